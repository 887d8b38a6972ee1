//! The words of the domain as checked types: users, role names, revisions, changes, commits.
//!
//! Imports nothing of ours; every other module speaks in these.

use std::{fmt, sync::Arc, time::SystemTime};

use uuid::Uuid;

/// The id by which a bot knows a user. Any value a bot's own table holds; requests refuse 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct UserId(pub i64);

/// The id of a mailbox. Requests refuse 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct MailboxId(pub i64);

/// The number of a commit. Later commits have larger ones; numbers may be skipped; 0 is before the first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Revision(pub i64);

/// The random mark of one commit: two histories that give one revision to different commits differ in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tag(pub Uuid);

/// The commit at which a read of the log starts, and which it must find with this tag.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Anchor {
    pub revision: Revision,
    pub tag: Tag,
}

/// A role as the store holds it: never empty, otherwise any text. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RoleName(Arc<str>);

/// Why a text cannot be written as a role.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RoleNameError {
    #[error("a role must not be empty")]
    Empty,
    #[error("a role has at most {} bytes", RoleName::MAX_WRITTEN_BYTES)]
    TooLong,
    #[error("a role has only the characters a-z, 0-9, _ and -")]
    Character,
}

/// Through which door a change came in. The numbers are stored in the change log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    Rpc = 1,
    Sql = 2,
    Broker = 3,
}

/// What a change was; derived from the change, never stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ChangeKind {
    UserCreated,
    AdminAdded,
    AdminRemoved,
    AdminTransferred,
    RoleChanged,
    UserDeleted,
}

/// The hand-over that a change belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transfer {
    pub from: UserId,
    pub to: UserId,
    pub mailbox: Option<MailboxId>,
}

/// One user's part of a commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// Its place in its commit, from 0 and without gaps.
    pub index: u64,
    pub user: UserId,
    /// None where the user did not exist before.
    pub old: Option<RoleName>,
    /// None where the user was deleted.
    pub new: Option<RoleName>,
    pub username: Option<Box<str>>,
    pub origin: Origin,
    pub actor: Arc<str>,
    pub reason: Option<Box<str>>,
    pub transfer: Option<Transfer>,
}

/// What one transaction changed, or a run of it: a commit may be larger than anybody wants to hold at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Commit {
    pub revision: Revision,
    pub tag: Tag,
    pub at: SystemTime,
    /// How many changes the whole commit has, however many are here.
    pub size: u64,
    /// In order of index, without gaps.
    pub changes: Vec<Change>,
}

/// A row of `users`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UserRow {
    pub user: UserId,
    pub role: RoleName,
    pub username: Option<Box<str>>,
}

// === impl RoleName ===

impl RoleName {
    pub const MAX_WRITTEN_BYTES: usize = 64;

    /// A role that the store holds already.
    ///
    /// # Panics
    /// On an empty text: the stores read that, like NULL, as the default role.
    pub fn held(text: &str) -> Self {
        assert!(!text.is_empty(), "a store reads an empty role as the default role");
        Self(text.into())
    }

    /// A role to be written, or to be configured.
    pub fn to_write(text: &str) -> Result<Self, RoleNameError> {
        if text.is_empty() {
            return Err(RoleNameError::Empty);
        }
        if text.len() > Self::MAX_WRITTEN_BYTES {
            return Err(RoleNameError::TooLong);
        }
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
        if !text.bytes().all(allowed) {
            return Err(RoleNameError::Character);
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RoleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl ids ===

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for MailboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// === impl Change ===

impl Change {
    /// What the change was, where `admin` is the role of admins.
    pub fn kind(&self, admin: &RoleName) -> ChangeKind {
        let Some(new) = &self.new else { return ChangeKind::UserDeleted };
        if self.transfer.is_some_and(|transfer| transfer.to == self.user) {
            return ChangeKind::AdminTransferred;
        }
        match &self.old {
            old if new == admin && old.as_ref() != Some(admin) => ChangeKind::AdminAdded,
            Some(old) if old == admin && new != admin => ChangeKind::AdminRemoved,
            None => ChangeKind::UserCreated,
            Some(_) => ChangeKind::RoleChanged,
        }
    }
}

// === impl Commit ===

impl Commit {
    pub fn anchor(&self) -> Anchor {
        Anchor { revision: self.revision, tag: self.tag }
    }

    /// Whether every change of the commit is here.
    pub fn is_whole(&self) -> bool {
        self.changes.len() as u64 == self.size
    }

    /// Whether this run of the commit has its last change.
    pub fn ends_here(&self) -> bool {
        self.changes.last().is_some_and(|last| last.index + 1 == self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(old: Option<&str>, new: Option<&str>, transfer: Option<Transfer>) -> Change {
        Change {
            index: 0,
            user: UserId(1),
            old: old.map(RoleName::held),
            new: new.map(RoleName::held),
            username: None,
            origin: Origin::Rpc,
            actor: "anonymous".into(),
            reason: None,
            transfer,
        }
    }

    #[test]
    fn a_kind_is_derived_from_the_two_roles_and_the_transfer() {
        let admin = RoleName::held("admin");
        let to_us = Some(Transfer { from: UserId(2), to: UserId(1), mailbox: None });
        let from_us = Some(Transfer { from: UserId(1), to: UserId(2), mailbox: None });
        for (old, new, transfer, kind) in [
            (None, Some("user"), None, ChangeKind::UserCreated),
            (None, Some("admin"), None, ChangeKind::AdminAdded),
            (Some("user"), Some("admin"), None, ChangeKind::AdminAdded),
            (Some("admin"), Some("user"), None, ChangeKind::AdminRemoved),
            (Some("admin"), Some("user"), from_us, ChangeKind::AdminRemoved),
            (Some("user"), Some("helper"), None, ChangeKind::RoleChanged),
            (Some("helper"), Some("user"), from_us, ChangeKind::RoleChanged),
            (Some("admin"), Some("admin"), to_us, ChangeKind::AdminTransferred),
            (None, Some("admin"), to_us, ChangeKind::AdminTransferred),
            (Some("admin"), None, None, ChangeKind::UserDeleted),
            (Some("user"), None, None, ChangeKind::UserDeleted),
        ] {
            assert_eq!(change(old, new, transfer).kind(&admin), kind, "{old:?} to {new:?}, {transfer:?}");
        }
    }

    #[test]
    fn a_role_to_write_is_short_and_plain() {
        assert!(RoleName::to_write("super_admin-2").is_ok());
        assert!(RoleName::to_write(&"a".repeat(64)).is_ok());
        assert_eq!(RoleName::to_write(""), Err(RoleNameError::Empty));
        assert_eq!(RoleName::to_write(&"a".repeat(65)), Err(RoleNameError::TooLong));
        for text in ["Admin", "a b", "é", "a\0", "a/b"] {
            assert_eq!(RoleName::to_write(text), Err(RoleNameError::Character), "{text:?}");
        }
    }
}
