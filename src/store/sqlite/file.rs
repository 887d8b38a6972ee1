//! Which file a path names: open connections keep a file that was replaced or removed under its name.
//!
//! Nothing here runs on the runtime's own threads, for those of a frozen disk would keep it from ever ending.

use std::{
    ffi::OsString,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use tokio::sync::oneshot;

/// A file and its write-ahead log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    file: (u64, u64),
    wal: Option<(u64, u64)>,
}

/// Looks at one path, on one thread, however many ask and however long the disk takes.
pub(super) struct Looker {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    asked: Mutex<Asked>,
    changed: Condvar,
}

#[derive(Default)]
struct Asked {
    waiting: Vec<oneshot::Sender<io::Result<Identity>>>,
    over: bool,
}

// === impl Identity ===

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { file: number(path)?, wal: number(&beside(path, "-wal")).ok() })
    }

    /// The same, without a write-ahead log that may be removed.
    pub(super) fn without_wal(self) -> Self {
        Self { wal: None, ..self }
    }

    pub(super) fn is_file_of(&self, other: &Self) -> bool {
        self.file == other.file
    }

    /// The same, with the write-ahead log at `path` where that is the one which this process has open: SQLite makes it as
    /// late as at the first read or write, after our last look maybe. Without one where it is another's. Asked before the
    /// connections close: as soon as they are, a new file may get the number of a log that was removed.
    pub(super) fn with_open_wal(self, path: &Path) -> Self {
        let at_path = number(&beside(path, "-wal")).ok();
        let mut open = std::fs::read_dir("/dev/fd").into_iter().flatten().flatten();
        let is_ours =
            at_path.is_some() && (at_path == self.wal || open.any(|file| number(&file.path()).ok() == at_path));
        Self { wal: at_path.filter(|_| is_ours), ..self }
    }

    /// Removes the write-ahead log of a file that is no longer at `path`: SQLite would play it into the one that is now.
    pub(super) fn remove_old_wal(&self, path: &Path) {
        let wal = beside(path, "-wal");
        // Back again: the log beside it is its own.
        if number(path).is_ok_and(|file| file == self.file) {
            return;
        }
        if self.wal.is_some() && number(&wal).ok() == self.wal {
            for left in [wal, beside(path, "-shm")] {
                if let Err(error) = std::fs::remove_file(&left) {
                    tracing::warn!(%error, file = %left.display(), "remove what the replaced file left");
                }
            }
        }
    }
}

// === impl Looker ===

impl Looker {
    pub(super) fn start(path: PathBuf) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared { path, asked: Mutex::default(), changed: Condvar::new() });
        let looking = shared.clone();
        thread::Builder::new().name("rolecache-file".to_owned()).spawn(move || {
            let _over = Over(&looking);
            looking.run();
        })?;
        Ok(Arc::new(Self { shared }))
    }

    /// What the path names, by a look that began after this call. Waits as long as the disk does.
    pub(super) async fn look(&self) -> io::Result<Identity> {
        let (tell, told) = oneshot::channel();
        {
            let mut asked = self.shared.lock();
            if asked.over {
                return Err(io::Error::other("nobody looks at the file any more"));
            }
            asked.waiting.retain(|waiting| !waiting.is_closed());
            asked.waiting.push(tell);
        }
        self.shared.changed.notify_one();
        told.await.unwrap_or_else(|_| Err(io::Error::other("nobody looks at the file any more")))
    }

    /// Asked of every new connection before it reads: one that opened a file which took our name, and the write-ahead log of
    /// ours, which stands there still, would play the one into the other.
    pub(super) async fn must_find(&self, identity: Identity) -> io::Result<()> {
        match self.look().await?.is_file_of(&identity) {
            true => Ok(()),
            false => Err(io::Error::other("the database file was replaced")),
        }
    }
}

/// The end of the thread that looks: whoever waits for it is told.
struct Over<'a>(&'a Shared);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let mut asked = self.0.lock();
        asked.over = true;
        asked.waiting.clear();
    }
}

impl Drop for Looker {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_one();
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let mut asked = self.lock();
            while asked.waiting.is_empty() && !asked.over {
                asked = self.changed.wait(asked).unwrap_or_else(PoisonError::into_inner);
            }
            if asked.over {
                return;
            }
            let waiting = std::mem::take(&mut asked.waiting);
            // Whoever asks from here on is told by the next look.
            drop(asked);
            let found = Identity::of(&self.path);
            for waiting in waiting {
                let copy = found.as_ref().copied().map_err(|error| io::Error::new(error.kind(), error.to_string()));
                let _ = waiting.send(copy);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does `work` on a thread of its own, for which nothing waits at the end.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (tell, told) = oneshot::channel();
    thread::Builder::new().name("rolecache-file".to_owned()).spawn(move || {
        let _ = tell.send(work());
    })?;
    told.await.map_err(io::Error::other)
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_a_log_that_is_still_at_the_path_is_removed_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, wal) = (dir.path().join("a.db"), dir.path().join("a.db-wal"));
        let look = || {
            fs::write(&path, "file").unwrap();
            fs::write(&wal, "log").unwrap();
            (Identity::of(&path).unwrap(), fs::File::open(&path).unwrap(), fs::File::open(&wal).unwrap())
        };
        let replace = || {
            fs::remove_file(&path).unwrap();
            fs::write(&path, "another file").unwrap();
        };

        let (old, open_file, open_log) = look();
        replace();
        let noted = old.with_open_wal(&path);
        drop((open_file, open_log));
        noted.remove_old_wal(&path);
        assert!(!wal.exists(), "the old log would be played into the new file");

        // Removed together with the file: the number of the log is free once the connections are closed.
        let (old, open_file, open_log) = look();
        fs::remove_file(&wal).unwrap();
        replace();
        let noted = old.with_open_wal(&path);
        assert_eq!(noted, old.without_wal());
        drop((open_file, open_log));
        fs::write(&wal, "what another program has committed since").unwrap();
        noted.remove_old_wal(&path);
        assert!(wal.exists(), "another program's commits are gone");
    }
}
