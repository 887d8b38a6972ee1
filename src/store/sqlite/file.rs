//! Which file a path names: open connections keep a file that was replaced or removed under its name.

use std::{
    ffi::OsString,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A file and its write-ahead log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    file: (u64, u64),
    wal: Option<(u64, u64)>,
}

impl Identity {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { file: number(path)?, wal: number(&beside(path, "-wal")).ok() })
    }

    pub(super) fn is_file_of(&self, other: &Self) -> bool {
        self.file == other.file
    }

    /// Asked of every new connection before it reads: one that opened a file which took our name, and the write-ahead log of
    /// ours, which stands there still, would play the one into the other.
    pub(super) async fn must_be_at(self, path: &Path) -> Result<(), sqlx::Error> {
        let path = path.to_owned();
        let now = tokio::task::spawn_blocking(move || Self::of(&path)).await.map_err(io::Error::other)??;
        match now.is_file_of(&self) {
            true => Ok(()),
            false => Err(sqlx::Error::Io(io::Error::other("the database file was replaced"))),
        }
    }

    /// Removes the write-ahead log of a file that is no longer at `path`: SQLite would play it into the one that is now.
    pub(super) fn remove_old_wal(&self, path: &Path) {
        let wal = beside(path, "-wal");
        if self.wal.is_some() && number(&wal).ok() == self.wal {
            for left in [wal, beside(path, "-shm")] {
                if let Err(error) = std::fs::remove_file(&left) {
                    tracing::warn!(%error, file = %left.display(), "remove what the replaced file left");
                }
            }
        }
    }
}

/// Absent or without contents.
pub(super) fn is_empty(path: &Path) -> bool {
    std::fs::metadata(path).map_or(true, |found| found.len() == 0)
}

fn number(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::metadata(path)?;
    Ok((found.dev(), found.ino()))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}
