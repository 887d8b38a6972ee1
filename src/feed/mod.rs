//! The feed: what the log says, once read by one tailer, for any number of watchers.
//!
//! A watcher is a [`Cursor`]: its place in the log, over a ring that all share. It pulls; nothing is ever queued for it,
//! so that a watcher that does not read costs its place, and where it is behind the ring a small page, and no more.

mod audit;
pub mod ring;
mod tailer;

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, watch},
    task::consume_budget,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use self::ring::{Lookup, Ring};
pub use self::tailer::{Apply, Broken, Tailer};
use crate::{
    role::{Anchor, Commit, Revision},
    step::{History, Place, Step, Stepper},
    store::{LogError, Page, Position, Store, StoreError},
};

/// A commit of more changes is paged from the store by everybody, instead of being held in memory.
pub const OVERSIZED: u64 = 10_000;

/// Watchers that page the log from the store at once; the others wait for their turn.
const PAGERS: usize = 4;

/// Changes that a paging watcher reads at once; so many of one commit go into one message.
const PAGER_LIMIT: usize = 1_000;

/// Of them, so much stays in memory until it is taken, which may be never: some hundreds of usual commits. The rest is read
/// again. Of a commit that is larger, one message.
const PAGE_BYTES: usize = 64 * 1024;

/// How often all watchers are woken at most: what comes in between reaches them together. The first is not kept waiting.
const BELL_PAUSE: Duration = Duration::from_millis(10);

/// How long a watch that cannot go on waits for this replica to follow the new history.
const HISTORY_LIMIT: Duration = Duration::from_secs(2);

/// Before a watcher asks a store again that did not answer.
const PAGER_RETRY: Duration = Duration::from_millis(500);

/// How the feed is built.
#[derive(Clone, Debug)]
pub struct Options {
    /// How often the log is read where nothing says that it grew.
    pub poll_interval: Duration,
    /// Of commits held in memory.
    pub ring_bytes: usize,
}

/// The log as this replica has applied it. Cheap to clone.
#[derive(Clone)]
pub struct Feed {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn Store>,
    step: Step,
    ring: RwLock<Ring>,
    pagers: Arc<Semaphore>,
    /// Follows the replica's place, and wakes the watchers.
    bell: watch::Sender<Place>,
}

/// A watcher's place in the log.
pub struct Cursor {
    feed: Feed,
    position: Position,
    history: History,
    places: watch::Receiver<Place>,
    /// What the last page brought and the watcher has not taken yet: its commits, each with where it leads.
    paged: VecDeque<Arc<Commit>>,
    paged_to: Option<Position>,
    /// A page on its way. In a task of its own: a watcher that is not polled, because its client does not read, would
    /// keep its turn and its connection for ever.
    paging: Option<AbortOnDropHandle<Result<(Page, Revision), LogError>>>,
    /// Before then the store is not asked again. Kept here, as what follows is: whoever waits in [`Cursor::next`] may be interrupted
    /// more often than that.
    page_again: Option<Instant>,
    /// Until when it is waited that this replica follows the new history.
    end_by: Option<Instant>,
}

/// Why a watch cannot go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CursorError {
    #[error("the store's history changed after revision {}", last.revision)]
    HistoryChanged { last: Anchor },
    #[error("the log is trimmed up to revision {oldest}, which is after {requested}")]
    Compacted { requested: Revision, oldest: Revision, head: Revision },
    #[error(transparent)]
    Broken(StoreError),
}

/// A feed over `store`, and the task that keeps it.
pub fn feed(options: Options, store: Arc<dyn Store>, stepper: Stepper, apply: Arc<dyn Apply>) -> (Feed, Tailer) {
    let step = stepper.reader();
    let ring = RwLock::new(Ring::new(step.place().applied, options.ring_bytes));
    let bell = watch::Sender::new(step.place());
    let shared = Arc::new(Shared { store, step, ring, pagers: Arc::new(Semaphore::new(PAGERS)), bell });
    let feed = Feed { shared };
    (feed.clone(), Tailer::new(options, feed, stepper, apply))
}

// === impl Feed ===

impl Feed {
    /// A cursor for a watcher that has seen everything up to `anchor`, which was looked up in or after `history`.
    pub fn after(&self, anchor: Anchor, history: History) -> Cursor {
        let places = self.shared.bell.subscribe();
        Cursor {
            feed: self.clone(),
            position: anchor.into(),
            history,
            places,
            paged: VecDeque::new(),
            paged_to: None,
            paging: None,
            page_again: None,
            end_by: None,
        }
    }

    fn look(&self, anchor: Anchor) -> Lookup {
        // Pure data: a panic inside cannot leave the ring half changed in a way that later looks miss.
        self.shared.ring.read().unwrap_or_else(PoisonError::into_inner).after(anchor)
    }

    /// Wakes the watchers whenever this replica has moved. Never returns.
    async fn ring_bell(&self) -> Infallible {
        let mut places = self.shared.step.subscribe();
        loop {
            self.shared.bell.send_replace(*places.borrow_and_update());
            sleep(BELL_PAUSE).await;
            // The other side lives in the tailer, as this task does.
            let _ = places.changed().await;
        }
    }

    fn append(&self, commit: Arc<Commit>) {
        self.shared.ring.write().unwrap_or_else(PoisonError::into_inner).append(commit);
    }

    fn restart(&self, floor: Anchor, bytes: usize) {
        *self.shared.ring.write().unwrap_or_else(PoisonError::into_inner) = Ring::new(floor, bytes);
    }
}

// === impl Cursor ===

