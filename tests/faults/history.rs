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

/// What is told to a transfer from one who is no admin.
pub const NO_ADMIN: &str = "NOT_AN_ADMIN";

/// Reasons that are answers: what is in the store is not what the write is for.
pub const DECLINES: [&str; 2] = [MISMATCH, NO_ADMIN];

/// Which server process: a replica's number and how often it was started before.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Process {
    pub replica: usize,
    pub start: usize,
}

impl Process {
    /// Of an answer that one of two gave.
    pub const NEITHER: Self = Self { replica: usize::MAX, start: 0 };
}

/// One attempt of a write.
#[derive(Clone, Debug)]
pub struct Write {
    pub id: String,
    pub user: i64,
    /// Empty where the user is deleted.
    pub role: String,
    /// The role that it is only to take the place of.
    pub expected: Option<String>,
    /// Of a transfer.
    pub giver: Option<Giver>,
    pub process: Process,
    pub begun: Duration,
    pub ended: Duration,
    pub told: Told,
}

/// The admin whom a transfer comes from.
#[derive(Clone, Copy, Debug)]
pub struct Giver {
    pub user: i64,
    /// Who is none any more afterwards.
    pub demoted: bool,
}

/// What a writer was told.
#[derive(Clone, PartialEq, Debug)]
pub enum Told {
    Done {
        revision: i64,
        changed: bool,
    },
    /// Nothing was changed, for what is in the store is not what it is for.
    Declined {
        why: String,
        /// The role that is said to be there.
        current: String,
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
    /// One that has not begun.
    pub fn of(id: &str, user: i64, role: &str) -> Self {
        Self {
            id: id.to_owned(),
            user,
            role: role.to_owned(),
            expected: None,
            giver: None,
            process: Process { replica: 0, start: 0 },
            begun: Duration::ZERO,
            ended: Duration::ZERO,
            told: Told::Unknown(String::new()),
        }
    }

    /// How many changes the log may have of it.
    pub fn changes(&self) -> usize {
        1 + usize::from(self.giver.is_some_and(|giver| giver.demoted))
    }

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
    /// What it began with, where it asked for that.
    pub snapshot: Option<Snapshot>,
    /// Where a stream did not go on from the token of the one before.
    pub started_over: Vec<i64>,
    /// A heartbeat's revision, and how many commits had come before it.
    pub heartbeats: Vec<(i64, usize)>,
    /// How often it had to open a stream.
    pub opened: usize,
    /// Reasons with which streams ended, of a watcher that is led by the hand.
    pub ends: Vec<String>,
}

/// All users with a role other than the default, at a revision.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub revision: i64,
    pub users: Vec<(i64, String)>,
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
        let is_answer = matches!(&write.told, Told::Done { .. } | Told::Declined { .. });
        self.succeeded.fetch_add(is_answer.into(), Ordering::Relaxed);
        self.writes.lock().unwrap().push(write);
    }

    pub fn read(&self, read: Read) {
        self.read_together(vec![read]);
    }

    /// What one call was told, of at least one user.
    pub fn read_together(&self, reads: Vec<Read>) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let is_answer = reads.iter().all(|read| read.answer.is_ok());
        self.succeeded.fetch_add(is_answer.into(), Ordering::Relaxed);
        reads.iter().filter_map(|read| read.answer.as_ref().ok()).for_each(|answer| self.told_of(answer.revision));
        self.reads.lock().unwrap().extend(reads);
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
