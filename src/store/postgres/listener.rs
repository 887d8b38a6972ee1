//! The doorbell: LISTEN on a connection of its own, rebuilt on any doubt.
//!
//! A hint and no more. sqlx's listener says nothing of a connection that is half open, and not always of one that
//! broke; and where notifications are swallowed nothing is ever said. So whoever has heard nothing for a while rings,
//! from another session, and expects to hear it. Every new connection rings once for whatever was missed.

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
use crate::{failpoint, store::StoreError};

const CHANNEL: &str = "rolecache";
/// After so much silence it is doubted that anything would be heard. All replicas hear what one of them rings.
const SILENCE: Duration = Duration::from_secs(5);
/// Of each statement that it takes to listen and to probe.
const STATEMENT_LIMIT: Duration = Duration::from_secs(2);
/// How long a notification to ourselves may take before LISTEN counts as swallowed.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
const PROBE_AGAIN: Duration = Duration::from_secs(60);
/// How often the log is read instead, behind a pooler.
const POLL: Duration = Duration::from_millis(50);
/// Whether this session began with the settings that we ask for, and so is ours alone. One that a pooler shares has them from
/// its role: a LISTEN would stay in it when others have it, and what it hears come between them and their answers.
const IS_OURS: &str = "select source = 'client' from pg_settings where name = 'statement_timeout'";

/// What is known about notifications.
#[derive(Default)]
pub(super) struct Listening {
    is_polled: AtomicBool,
}

enum Start {
    Heard(Ear),
    Swallowed(Ear),
    /// The session is a pooler's, and nothing listens in it.
    Pooled,
}

/// Why a connection is not trusted any more.
#[derive(Debug, thiserror::Error)]
enum Doubt {
    #[error(transparent)]
    Failed(#[from] Failure),
    #[error("it hears nothing")]
    Unheard,
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
                Ok(Start::Heard(ear)) => {
                    pause = pauses();
                    if self.listening.is_polled.swap(false, Ordering::Relaxed) {
                        tracing::info!("notifications arrive again");
                    }
                    let doubt = self.follow(ear, wake).await;
                    tracing::warn!(%doubt, "the connection that listens for changes is made anew");
                }
                Ok(Start::Swallowed(mut ear)) => {
                    // The session may go on, for others: it should not hear for us.
                    let _ = timeout(STATEMENT_LIMIT, ear.listener().unlisten_all()).await;
                    drop(ear);
                    self.poll_instead(wake).await;
                }
                Ok(Start::Pooled) => self.poll_instead(wake).await,
                Err(failure) => tracing::debug!(error = %failure, "cannot listen for changes"),
            }
            tokio::time::sleep(pause.next().unwrap_or_default()).await;
        }
    }

    /// Until it is time to look again.
    async fn poll_instead(&self, wake: &(dyn Fn() + Send + Sync)) {
        if !self.listening.is_polled.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "notifications cannot be relied on, as behind a pooler; the log is read every {} ms instead",
                POLL.as_millis()
            );
            wake();
        }
        tokio::time::sleep(PROBE_AGAIN).await;
    }

    pub(super) fn poll_at_least_every(&self) -> Option<Duration> {
        self.listening.is_polled.load(Ordering::Relaxed).then_some(POLL)
    }

    async fn subscribe(&self, wake: &(dyn Fn() + Send + Sync)) -> Result<Start, Failure> {
        // One connection, and never another: a reconnect behind our back would not be followed by a read.
        let options = session::session(&self.url, session::STATEMENT_LIMIT);
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .acquire_timeout(session::CONNECT_LIMIT)
            .connect_lazy_with(options);
        let mut ear = Ear(Some(PgListener::connect_with(&pool).await.map_err(Failure::NoConnection)?));
        let listener = ear.listener();
        listener.eager_reconnect(false);
        let is_ours = in_time(sqlx::query_scalar::<_, bool>(IS_OURS).fetch_one(&mut *listener)).await?;
        if !is_ours {
            return Ok(Start::Pooled);
        }
        in_time(listener.listen(CHANNEL)).await?;
        if !failpoint::is_on!("bug::no_read_after_listen") {
            wake();
        }
        Ok(if self.hears(listener).await? { Start::Heard(ear) } else { Start::Swallowed(ear) })
    }

    /// Rings from another session. From its own it would always be heard, behind a pooler too: both would be the same
    /// server connection at that moment.
    async fn hears(&self, listener: &mut PgListener) -> Result<bool, Failure> {
        let mark = Uuid::new_v4().to_string();
        let ring = session::fetch(&self.pools.reads, || sqlx::query("select pg_notify('rolecache', $1)").bind(&mark));
        timeout(STATEMENT_LIMIT, ring).await.unwrap_or(Err(Failure::Silent(STATEMENT_LIMIT)))?;
        // Whatever comes was not swallowed.
        match timeout(PROBE_LIMIT, listener.try_recv()).await {
            Ok(Ok(Some(_))) => Ok(true),
            Ok(Ok(None)) => Err(lost()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Ok(false),
        }
    }

    /// Rings for every notification until there is reason to doubt that they arrive.
    async fn follow(&self, mut ear: Ear, wake: &(dyn Fn() + Send + Sync)) -> Doubt {
        let listener = ear.listener();
        if !failpoint::is_on!("bug::no_read_after_listen") {
            wake();
        }
        loop {
            match timeout(SILENCE, listener.try_recv()).await {
                Ok(Ok(Some(_))) => {}
                Ok(Ok(None)) => return Doubt::Failed(lost()),
                Ok(Err(error)) => return Doubt::Failed(error.into()),
                Err(_) => match self.hears(listener).await {
                    Ok(true) => {}
                    Ok(false) => return Doubt::Unheard,
                    Err(failure) => return Doubt::Failed(failure),
                },
            }
            while listener.next_buffered().is_some() {}
            wake();
        }
    }
}

/// A listener whose connection is closed when it is dropped, whatever the other end does.
struct Ear(Option<PgListener>);

impl Ear {
    fn listener(&mut self) -> &mut PgListener {
        self.0.as_mut().expect("there until it is dropped")
    }
}

impl Drop for Ear {
    /// sqlx says good-bye to a listener's connection in a task without a limit, which would keep a silent one, and its
    /// session, for ever. Here that task comes into a runtime that ends before it runs, and takes the connection along.
    fn drop(&mut self) {
        match tokio::runtime::Builder::new_current_thread().build() {
            Ok(runtime) => {
                let handle = runtime.handle().clone();
                let _inside = handle.enter();
                drop(self.0.take());
                runtime.shutdown_background();
            }
            Err(error) => tracing::warn!(%error, "a connection that listened may stay open"),
        }
    }
}

/// A statement of the connection that listens.
async fn in_time<T>(statement: impl Future<Output = sqlx::Result<T>>) -> Result<T, Failure> {
    timeout(STATEMENT_LIMIT, statement).await.map_err(|_| Failure::Silent(STATEMENT_LIMIT))?.map_err(Failure::from)
}

fn lost() -> Failure {
    Failure::NoConnection(sqlx::Error::WorkerCrashed)
}
