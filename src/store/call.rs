//! Writes as callers ask for them, and what becomes of them.

use std::{sync::Arc, time::SystemTime};

use super::Cause;
use crate::role::{Change, MailboxId, Revision, RoleName, Tag, UserId};

/// One write, as a caller asked for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    pub actor: Arc<str>,
    pub grant: Grant,
    pub request: Option<RequestId>,
    pub op: Op,
}

/// The roles that a caller may give and take. Compared under the lock of the row, so that nobody takes away a role that
/// came between a look and the write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Grant {
    Any,
    /// These, and the default role: it is the absence of rights, and so within every grant.
    Only(Arc<[RoleName]>),
}

/// A caller's own key for one write, and a hash of what it asked for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RequestId {
    pub id: Box<str>,
    pub hash: [u8; 32],
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    Set {
        user: UserId,
        role: RoleName,
        /// None leaves the known one.
        username: Option<Box<str>>,
        /// Only if this is the role now. The default role also matches a user that does not exist, "" only such a one.
        expected: Option<Box<str>>,
        reason: Option<Box<str>>,
    },
    Transfer {
        from: UserId,
        to: UserId,
        mailbox: Option<MailboxId>,
        demote_from: bool,
        to_username: Option<Box<str>>,
        reason: Option<Box<str>>,
    },
    Delete {
        user: UserId,
        reason: Option<Box<str>>,
    },
    Register {
        mailbox: MailboxId,
        creator: UserId,
    },
}

/// A write that is committed, or that had nothing to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Written {
    /// Of the commit that holds it; of a write with nothing to do, the head as read after its rows were locked.
    pub revision: Revision,
    /// Of that commit; None of an earlier attempt whose commit is not looked up again.
    pub tag: Option<Tag>,
    pub at: SystemTime,
    /// What it changed, in order of index; empty where it had nothing to do. Of a transfer first the receiver's.
    pub changes: Vec<Change>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteError {
    /// Somebody's transaction holds what it needs. Nothing was changed; worth another try.
    #[error("somebody's transaction holds the row")]
    Busy,
    /// Somebody's transaction holds what every commit needs. Nothing was changed; worth another try.
    #[error("somebody's transaction holds what every commit needs")]
    AllHeld,
    /// An earlier attempt with the same request id has not ended, and may yet happen; worth another try.
    #[error("an earlier attempt with the same request id has not ended")]
    Underway,
    #[error("refused: {0:?}")]
    Refused(Refusal),
    /// It was never sent, or is known not to have happened.
    #[error("the store does not answer: {0}")]
    Unreachable(Cause),
    /// It was sent, and the answer was lost: it may have happened.
    #[error("the connection broke before the store confirmed: {0}")]
    OutcomeUnknown(Cause),
    /// An earlier attempt with the same request id was written; what it did is trimmed.
    #[error("the commit of the earlier attempt is not in the log any more")]
    Forgotten,
    #[error("the store is broken: {0}")]
    Broken(Cause),
}

/// Why a write was refused. Nothing was changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// This role would come or go, and is outside of the caller's grant. Told even where nothing would change, and before
    /// the role is compared with the expected one. A repeat of a request id is no matter of grants: it changes nothing.
    NotGranted {
        role: RoleName,
    },
    RoleMismatch {
        current: RoleName,
    },
    NotAnAdmin {
        current: RoleName,
    },
    NotTheCreator {
        creator: UserId,
    },
    MailboxNotFound,
    MailboxExists {
        creator: UserId,
    },
    RequestIdReused,
    /// A constraint or trigger of the adopted table said no.
    Rejected {
        cause: String,
    },
}

// === impl Call ===

impl Call {
    /// The users whose rows it touches.
    pub fn users(&self) -> impl Iterator<Item = UserId> {
        let (first, second) = match &self.op {
            Op::Set { user, .. } | Op::Delete { user, .. } => (Some(*user), None),
            Op::Transfer { from, to, .. } => (Some(*from), Some(*to)),
            Op::Register { .. } => (None, None),
        };
        first.into_iter().chain(second)
    }

    /// The mailbox whose row it touches.
    pub fn mailbox(&self) -> Option<MailboxId> {
        match &self.op {
            Op::Transfer { mailbox, .. } => *mailbox,
            Op::Register { mailbox, .. } => Some(*mailbox),
            Op::Set { .. } | Op::Delete { .. } => None,
        }
    }
}

// === impl Written ===

impl Written {
    /// What a call is told: of its own users. The table's own triggers and keys may have changed others.
    pub(super) fn of(mut self, call: &Call) -> Self {
        self.changes.retain(|change| call.users().any(|user| user == change.user));
        self
    }
}

// === impl Grant ===

impl Grant {
    /// Whether `role` may be given and taken in a store with this default role.
    pub fn covers(&self, role: &RoleName, default_role: &RoleName) -> bool {
        match self {
            Self::Any => true,
            Self::Only(roles) => role == default_role || roles.contains(role),
        }
    }
}
