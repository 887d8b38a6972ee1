//! The cache: which role each user has, as of the last applied commit.
//!
//! Every entry is the store's state at `applied`, or at the one commit that is being applied just now. Entries come
//! from commits ([`RoleCache::apply`], called by the tailer alone) and, in lazy mode, from fills on a miss.
//! No entry has a time and nothing is swept; only the self-check looks at them, every few minutes.

mod check;
mod entries;
mod fill;
mod floor;
mod load;
mod map;
mod miss;
mod names;
mod read;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use tokio::sync::{Notify, Semaphore, mpsc};

pub use self::names::NotKept;
pub use self::read::{Answer, Answers, Query, ReadError, Source};
use self::{
    check::Marks,
    entries::Entries,
    fill::{Fill, Fills},
    floor::Floor,
    names::{Names, RoleId},
};
use crate::{
    failpoint,
    role::{Commit, RoleName, UserId},
    step::Step,
    store::Store,
    sync::{AtomicU64, Mutex, Ordering, PoisonError},
};

/// How the cache is filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// By misses and by commits, up to `capacity` users.
    Lazy { capacity: Option<usize> },
    /// At start, with every user whose role is not the default; from then on absence means the default role.
    Complete,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub mode: Mode,
    /// How long answers may be served without proof, marked stale.
    pub max_staleness: Duration,
    /// Reads from the store at once while the cache cannot answer as truth.
    pub fallback_reads: usize,
    /// A commit of more changes updates, in lazy mode, only the users that are held.
    pub oversized: u64,
}

/// The roles of users, in memory.
pub struct RoleCache {
    options: Options,
    store: Arc<dyn Store>,
    step: Step,
    default_role: RoleName,
    default_id: RoleId,
    names: Names,
    entries: Entries,
    fills: Fills,
    marks: Marks,
    queue: mpsc::Sender<Arc<Fill>>,
    fallback: Semaphore,
    completeness: Completeness,
    floor: Floor,
    counters: Counters,
}

/// What the cache has done since it started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    pub hits: u64,
    pub misses: u64,
    pub users: u64,
    pub bytes: u64,
    pub changes_applied: u64,
    pub store_reads: u64,
    pub coalesced_misses: u64,
    pub stale_answers: u64,
    /// Users whom a self-check found with another role than the store's.
    pub mismatches: u64,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    changes_applied: AtomicU64,
    store_reads: AtomicU64,
    coalesced_misses: AtomicU64,
    stale_answers: AtomicU64,
    mismatches: AtomicU64,
}

/// Whether absence from the table means the default role.
///
/// An even number says no, an odd one yes, and none comes twice: a reader who finds the same odd number before and after
/// it looked into the table knows that the table was complete all the while.
struct Completeness {
    state: AtomicU64,
    /// Held while entries go because completeness ends or makes them needless, and while a load puts entries in: a load
    /// that has been overtaken by a reset would fill the table with roles of another history, and one that comes after
    /// it would take a user whose entry just went for one whom no commit has touched.
    moving: Mutex<()>,
    lost: Notify,
}

/// The task that runs the queries of misses.
pub struct Filler {
    cache: Arc<RoleCache>,
    queue: mpsc::Receiver<Arc<Fill>>,
}

/// A cache over `store`, and the task that fills it.
pub fn cache(options: Options, store: Arc<dyn Store>, step: Step) -> (Arc<RoleCache>, Filler) {
    let names = Names::new();
    let default_role = store.facts().default_role.clone();
    let default_id = names.intern(&default_role).expect("the default role is configured, and so at most 64 bytes long");
    let capacity = match options.mode {
        Mode::Lazy { capacity } => capacity,
        Mode::Complete => None,
    };
    let (sender, queue) = mpsc::channel(fill::QUEUE);
    let cache = Arc::new(RoleCache {
        fallback: Semaphore::new(options.fallback_reads),
        options,
        store,
        step,
        default_role,
        default_id,
        names,
        entries: Entries::new(capacity),
        fills: Fills::default(),
        marks: Marks::default(),
        queue: sender,
        completeness: Completeness { state: AtomicU64::new(0), moving: Mutex::new(()), lost: Notify::new() },
        floor: Floor::default(),
        counters: Counters::default(),
    });
    (cache.clone(), Filler { cache, queue })
}

// === impl RoleCache ===

