//! Fills: one load per user at a time, and never an old role over a new one.
//!
//! The race that this file is about: a query reads a role, the role changes and the change is applied, then the query's
//! answer arrives. The rules that close it, in the order in which they act:
//!
//! 1. A fill is registered for its user before its query is sent.
//! 2. A commit marks the fills of the users it touches before it writes their entries ([`Fills::overtake`]).
//! 3. The query reads the role and the store's newest revision R in one statement.
//! 4. The fill waits until `applied` has reached R: an entry is never ahead of the cache.
//! 5. Still registered, it is put in unless a commit above R has marked it. Marked, it reads again.
//!
//! Queries of users who are missed together go out together.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinSet};

use super::{
    Filler, ReadError, RoleCache,
    map::{DashMap, Entry},
};
use crate::{
    failpoint,
    role::{Anchor, Revision, RoleName, UserId},
    step::{History, HistoryEnded},
    sync::{AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering, PoisonError, timeout},
};

/// Users who wait for a query at once; more are refused.
pub(super) const QUEUE: usize = 100_000;

/// Of these, places that only reads of one user get: few callers with many users each leave them to all others.
pub(super) const OF_SINGLE_READS: usize = QUEUE / 10;

/// Users in one query, and queries at once.
const BATCH: usize = 1_000;
const QUERIES: usize = 8;

/// Of a fill, all its queries and waits together: shorter than a read waits, which is to be told why.
const LIMIT: Duration = Duration::from_secs(4);

/// Of the wait for `applied`. A fill that waits longer is answered, but not kept.
const STEP_LIMIT: Duration = Duration::from_secs(1);

/// A moment in the order of all queries and reads: a read takes one when it begins, a fill when it sends a query.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Ticket(u64);

/// One user's load.
pub(super) struct Fill {
    user: UserId,
    /// Of the query; 0 until it is sent.
    sent: AtomicU64,
    /// The newest commit that touched the user since the query was sent. Locked while the role is put in, so that a
    /// commit marks either before that, and is seen, or after it, and then writes over it.
    overtaken: Mutex<Revision>,
    done: watch::Sender<Option<Result<Filled, ReadError>>>,
}

/// What a fill found. True as of `revision`, which may be ahead of `applied` where it was not kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Filled {
    pub(super) role: RoleName,
    pub(super) revision: Revision,
    /// The head that it was read at, where nobody has compared that with what was applied.
    pub(super) unkept: Option<Anchor>,
}

/// The fills that run now.
#[derive(Default)]
pub(super) struct Fills {
    running: DashMap<UserId, Arc<Fill>>,
    count: AtomicUsize,
    tickets: AtomicU64,
}

/// A reader's part in a fill.
pub(super) enum Joined {
    /// It began the fill, and has to queue it.
    Began(Arc<Fill>),
    /// Somebody's fill that is fresh enough for it.
    Waits(Arc<Fill>),
    /// Somebody's fill that may have read too early for it: it has to end first.
    TooOld(Arc<Fill>),
}

// === impl Fills ===

impl Fills {
    pub(super) fn ticket(&self) -> Ticket {
        Ticket(self.tickets.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Begins or joins the fill of a user. With a ticket, only a fill will do whose query is sent after it was taken.
    pub(super) fn join(&self, user: UserId, after: Option<Ticket>) -> Joined {
        match self.running.entry(user) {
            Entry::Vacant(place) => {
                let fill = Arc::new(Fill {
                    user,
                    sent: AtomicU64::new(0),
                    overtaken: Mutex::default(),
                    done: watch::Sender::new(None),
                });
                self.count.fetch_add(1, Ordering::SeqCst);
                place.insert(fill.clone());
                Joined::Began(fill)
            }
            Entry::Occupied(fill) => {
                let fill = fill.get().clone();
                if fill.is_fresh(after) { Joined::Waits(fill) } else { Joined::TooOld(fill) }
            }
        }
    }

    /// Marks the fill of a user, if there is one, as overtaken by a commit.
    pub(super) fn overtake(&self, user: UserId, by: Revision) {
        // A fill that registers after this look sends its query after it, and sees the commit that is being applied.
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        let fill = self.running.get(&user).map(|fill| fill.clone());
        if let Some(fill) = fill {
            let mut overtaken = fill.overtaken();
            *overtaken = by.max(*overtaken);
        }
    }

    /// Marks every fill: what its query found is of a history that has ended.
    pub(super) fn overtake_all(&self) {
        let fills: Vec<_> = self.running.iter().map(|fill| fill.clone()).collect();
        for fill in fills {
            *fill.overtaken() = Revision(i64::MAX);
        }
    }

    /// Ends a fill with its outcome.
    pub(super) fn finish(&self, fill: &Arc<Fill>, outcome: Result<Filled, ReadError>) {
        if self.running.remove_if(&fill.user, |_, running| Arc::ptr_eq(running, fill)).is_some() {
            self.count.fetch_sub(1, Ordering::SeqCst);
        }
        fill.done.send_replace(Some(outcome));
    }
}

// === impl Fill ===

impl Fill {
    /// Waits for the outcome.
    pub(super) async fn outcome(&self) -> Result<Filled, ReadError> {
        let mut done = self.done.subscribe();
        match done.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().expect("waited for"),
            Err(_) => unreachable!("the sender is in the fill itself"),
        }
    }

    fn is_fresh(&self, after: Option<Ticket>) -> bool {
        let sent = self.sent.load(Ordering::SeqCst);
        // Nobody joins an overtaken one: its query is from before a commit that the reader may know of.
        *self.overtaken() == Revision(0) && after.is_none_or(|after| sent == 0 || sent > after.0)
    }

    /// A query is about to be sent: it sees all that has been applied, so no mark from before counts.
    fn send(&self, ticket: Ticket) {
        let mut overtaken = self.overtaken();
        self.sent.store(ticket.0, Ordering::SeqCst);
        *overtaken = Revision(0);
    }

    fn overtaken(&self) -> MutexGuard<'_, Revision> {
        self.overtaken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Filler ===

impl Filler {
    /// Runs the queries of all fills. Never returns.
    pub async fn run(mut self) -> Infallible {
        let mut queries = JoinSet::new();
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                _ = self.queue.recv_many(&mut batch, BATCH), if queries.len() < QUERIES => {
                    failpoint::kill!("filler::task");
                    let (cache, fills) = (self.cache.clone(), std::mem::take(&mut batch));
                    queries.spawn(async move { cache.fill(fills).await });
                }
                Some(ended) = queries.join_next() => {
                    if let Err(panic) = ended {
                        std::panic::resume_unwind(panic.into_panic());
                    }
                }
            }
        }
    }
}

