//! The seeds of an audit: a line in the log for each change that this replica applies.

use crate::{
    feed::OVERSIZED,
    role::{Change, ChangeKind, Commit, Origin, RoleName},
};

/// Writes down every change of a commit; of an oversized one, only that it happened.
pub(super) fn record(commit: &Commit, admin: &RoleName) {
    if commit.size > OVERSIZED {
        if commit.ends_here() {
            tracing::info!(target: "rolecache::audit", revision = commit.revision.0, changes = commit.size, "roles changed in bulk");
        }
        return;
    }
    for change in &commit.changes {
        record_change(commit, change, admin);
    }
}

fn record_change(commit: &Commit, change: &Change, admin: &RoleName) {
    let (kind, message) = match change.kind(admin) {
        ChangeKind::UserCreated => ("user_created", "user created"),
        ChangeKind::AdminAdded => ("admin_added", "admin added"),
        ChangeKind::AdminRemoved => ("admin_removed", "admin removed"),
        ChangeKind::AdminTransferred => ("admin_transferred", "admin transferred"),
        ChangeKind::RoleChanged => ("role_changed", "role changed"),
        ChangeKind::UserDeleted => ("user_deleted", "user deleted"),
    };
    let origin = match change.origin {
        Origin::Rpc => "rpc",
        Origin::Sql => "sql",
        Origin::Broker => "broker",
    };
    tracing::info!(
        target: "rolecache::audit",
        kind,
        user_id = change.user.0,
        username = change.username.as_deref().unwrap_or_default(),
        old_role = change.old.as_ref().map_or("", RoleName::as_str),
        new_role = change.new.as_ref().map_or("", RoleName::as_str),
        actor = &*change.actor,
        origin,
        reason = change.reason.as_deref().unwrap_or_default(),
        revision = commit.revision.0,
        "{message}"
    );
}
