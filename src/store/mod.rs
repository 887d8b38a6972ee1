//! The store is the truth: `users`, `mailboxes` and the change log behind one trait.
//!
//! The trait's docs are the contract that both stores keep and `tests/store` checks: what is atomic, what is
//! ordered, which errors are worth another try. Every method has a limit of its own and may be cancelled, `write`
//! apart: that one belongs into a task, because a dropped write may leave its transaction open.

mod call;
pub mod postgres;
pub mod sqlite;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use uuid::Uuid;

pub use self::call::{Call, Grant, Op, Refusal, RequestId, WriteError, Written};
use crate::role::{Anchor, Change, Commit, MailboxId, Revision, RoleName, Tag, UserId, UserRow};

/// Whatever went wrong inside a store: for the log, never for a client.
pub type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// The truth about who has which role.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// What was found when the store was opened.
    fn facts(&self) -> &Facts;

    /// The newest commit; where the log is empty, the point up to which it was trimmed.
    async fn head(&self) -> Result<Anchor, StoreError>;

    /// What follows `from` in the log, oldest first, as of one moment: whole commits while they have at most `limit`
    /// changes together, or up to `limit` changes of the first one where that alone has more.
    ///
    /// The anchor must be found with its tag, in the same statement: the log is still the one that `from` is of, and
    /// nothing is missing between the anchor and the first commit of the page.
    async fn read_log(&self, from: &Position, limit: usize) -> Result<Page, LogError>;

    /// The anchor from which a reader who has seen everything up to `revision` goes on. With a tag, the commit of this
    /// revision and tag; without one, the newest commit up to `revision`.
    async fn locate(&self, revision: Revision, tag: Option<Tag>) -> Result<Anchor, LogError>;

    /// The roles of `users`, in their order, and the head, as of one moment. Who is unknown has the default role.
    async fn roles(&self, users: &[UserId]) -> Result<Roles, StoreError>;

    /// Every user with a role other than the default, as of one moment, in order of id and chunk by chunk.
    /// Lasts at most 60 s in all.
    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError>;

    /// Does `calls`, which name each user, mailbox and request id at most once between them, and answers for each in
    /// its place. Each is all or nothing; those that commit together share a revision; none fails for another's sake.
    /// A call that came before with the same request id writes nothing and gets the first answer.
    ///
    /// Nothing is waited for: what somebody else has locked is `Busy`, and worth another try.
    async fn write(&self, calls: &[Call]) -> Vec<Result<Written, WriteError>>;

    /// Who a mailbox belongs to.
    async fn mailbox(&self, mailbox: MailboxId) -> Result<Option<UserId>, StoreError>;

    /// Up to `limit` users after `after` in order of id, with this role if one is given, and the head, as of one
    /// moment. A row without a role has the default role.
    async fn list_users(&self, role: Option<&str>, after: Option<UserId>, limit: usize)
    -> Result<UserPage, StoreError>;

    /// Up to `limit` changes after `from`, oldest first, of one user if one is given, and the head, as of one moment.
    /// With `from.kept_only` whatever is left of the log will do; otherwise a trimmed start is `Compacted`.
    async fn list_changes(
        &self,
        user: Option<UserId>,
        from: ListPosition,
        limit: usize,
    ) -> Result<ChangePage, LogError>;

    /// Removes one batch of commits, oldest first, that are older than `retain` and not among the newest 10,000, and
    /// one of request ids older than a day. Answers how many commits and request ids went; 0 and 0 when all is done or
    /// another replica is at it.
    async fn trim(&self, retain: Duration) -> Result<Trimmed, StoreError>;

    /// Whether everything that logs changes is still in place; what is not, in sentences. Opening the store puts it right,
    /// where it may migrate, and ends the history, so that nobody goes on as if nothing had been missed.
    async fn check_triggers(&self) -> Result<Vec<String>, StoreError>;

    /// Calls `wake` whenever the log may have grown. A hint and no more: wake-ups get lost. Returns only on a broken
    /// invariant, after having rebuilt its connection on any lesser doubt.
    async fn listen(&self, wake: &(dyn Fn() + Send + Sync)) -> StoreError;

    /// The longest that a reader of the log may wait for `listen`, where the store has a reason of its own.
    fn poll_at_least_every(&self) -> Option<Duration>;

    /// Closes every connection.
    async fn close(&self);
}

/// Users as of [`Snapshot::anchor`].
#[async_trait]
pub trait Snapshot: Send {
    /// The newest commit that this snapshot has in it.
    fn anchor(&self) -> Anchor;

