//! Reads: what may answer a read now, and with which revision.
//!
//! With proof of step the cache is the truth. Without, answers come from the store, or from the cache and are marked
//! stale, or are refused: the table "Failure model" of the design, row by row.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{RoleCache, miss::Wish};
use crate::{
    role::{Revision, RoleName, UserId},
    step::{FeedState, Standing},
    store::{Cause, StoreError},
    sync::{Ordering, timeout, timeout_at},
};

/// How long a read waits for a proof that holds.
const PROOF_LIMIT: Duration = Duration::from_millis(500);

/// How long a read waits altogether, for a revision or for the store.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// What a read asks for, beside the users.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// At least as fresh as this revision; 0 for whatever is applied.
    pub min_revision: Revision,
    /// From the store itself.
    pub fully_consistent: bool,
    /// When the caller stops waiting, if it said so.
    pub deadline: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    Cache,
    Store,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    pub role: RoleName,
    /// The answer is true as of this revision or a later one.
    pub revision: Revision,
    pub source: Source,
    /// Older than the promise of bounded staleness allows.
    pub stale: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answers {
    /// In the order asked.
    pub roles: Vec<RoleName>,
    pub revision: Revision,
    pub stale: bool,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    #[error("the store does not answer: {0}")]
    Unreachable(Cause),
    #[error("the store is broken: {0}")]
    Broken(Cause),
    #[error("nothing was proven for {age:?}")]
    TooStale { age: Duration },
    #[error("too many reads wait for the store")]
    Overloaded,
    #[error("revision {requested} is not known; the newest is {head}")]
    UnknownRevision { requested: Revision, head: Revision },
    #[error("the caller's deadline passed")]
    Deadline,
}

/// What may answer now.
enum Footing {
    /// The cache, as the truth of `Standing::applied`.
    Cache(Standing),
    /// The store: the cache is behind, or not loaded.
    Store(Standing),
    /// The cache, marked stale.
    Stale(Standing),
}

impl Footing {
    fn standing(&self) -> &Standing {
        let (Self::Cache(standing) | Self::Store(standing) | Self::Stale(standing)) = self;
        standing
    }
}

impl RoleCache {
    /// The role of one user.
    pub async fn get(&self, user: UserId, query: Query) -> Result<Answer, ReadError> {
        if let Some(answer) = self.hit(user, query) {
            return Ok(answer);
        }
        let misses = self.read(&[user], query).await?;
        let [role]: [RoleName; 1] = misses.roles.try_into().expect("one role for one user");
        Ok(Answer { role, revision: misses.revision, source: misses.source, stale: misses.stale })
    }

    /// The roles of many users, each true as of the one revision of the answer.
    pub async fn get_many(&self, users: &[UserId], query: Query) -> Result<Answers, ReadError> {
        let read = self.read(users, query).await?;
        Ok(Answers { roles: read.roles, revision: read.revision, stale: read.stale })
    }

    /// The way of nearly every read: proof, entry, answer, without waiting.
    fn hit(&self, user: UserId, query: Query) -> Option<Answer> {
        let standing = self.step.glance();
        if query.fully_consistent || query.min_revision > standing.applied || !self.is_truth(&standing) {
            return None;
        }
        let role = self.look(user)?;
        if self.step.history() != standing.history {
            return None;
        }
        self.counters.hits.fetch_add(1, Ordering::Relaxed);
        Some(Answer { role, revision: standing.applied, source: Source::Cache, stale: false })
    }

    /// Whether the cache may answer as the truth: in step, and not behind an answer that the store has given.
    fn is_truth(&self, standing: &Standing) -> bool {
        standing.is_proven() && self.floor.is_under(standing)
    }

    /// Whether it catches up with so much that nothing has been proven for a while.
    pub(super) fn is_far_behind(&self) -> bool {
        self.step.feed() == FeedState::CatchingUp && !self.step.standing().is_proven()
    }

    /// What the table says about a user; None where it says nothing.
    pub(super) fn look(&self, user: UserId) -> Option<RoleName> {
        let complete = self.completeness.number();
        match self.entries.get(user) {
            Some(id) => Some(self.names.name(id)),
            // Complete before the look, and the same completeness after it: absence is an answer.
            None if complete.is_some() && self.completeness.number() == complete => Some(self.default_role.clone()),
            None => None,
        }
    }