impl Cursor {
    /// The last commit that was taken whole.
    pub fn seen(&self) -> Anchor {
        self.position.anchor
    }

    /// Whether the last commit that was taken has more changes to come.
    pub fn is_inside_a_commit(&self) -> bool {
        self.position.inside.is_some()
    }

    /// What follows: a whole commit, or a run of one whose last run says so by [`Commit::ends_here`]. Waits until there
    /// is something. May be dropped while it waits, and called again.
    pub async fn next(&mut self) -> Result<Arc<Commit>, CursorError> {
        loop {
            self.in_history().await?;
            // The bell may not have told of this history yet; what it tells of the one before is no use.
            let place = *self.places.borrow_and_update();
            if place.history != self.history {
                self.moved().await?;
                continue;
            }
            if let Some(commit) = self.paged.pop_front() {
                self.position = match self.paged_to.filter(|_| self.paged.is_empty()) {
                    Some(end) => end,
                    None => commit.anchor().into(),
                };
                return Ok(commit);
            }
            if let Some(paging) = &mut self.paging {
                let page = paging.await;
                self.paging = None;
                self.take(page.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))).await?;
                continue;
            }
            let applied = place.applied.revision;
            match self.feed.look(self.seen()) {
                // Whoever hears of it and then reads is not answered from before it.
                Lookup::Next(commit) if commit.revision > self.feed.shared.step.applied() => self.moved().await?,
                Lookup::Next(commit) if self.position.inside.is_none() && commit.is_whole() => {
                    // A watcher with much before it must not keep a thread from everybody else.
                    consume_budget().await;
                    // A new history begins before the ring does.
                    self.in_history().await?;
                    self.position = commit.anchor().into();
                    return Ok(commit);
                }
                Lookup::Next(_) => self.start_paging().await,
                Lookup::Behind if self.seen().revision < applied => self.start_paging().await,
                Lookup::Behind | Lookup::UpToDate => self.moved().await?,
                Lookup::Foreign => return Err(self.history_changed().await),
            }
        }
    }

    /// Whether the history is still the one of this watch. Asked of the step itself, which never lags.
    async fn in_history(&mut self) -> Result<(), CursorError> {
        match self.feed.shared.step.history() == self.history {
            true => Ok(()),
            false => Err(self.history_changed().await),
        }
    }

    /// The end of a watch, told once this replica follows the new history: whoever opens the next one finds it.
    async fn history_changed(&mut self) -> CursorError {
        self.feed.shared.step.nudge();
        let history = self.history;
        let end_by = *self.end_by.get_or_insert_with(|| Instant::now() + HISTORY_LIMIT);
        let _ = timeout_at(end_by, self.places.wait_for(|place| place.history > history)).await;
        CursorError::HistoryChanged { last: self.seen() }
    }

    async fn start_paging(&mut self) {
        if let Some(again) = self.page_again {
            sleep_until(again).await;
            self.page_again = None;
        }
        self.paging = Some(self.page());
    }

    /// The next page of the log, and what was applied before it was read.
    fn page(&self) -> AbortOnDropHandle<Result<(Page, Revision), LogError>> {
        let (shared, position, history) = (self.feed.shared.clone(), self.position, self.history);
        AbortOnDropHandle::new(tokio::spawn(async move {
            let turn = shared.pagers.acquire().await;
            let applied = shared.step.applied();
            let page = shared.store.read_log(&position, PAGER_LIMIT).await?;
            drop(turn);
            // The store may have gone back in time, and this replica not know yet: then the page is of another history. What
            // is found anew is what was applied before, and so vouches for no more.
            shared.step.found_anew(history).await;
            Ok((page, applied))
        }))
    }

    async fn take(&mut self, page: Result<(Page, Revision), LogError>) -> Result<(), CursorError> {
        let (page, applied) = match page {
            Ok(page) => page,
            Err(LogError::Store(StoreError::Unreachable(cause))) => {
                tracing::debug!(%cause, "a watcher asks the store for the log again");
                self.page_again = Some(Instant::now() + PAGER_RETRY);
                return Ok(());
            }
            Err(LogError::Store(error)) => return Err(CursorError::Broken(error)),
            Err(LogError::Compacted { requested, oldest, head }) => {
                return Err(CursorError::Compacted { requested, oldest, head });
            }
            Err(LogError::HistoryChanged { .. } | LogError::Unknown { .. }) => {
                return Err(self.history_changed().await);
            }
        };
        // Pages never run ahead of what the cache has applied: who hears of a change and then reads would otherwise get
        // the old role.
        let whole_page = page.commits.len();
        let mut bytes = 0;
        let is_taken = |commit: &Commit| {
            let is_first = bytes == 0;
            bytes += ring::bytes(commit);
            commit.revision <= applied && (is_first || bytes <= PAGE_BYTES)
        };
        self.paged = page.commits.into_iter().take_while(is_taken).map(Arc::new).collect();
        // Two servers may answer for one another while one takes over. A page is one server's: as its last commit, so all.
        if self.paged.back().is_some_and(|last| self.feed.shared.step.has(last.anchor()) == Some(false)) {
            return Err(self.history_changed().await);
        }
        self.paged_to = (self.paged.len() == whole_page).then_some(page.next);
        if self.paged.is_empty() {
            self.moved().await?;
        }
        Ok(())
    }

    /// Waits for the next move of this replica.
    async fn moved(&mut self) -> Result<(), CursorError> {
        // The tailer lives as long as the server.
        self.places.changed().await.map_err(|_| CursorError::HistoryChanged { last: self.seen() })
    }
}
