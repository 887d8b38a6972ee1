//! A connection that is cut off when nobody waits for it any more.
//!
//! Dropped, its statement is interrupted. Its place stays taken until its thread has ended: on a frozen disk no more threads
//! hang than there are places.

use std::{
    ops::{Deref, DerefMut},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{ConnectOptions, Row, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::timeout,
};

use super::file::{Identity, Looker};

/// How long to wait for a place.
const ACQUIRE: Duration = Duration::from_secs(2);

/// Steps of SQLite's machine between two looks at whether somebody still waits: a few rows, each of which may take
/// milliseconds in a table that works columns out.
const STEPS: i32 = 100;

/// Where connections come from: one file, and so many places.
#[derive(Clone)]
pub(super) struct Source {
    options: SqliteConnectOptions,
    identity: Identity,
    looker: Arc<Looker>,
    places: Arc<Semaphore>,
    /// Of everything that is connected to the file.
    over: Arc<AtomicBool>,
}

/// Dropped in the middle of whatever, it interrupts that and closes.
pub(super) struct Connection {
    inner: Option<SqliteConnection>,
    cut: Arc<AtomicBool>,
    place: Option<OwnedSemaphorePermit>,
}

// === impl Source ===

impl Source {
    pub(super) fn new(
        options: SqliteConnectOptions,
        identity: Identity,
        looker: Arc<Looker>,
        over: Arc<AtomicBool>,
        places: u32,
    ) -> Self {
        Self { options, identity, looker, places: Arc::new(Semaphore::new(places as usize)), over }
    }

    /// The same places, and another wait for locks.
    pub(super) fn with_busy(&self, busy: Duration) -> Self {
        Self { options: self.options.clone().busy_timeout(busy), ..self.clone() }
    }

    /// Waits until `places` of them are free, which all are in the end.
    pub(super) async fn wait_for_places(&self, places: u32) {
        let _ = self.places.acquire_many(places).await;
    }

    pub(super) async fn connect(&self) -> Result<Connection, sqlx::Error> {
        let place = self.place().await?;
        self.connect_in(place).await
    }

    pub(super) async fn place(&self) -> Result<OwnedSemaphorePermit, sqlx::Error> {
        match timeout(ACQUIRE, self.places.clone().acquire_owned()).await {
            Ok(_) if self.over.load(Ordering::SeqCst) => Err(sqlx::Error::PoolClosed),
            Ok(place) => place.map_err(|_| sqlx::Error::PoolClosed),
            Err(_) => Err(sqlx::Error::PoolTimedOut),
        }
    }

    /// In a task: a caller who goes away leaves the place taken as long as the file is still being opened.
    pub(super) async fn connect_in(&self, place: OwnedSemaphorePermit) -> Result<Connection, sqlx::Error> {
        let Self { options, identity, looker, over, .. } = self.clone();
        let connecting = tokio::spawn(async move {
            let cut = Arc::new(AtomicBool::new(false));
            let is_cut = cut.clone();
            let inner = Some(options.connect().await?);
            let mut connection = Connection { inner, cut, place: Some(place) };
            connection
                .lock_handle()
                .await?
                .set_progress_handler(STEPS, move || !is_cut.load(Ordering::Relaxed) && !over.load(Ordering::Relaxed));
            looker.must_find(identity).await?;
            Ok(connection)
        });
        match connecting.await {
            Ok(connected) => connected,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(sqlx::Error::WorkerCrashed),
        }
    }
}

// === impl Connection ===

impl Connection {
    /// Brings what only the write-ahead log holds into the file that is open here, whatever has its name by now.
    pub(super) async fn checkpoint(&mut self) -> Result<bool, sqlx::Error> {
        let row = sqlx::query("pragma wal_checkpoint(passive)").fetch_one(&mut **self).await?;
        let (pages, done): (i64, i64) = (row.try_get(1)?, row.try_get(2)?);
        Ok(pages == done)
    }

    /// Waits until its transaction is over and its locks are free.
    pub(super) async fn close(mut self) {
        if let Some(closing) = self.start_closing() {
            let _ = closing.await;
        }
    }

    /// What it is given takes a place from here on; what it returns did so far.
    pub(super) fn swap_place(&mut self, place: Option<OwnedSemaphorePermit>) -> Option<OwnedSemaphorePermit> {
        std::mem::replace(&mut self.place, place)
    }

    fn start_closing(&mut self) -> Option<JoinHandle<()>> {
        let inner = self.inner.take()?;
        let place = self.place.take();
        // Without a runtime it closes all the same, only unseen.
        let runtime = Handle::try_current().ok()?;
        Some(runtime.spawn(async move {
            let _ = sqlx::Connection::close(inner).await;
            drop(place);
        }))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.cut.store(true, Ordering::Relaxed);
        drop(self.start_closing());
    }
}

impl Deref for Connection {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        self.inner.as_ref().expect("taken only at the end")
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        self.inner.as_mut().expect("taken only at the end")
    }
}