    /// The next chunk of at most [`SNAPSHOT_CHUNK`] users; empty at the end.
    async fn next(&mut self) -> Result<Vec<UserRow>, StoreError>;
}

/// Users per chunk of a snapshot.
pub const SNAPSHOT_CHUNK: usize = 1_000;

/// How long a snapshot or a whole load may take.
pub const SNAPSHOT_LIMIT: Duration = Duration::from_secs(60);

/// Commits that stay in the log however old they are.
pub const KEEP_COMMITS: i64 = 10_000;

/// How long a request id is remembered.
pub const KEEP_REQUESTS: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StoreKind {
    Postgres,
    Sqlite,
}

/// What a store is, found out when it is opened.
#[derive(Clone, Debug)]
pub struct Facts {
    pub kind: StoreKind,
    /// Names the database: another id is another database.
    pub store_id: Uuid,
    pub default_role: RoleName,
    pub admin_role: RoleName,
    /// Where it is, without secrets, and what was adopted: one sentence for the start log each.
    pub about: String,
    pub adopted: String,
}

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct Options {
    /// `postgres://...` or `sqlite://...`
    pub url: String,
    pub default_role: RoleName,
    pub admin_role: RoleName,
    /// Bring the schema up to date, or only check that it is.
    pub migrate: bool,
}

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Worth another try.
    #[error("the store cannot be reached: {0}")]
    Unreachable(Cause),
    /// Trying again changes nothing: a sentence for the person who starts the server.
    #[error("{0}")]
    Refused(String),
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// No answer in time, or no connection. Worth another try.
    #[error("the store does not answer: {0}")]
    Unreachable(Cause),
    /// An answer that the schema rules out.
    #[error("the store is broken: {0}")]
    Broken(Cause),
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum LogError {
    /// The log holds no such commit any more, though it should: a restored backup, or a failover that lost commits. Or it
    /// does, and a trigger was missing after it: changes were made that nobody logged.
    #[error("the history of the store is not the one that revision {} is of", at.revision)]
    HistoryChanged { at: Anchor, head: Revision },
    /// What follows was trimmed, or has a hole. `oldest` can still be resumed from.
    #[error("the log is trimmed up to revision {oldest}, which is after {requested}")]
    Compacted { requested: Revision, oldest: Revision, head: Revision },
    /// Past the head.
    #[error("revision {requested} is not known; the newest is {head}")]
    Unknown { requested: Revision, head: Revision },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Where a read of the log goes on: after a whole commit, or inside the one that follows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Position {
    pub anchor: Anchor,
    pub inside: Option<Inside>,
}

/// A place inside the commit that follows the anchor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inside {
    pub commit: Anchor,
    /// The index of the next change.
    pub index: u64,
    /// The store's own key of the last change read.
    pub row: i64,
}

/// A part of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// Whole commits, or a run of one.
    pub commits: Vec<Commit>,
    /// Where the next read goes on.
    pub next: Position,
    /// The newest commit at the moment of the read: the page reaches it where `next` is after it.
    pub head: Anchor,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Roles {
    pub head: Anchor,
    pub roles: Vec<RoleName>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UserPage {
    pub head: Anchor,
    pub users: Vec<UserRow>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListPosition {
    /// Changes of later commits follow, and
    pub revision: Revision,
    /// of this commit those from this index on, which starts at this row key.
    pub inside: Option<(u64, i64)>,
    pub kept_only: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChangePage {
    pub head: Anchor,
    pub changes: Vec<ListedChange>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedChange {
    pub revision: Revision,
    pub at: SystemTime,
    pub change: Change,
    /// The store's own key of this change in its commit.
    pub row: i64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Trimmed {
    pub commits: u64,
    pub requests: u64,
}

// === impl StoreKind ===

impl StoreKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Sqlite => "sqlite",
        }
    }
}

// === impl Position ===

impl From<Anchor> for Position {
    fn from(anchor: Anchor) -> Self {
        Self { anchor, inside: None }
    }
}

// === impl Page ===

impl Page {
    /// Whether nothing followed at the moment of the read.
    pub fn reaches_head(&self) -> bool {
        self.next.inside.is_none() && self.next.anchor == self.head
    }
}

/// Opens the store that the URL names.
pub async fn open(options: &Options) -> Result<Arc<dyn Store>, OpenError> {
    if options.url.starts_with("sqlite:") {
        return sqlite::open(options).await;
    }
    postgres::open(options).await
}
