//! The embedded store: one SQLite file, one server process, any number of other programs that write to `users`.
//!
//! Reads run on a few pools and see one moment each, by one statement or one read transaction. Writes run on one connection,
//! which is thrown away on any doubt about its transaction. Every call has a limit of its own: a disk may freeze.

mod adopt;
mod batch;
mod call;
mod check;
mod connection;
mod error;
mod file;
mod list;
mod live;
mod lock;
mod log;
mod open;
mod place;
mod plan;
mod pool;
mod requests;
mod rows;
mod schema;
mod snapshot;
mod triggers;
mod trim;
mod users;

use std::{
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::time::timeout;

pub use self::open::open;
use self::{error::unreachable, file::Looker, live::Live, lock::Lock, open::EstablishError};
use super::{
    Call, ChangePage, Facts, ListPosition, LogError, Options, Page, Position, Roles, Snapshot, Store, StoreError,
    Trimmed, UserPage, WriteError, Written,
};
use crate::role::{Anchor, MailboxId, Revision, Tag, UserId};

/// How long any one call may take.
const LIMIT: Duration = Duration::from_secs(5);

/// How often it is checked that the file under our connections is the one that has its name.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// SQLite offers no wake-up across processes: a look at the log costs less than one at the file would bring.
const POLL: Duration = Duration::from_millis(50);

struct Sqlite {
    path: PathBuf,
    options: Options,
    facts: Facts,
    /// Guards which file we are connected to. Never held across an await.
    current: Mutex<Current>,
    /// One at a time looks at the file and reopens it. Taken before `current`.
    looking: tokio::sync::Mutex<()>,
    looker: Arc<Looker>,
    lock: Mutex<Option<Lock>>,
}

struct Current {
    live: Arc<Live>,
    /// None once the file is known to be another one.
    looked: Option<Instant>,
    /// The store is closed, and opens nothing any more.
    closed: bool,
}

// === impl Sqlite ===

impl Sqlite {
    fn new(path: PathBuf, options: Options, facts: Facts, live: Live, looker: Arc<Looker>, lock: Lock) -> Self {
        let current = Current { live: Arc::new(live), looked: Some(Instant::now()), closed: false };
        Self {
            path,
            options,
            facts,
            current: Mutex::new(current),
            looking: tokio::sync::Mutex::new(()),
            looker,
            lock: Mutex::new(Some(lock)),
        }
    }

    /// The connections, to the file that had our name a second ago at the latest.
    async fn live(&self) -> Result<Arc<Live>, StoreError> {
        match self.looked_within(LOOK_EVERY) {
            Some(live) => Ok(live),
            None => self.look().await,
        }
    }

    /// The connections, to the file that has our name now.
    async fn look(&self) -> Result<Arc<Live>, StoreError> {
        let asked = Instant::now();
        let _one_at_a_time = self.looking.lock().await;
        if let Some(live) = self.looked_within(asked.elapsed()) {
            return Ok(live);
        }
        let live = {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if current.closed {
                return Err(closed());
            }
            current.live.clone()
        };
        match self.looker.look().await {
            // Closed for a file that could not be opened then, it is of no use for the one that came back.
            Ok(now) if now.is_file_of(&live.identity()) && !live.is_closed() => {
                *live.identity.lock().unwrap_or_else(PoisonError::into_inner) = now;
                self.current.lock().unwrap_or_else(PoisonError::into_inner).looked = Some(asked);
                Ok(live)
            }
            Ok(_) => self.reopen(live).await,
            Err(error) => Err(unreachable(format!("{}: {error}", self.path.display()))),
        }
    }

    fn looked_within(&self, age: Duration) -> Option<Arc<Live>> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.looked.filter(|looked| looked.elapsed() <= age).map(|_| current.live.clone())
    }

    /// Follows the name to the file that it names now: a restored backup, whose history the anchors will not find.
    async fn reopen(&self, old: Arc<Live>) -> Result<Arc<Live>, StoreError> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).looked = None;
        let gone = |error| StoreError::Unreachable(error::cause(error));
        let note = |identity| *old.identity.lock().unwrap_or_else(PoisonError::into_inner) = identity;
        if !old.is_closed() {
            tracing::warn!(file = %self.path.display(), "the database file was replaced; opening the new one");
            // Not once it is closed: what this process has open then may belong to the file that it could not open.
            let (identity, path) = (old.identity(), self.path.clone());
            // Noted, should this call be dropped before it is done.
            note(file::aside(move || identity.with_open_wal(&path)).await.map_err(gone)?);
        }
        old.close().await;
        let (identity, path) = (old.identity(), self.path.clone());
        file::aside(move || identity.remove_old_wal(&path)).await.map_err(gone)?;
        // Another one may get its number.
        note(identity.without_wal());
        let known = Some(self.facts.store_id);
        let live = match open::establish(&self.path, &self.options, &self.looker, known).await {
            Ok((live, _)) => Arc::new(live),
            Err(EstablishError::Another) => {
                return Err(error::broken(format!("{} is another database now", self.path.display())));
            }
            Err(EstablishError::Open(error)) => return Err(StoreError::Unreachable(error::cause(error))),
        };
        let is_closed = {
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if !current.closed {
                *current = Current { live: live.clone(), looked: Some(Instant::now()), closed: false };
            }
            current.closed
        };
        if is_closed {
            live.close().await;
            return Err(closed());
        }
        Ok(live)
    }
}

