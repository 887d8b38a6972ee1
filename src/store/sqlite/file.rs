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
    /// late as at the first read or write, after our last look maybe. Asked before the connections close.
    pub(super) fn with_open_wal(self, path: &Path) -> Self {
        let at_path = number(&beside(path, "-wal")).ok();
        let open = std::fs::read_dir("/dev/fd").into_iter().flatten().flatten();
        let is_open = at_path.is_some() && open.into_iter().any(|file| number(&file.path()).ok() == at_path);
        if is_open { Self { wal: at_path, ..self } } else { self }
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
        thread::Builder::new().name("rolecache-file".to_owned()).spawn(move || looking.run())?;
        Ok(Arc::new(Self { shared }))
    }

    /// What the path names, by a look that began after this call. Waits as long as the disk does.
    pub(super) async fn look(&self) -> io::Result<Identity> {
        let (tell, told) = oneshot::channel();
        {
            let mut asked = self.shared.lock();
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
