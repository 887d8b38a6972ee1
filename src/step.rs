//! How far this replica is in step with its store: what it has applied, and the proof of it.
//!
//! The tailer alone holds the [`Stepper`] and moves it; cache, feed, writer and grpc hold a [`Step`] and read it or wait
//! for it. Within one history `applied` never goes back.

mod moment;
mod recent;

use std::{
    cmp,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, futures::Notified, watch};
use uuid::Uuid;

pub use self::moment::Moment;
use self::recent::Recent;
use crate::{
    failpoint,
    role::{Anchor, Revision, Tag},
    sync,
};

/// How long a proof lets the cache answer as truth.
pub const PROOF_HOLDS: Duration = Duration::from_secs(2);

/// The reading side. Cheap to clone.
#[derive(Clone)]
pub struct Step(Arc<Shared>);

/// The moving side, of which there is one.
pub struct Stepper(Arc<Shared>);

/// How the replica stands to the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FeedState {
    /// Every commit arrives as it is made.
    Live,
    /// Connected, and reading what it missed.
    CatchingUp,
    /// The store is out of reach.
    Disconnected,
}

/// Which of the store's histories the replica follows: a count of how often it had to start over. 0 before the first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct History(u64);

/// How far the replica is: what watchers and waiting calls are woken for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub applied: Anchor,
    pub history: History,
}

/// What an answer from the cache stands on. Taken before the entry is read, so that its revision is never newer than
/// the role.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    pub applied: Revision,
    pub history: History,
    /// When the last proving read of the log was sent; None before the first of this history.
    proof: Option<Moment>,
}

/// The history that was waited in is no longer the store's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the store's history changed")]
pub struct HistoryEnded;

struct Shared {
    applied: AtomicI64,
    history: AtomicU64,
    /// Of the moment when the last proving read was sent, in nanoseconds; 0 for none in this history.
    proof: AtomicU64,
    /// The same of the last read that found the log to go on from what is applied, whatever followed.
    found: AtomicU64,
    /// The newest revision that any read of the log has shown.
    store_head: AtomicI64,
    place: watch::Sender<Place>,
    recent: Recent,
    feed: watch::Sender<FeedState>,
    proven: Notify,
    nudge: Notify,
}

/// A replica that has taken no step yet.
pub fn start() -> (Stepper, Step) {
    let nowhere = Anchor { revision: Revision(0), tag: Tag(Uuid::nil()) };
    let place = Place { applied: nowhere, history: History(0) };
    let shared = Arc::new(Shared {
        applied: AtomicI64::new(0),
        history: AtomicU64::new(0),
        proof: AtomicU64::new(0),
        found: AtomicU64::new(0),
        store_head: AtomicI64::new(0),
        place: watch::Sender::new(place),
        recent: Recent::default(),
        feed: watch::Sender::new(FeedState::Disconnected),
        proven: Notify::new(),
        nudge: Notify::new(),
    });
    (Stepper(shared.clone()), Step(shared))
}

// === impl Standing ===

impl Standing {
    /// How old the proof is by now.
    pub fn proof_age(&self) -> Option<Duration> {
        self.proof.map(Moment::elapsed)
    }

    /// Whether its proof holds, still.
    pub fn is_proven(&self) -> bool {
        self.proof_age().is_some_and(|age| age <= PROOF_HOLDS)
    }
}

// === impl Step ===

impl Step {
    /// What the replica stands on.
    pub fn standing(&self) -> Standing {
        let proof = self.proof();
        let place = self.place();
        Standing { applied: place.applied.revision, history: place.history, proof }
    }

    /// The same without a lock, for the hot path: of one history only if [`Step::history`] is still the same after the
    /// entry was read.
    pub fn glance(&self) -> Standing {
        let history = self.history();
        let proof = self.proof();
        Standing { applied: self.applied(), history, proof }
    }

    fn proof(&self) -> Option<Moment> {
        let sent = self.0.proof.load(Ordering::SeqCst);
        (sent != 0).then_some(Moment(sent))
    }

    pub fn applied(&self) -> Revision {
        sync::point();
        Revision(self.0.applied.load(Ordering::SeqCst))
    }