    async fn read(&self, users: &[UserId], query: Query) -> Result<ReadAnswer, ReadError> {
        let limit = Instant::now() + READ_LIMIT;
        let until = query.deadline.map_or(limit, |deadline| deadline.min(limit));
        match timeout_at(until, self.read_in_time(users, query)).await {
            Ok(read) => read,
            Err(_) if until < limit => Err(ReadError::Deadline),
            Err(_) if self.step.feed() == FeedState::Disconnected => Err(ReadError::silent()),
            Err(_) => Err(ReadError::Overloaded),
        }
    }

    async fn read_in_time(&self, users: &[UserId], query: Query) -> Result<ReadAnswer, ReadError> {
        // Whatever this read gets from the store has to be read after this moment, where it asks for a fresh answer.
        let ahead = query.min_revision > self.step.applied();
        let fresh = (query.fully_consistent || ahead).then(|| self.fills.ticket());
        let mut wish = Wish { fresh, counted: !query.fully_consistent };
        loop {
            if self.step.is_between_histories() {
                if self.step.feed() == FeedState::Disconnected {
                    return Err(ReadError::silent());
                }
                self.step.settled().await;
                continue;
            }
            if query.min_revision > self.step.applied() {
                self.wait_for(query.min_revision).await?;
                continue;
            }
            let footing = if query.fully_consistent { self.store_footing()? } else { self.footing().await };
            // While a proof was waited for, a history may have begun that is not as far.
            if query.min_revision > footing.standing().applied {
                continue;
            }
            let answer = match footing {
                Footing::Cache(standing) => self.answer_from_cache(users, standing, &mut wish).await?,
                Footing::Store(standing) => self.answer_from_store(users, standing, &mut wish).await?,
                Footing::Stale(standing) => self.answer_stale(users, standing, &wish)?,
            };
            // None: of another history than it began in, or too old by now.
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
    }

    /// Waits for a revision that was not applied yet, if the store has it.
    async fn wait_for(&self, revision: Revision) -> Result<(), ReadError> {
        let history = self.step.place().history;
        if revision > self.step.store_head() {
            if self.step.feed() == FeedState::Disconnected {
                return Err(ReadError::silent());
            }
            self.step.proven_anew().await;
            let head = self.step.store_head();
            if revision > head {
                return Err(ReadError::UnknownRevision { requested: revision, head });
            }
        }
        self.step.nudge();
        // In a history that begins meanwhile the revision is looked up again.
        let _ = self.step.reach_in(history, revision).await;
        Ok(())
    }

    /// What may answer a read that leaves it to us.
    async fn footing(&self) -> Footing {
        let standing = self.step.standing();
        if self.is_truth(&standing) {
            return Footing::Cache(standing);
        }
        if self.step.feed() == FeedState::Live {
            // Connected when last heard of: this process was paused, or the read is on its way. All share one.
            let _ = timeout(PROOF_LIMIT, self.step.proven()).await;
        }
        let standing = self.step.standing();
        match self.step.feed() {
            _ if self.is_truth(&standing) => Footing::Cache(standing),
            FeedState::CatchingUp => Footing::Store(standing),
            _ if standing.is_proven() => Footing::Store(standing),
            FeedState::Live | FeedState::Disconnected => Footing::Stale(standing),
        }
    }

    /// What may answer a read that asks for the store.
    fn store_footing(&self) -> Result<Footing, ReadError> {
        let standing = self.step.standing();
        match self.step.feed() {
            FeedState::Disconnected if !standing.is_proven() => Err(ReadError::silent()),
            _ => Ok(Footing::Store(standing)),
        }
    }

    /// Hits from the table, the rest by fills.
    async fn answer_from_cache(
        &self,
        users: &[UserId],
        standing: Standing,
        wish: &mut Wish,
    ) -> Result<Option<ReadAnswer>, ReadError> {
        let mut roles: Vec<Option<RoleName>> = users.iter().map(|user| self.look(*user)).collect();
        let missing: Vec<usize> = (0..users.len()).filter(|index| roles[*index].is_none()).collect();
        // Not loaded yet, a complete cache sends everybody to the store: no more at once than a lost feed may.
        let _turn = match missing.is_empty() || self.is_loaded() {
            true => None,
            false => Some(self.fallback.try_acquire().map_err(|_| ReadError::Overloaded)?),
        };
        if self.step.history() != standing.history {
            return Ok(None);
        }
        self.count(wish, users.len() - missing.len(), missing.len());
        if missing.is_empty() {
            let roles = roles.into_iter().flatten().collect();
            return Ok(Some(ReadAnswer { roles, revision: standing.applied, source: Source::Cache, stale: false }));
        }
        let users_missing: Vec<UserId> = missing.iter().map(|index| users[*index]).collect();
        let Some((filled, oldest)) = self.fill_all(&users_missing, standing, *wish).await? else {
            wish.counted = false;
            return Ok(None);
        };
        for (index, role) in missing.into_iter().zip(filled) {
            roles[index] = Some(role);
        }
        let all_missed = users_missing.len() == users.len();
        if !all_missed && !standing.is_proven() {
            // Hits are only as new as the look at them, whose proof has run out meanwhile: all from the store, then, which ends,
            // however little is kept in memory.
            wish.counted = false;
            return self.answer_from_store(users, self.step.standing(), wish).await;
        }
        // Where everything was loaded the answer is as new as the load.
        let revision = if all_missed { oldest } else { standing.applied };
        let roles = roles.into_iter().flatten().collect();
        Ok(Some(ReadAnswer { roles, revision, source: Source::Store, stale: false }))
    }

    async fn answer_from_store(
        &self,
        users: &[UserId],
        standing: Standing,
        wish: &mut Wish,
    ) -> Result<Option<ReadAnswer>, ReadError> {
        // A lost feed must not drown the database; a fully consistent read of a healthy one may ask.
        let _turn = match standing.is_proven() {
            true => None,
            false => Some(self.fallback.try_acquire().map_err(|_| ReadError::Overloaded)?),
        };
        self.count(wish, 0, users.len());
        // Nothing else says how old the answer of a query is that is on its way already.
        let fresh = wish.fresh.or_else(|| Some(self.fills.ticket()));
        let filled = self.fill_all(users, standing, Wish { fresh, ..*wish }).await?;
        wish.counted = false;
        Ok(filled.map(|(roles, revision)| ReadAnswer { roles, revision, source: Source::Store, stale: false }))
    }

    fn answer_stale(&self, users: &[UserId], standing: Standing, wish: &Wish) -> Result<Option<ReadAnswer>, ReadError> {
        // Without a proof in this history there is nothing that was ever true.
        let Some(age) = standing.proof_age() else { return Err(ReadError::silent()) };
        let roles: Vec<RoleName> = users.iter().filter_map(|user| self.look(*user)).collect();
        if self.step.history() != standing.history {
            return Ok(None);
        }
        // A read that is refused counts too: it was a hit or a miss, and then too old.
        self.count(wish, roles.len(), users.len() - roles.len());
        if roles.len() < users.len() {
            return Err(ReadError::silent());
        }
        if age > self.options.max_staleness {
            return Err(ReadError::TooStale { age });
        }
        self.counters.stale_answers.fetch_add(1, Ordering::Relaxed);
        Ok(Some(ReadAnswer { roles, revision: standing.applied, source: Source::Cache, stale: true }))
    }

    fn count(&self, wish: &Wish, hits: usize, misses: usize) {
        if wish.counted {
            self.counters.hits.fetch_add(hits as u64, Ordering::Relaxed);
            self.counters.misses.fetch_add(misses as u64, Ordering::Relaxed);
        }
    }
}

struct ReadAnswer {
    roles: Vec<RoleName>,
    revision: Revision,
    source: Source,
    stale: bool,
}

// === impl ReadError ===

impl ReadError {
    pub(super) fn silent() -> Self {
        Self::Unreachable(Arc::new(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time")))
    }
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unreachable(cause) => Self::Unreachable(cause),
            StoreError::Broken(cause) => Self::Broken(cause),
        }
    }
}
