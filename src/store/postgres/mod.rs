//! PostgreSQL as the store: the tables that bots know, adopted as they are, and the log that triggers write.
//!
//! `migrations/postgres` says what the database guarantees; the files here each own one kind of statement.

mod adopt;
mod list;
mod listener;
mod log;
mod migrate;
mod open;
mod rights;
mod rows;
mod session;
mod snapshot;
mod triggers;
mod upkeep;
mod write;

use std::time::Duration;

use async_trait::async_trait;
use sqlx::postgres::PgConnectOptions;

pub use self::open::open;
use self::{listener::Listening, session::Pools};
use super::{
    Call, ChangePage, Facts, ListPosition, LogError, Page, Position, Roles, Snapshot, Store, StoreError, Trimmed,
    UserPage, WriteError, Written,
};
use crate::role::{Anchor, MailboxId, Revision, Tag, UserId};

struct Postgres {
    pools: Pools,
    url: PgConnectOptions,
    facts: Facts,
    listening: Listening,
}

#[async_trait]
impl Store for Postgres {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    async fn head(&self) -> Result<Anchor, StoreError> {
        self.head().await
    }

    async fn read_log(&self, from: &Position, limit: usize) -> Result<Page, LogError> {
        self.read_log(from, limit).await
    }

    async fn locate(&self, revision: Revision, tag: Option<Tag>) -> Result<Anchor, LogError> {
        self.locate(revision, tag).await
    }

    async fn roles(&self, users: &[UserId]) -> Result<Roles, StoreError> {
        self.roles(users).await
    }

    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
        snapshot::open(&self.url, &self.facts).await
    }

    async fn write(&self, calls: &[Call]) -> Vec<Result<Written, WriteError>> {
        self.write(calls).await
    }

    async fn mailbox(&self, mailbox: MailboxId) -> Result<Option<UserId>, StoreError> {
        self.mailbox(mailbox.0).await
    }

    async fn list_users(
        &self,
        role: Option<&str>,
        after: Option<UserId>,
        limit: usize,
    ) -> Result<UserPage, StoreError> {
        self.list_users(role, after, limit).await
    }

    async fn list_changes(
        &self,
        user: Option<UserId>,
        from: ListPosition,
        limit: usize,
    ) -> Result<ChangePage, LogError> {
        self.list_changes(user, from, limit).await
    }

    async fn trim(&self, retain: Duration) -> Result<Trimmed, StoreError> {
        self.trim(retain).await
    }

    async fn check_triggers(&self) -> Result<Vec<String>, StoreError> {
        self.check_triggers().await
    }

    async fn listen(&self, wake: &(dyn Fn() + Send + Sync)) -> StoreError {
        self.listen(wake).await
    }

    fn poll_at_least_every(&self) -> Option<Duration> {
        self.poll_at_least_every()
    }

    async fn close(&self) {
        self.pools.close().await;
    }
}
