//! What clients were told, written down as it happens.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::log::DEFAULT;
use rolecache::proto::v1::{Commit, GetRoleResponse, Source};

/// What is told to a write that expected another role.
pub const MISMATCH: &str = "ROLE_MISMATCH";

/// Which server process: a replica's number and how often it was started before.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Process {
    pub replica: usize,
    pub start: usize,
}

/// One attempt of a write.
#[derive(Clone, Debug)]
pub struct Write {
    pub id: String,
    pub user: i64,
    pub role: String,
    /// The role that it is only to take the place of.
    pub expected: Option<String>,
    pub process: Process,
    pub begun: Duration,
    pub ended: Duration,
    pub told: Told,
}

/// What a writer was told.
#[derive(Clone, PartialEq, Debug)]
pub enum Told {
    Done {
        revision: i64,
        changed: bool,
    },
    /// Nothing was changed, the server says: its reason.
    Refused(String),
    /// Nobody knows.
    Unknown(String),
}

#[derive(Clone, Debug)]
pub struct Read {
    pub user: i64,
    pub process: Process,
    pub begun: Duration,
    pub ended: Duration,
    pub min_revision: i64,
    pub answer: Result<Answer, String>,
}

#[derive(Clone, Debug)]
pub struct Answer {
    pub role: String,
    pub revision: i64,
    pub source: Source,
    pub stale: bool,
}

impl Write {
    /// Whether it may take the place of this role; empty for none.
    pub fn expects(&self, old: &str) -> bool {
        let old = if old.is_empty() { DEFAULT } else { old };
        self.expected.as_deref().is_none_or(|expected| expected == old)
    }
}

impl From<GetRoleResponse> for Answer {
    fn from(answer: GetRoleResponse) -> Self {
        let source = answer.source();
        Self { role: answer.role, revision: answer.revision, source, stale: answer.stale }
    }
}

/// What one watcher saw over all its streams, each going on where the last one ended.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Where it began: everything after this is due.
    pub from: i64,
    pub commits: Vec<(Duration, Commit)>,
    /// A heartbeat's revision, and how many commits had come before it.
    pub heartbeats: Vec<(i64, usize)>,
    /// How often it had to open a stream.
    pub opened: usize,
    /// Reasons with which streams ended, of a watcher that is led by the hand.
    pub ends: Vec<String>,
}

/// A stream of a watcher that was refused, or that ended.
#[derive(Clone, Debug)]
pub struct End {
    pub process: Process,
    /// When it was asked for, or when its last message came.
    pub last: Duration,
    pub ended: Duration,
    pub was_open: bool,
    pub why: String,
}

/// Everything that clients were told.
pub struct History {
    origin: Instant,
    calls: AtomicU64,
    succeeded: AtomicU64,
    newest: AtomicI64,
    /// Writers who gave up before anybody said what became of their write.
    pub untold: Mutex<Vec<String>>,
    pub writes: Mutex<Vec<Write>>,
    pub reads: Mutex<Vec<Read>>,
    pub seen: Mutex<Vec<Seen>>,
    pub ends: Mutex<Vec<End>>,
}

// === impl History ===

impl History {
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
            calls: AtomicU64::new(0),
            succeeded: AtomicU64::new(0),
            newest: AtomicI64::new(0),
            untold: Mutex::default(),
            writes: Mutex::default(),
            reads: Mutex::default(),
            seen: Mutex::default(),
            ends: Mutex::default(),
        }
    }

    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// A moment on its clock.
    pub fn at(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.origin)
    }

    /// Somebody was told of a revision.
    pub fn told_of(&self, revision: i64) {
        self.newest.fetch_max(revision, Ordering::Relaxed);
    }

    /// The newest revision that anybody was told of.
    pub fn newest(&self) -> i64 {
        self.newest.load(Ordering::Relaxed)
    }

    pub fn wrote(&self, write: Write) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if let Told::Done { revision, .. } = write.told {
            self.told_of(revision);
        }
        let is_answer = matches!(&write.told, Told::Done { .. }) || write.told == Told::Refused(MISMATCH.into());
        self.succeeded.fetch_add(is_answer.into(), Ordering::Relaxed);
        self.writes.lock().unwrap().push(write);
    }

    pub fn read(&self, read: Read) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if let Ok(answer) = &read.answer {
            self.told_of(answer.revision);
        }
        self.succeeded.fetch_add(read.answer.is_ok().into(), Ordering::Relaxed);
        self.reads.lock().unwrap().push(read);
    }

    /// Calls that were answered, well or badly.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Those that got what they asked for.
    pub fn succeeded(&self) -> u64 {
        self.succeeded.load(Ordering::Relaxed)
    }
}
