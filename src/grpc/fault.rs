//! Everything that a caller can be told, and which failure inside is which of them.
//!
//! Causes stay in the log; no word of the store's reaches a caller.

use std::{any::Any, fmt::Display, time::Duration};

use uuid::Uuid;

use crate::{
    cache::ReadError,
    feed::CursorError,
    panics,
    role::{Anchor, MailboxId, Revision, RoleName, UserId},
    store::{LogError, Refusal, StoreError},
    writer::WriteFailure,
};

/// Everything that a caller can be told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    InvalidField { field: String, problem: String },
    UnknownRole { field: &'static str, known: String },
    RequestIdReused,
    MailboxNotFound { mailbox: MailboxId },
    MailboxExists { creator: UserId },
    RoleMismatch { current: RoleName },
    NotAnAdmin { current: RoleName },
    NotTheCreator { creator: UserId },
    HistoryChanged { store_id: Uuid, revision: Revision },
    RevisionUnknown { requested: Revision, head: Revision },
    NoCredentials,
    BadCredentials,
    ScopeMissing { scope: String },
    RateLimited { after: Duration },
    StoreRejected,
    UserBusy,
    RevisionCompacted { requested: Revision, oldest: Revision, head: Revision, store_id: Uuid },
    Overloaded,
    TooManyWatches,
    MessageTooLarge { limit: usize },
    Deadline,
    StoreUnreachable,
    OutcomeUnknown,
    TooStale { age: Duration },
    ShuttingDown,
    Bug { incident: Uuid },
}

/// An adopted table may hold a role of any length; a status travels in headers, which may not have any.
pub(super) fn short(role: &RoleName) -> String {
    role.as_str().chars().take(64).collect()
}

// === impl Fault ===

impl Fault {
    pub(super) fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::InvalidField { field: field.into(), problem: problem.into() }
    }

    /// A broken invariant: the cause goes to the log, under an id that the caller gets.
    pub(super) fn bug(cause: &dyn Display) -> Self {
        let incident = Uuid::new_v4();
        tracing::error!(%incident, %cause, "a call failed for a reason that should not exist");
        Self::Bug { incident }
    }

    /// What a handler left when it panicked.
    pub(super) fn panic(left: &(dyn Any + Send)) -> Self {
        let incident = Uuid::new_v4();
        tracing::error!(%incident, cause = panics::text(left), panics = panics::count(), "a call panicked");
        Self::Bug { incident }
    }

    /// Why a call was denied, in a word of the contract.
    pub(super) fn denial(&self) -> String {
        match self {
            Self::NoCredentials => "NO_CREDENTIALS".into(),
            Self::BadCredentials => "BAD_CREDENTIALS".into(),
            Self::ScopeMissing { scope } => format!("SCOPE_MISSING {scope}"),
            Self::RateLimited { .. } => "RATE_LIMITED".into(),
            other => format!("{other:?}"),
        }
    }

    fn unreachable(cause: &dyn Display) -> Self {
        tracing::debug!(%cause, "a call failed because the store does not answer");
        Self::StoreUnreachable
    }

    pub(super) fn read(error: ReadError) -> Self {
        match error {
            ReadError::Unreachable(cause) => Self::unreachable(&cause),
            ReadError::Broken(cause) => Self::bug(&cause),
            ReadError::TooStale { age } => Self::TooStale { age },
            ReadError::Overloaded => Self::Overloaded,
            ReadError::UnknownRevision { requested, head } => Self::RevisionUnknown { requested, head },
            ReadError::Deadline => Self::Deadline,
        }
    }

    pub(super) fn store(error: StoreError) -> Self {
        match error {
            StoreError::Unreachable(cause) => Self::unreachable(&cause),
            StoreError::Broken(cause) => Self::bug(&cause),
        }
    }

    pub(super) fn log(error: LogError, store_id: Uuid) -> Self {
        match error {
            LogError::HistoryChanged { head, .. } => Self::HistoryChanged { store_id, revision: head },
            LogError::Compacted { requested, oldest, head } => {
                Self::RevisionCompacted { requested, oldest, head, store_id }
            }
            LogError::Unknown { requested, head } => Self::RevisionUnknown { requested, head },
            LogError::Store(error) => Self::store(error),
        }
    }

    /// `head` is the newest revision known.
    pub(super) fn cursor(error: CursorError, store_id: Uuid, head: Anchor) -> Self {
        match error {
            CursorError::HistoryChanged { .. } => Self::HistoryChanged { store_id, revision: head.revision },
            CursorError::Compacted { requested, oldest, head } => {
                Self::RevisionCompacted { requested, oldest, head, store_id }
            }
            CursorError::Broken(error) => Self::store(error),
        }
    }

    pub(super) fn write(failure: WriteFailure, mailbox: Option<MailboxId>) -> Self {
        match failure {
            WriteFailure::Refused(refusal) => Self::refusal(refusal, mailbox),
            WriteFailure::UserBusy => Self::UserBusy,
            WriteFailure::Unreachable(cause) => Self::unreachable(&cause),
            WriteFailure::OutcomeUnknown => Self::OutcomeUnknown,
            WriteFailure::Overloaded => Self::Overloaded,
            WriteFailure::Broken(cause) => Self::bug(&cause),
        }
    }

    fn refusal(refusal: Refusal, mailbox: Option<MailboxId>) -> Self {
        match refusal {
            Refusal::NotGranted { role } => Self::ScopeMissing { scope: format!("write:{}", short(&role)) },
            Refusal::RoleMismatch { current } => Self::RoleMismatch { current },
            Refusal::NotAnAdmin { current } => Self::NotAnAdmin { current },
            Refusal::NotTheCreator { creator } => Self::NotTheCreator { creator },
            Refusal::MailboxNotFound => match mailbox {
                Some(mailbox) => Self::MailboxNotFound { mailbox },
                None => Self::bug(&"a mailbox was not found that no call named"),
            },
            Refusal::MailboxExists { creator } => Self::MailboxExists { creator },
            Refusal::RequestIdReused => Self::RequestIdReused,
            Refusal::Rejected { cause } => {
                tracing::warn!(%cause, "the store's own table refused a write");
                Self::StoreRejected
            }
        }
    }
}