impl RoleCache {
    /// Runs fills to their end, all with one query at a time.
    pub(super) async fn fill(&self, fills: Vec<Arc<Fill>>) {
        let mut running: HashMap<UserId, Arc<Fill>> = fills.into_iter().map(|fill| (fill.user, fill)).collect();
        let ran = timeout(LIMIT, async {
            while !running.is_empty() {
                self.ask(&mut running).await?;
            }
            Ok(())
        });
        let error = match ran.await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => ReadError::silent(),
        };
        for fill in running.values() {
            self.fills.finish(fill, Err(error.clone()));
        }
    }

    /// One query for all of `running`, less those that it finishes.
    async fn ask(&self, running: &mut HashMap<UserId, Arc<Fill>>) -> Result<(), ReadError> {
        // The history may be about to begin: then it is waited for, and what was applied in the one before means nothing.
        let (history, place) = (self.step.history(), self.step.place());
        let ticket = self.fills.ticket();
        let users: Vec<UserId> = running.keys().copied().collect();
        for fill in running.values() {
            fill.send(ticket);
        }
        self.counters.store_reads.fetch_add(users.len() as u64, Ordering::Relaxed);
        let found = self.store.roles(&users).await?;
        let revision = found.head.revision;
        self.step.nudge();
        if place.history == history && revision < place.applied.revision {
            // The store has forgotten commits. The tailer, nudged, finds out what happened and begins a new history.
            let _ = timeout(STEP_LIMIT, self.step.reach_in(history, Revision(i64::MAX))).await;
            return Ok(());
        }
        let limit = if self.is_far_behind() { Duration::ZERO } else { STEP_LIMIT };
        let reached = match timeout(limit, self.step.reach_in(history, revision)).await {
            Ok(Ok(())) => true,
            Ok(Err(HistoryEnded)) => return Ok(()),
            Err(_) => false,
        };
        if reached && self.step.has(found.head) != Some(true) {
            // Of a store that has gone back in time, or so long passed that nobody can tell.
            let _ = timeout(STEP_LIMIT, self.step.found_anew(history)).await;
            return Ok(());
        }
        for (user, role) in users.into_iter().zip(found.roles) {
            let fill = &running[&user];
            let filled = match reached {
                true => self.keep(fill, role, revision, history),
                false => Some(Filled { role, revision, unkept: Some(found.head) }),
            };
            if let Some(filled) = filled {
                self.fills.finish(fill, Ok(filled));
                running.remove(&user);
            }
        }
        Ok(())
    }

    /// Puts a role in that was read at `revision`, which is applied; None if a later commit has touched the user, or
    /// the history has ended.
    fn keep(&self, fill: &Fill, role: RoleName, revision: Revision, history: History) -> Option<Filled> {
        // Loaded before the mark is looked at: a commit marks first and is applied last, so that a role without a mark
        // is true as of this revision.
        let applied = self.step.applied();
        let overtaken = fill.overtaken();
        // A reset marks every fill, but this one may have sent its query after that; a new history begins before it.
        let spoiled = *overtaken > revision || self.step.history() != history;
        if spoiled && !failpoint::is_on!("bug::fill_unchecked") {
            return None;
        }
        let complete = self.completeness.number().is_some();
        match self.names.intern(&role) {
            // A complete cache has its entry, or needs none.
            Ok(_) if complete => {}
            Ok(id) => self.put_in(fill.user, id),
            Err(reason) => tracing::debug!(user_id = fill.user.0, %reason, "a role is not kept in memory"),
        }
        Some(Filled { role, revision: applied.max(revision), unkept: None })
    }
}
