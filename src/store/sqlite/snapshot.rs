//! Every user with a role other than the default, from one read transaction on a connection that it keeps.

use std::time::Instant;

use async_trait::async_trait;
use sqlx::AssertSqlSafe;
use tokio::time::timeout;

use super::{Live, connection::Connection, error::unreachable, rows, triggers, users};
use crate::{
    role::{Anchor, UserId, UserRow},
    store::{SNAPSHOT_CHUNK, SNAPSHOT_LIMIT, Snapshot, StoreError},
};

struct Reading {
    /// In a read transaction, which ends when the connection closes.
    connection: Connection,
    anchor: Anchor,
    started: Instant,
    username: &'static str,
    after: Option<UserId>,
    done: bool,
}

pub(super) async fn open(live: &Live) -> Result<Box<dyn Snapshot>, StoreError> {
    let mut connection = live.snapshots.lease().await?.keep();
    sqlx::raw_sql("begin").execute(&mut *connection).await?;
    // The transaction sees the moment of its first read, which is this one.
    let row = sqlx::query("select revision, tag from rolecache_head").fetch_one(&mut *connection).await?;
    Ok(Box::new(Reading {
        anchor: rows::anchor(&row, 0)?,
        connection,
        started: Instant::now(),
        username: users::username(live),
        after: None,
        done: false,
    }))
}

#[async_trait]
impl Snapshot for Reading {
    fn anchor(&self) -> Anchor {
        self.anchor
    }

    async fn next(&mut self) -> Result<Vec<UserRow>, StoreError> {
        if self.done {
            return Ok(Vec::new());
        }
        let left = SNAPSHOT_LIMIT.saturating_sub(self.started.elapsed());
        match timeout(left, self.chunk()).await {
            Ok(chunk) => chunk,
            Err(_) => Err(unreachable(format!("the snapshot took longer than {} s", SNAPSHOT_LIMIT.as_secs()))),
        }
    }
}

impl Reading {
    async fn chunk(&mut self) -> Result<Vec<UserRow>, StoreError> {
        let bound = if self.after.is_some() { "and user_id > ?1" } else { "" };
        let sql = format!(
            "select user_id, {role}, {username} from users
             where typeof(user_id) = 'integer' {bound} and {role} <> (select default_role from rolecache_feed)
             order by user_id limit ?2",
            role = triggers::role("role"),
            username = self.username,
        );
        let found = sqlx::query(AssertSqlSafe(sql))
            .bind(self.after.map(|user| user.0))
            .bind(SNAPSHOT_CHUNK as i64)
            .fetch_all(&mut *self.connection)
            .await?;
        let chunk = found.iter().map(|row| rows::user(row, 0)).collect::<Result<Vec<_>, _>>()?;
        self.after = chunk.last().map(|last| last.user);
        self.done = chunk.len() < SNAPSHOT_CHUNK;
        Ok(chunk)
    }
}