    pub fn history(&self) -> History {
        History(self.0.history.load(Ordering::SeqCst))
    }

    pub fn store_head(&self) -> Revision {
        Revision(self.0.store_head.load(Ordering::SeqCst))
    }

    pub fn place(&self) -> Place {
        *self.0.place.borrow()
    }

    /// Whether what is followed has this very commit: a store that has gone back in time gives the same numbers again. None
    /// where that is older or newer than what is kept of it.
    pub fn has(&self, seen: Anchor) -> Option<bool> {
        self.0.recent.has(seen)
    }

    pub fn feed(&self) -> FeedState {
        *self.0.feed.borrow()
    }

    /// Tells every change of [`Step::feed`] from now on.
    pub fn subscribe_feed(&self) -> watch::Receiver<FeedState> {
        self.0.feed.subscribe()
    }

    /// Tells every move of [`Place`] from now on.
    pub fn subscribe(&self) -> watch::Receiver<Place> {
        self.0.place.subscribe()
    }

    /// Makes the tailer read the log at once.
    pub fn nudge(&self) {
        self.0.nudge.notify_one();
    }

    /// Waits until a first history is followed.
    pub async fn started(&self) {
        // The other side lives as long as this one.
        let _ = self.subscribe().wait_for(|place| place.history != History(0)).await;
    }

    /// Whether what is in memory is of a history that is gone, and the new one is not followed yet.
    pub fn is_between_histories(&self) -> bool {
        self.place().history != self.history()
    }

    /// The place in the history that is followed, or in the one that is about to be.
    pub async fn settled(&self) -> Place {
        while self.reach_in(self.history(), Revision(0)).await.is_err() {}
        self.place()
    }

    /// Waits until everything up to `revision` is applied, in the history that is followed now.
    pub async fn reach(&self, revision: Revision) -> Result<(), HistoryEnded> {
        self.reach_in(self.place().history, revision).await
    }

    /// Waits until everything up to `revision` is applied, in a history that may be about to begin.
    pub async fn reach_in(&self, history: History, revision: Revision) -> Result<(), HistoryEnded> {
        let mut places = self.subscribe();
        let arrived = places
            .wait_for(|place| match place.history.cmp(&history) {
                cmp::Ordering::Less => false,
                cmp::Ordering::Equal => place.applied.revision >= revision,
                cmp::Ordering::Greater => true,
            })
            .await;
        match arrived {
            Ok(place) if place.history == history => Ok(()),
            _ => Err(HistoryEnded),
        }
    }

    /// Waits for a proof that holds, which a nudged tailer brings.
    pub async fn proven(&self) {
        self.proof_where(|| self.standing().is_proven()).await;
    }

    /// Waits for a proof by a read of the log that is sent after this call: from then on [`Step::store_head`] is at
    /// least what the store's head is now. All who wait share one read.
    pub async fn proven_anew(&self) {
        let now = Moment::now();
        self.proof_where(|| self.0.proof.load(Ordering::SeqCst) > now.0).await;
    }

    /// Waits for a read of the log that is sent after this call and finds what is applied, or until `history` has ended: what
    /// was seen in the store before the call, up to what was applied then, is of the history that is followed. All who wait
    /// share one read.
    pub async fn found_anew(&self, history: History) {
        let now = Moment::now();
        self.proof_where(|| self.0.found.load(Ordering::SeqCst) > now.0 || self.history() != history).await;
    }

    async fn proof_where(&self, holds: impl Fn() -> bool) {
        loop {
            let proven = self.0.proven.notified();
            tokio::pin!(proven);
            // Armed before the look: a proof between look and wait would otherwise be missed.
            proven.as_mut().enable();
            if holds() {
                return;
            }
            self.nudge();
            proven.await;
        }
    }
}

// === impl Stepper ===

impl Stepper {
    pub fn reader(&self) -> Step {
        Step(self.0.clone())
    }