#[async_trait]
impl Store for Sqlite {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    async fn head(&self) -> Result<Anchor, StoreError> {
        limited(async { log::head(&self.look().await?.log).await }).await
    }

    async fn read_log(&self, from: &Position, limit: usize) -> Result<Page, LogError> {
        limited(async { log::read(&self.look().await?.log, from, limit).await }).await
    }

    async fn locate(&self, revision: Revision, tag: Option<Tag>) -> Result<Anchor, LogError> {
        limited(async { log::locate(&self.live().await?.lists, revision, tag).await }).await
    }

    async fn roles(&self, users: &[UserId]) -> Result<Roles, StoreError> {
        limited(async { users::roles(&self.live().await?.fills, &self.facts.default_role, users).await }).await
    }

    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
        limited(async { snapshot::open(&*self.live().await?).await }).await
    }

    async fn write(&self, calls: &[Call]) -> Vec<Result<Written, WriteError>> {
        // A batch that went into a file that had lost its name would be gone.
        match limited(self.look()).await {
            Ok(live) => batch::write(&live, &self.facts, calls).await,
            Err(StoreError::Unreachable(cause)) => {
                calls.iter().map(|_| Err(WriteError::Unreachable(cause.clone()))).collect()
            }
            Err(StoreError::Broken(cause)) => calls.iter().map(|_| Err(WriteError::Broken(cause.clone()))).collect(),
        }
    }

    async fn mailbox(&self, mailbox: MailboxId) -> Result<Option<UserId>, StoreError> {
        limited(async { users::mailbox(&self.live().await?.lists, mailbox).await }).await
    }

    async fn list_users(
        &self,
        role: Option<&str>,
        after: Option<UserId>,
        limit: usize,
    ) -> Result<UserPage, StoreError> {
        limited(async { users::list(&*self.live().await?, role, after, limit).await }).await
    }

    async fn list_changes(
        &self,
        user: Option<UserId>,
        from: ListPosition,
        limit: usize,
    ) -> Result<ChangePage, LogError> {
        limited(async { list::changes(&self.live().await?.lists, user, from, limit).await }).await
    }

    async fn trim(&self, retain: Duration) -> Result<Trimmed, StoreError> {
        limited(async { trim::trim(&*self.live().await?, retain).await }).await
    }

    async fn check_triggers(&self) -> Result<Vec<String>, StoreError> {
        limited(async { check::triggers(&self.live().await?.lists).await }).await
    }

    async fn listen(&self, _wake: &(dyn Fn() + Send + Sync)) -> StoreError {
        // Whoever reads the log polls it, as `poll_at_least_every` says.
        std::future::pending().await
    }

    fn poll_at_least_every(&self) -> Option<Duration> {
        Some(POLL)
    }

    async fn close(&self) {
        let live = {
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            current.closed = true;
            current.live.clone()
        };
        live.close().await;
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(lock) = lock {
            lock.release();
        }
    }
}

fn closed() -> StoreError {
    unreachable("the store is closed")
}

async fn limited<T, E: From<StoreError>>(call: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    match timeout(LIMIT, call).await {
        Ok(answer) => answer,
        Err(_) => Err(unreachable(format!("no answer within {} s", LIMIT.as_secs())).into()),
    }
}
