//! Connections for reading, which go back into their pool only in order.
//!
//! A read that ran out of time, or whose caller went away, leaves its connection half read: that one is never used again.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use sqlx::SqliteConnection;

use super::connection::{Connection, Source};
use crate::store::{LogError, StoreError};

/// Connections for reading, used again and again.
pub(super) struct Pool {
    source: Source,
    size: u32,
    /// Never held across an await.
    idle: Arc<Mutex<Idle>>,
}

#[derive(Default)]
struct Idle {
    connections: Vec<Connection>,
    closed: bool,
}

/// A connection that goes back into its pool only through [`Lease::end`].
pub(super) struct Lease {
    connection: Connection,
    idle: Arc<Mutex<Idle>>,
}

/// Whether an answer says that its connection is in order.
pub(super) trait Verdict {
    fn is_in_order(&self) -> bool;
}

// === impl Pool ===

impl Pool {
    pub(super) fn new(source: Source, size: u32) -> Self {
        Self { source, size, idle: Arc::default() }
    }

    pub(super) async fn lease(&self) -> Result<Lease, sqlx::Error> {
        let place = self.source.place().await?;
        let ready = {
            let mut idle = lock(&self.idle);
            if idle.closed {
                return Err(sqlx::Error::PoolClosed);
            }
            idle.connections.pop()
        };
        let connection = match ready {
            Some(mut connection) => {
                connection.swap_place(Some(place));
                connection
            }
            None => self.source.connect_in(place).await?,
        };
        Ok(Lease { connection, idle: self.idle.clone() })
    }

    /// A connection that nobody reads on, which never goes back.
    pub(super) fn take_idle(&self) -> Option<Connection> {
        lock(&self.idle).connections.pop()
    }

    /// Waits until every connection is closed. The source is over: what still reads ends.
    pub(super) async fn close(&self) {
        let left = {
            let mut idle = lock(&self.idle);
            idle.closed = true;
            std::mem::take(&mut idle.connections)
        };
        for connection in left {
            connection.close().await;
        }
        self.source.wait_for_places(self.size).await;
    }
}

// === impl Lease ===

impl Lease {
    /// Passes `answer` on, and the connection back where nothing is wrong with it.
    pub(super) fn end<T, E: Verdict>(self, answer: Result<T, E>) -> Result<T, E> {
        if answer.as_ref().err().is_none_or(Verdict::is_in_order) {
            let Self { mut connection, idle } = self;
            let mut idle = lock(&idle);
            // Otherwise it keeps its place until it is closed, for which the pool waits.
            if !idle.closed {
                // Free only once the connection is back.
                let _place = connection.swap_place(None);
                idle.connections.push(connection);
            }
        }
        answer
    }

    /// The connection alone, which never goes back.
    pub(super) fn keep(self) -> Connection {
        self.connection
    }
}

impl Deref for Lease {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.connection
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }
}

// === impl Verdict ===

impl Verdict for StoreError {
    fn is_in_order(&self) -> bool {
        false
    }
}

impl Verdict for LogError {
    fn is_in_order(&self) -> bool {
        !matches!(self, Self::Store(_))
    }
}

impl Verdict for sqlx::Error {
    fn is_in_order(&self) -> bool {
        false
    }
}

fn lock(idle: &Mutex<Idle>) -> MutexGuard<'_, Idle> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}