    /// Resolves at the next nudge, one before the call included.
    pub fn nudged(&self) -> Notified<'_> {
        self.0.nudge.notified()
    }

    /// A new history begins: nothing is proven, and no answer from the old one may be given any more. Before the cache
    /// is emptied.
    pub fn begin_history(&self) {
        self.0.proof.store(0, Ordering::SeqCst);
        self.0.history.fetch_add(1, Ordering::SeqCst);
        self.0.proven.notify_waiters();
    }

    /// The new history is followed from `anchor` on. After the cache is emptied.
    pub fn follow_from(&self, anchor: Anchor) {
        self.0.store_head.store(anchor.revision.0, Ordering::SeqCst);
        let history = History(self.0.history.load(Ordering::SeqCst));
        self.0.recent.begin(anchor);
        // Under the lock of the place: who has seen the one and then looks at the other must not see it go back.
        self.0.place.send_modify(|place| {
            self.0.applied.store(anchor.revision.0, Ordering::SeqCst);
            *place = Place { applied: anchor, history };
        });
    }

    /// Everything up to `anchor` is in the cache and in the ring.
    pub fn advance(&self, anchor: Anchor) {
        let before = self.0.applied.load(Ordering::SeqCst);
        assert!(before < anchor.revision.0, "applied goes from {before} to {}", anchor.revision);
        self.0.recent.push(anchor);
        self.0.place.send_modify(|place| {
            self.0.applied.store(anchor.revision.0, Ordering::SeqCst);
            place.applied = anchor;
        });
    }

    pub fn saw_head(&self, head: Revision) {
        self.0.store_head.store(head.0, Ordering::SeqCst);
    }

    /// A read that was sent at `sent` found what is applied.
    pub fn find(&self, sent: Moment) {
        self.0.found.store(sent.0, Ordering::SeqCst);
        self.0.proven.notify_waiters();
    }

    /// A read that was sent at `sent` found nothing after `applied`.
    pub fn prove(&self, sent: Moment) {
        let sent = if failpoint::is_on!("bug::unproven") { Moment::now() } else { sent };
        self.0.proof.store(sent.0, Ordering::SeqCst);
        self.set_feed(FeedState::Live);
        self.0.proven.notify_waiters();
    }

    pub fn set_feed(&self, feed: FeedState) {
        self.0.feed.send_if_modified(|present| std::mem::replace(present, feed) != feed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anchor(revision: i64) -> Anchor {
        Anchor { revision: Revision(revision), tag: Tag(Uuid::nil()) }
    }

    #[tokio::test]
    async fn reach_waits_for_the_revision_and_not_for_another_history() {
        let (stepper, step) = start();
        stepper.begin_history();
        stepper.follow_from(anchor(3));
        assert_eq!(step.reach(Revision(3)).await, Ok(()));
        let waiting = tokio::spawn({
            let step = step.clone();
            async move { step.reach(Revision(5)).await }
        });
        stepper.advance(anchor(4));
        stepper.advance(anchor(6));
        assert_eq!(waiting.await.unwrap(), Ok(()));

        let other = Anchor { tag: Tag(Uuid::max()), ..anchor(4) };
        assert_eq!([anchor(3), anchor(4), other].map(|seen| step.has(seen)), [Some(true), Some(true), Some(false)]);
        assert_eq!([anchor(2), anchor(5), anchor(7)].map(|seen| step.has(seen)), [None, Some(false), None]);

        let (first, place) = (step.history(), step.place());
        assert_eq!(place.applied, anchor(6));
        stepper.begin_history();
        stepper.follow_from(anchor(9));
        assert_eq!(step.reach_in(first, Revision(7)).await, Err(HistoryEnded));
        assert_eq!((step.has(anchor(6)), step.has(anchor(9))), (None, Some(true)));
    }

    #[tokio::test]
    async fn a_new_history_takes_the_proof_away() {
        let (stepper, step) = start();
        assert!(!step.standing().is_proven());
        stepper.begin_history();
        stepper.follow_from(anchor(0));
        stepper.prove(Moment::now());
        step.proven().await;
        assert!(step.standing().is_proven());
        assert_eq!(step.feed(), FeedState::Live);
        stepper.begin_history();
        assert!(!step.standing().is_proven());
    }
}
