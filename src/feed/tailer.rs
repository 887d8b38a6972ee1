//! The tailer: the one task that follows the log, and the only door through which commits enter memory.
//!
//! In order of revision, each commit goes to the cache, then to the ring, then `applied` moves and the watchers wake.
//! Cache before watchers: nobody can hear of a change and then read the old role here.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::{sleep, timeout};

use super::{Feed, OVERSIZED, Options, audit};
use crate::{
    failpoint,
    role::{Anchor, Commit},
    step::{FeedState, Moment, Stepper},
    store::{LogError, Page, Position, StoreError},
};

/// Without an answer for so long, the store counts as out of reach, though the read goes on.
const SILENCE: Duration = Duration::from_secs(2);

/// What the tailer hands commits to, before anybody else hears of them.
pub trait Apply: Send + Sync {
    /// Takes in a commit, or the next run of an oversized one. Cannot fail: what it cannot take in, it must not answer.
    fn apply(&self, commit: &Commit);

    /// Forgets everything: what follows is of another history.
    fn reset(&self);
}

/// The task that follows the log.
pub struct Tailer {
    options: Options,
    feed: Feed,
    stepper: Stepper,
    apply: Arc<dyn Apply>,
}

/// The log holds what it cannot hold: the tailer stops rather than guess.
#[derive(Debug, thiserror::Error)]
#[error("the change log cannot be followed: {0}")]
pub struct Broken(#[from] StoreError);

impl Tailer {
    pub(super) fn new(options: Options, feed: Feed, stepper: Stepper, apply: Arc<dyn Apply>) -> Self {
        Self { options, feed, stepper, apply }
    }

    /// Follows the log until it is found broken.
    pub async fn run(self) -> Broken {
        tokio::select! {
            broken = self.follow() => broken,
            never = self.feed.ring_bell() => match never {},
        }
    }

    async fn follow(&self) -> Broken {
        self.stepper.begin_history();
        let mut position = match self.start_over().await {
            Ok(position) => position,
            Err(broken) => return broken,
        };
        loop {
            failpoint::kill!("tailer::task");
            // A nudge that comes before the wait is kept for it.
            let nudged = self.stepper.nudged();
            match self.catch_up(&mut position).await {
                Ok(()) => {}
                Err(LogError::Store(StoreError::Unreachable(cause))) => self.lost(&cause),
                Err(LogError::Store(error)) => return Broken(error),
                Err(reason) => {
                    tracing::error!(%reason, "the change log does not go on from here: starting over with an empty cache");
                    // Nothing of the history that is gone may be answered, not even for as long as its proof would hold.
                    self.stepper.begin_history();
                    self.stepper.set_feed(FeedState::CatchingUp);
                    position = match self.start_over().await {
                        Ok(position) => position,
                        Err(broken) => return broken,
                    };
                    continue;
                }
            }
            let poll = self.feed.shared.store.poll_at_least_every();
            let mut interval = poll.map_or(self.options.poll_interval, |poll| poll.min(self.options.poll_interval));
            if failpoint::is_on!("tailer::unpolled") {
                interval = Duration::MAX;
            }
            let _ = timeout(interval, nudged).await;
        }
    }

    /// Follows a history that has begun from the store's head on, with an empty cache and an empty ring.
    async fn start_over(&self) -> Result<Position, Broken> {
        loop {
            let sent = Moment::now();
            match self.heard(self.feed.shared.store.head()).await {
                Ok(head) => {
                    self.apply.reset();
                    self.feed.restart(head, self.options.ring_bytes);
                    self.stepper.follow_from(head);
                    self.stepper.prove(sent);
                    tracing::info!(revision = head.revision.0, "following the change log");
                    return Ok(head.into());
                }
                Err(error @ StoreError::Broken(_)) => return Err(Broken(error)),
                Err(cause) => {
                    self.lost(&cause);
                    sleep(self.options.poll_interval).await;
                }
            }
        }
    }

    /// Reads and applies what follows `position` until nothing does.
    async fn catch_up(&self, position: &mut Position) -> Result<(), LogError> {
        loop {
            let sent = Moment::now();
            let read = self.feed.shared.store.read_log(position, OVERSIZED as usize);
            let page = self.heard(read).await?;
            self.stepper.find(sent);
            self.stepper.saw_head(page.head.revision);
            let reaches_head = page.reaches_head();
            *position = page.next;
            self.enter(page);
            if reaches_head {
                if self.stepper.reader().feed() == FeedState::Disconnected {
                    tracing::info!(revision = position.anchor.revision.0, "the store answers again");
                }
                self.stepper.prove(sent);
                return Ok(());
            }
            self.stepper.set_feed(FeedState::CatchingUp);
        }
    }

    /// Takes a page into memory.
    fn enter(&self, page: Page) {
        let admin = &self.feed.shared.store.facts().admin_role;
        for commit in page.commits {
            failpoint::kill!("tailer::before_apply");
            self.apply.apply(&commit);
            failpoint::kill!("tailer::before_ring");
            audit::record(&commit, admin);
            if commit.ends_here() {
                let anchor = commit.anchor();
                self.feed.append(Arc::new(if commit.is_whole() {
                    commit
                } else {
                    stand_in(anchor, commit.size, commit.at)
                }));
                self.stepper.advance(anchor);
            }
        }
    }

    /// Waits for a read, and says so when it takes too long.
    async fn heard<T>(&self, read: impl Future<Output = T>) -> T {
        tokio::pin!(read);
        match timeout(SILENCE, &mut read).await {
            Ok(answer) => answer,
            Err(_) => {
                self.lost(&"it is silent");
                read.await
            }
        }
    }

    fn lost(&self, cause: &dyn std::fmt::Display) {
        if self.stepper.reader().feed() != FeedState::Disconnected {
            let reads = match self.stepper.reader().is_between_histories() {
                true => "refused",
                false => "served from the cache, and marked stale",
            };
            tracing::warn!(%cause, "the store does not answer: reads are {reads}");
        }
        self.stepper.set_feed(FeedState::Disconnected);
    }
}

/// What stands in the ring for a commit that watchers page from the store.
fn stand_in(anchor: Anchor, size: u64, at: SystemTime) -> Commit {
    Commit { revision: anchor.revision, tag: anchor.tag, at, size, changes: Vec::new() }
}
