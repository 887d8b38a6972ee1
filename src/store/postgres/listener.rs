//! The doorbell: LISTEN on a connection of its own, rebuilt on any doubt.
//!
//! A hint and no more. sqlx's listener says nothing of a connection that is half open, and not always of one that
//! broke; so it is asked every few seconds, and every new one rings once for whatever was missed.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    Postgres,
    session::{self, Failure},
};
use crate::store::StoreError;

const CHANNEL: &str = "rolecache";
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(2);
/// How long a notification to ourselves may take before LISTEN counts as swallowed.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
const PROBE_AGAIN: Duration = Duration::from_secs(60);
/// How often the log is read instead, behind a pooler that swallows LISTEN.
const POLL: Duration = Duration::from_millis(50);

/// What is known about notifications.
#[derive(Default)]
pub(super) struct Listening {
    is_swallowed: AtomicBool,
}

enum Probe {
    Heard,
    Swallowed,
}

impl Postgres {
    pub(super) async fn listen(&self, wake: &(dyn Fn() + Send + Sync)) -> StoreError {
        let pauses = || {
            ExponentialBuilder::default()
                .with_min_delay(Duration::from_millis(100))
                .with_max_delay(Duration::from_secs(5))
                .with_jitter()
                .without_max_times()
                .build()
        };
        let mut pause = pauses();
        loop {
            match self.subscribe(wake).await {
                Ok((listener, Probe::Heard)) => {
                    pause = pauses();
                    self.listening.is_swallowed.store(false, Ordering::Relaxed);
                    let failure = follow(listener, wake).await;
                    tracing::warn!(error = %failure, "the connection that listens for changes is lost");
                }
                Ok((_, Probe::Swallowed)) => {
                    if !self.listening.is_swallowed.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            "notifications do not arrive, as behind a pooler in transaction mode; the log is read every \
                             {} ms instead",
                            POLL.as_millis()
                        );
                        wake();
                    }
                    tokio::time::sleep(PROBE_AGAIN).await;
                }
                Err(failure) => tracing::debug!(error = %failure, "cannot listen for changes"),
            }
            tokio::time::sleep(pause.next().unwrap_or_default()).await;
        }
    }

    pub(super) fn poll_at_least_every(&self) -> Option<Duration> {
        self.listening.is_swallowed.load(Ordering::Relaxed).then_some(POLL)
    }

    async fn subscribe(&self, wake: &(dyn Fn() + Send + Sync)) -> Result<(PgListener, Probe), Failure> {
        // One connection, and never another: a reconnect behind our back would not be followed by a read.
        let options = session::session(&self.url, session::STATEMENT_LIMIT);
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .acquire_timeout(session::CONNECT_LIMIT)
            .connect_lazy_with(options);
        let mut listener = PgListener::connect_with(&pool).await.map_err(Failure::NoConnection)?;
        listener.eager_reconnect(false);
        answered(HEARTBEAT_LIMIT, listener.listen(CHANNEL)).await?;
        wake();
        let probe = self.probe(&mut listener).await?;
        Ok((listener, probe))
    }

    /// Rings from another session. From its own it would always be heard, behind a pooler too: both would be the same
    /// server connection at that moment.
    async fn probe(&self, listener: &mut PgListener) -> Result<Probe, Failure> {
        let mark = Uuid::new_v4().to_string();
        session::fetch(&self.pools.reads, sqlx::query("select pg_notify('rolecache', $1)").bind(&mark)).await?;
        // Whatever comes was not swallowed.
        match timeout(PROBE_LIMIT, listener.try_recv()).await {
            Ok(Ok(Some(_))) => Ok(Probe::Heard),
            Ok(Ok(None)) => Err(lost()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Ok(Probe::Swallowed),
        }
    }
}

/// Rings for every notification until there is reason to doubt that they arrive.
async fn follow(mut listener: PgListener, wake: &(dyn Fn() + Send + Sync)) -> Failure {
    wake();
    loop {
        match timeout(HEARTBEAT_EVERY, listener.try_recv()).await {
            Ok(Ok(Some(_))) => {
                while listener.next_buffered().is_some() {}
                wake();
            }
            Ok(Ok(None)) => return lost(),
            Ok(Err(error)) => return error.into(),
            Err(_) => {
                let beat = sqlx::query("select 1").execute(&mut listener);
                if let Err(failure) = answered(HEARTBEAT_LIMIT, beat).await {
                    return failure;
                }
            }
        }
    }
}

async fn answered<T>(limit: Duration, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Failure> {
    match timeout(limit, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Failure::Silent(limit)),
    }
}

fn lost() -> Failure {
    Failure::NoConnection(sqlx::Error::WorkerCrashed)
}
