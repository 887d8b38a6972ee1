//! The connections to one file.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::timeout;

use super::{
    LOOK_EVERY,
    adopt::Users,
    connection::{Connection, Source},
    file::Identity,
    pool::Pool,
};

/// The connections to one file.
pub(super) struct Live {
    /// For the log and its head alone: no list, however slow, keeps the feed waiting.
    pub(super) log: Pool,
    /// For everything else that reads.
    pub(super) reads: Pool,
    /// None before the first write and after any doubt.
    pub(super) writer: tokio::sync::Mutex<Option<Connection>>,
    pub(super) writers: Source,
    /// As of the last look. Never held across an await.
    pub(super) identity: Mutex<Identity>,
    pub(super) users: Users,
}

// === impl Live ===

impl Live {
    pub(super) async fn connect_writer(&self, busy: Option<Duration>) -> Result<Connection, sqlx::Error> {
        let mut connection = match busy {
            Some(busy) => self.writers.with_busy(busy).connect().await?,
            None => self.writers.connect().await?,
        };
        // Not among the options: unlike those it reads the file.
        sqlx::raw_sql("pragma synchronous = full").execute(&mut *connection).await?;
        Ok(connection)
    }

    pub(super) fn identity(&self) -> Identity {
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn close(&self) {
        // A stuck statement must not keep us: the process ends, or the file is not ours any more.
        let closed = timeout(LOOK_EVERY, async {
            if let Some(writer) = self.writer.lock().await.take() {
                writer.close().await;
            }
            tokio::join!(self.log.close(), self.reads.close());
        });
        if closed.await.is_err() {
            tracing::warn!("a connection was still busy when the database was closed");
        }
    }
}
