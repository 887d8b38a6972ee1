//! What each fault is on the wire: code, reason, metadata, a sentence. The contract is `docs/errors.md`.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::fault::{Fault, short};

const DOMAIN: &str = "rolecache";

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
            Self::NoCredentials => wire(
                Code::Unauthenticated,
                "NO_CREDENTIALS",
                "This server answers known callers only: send a bearer token as authorization metadata.".into(),
            ),
            Self::BadCredentials => wire(
                Code::Unauthenticated,
                "BAD_CREDENTIALS",
                "The authorization metadata is no bearer token of a caller that this server knows.".into(),
            ),
            Self::ScopeMissing { scope } => Wire {
                metadata: vec![("scope", scope.clone())],
                ..wire(
                    Code::PermissionDenied,
                    "SCOPE_MISSING",
                    format!("The caller lacks the scope {scope}. Nothing was changed."),
                )
            },
            Self::RateLimited { after } => retry(
                after,
                wire(
                    Code::ResourceExhausted,
                    "RATE_LIMITED",
                    "The caller makes more calls a second than it may. Nothing was changed.".into(),
                ),
            ),
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
                    "Somebody's transaction held the user's row, or everybody's turn to commit, for 2 s. This call changed nothing.".into(),
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
                wire(Code::ResourceExhausted, "OVERLOADED", "Too many calls wait here. This call changed nothing.".into()),
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
                wire(Code::Unavailable, "STORE_UNREACHABLE", "The store does not answer. This call changed nothing.".into()),
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
