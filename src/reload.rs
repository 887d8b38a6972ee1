//! Files that are read again when they change: certificates, keys, credentials.
//!
//! They are looked at time and again, by content: what notifies of changes misses those that a link or a mounted volume
//! brings. What is new counts once it was found twice the same, so that a file that is being written is not taken half.

use std::{convert::Infallible, io::Read, path::PathBuf, time::Duration};

use tokio::{task::spawn_blocking, time::sleep};

/// Of one file: more is none of ours.
const MOST_BYTES: u64 = 1 << 20;

/// Looks one after the other that find the files changed: they are not being written, they never stop to be.
const UNSTEADY: u32 = 20;

/// Files that make one thing together.
#[derive(Clone, Debug)]
pub struct Files {
    /// What the log calls them.
    pub what: &'static str,
    pub paths: Vec<PathBuf>,
}

/// The contents of [`Files`], in their order.
pub type Contents = Vec<Vec<u8>>;

// === impl Files ===

impl Files {
    /// Reads them all; a sentence where one cannot be read.
    pub fn read(&self) -> Result<Contents, String> {
        self.paths.iter().map(read).collect()
    }

    /// Looks at the files every `interval`, and calls `take` with each new state of them, `known` being the one that is in
    /// use. What `take` refuses, and what cannot be read, leaves the one in use and is said in the log, once. Never returns.
    pub async fn keep_read(
        self,
        interval: Duration,
        known: Contents,
        take: impl Fn(&Contents) -> Result<(), String> + Send,
    ) -> Infallible {
        let mut in_use = Ok(known);
        let mut last = in_use.clone();
        let mut unsteady = 0;
        loop {
            sleep(interval).await;
            let files = self.clone();
            let found = match spawn_blocking(move || files.read()).await {
                Ok(found) => found,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            };
            if found == last && found != in_use {
                match found.clone().and_then(|contents| take(&contents)) {
                    Ok(()) => tracing::info!("{}: read again", self.what),
                    Err(problem) => tracing::error!(problem, "{}: what was read before stays in use", self.what),
                }
                in_use = found.clone();
            }
            unsteady = if found == last { 0 } else { unsteady + 1 };
            if unsteady == UNSTEADY {
                tracing::error!("{}: each look finds another content; what was read before stays in use", self.what);
            }
            last = found;
        }
    }
}

fn read(path: &PathBuf) -> Result<Vec<u8>, String> {
    let mut contents = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut contents));
    match read {
        Ok(_) if contents.len() as u64 > MOST_BYTES => Err(format!("{} is larger than 1 MiB", path.display())),
        Ok(_) => Ok(contents),
        Err(error) => Err(format!("{} cannot be read: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, time::Duration};

    use super::*;

    const INTERVAL: Duration = Duration::from_millis(50);

    #[tokio::test(flavor = "multi_thread")]
    async fn what_changes_is_taken_and_what_is_broken_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = ["one", "two"].map(|name| directory.path().join(name)).into();
        let files = Files { what: "test files", paths: paths.clone() };
        assert!(files.read().unwrap_err().contains("one cannot be read"));
        paths.iter().for_each(|path| fs::write(path, "1").unwrap());
        let known = files.read().unwrap();
        let (taken, seen) = mpsc::channel();
        let take = move |contents: &Contents| {
            taken.send(contents.concat()).unwrap();
            if contents[0] == b"broken" { Err("broken".to_owned()) } else { Ok(()) }
        };
        let task = tokio::spawn(files.keep_read(INTERVAL, known, take));
        let next = || seen.recv_timeout(Duration::from_secs(20)).unwrap();
        let next = || tokio::task::block_in_place(next);
        for (text, expected) in [("2", "21"), ("broken", "broken1"), ("3", "31"), ("2", "21")] {
            fs::write(&paths[0], text).unwrap();
            assert_eq!(next(), expected.as_bytes());
        }
        // Away for a while: what was there stays in use, whether or not anybody noticed.
        fs::remove_file(&paths[0]).unwrap();
        fs::write(&paths[0], "4").unwrap();
        assert_eq!(next(), b"41");
        task.abort();
    }
}
