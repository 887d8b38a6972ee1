//! Misses: the users of a read who are not in the table, each by a fill of its own or of somebody else's.

use std::{collections::HashMap, sync::Arc};

use super::{
    ReadError, RoleCache,
    fill::{Fill, Filled, Joined, OF_SINGLE_READS, Ticket},
};
use crate::{
    role::{Revision, RoleName, UserId},
    step::Standing,
    sync::Ordering,
};

/// How a read wants its misses loaded.
#[derive(Clone, Copy)]
pub(super) struct Wish {
    /// By a query that is sent after this.
    pub(super) fresh: Option<Ticket>,
    /// As hits and misses; reads that ask for the store are neither, and one that has to begin again was counted.
    pub(super) counted: bool,
}

/// A read's part in the load of one user.
struct Joining {
    index: usize,
    fill: Arc<Fill>,
    too_old: bool,
}

impl RoleCache {
    /// The roles of users by fills, one each, and the oldest revision among them, which is not older than `standing`. None
    /// where its history has ended.
    pub(super) async fn fill_all(
        &self,
        users: &[UserId],
        standing: Standing,
        wish: Wish,
    ) -> Result<Option<(Vec<RoleName>, Revision)>, ReadError> {
        // A user who is asked twice is read once: two reads could tell two roles in one answer.
        let mut places = HashMap::new();
        let mut distinct = Vec::new();
        let place = |user: &UserId| {
            *places.entry(*user).or_insert_with(|| {
                distinct.push(*user);
                distinct.len() - 1
            })
        };
        let asked: Vec<usize> = users.iter().map(place).collect();
        self.count_coalesced(wish, users.len() - distinct.len());

        let mut found: Vec<Option<Filled>> = vec![None; distinct.len()];
        // A miss that has to join again is still one miss.
        let mut is_accounted = vec![false; distinct.len()];
        let mut wanted: Vec<usize> = (0..distinct.len()).collect();
        let spared = if distinct.len() > 1 { OF_SINGLE_READS } else { 0 };
        while !wanted.is_empty() {
            let pending: Vec<Joining> = wanted
                .drain(..)
                .map(|index| self.join(index, distinct[index], wish, spared, &mut is_accounted[index]))
                .collect::<Result<_, _>>()?;
            for Joining { index, fill, too_old } in pending {
                let outcome = fill.outcome().await;
                // Who waits for its end does not wait for another one that finds no store either.
                let filled = match outcome {
                    Ok(_) if too_old => None,
                    Err(error) if too_old && !matches!(error, ReadError::Unreachable(_)) => None,
                    outcome => Some(outcome?),
                };
                let Some(filled) = filled else {
                    wanted.push(index);
                    continue;
                };
                // A later read must not be older: it goes out once this replica has applied as much. Far behind, that
                // takes too long; then it goes out at once, and the cache is not the truth until it is as far.
                if filled.revision > self.step.applied() && self.is_far_behind() {
                    self.floor.raise(standing.history, filled.revision);
                } else if self.step.reach_in(standing.history, filled.revision).await.is_err() {
                    return Ok(None);
                } else if filled.unkept.is_some_and(|seen| self.step.has(seen) != Some(true)) {
                    // As far by number, and perhaps of another history.
                    wanted.push(index);
                    continue;
                }
                if filled.revision >= standing.applied {
                    found[index] = Some(filled);
                } else {
                    wanted.push(index);
                }
            }
        }
        if self.step.history() != standing.history {
            return Ok(None);
        }
        let found: Vec<Filled> = found.into_iter().flatten().collect();
        let oldest = found.iter().map(|filled| filled.revision).min().unwrap_or(standing.applied);
        // True as of what was read, so of what is applied too, which is what a later read may be as old as.
        let oldest = oldest.min(self.step.applied());
        Ok(Some((asked.into_iter().map(|place| found[place].role.clone()).collect(), oldest)))
    }

    /// Begins a fill only where the queue has more than `spared` places left.
    fn join(
        &self,
        index: usize,
        user: UserId,
        wish: Wish,
        spared: usize,
        is_accounted: &mut bool,
    ) -> Result<Joining, ReadError> {
        let (fill, too_old) = match self.fills.join(user, wish.fresh) {
            Joined::Waits(fill) => {
                if !std::mem::replace(is_accounted, true) {
                    self.count_coalesced(wish, 1);
                }
                (fill, false)
            }
            Joined::TooOld(fill) => (fill, true),
            Joined::Began(fill) => {
                if self.queue.capacity() <= spared || self.queue.try_send(fill.clone()).is_err() {
                    self.fills.finish(&fill, Err(ReadError::Overloaded));
                    return Err(ReadError::Overloaded);
                }
                *is_accounted = true;
                (fill, false)
            }
        };
        Ok(Joining { index, fill, too_old })
    }

    fn count_coalesced(&self, wish: Wish, misses: usize) {
        if wish.counted {
            self.counters.coalesced_misses.fetch_add(misses as u64, Ordering::Relaxed);
        }
    }
}
