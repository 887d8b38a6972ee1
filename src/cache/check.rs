//! The self-check: now and then the cache is compared with its store, so that a bug in it does not live on.
//!
//! Roles change while they are compared, and the same rules as of a fill tell a difference from a race: users are marked,
//! then one query reads their roles and the head R, then `applied` reaches R. Who was touched by a commit above R is
//! passed over; of everybody else the entry is the role at R, or wrong.

use std::{convert::Infallible, panic, sync::Arc, time::Duration};

use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{Mode, RoleCache, entries::random_below, map::DashMap};
use crate::{
    role::{Revision, RoleName, UserId},
    step::{History, HistoryEnded},
    store::StoreError,
    sync::{AtomicBool, Ordering},
};

/// Users in one query, of which there is one at a time. Also the sample of a lazy cache: no more for the store than one
/// moment of many misses, and a bug that spoils one entry in a hundred is as good as found by the first check.
const BATCH: usize = 1_000;

/// Of the wait for `applied` and its proof.
const STEP_LIMIT: Duration = Duration::from_secs(5);

/// Differences that are told one by one.
const TOLD: u64 = 10;

/// The users who are being compared, each with the newest commit that has touched it since.
#[derive(Default)]
pub(super) struct Marks {
    pub(super) marks: DashMap<UserId, Revision>,
    /// Whether there may be any: nearly never.
    is_checking: AtomicBool,
}

/// Takes the marks away.
struct Marked<'a>(&'a Marks);

/// Why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    History(#[from] HistoryEnded),
    #[error("the change log was not caught up with in {} s", STEP_LIMIT.as_secs())]
    Behind,
    #[error("not all roles are loaded")]
    NotLoaded,
}

impl RoleCache {
    /// Compares the cache with its store, each `interval` or so: replicas that started together do not all ask at once.
    /// Never returns.
    pub async fn keep_checked(self: Arc<Self>, interval: Duration) -> Infallible {
        loop {
            let jitter = random_below(interval.as_millis() as usize / 2 + 1);
            sleep(interval * 3 / 4 + Duration::from_millis(jitter as u64)).await;
            if let Err(reason) = self.check().await {
                tracing::warn!(%reason, "the cache was not compared with the store");
            }
        }
    }

    /// Compares once, and starts the cache anew where it differs. One at a time.
    pub(super) async fn check(self: &Arc<Self>) -> Result<(), CheckError> {
        let users = match self.options.mode {
            Mode::Lazy { .. } => aside(self, |cache| cache.entries.sample(BATCH)).await,
            Mode::Complete => self.suspects().await?,
        };
        let mut found = 0;
        for batch in users.chunks(BATCH) {
            found += self.compare(batch).await?;
            if found > 0 {
                let mismatches = self.counters.mismatches.load(Ordering::Relaxed);
                tracing::error!(found, mismatches, "the cache differs from the store: it starts anew");
                self.reset();
                break;
            }
        }
        tracing::debug!(users = users.len(), "the cache was compared with the store");
        Ok(())
    }

    /// Of a complete cache, everybody who differs from one snapshot of the store: by a commit since, or by a bug.
    async fn suspects(self: &Arc<Self>) -> Result<Vec<UserId>, CheckError> {
        let complete = self.completeness.number().ok_or(CheckError::NotLoaded)?;
        let mut held = aside(self, |cache| cache.entries.users_in_order()).await.into_iter().peekable();
        let mut snapshot = self.store.snapshot().await?;
        let mut suspects = Vec::new();
        loop {
            let rows = snapshot.next().await?;
            if self.completeness.number() != Some(complete) {
                return Err(CheckError::NotLoaded);
            }
            if rows.is_empty() {
                suspects.extend(held);
                return Ok(suspects);
            }
            for row in rows {
                // Both are in order of id.
                while let Some(user) = held.next_if(|user| *user < row.user) {
                    suspects.push(user);
                }
                held.next_if_eq(&row.user);
                if self.look(row.user).as_ref() != Some(&row.role) {
                    suspects.push(row.user);
                }
            }
        }
    }

    /// How many of `users` have another role here than in the store.
    async fn compare(&self, users: &[UserId]) -> Result<u64, CheckError> {
        let history = self.step.history();
        let _marked = self.marks.set(users);
        let read = self.store.roles(users).await?;
        let revision = read.head.revision;
        self.step.nudge();
        let in_step = async {
            self.step.reach_in(history, revision).await?;
            // A store that has forgotten commits may show others of the same numbers: then this ends the history.
            self.step.proven_anew().await;
            Ok::<_, HistoryEnded>(())
        };
        timeout(STEP_LIMIT, in_step).await.map_err(|_| CheckError::Behind)??;
        let mut found = 0;
        for (user, stored) in users.iter().zip(&read.roles) {
            let Some(cached) = self.difference(*user, stored, revision, history) else { continue };
            found += 1;
            let mismatches = self.counters.mismatches.fetch_add(1, Ordering::Relaxed) + 1;
            if found <= TOLD {
                tracing::error!(
                    user_id = user.0,
                    cached = cached.as_str(),
                    stored = stored.as_str(),
                    revision = revision.0,
                    mismatches,
                    "the cache has another role than the store"
                );
            }
        }
        Ok(found)
    }

    /// What the cache says about a user, where it is not what the store said at `revision`, which is applied.
    fn difference(&self, user: UserId, stored: &RoleName, revision: Revision, history: History) -> Option<RoleName> {
        // Held until the entry is read: a commit, and a reset, marks first.
        let mark = self.marks.marks.get(&user)?;
        if *mark > revision || self.step.history() != history {
            return None;
        }
        self.look(user).filter(|cached| cached != stored)
    }
}

/// A walk over the whole table, away from the threads that answer.
async fn aside<T: Send + 'static>(cache: &Arc<RoleCache>, walk: impl FnOnce(&RoleCache) -> T + Send + 'static) -> T {
    let cache = cache.clone();
    match spawn_blocking(move || walk(&cache)).await {
        Ok(found) => found,
        Err(error) => panic::resume_unwind(error.into_panic()),
    }
}

// === impl Marks ===

impl Marks {
    fn set(&self, users: &[UserId]) -> Marked<'_> {
        let marked = Marked(self);
        self.is_checking.store(true, Ordering::SeqCst);
        for user in users {
            self.marks.insert(*user, Revision(0));
        }
        marked
    }

    /// A user is about to be changed by a commit.
    pub(super) fn overtake(&self, user: UserId, by: Revision) {
        // A check that marks after this look sends its query after it, and sees the commit that is being applied.
        if self.is_checking.load(Ordering::SeqCst)
            && let Some(mut mark) = self.marks.get_mut(&user)
        {
            *mark = by.max(*mark);
        }
    }

    /// Everybody is about to go.
    pub(super) fn overtake_all(&self) {
        self.marks.iter_mut().for_each(|mut mark| *mark = Revision(i64::MAX));
    }
}

impl Drop for Marked<'_> {
    fn drop(&mut self) {
        self.0.is_checking.store(false, Ordering::SeqCst);
        self.0.marks.clear();
        self.0.marks.shrink_to_fit();
    }
}
