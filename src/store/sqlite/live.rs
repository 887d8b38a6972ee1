//! The connections to one file.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::timeout;

use super::{
    LOOK_EVERY,
    adopt::Users,
    connection::{Connection, Source},
    file::Identity,
    open::WRITERS,
    pool::Pool,
};

/// The connections to one file.
pub(super) struct Live {
    /// For the log and its head alone: no list, however slow, keeps the feed waiting.
    pub(super) log: Pool,
    /// For the roles that the cache misses: neither lists nor snapshots keep them waiting.
    pub(super) fills: Pool,
    /// For lists, what is looked up, and what upkeep looks at.
    pub(super) lists: Pool,
    /// For snapshots, each of which keeps its connection for as long as it is read.
    pub(super) snapshots: Pool,
    /// None before the first write and after any doubt.
    pub(super) writer: tokio::sync::Mutex<Option<Connection>>,
    pub(super) writers: Source,
    /// As of the last look. Never held across an await.
    pub(super) identity: Mutex<Identity>,
    pub(super) users: Users,
    /// Set for good as closing begins: interrupts every statement, and refuses every new connection.
    pub(super) over: Arc<AtomicBool>,
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

    /// Whether it can do no more, now and ever after.
    pub(super) fn is_closed(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Ends whatever still runs, and waits for it, within a limit.
    pub(super) async fn close(&self) {
        self.over.store(true, Ordering::SeqCst);
        // Closes alone: of two that close at once, neither would be the last one, which clears the write-ahead log away.
        let pools = [&self.log, &self.fills, &self.lists, &self.snapshots];
        let mut last = pools.into_iter().find_map(Pool::take_idle);
        // A stuck statement must not keep us: the process ends, or the file is not ours any more.
        let closed = timeout(LOOK_EVERY, async {
            let writers = async {
                if let Some(mut writer) = self.writer.lock().await.take() {
                    if last.is_some() {
                        writer.close().await;
                    } else {
                        drop(writer.swap_place(None));
                        last = Some(writer);
                    }
                }
                self.writers.wait_for_places(WRITERS).await;
                // Nobody writes any more. A file that lost its name would be left without what only the log holds.
                if let Some(connection) = &mut last {
                    match connection.checkpoint().await {
                        Ok(true) => {}
                        Ok(false) => tracing::warn!("another program reads: not all of the log went into the database"),
                        Err(error) => tracing::warn!(%error, "the log did not go into the database"),
                    }
                }
            };
            let readers = async {
                tokio::join!(self.log.close(), self.fills.close(), self.lists.close(), self.snapshots.close())
            };
            tokio::join!(writers, readers);
            if let Some(last) = last {
                last.close().await;
            }
        });
        if closed.await.is_err() {
            tracing::warn!("a connection was still busy when the database was closed");
        }
    }
}
