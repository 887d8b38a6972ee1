//! The one map from what went wrong to what a caller is told: code, reason, metadata, a sentence.
//!
//! The contract is `docs/errors.md`. Causes stay in the log; no word of the store's reaches a caller.

use std::{collections::HashMap, fmt::Display, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use uuid::Uuid;

use crate::{
    cache::ReadError,
    feed::CursorError,
    role::{Anchor, MailboxId, Revision, RoleName, UserId},
    store::{LogError, Refusal, StoreError},
    writer::WriteFailure,
};

const DOMAIN: &str = "rolecache";

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

/// What a fault is on the wire.
struct Wire {
    code: Code,
    reason: &'static str,
    message: String,
    metadata: Vec<(&'static str, String)>,
    field: Option<String>,
    retry_after: Option<Duration>,
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

    fn wire(self) -> Wire {
        let wire = |code, reason, message: String| Wire {
            code,
            reason,
            message,
            metadata: Vec::new(),
            field: None,
            retry_after: None,
        };
        let retry = |after: Duration, wire: Wire| Wire { retry_after: Some(after), ..wire };
        let soon = Duration::from_millis(200);
        let later = Duration::from_secs(1);
        match self {
            Self::InvalidField { field, problem } => Wire {
                field: Some(field.clone()),
                ..wire(Code::InvalidArgument, "INVALID_FIELD", format!("{field}: {problem}."))
            },
            Self::UnknownRole { field, known } => Wire {
                field: Some(field.into()),
                metadata: vec![("known_roles", known.clone())],
                ..wire(
                    Code::InvalidArgument,
                    "UNKNOWN_ROLE",
                    format!("{field}: this server does not know the role; it knows {known}."),
                )
            },
            Self::RequestIdReused => Wire {
                field: Some("request_id".into()),
                ..wire(
                    Code::InvalidArgument,
                    "REQUEST_ID_REUSED",
                    "request_id: it came before, with another request. Use a new one for each write.".into(),
                )
            },
            Self::MailboxNotFound { mailbox } => Wire {
                metadata: vec![("mailbox_id", mailbox.to_string())],
                ..wire(Code::NotFound, "MAILBOX_NOT_FOUND", format!("Mailbox {mailbox} is not registered."))
            },
            Self::MailboxExists { creator } => Wire {
                metadata: vec![("creator_id", creator.to_string())],
                ..wire(
                    Code::AlreadyExists,
                    "MAILBOX_EXISTS",
                    format!("The mailbox is registered already, with user {creator} as its creator."),
                )
            },
            Self::RoleMismatch { current } => Wire {
                metadata: vec![("current_role", short(&current))],
                ..wire(
                    Code::FailedPrecondition,
                    "ROLE_MISMATCH",
                    format!("The user's role is {:?}, not the expected one. Nothing was changed.", short(&current)),
                )
            },
            Self::NotAnAdmin { current } => Wire {
                metadata: vec![("current_role", short(&current))],
                ..wire(
                    Code::FailedPrecondition,
                    "NOT_AN_ADMIN",
                    format!("from_user_id is no admin: its role is {:?}. Nothing was changed.", short(&current)),
                )
            },
            Self::NotTheCreator { creator } => Wire {
                metadata: vec![("creator_id", creator.to_string())],
                ..wire(
                    Code::FailedPrecondition,
                    "NOT_THE_CREATOR",
                    format!("from_user_id did not create the mailbox: user {creator} did. Nothing was changed."),
                )
            },
            Self::HistoryChanged { store_id, revision } => Wire {
                metadata: vec![("store_id", store_id.to_string()), ("revision", revision.to_string())],
                ..wire(
                    Code::DataLoss,
                    "HISTORY_CHANGED",
                    "The store's history is not the one that this watch followed: open it anew with initial_snapshot."
                        .into(),
                )
            },
            Self::RevisionUnknown { requested, head } => Wire {
                metadata: vec![("revision", head.to_string())],
                ..wire(
                    Code::FailedPrecondition,
                    "REVISION_UNKNOWN",
                    format!("Revision {requested} is not known to the store: its newest is {head}."),
                )
            },
            Self::StoreRejected => wire(
                Code::FailedPrecondition,
                "STORE_REJECTED",
                "A constraint or trigger of the users table refused the write. Nothing was changed.".into(),
            ),
            Self::UserBusy => retry(
                soon,
                wire(
                    Code::Aborted,
                    "USER_BUSY",
                    "Somebody's transaction held the user's row for 2 s. Nothing was changed.".into(),
                ),
            ),
            Self::RevisionCompacted { requested, oldest, head, store_id } => Wire {
                metadata: vec![
                    ("requested", requested.to_string()),
                    ("oldest", oldest.to_string()),
                    ("revision", head.to_string()),
                    ("store_id", store_id.to_string()),
                ],
                ..wire(
                    Code::OutOfRange,
                    "REVISION_COMPACTED",
                    format!(
                        "The log no longer holds what follows revision {requested}; {oldest} is the oldest to go on \
                         from. A watch is opened anew with initial_snapshot."
                    ),
                )
            },
            Self::Overloaded => retry(
                soon,
                wire(Code::ResourceExhausted, "OVERLOADED", "Too many calls wait here. Nothing was changed.".into()),
            ),
            Self::TooManyWatches => retry(
                later,
                wire(
                    Code::ResourceExhausted,
                    "TOO_MANY_WATCHES",
                    "This server has as many watches open as it may.".into(),
                ),
            ),
            Self::MessageTooLarge { limit } => wire(
                Code::ResourceExhausted,
                "MESSAGE_TOO_LARGE",
                format!("The request is over the limit of {limit} bytes."),
            ),
            Self::Deadline => wire(
                Code::DeadlineExceeded,
                "DEADLINE",
                "The deadline passed. If it was a write, it may have happened: ask again with the same request_id."
                    .into(),
            ),
            Self::StoreUnreachable => retry(
                later,
                wire(Code::Unavailable, "STORE_UNREACHABLE", "The store does not answer. Nothing was changed.".into()),
            ),
            Self::OutcomeUnknown => wire(
                Code::Unknown,
                "OUTCOME_UNKNOWN",
                "The store did not confirm the write, which may have happened: ask again with the same request_id."
                    .into(),
            ),
            Self::TooStale { age } => Wire {
                metadata: vec![("age_ms", age.as_millis().to_string())],
                ..retry(
                    later,
                    wire(
                        Code::Unavailable,
                        "TOO_STALE",
                        format!("The store has been out of reach for {} s: what is cached is too old.", age.as_secs()),
                    ),
                )
            },
            Self::ShuttingDown => {
                retry(later, wire(Code::Unavailable, "SHUTTING_DOWN", "This server is shutting down.".into()))
            }
            Self::Bug { incident } => Wire {
                metadata: vec![("incident", incident.to_string())],
                ..wire(
                    Code::Internal,
                    "BUG",
                    format!("Something broke that should not. The server's log has it as incident {incident}."),
                )
            },
        }
    }
}

/// An adopted table may hold a role of any length; a status travels in headers, which may not have any.
fn short(role: &RoleName) -> String {
    role.as_str().chars().take(64).collect()
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let Wire { code, reason, message, metadata, field, retry_after } = fault.wire();
        let metadata: HashMap<String, String> =
            metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, DOMAIN, metadata);
        if let Some(field) = field {
            details.add_bad_request_violation(field, message.clone());
        }
        if let Some(after) = retry_after {
            details.set_retry_info(Some(after));
        }
        Status::with_error_details(code, message, details)
    }
}
