//! One server process at a time holds a file: an advisory lock beside it, which the kernel lets go when we die.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use fs4::{FileExt, TryLockError};

/// Held as long as the store is open. Beside the file and not in it: SQLite's own locks on a file go when any handle of the
/// process on that file is closed.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    _file: File,
}

#[derive(Debug)]
pub(super) enum LockError {
    Held,
    Io(io::Error),
}

impl Lock {
    pub(super) fn path_for(database: &Path) -> PathBuf {
        let mut path = database.as_os_str().to_owned();
        path.push(".lock");
        path.into()
    }

    pub(super) fn take(database: &Path) -> Result<Self, LockError> {
        let path = Self::path_for(database);
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
            match FileExt::try_lock(&file) {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(LockError::Held),
                Err(TryLockError::Error(error)) => return Err(LockError::Io(error)),
            }
            // Between our open and our lock the one before us may have removed the file: then nobody else would meet this lock.
            let ours = file.metadata()?.ino();
            if std::fs::metadata(&path).is_ok_and(|now| now.ino() == ours) {
                return Ok(Self { path, _file: file });
            }
        }
    }

    /// Lets go and leaves nothing behind. Removed while still held, so that whoever waits at the old file notices.
    pub(super) fn release(self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, "remove the lock file");
        }
    }
}

impl From<io::Error> for LockError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
