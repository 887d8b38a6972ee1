//! What the services answer from, and what several RPCs do with it.

use std::{sync::Arc, time::Instant};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{READ_LIMIT, convert, fault::Fault, watch::Watches};
use crate::{
    access::Caller,
    cache::RoleCache,
    feed::Feed,
    panics,
    proto::v1,
    role::{Anchor, MailboxId},
    step::{FeedState, Step},
    store::{Call, Store, Written},
    writer::{WriteFailure, Writer},
};

/// Snapshots that are read from the store at once.
const SNAPSHOTS: usize = 4;

/// What callers list from the store at once, and what watches look up there; the others wait for their turn.
const LOOKUPS: usize = 4;
const RESUMES: usize = 4;

/// Of a caller, and of all.
pub(super) type Turn<'a> = (OwnedSemaphorePermit, SemaphorePermit<'a>);

pub(super) struct Core {
    pub(super) cache: Arc<RoleCache>,
    pub(super) feed: Feed,
    pub(super) writer: Writer,
    pub(super) store: Arc<dyn Store>,
    pub(super) step: Step,
    pub(super) watches: Watches,
    pub(super) snapshots: Semaphore,
    lookups: Semaphore,
    resumes: Semaphore,
    started: Instant,
    pub(super) shutdown: CancellationToken,
}

impl Core {
    #[expect(clippy::too_many_arguments, reason = "each is a part of its own, and there is one call")]
    pub(super) fn new(
        cache: Arc<RoleCache>,
        feed: Feed,
        writer: Writer,
        store: Arc<dyn Store>,
        step: Step,
        watches: Watches,
        started: Instant,
        shutdown: CancellationToken,
    ) -> Self {
        let (snapshots, lookups) = (Semaphore::new(SNAPSHOTS), Semaphore::new(LOOKUPS));
        let resumes = Semaphore::new(RESUMES);
        Self { cache, feed, writer, store, step, watches, snapshots, lookups, resumes, started, shutdown }
    }

    pub(super) async fn write(&self, call: Call) -> Result<Written, Fault> {
        let mailbox: Option<MailboxId> = call.mailbox();
        #[cfg(feature = "failpoints")]
        if crate::failpoint::is_on!("bug::write_in_request") {
            return self.write_in_request(call).await;
        }
        self.writer.write(call).await.map_err(|failure: WriteFailure| Fault::write(failure, mailbox))
    }

    /// A bug for tests: whoever hangs up drops the write in its midst.
    #[cfg(feature = "failpoints")]
    async fn write_in_request(&self, call: Call) -> Result<Written, Fault> {
        use crate::store::WriteError;
        let mailbox = call.mailbox();
        match self.store.write(&[call]).await.remove(0) {
            Ok(written) => match written.tag.map(|tag| Anchor { revision: written.revision, tag }) {
                Some(seen) => self.applied(seen).await.map(|()| written),
                None => Ok(written),
            },
            Err(WriteError::Refused(refusal)) => Err(Fault::write(WriteFailure::Refused(refusal), mailbox)),
            Err(WriteError::Busy | WriteError::AllHeld) => Err(Fault::write(WriteFailure::UserBusy, mailbox)),
            Err(_) => Err(Fault::write(WriteFailure::OutcomeUnknown, mailbox)),
        }
    }

    pub(super) fn changes(&self, written: &Written) -> Vec<v1::RoleChange> {
        let admin = &self.store.facts().admin_role;
        written.changes.iter().map(|change| convert::change(change, written.revision, written.at, admin)).collect()
    }

    /// Waits for a turn to list something from the store.
    pub(super) async fn lookup(&self, caller: &Caller) -> Result<Turn<'_>, Fault> {
        turn(caller.begin_list(), &self.lookups).await
    }

    /// Waits for a turn to look up where a watch goes on: lists, which may take long, are not in its way.
    pub(super) async fn resume(&self, caller: &Caller) -> Result<Turn<'_>, Fault> {
        turn(caller.begin_resume(), &self.resumes).await
    }

    /// Waits until this replica has applied what an answer from the store shows: who sees it and then reads must not
    /// get an older role.
    pub(super) async fn applied(&self, seen: Anchor) -> Result<(), Fault> {
        self.step.nudge();
        let arrived = async {
            let place = self.step.settled().await;
            if seen.revision <= place.applied.revision {
                // Of what this replica has applied, or the store has gone back in time: the next read of the log tells.
                self.step.found_anew(place.history).await;
            }
            self.step.reach_in(place.history, seen.revision).await
        };
        match timeout(READ_LIMIT, arrived).await {
            // Of this number, and perhaps not this commit: then what was read is of a store that lacks it by now.
            Ok(Ok(())) if self.step.has(seen) != Some(false) => Ok(()),
            // The store answers, and this replica has so much to take in that it cannot say when it is as far.
            Err(_) if self.step.feed() == FeedState::CatchingUp => Err(Fault::Overloaded),
            _ => Err(Fault::StoreUnreachable),
        }
    }

    pub(super) fn stats(&self) -> v1::StatsResponse {
        let stats = self.cache.stats();
        let reads = stats.hits + stats.misses;
        let facts = self.store.facts();
        let int = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        v1::StatsResponse {
            hits: int(stats.hits),
            misses: int(stats.misses),
            hit_rate_percent: if reads == 0 { 0.0 } else { stats.hits as f64 / reads as f64 * 100.0 },
            cache_size: int(stats.users),
            events_processed: int(stats.changes_applied),
            event_handlers: self.watches.open() as i64,
            revision: self.step.applied().0,
            store_revision: self.step.store_head().max(self.step.applied()).0,
            store_id: facts.store_id.to_string(),
            store_kind: facts.kind.as_str().to_owned(),
            feed_state: convert::feed_state(self.step.feed()).into(),
            store_reads: int(stats.store_reads),
            coalesced_misses: int(stats.coalesced_misses),
            stale_answers: int(stats.stale_answers),
            cache_bytes: int(stats.bytes),
            uptime: prost_types::Duration::try_from(self.started.elapsed()).ok(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cache_mismatches: int(stats.mismatches),
            panics: int(panics::counted()),
        }
    }
}

/// A caller's own turn first: its others are not in the line of all.
async fn turn(of_caller: impl Future<Output = OwnedSemaphorePermit>, turns: &Semaphore) -> Result<Turn<'_>, Fault> {
    match timeout(READ_LIMIT, async { (of_caller.await, turns.acquire().await) }).await {
        Ok((of_caller, Ok(of_all))) => Ok((of_caller, of_all)),
        _ => Err(Fault::Overloaded),
    }
}