impl RoleCache {
    /// Takes in a commit, or the next run of one. Called by the tailer alone, in order of revision.
    pub fn apply(&self, commit: &Commit) {
        // Fills first: one that finishes from now on, with a value from before this commit, reads again.
        for change in &commit.changes {
            self.fills.overtake(change.user, commit.revision);
            self.marks.overtake(change.user, commit.revision);
        }
        let complete = self.completeness.number().is_some();
        let held_only = self.options.mode != Mode::Complete && commit.size > self.options.oversized;
        for change in &commit.changes {
            if held_only && self.entries.get(change.user).is_none() {
                continue;
            }
            if failpoint::is_on!("bug::swallowed_apply") {
                continue;
            }
            let role = change.new.as_ref().unwrap_or(&self.default_role);
            match self.names.intern(role) {
                Ok(id) if complete && id == self.default_id => self.entries.remove(change.user),
                Ok(id) => self.put_in(change.user, id),
                Err(reason) => {
                    tracing::warn!(
                        user_id = change.user.0,
                        revision = commit.revision.0,
                        %reason,
                        "a role is not kept in memory: this user is read from the store"
                    );
                    self.completeness.lose(|| self.entries.remove(change.user));
                }
            }
        }
        #[cfg(feature = "failpoints")]
        if let Some(entry) = failpoint::told!("cache::corrupt") {
            self.corrupt(&entry);
        }
        self.counters.changes_applied.fetch_add(commit.changes.len() as u64, Ordering::Relaxed);
    }

    /// A bug for tests: `USER:ROLE` puts a wrong role in, `USER:` takes an entry out.
    #[cfg(feature = "failpoints")]
    fn corrupt(&self, entry: &str) {
        let Some((user, role)) = entry.split_once(':') else { return };
        let Ok(user) = user.parse().map(UserId) else { return };
        match self.names.intern(&RoleName::held(role)) {
            Ok(id) if !role.is_empty() => self.entries.insert(user, id),
            _ => self.entries.remove(user),
        }
    }

    /// Puts an entry in. Where the cache was complete before it came and absence says the same, it goes again: a load
    /// that ends beside this has looked for such entries already.
    fn put_in(&self, user: UserId, role: RoleId) {
        self.entries.insert(user, role);
        if role == self.default_id {
            self.completeness.while_complete(|| self.entries.remove_if(user, role));
        }
    }

    /// Forgets everything: what is applied from now on is of another history, or what is held was found to be wrong. Of
    /// a complete cache the load begins anew. Harmless beside a commit: what that puts in is true, and what it takes out
    /// is in the store already, which the load has yet to ask.
    pub fn reset(&self) {
        self.fills.overtake_all();
        self.marks.overtake_all();
        self.completeness.lose(|| self.entries.clear());
    }

    /// Whether reads find what they need here: always in lazy mode, after the load in complete mode.
    pub fn is_loaded(&self) -> bool {
        self.options.mode != Mode::Complete || self.completeness.number().is_some()
    }

    pub fn max_staleness(&self) -> Duration {
        self.options.max_staleness
    }

    pub fn stats(&self) -> Stats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            hits: of(&self.counters.hits),
            misses: of(&self.counters.misses),
            users: self.entries.len() as u64,
            bytes: self.entries.bytes() as u64,
            changes_applied: of(&self.counters.changes_applied),
            store_reads: of(&self.counters.store_reads),
            coalesced_misses: of(&self.counters.coalesced_misses),
            stale_answers: of(&self.counters.stale_answers),
            mismatches: of(&self.counters.mismatches),
        }
    }
}

// === impl Completeness ===

impl Completeness {
    /// The number of the present completeness; None where absence means nothing.
    fn number(&self) -> Option<u64> {
        let state = self.state.load(Ordering::SeqCst);
        (state % 2 == 1).then_some(state)
    }

    /// The number of the present incompleteness, for [`Completeness::gain`].
    fn before_load(&self) -> u64 {
        self.state.load(Ordering::SeqCst)
    }

    /// Lets a load that began at `before` put entries in; None if completeness was lost again since.
    fn unless_lost(&self, before: u64, put_in: impl FnOnce()) -> Option<()> {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        (self.state.load(Ordering::SeqCst) == before).then(put_in)
    }

    /// Complete, unless completeness was lost again since `before`.
    fn gain(&self, before: u64) -> Option<()> {
        debug_assert!(before.is_multiple_of(2));
        self.state.compare_exchange(before, before + 1, Ordering::SeqCst, Ordering::SeqCst).ok().map(drop)
    }

    /// Takes out what absence says as well, unless it does not: then no entry may go, for a load may be about to put an
    /// older one in its place.
    fn while_complete(&self, take_out: impl FnOnce()) {
        if self.number().is_none() {
            return;
        }
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        if self.number().is_some() {
            take_out();
        }
    }

    /// Ends completeness, and any load that runs now, and then takes entries out: absence must not be taken for the
    /// default role before.
    fn lose(&self, take_out: impl FnOnce()) {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let next = |state: u64| Some((state | 1) + 1);
        let _ = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
        take_out();
        self.lost.notify_one();
    }
}
