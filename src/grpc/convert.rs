//! Wire to domain, checked field by field, and domain to wire. Past this file nobody checks again.

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use prost::Message;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{fault::Fault, token};
use crate::{
    proto::v1,
    role::{
        Anchor, Change, ChangeKind, Commit, MailboxId, Origin, Revision, RoleName, RoleNameError, Transfer, UserId,
        UserRow,
    },
    step::FeedState,
    store::RequestId,
};

pub(super) const MAX_USER_IDS: usize = 10_000;
const MAX_NAME_BYTES: usize = 64;
const MAX_REASON_BYTES: usize = 500;
const MAX_PAGE: i32 = 1_000;
const DEFAULT_PAGE: i32 = 100;
const HEARTBEAT: Duration = Duration::from_secs(10);
const HEARTBEAT_RANGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60 * 60));

// === wire to domain ===

pub(super) fn user_id(field: &str, id: i64) -> Result<UserId, Fault> {
    if id == 0 { Err(Fault::field(field, "it must not be 0")) } else { Ok(UserId(id)) }
}

pub(super) fn user_ids(field: &str, ids: &[i64]) -> Result<Vec<UserId>, Fault> {
    if ids.len() > MAX_USER_IDS {
        return Err(Fault::field(field, format!("at most {MAX_USER_IDS} users at once, not {}", ids.len())));
    }
    match ids.iter().position(|id| *id == 0) {
        Some(index) => Err(Fault::field(format!("{field}[{index}]"), "it must not be 0")),
        None => Ok(ids.iter().copied().map(UserId).collect()),
    }
}

pub(super) fn mailbox_id(field: &str, id: i64) -> Result<MailboxId, Fault> {
    if id == 0 { Err(Fault::field(field, "it must not be 0")) } else { Ok(MailboxId(id)) }
}

pub(super) fn revision(field: &str, revision: i64) -> Result<Revision, Fault> {
    if revision < 0 { Err(Fault::field(field, "it must not be negative")) } else { Ok(Revision(revision)) }
}

/// A role to be written: well formed, and one that this server knows.
pub(super) fn role_to_write(field: &'static str, role: &str, known: &[RoleName]) -> Result<RoleName, Fault> {
    let role = RoleName::to_write(role).map_err(|error: RoleNameError| Fault::field(field, error.to_string()))?;
    if known.contains(&role) {
        return Ok(role);
    }
    let known: Vec<&str> = known.iter().map(RoleName::as_str).collect();
    Err(Fault::UnknownRole { field, known: known.join(",") })
}

/// A role to compare with: a store may hold any.
pub(super) fn role_to_compare(field: &str, role: String) -> Result<Box<str>, Fault> {
    text(field, role, MAX_NAME_BYTES)
}

/// None where it is empty.
pub(super) fn name(field: &str, name: String) -> Result<Option<Box<str>>, Fault> {
    Ok(Some(text(field, name, MAX_NAME_BYTES)?).filter(|name| !name.is_empty()))
}

/// None where it is empty.
pub(super) fn reason(field: &str, reason: String) -> Result<Option<Box<str>>, Fault> {
    Ok(Some(text(field, reason, MAX_REASON_BYTES)?).filter(|reason| !reason.is_empty()))
}

fn text(field: &str, text: String, max_bytes: usize) -> Result<Box<str>, Fault> {
    if text.len() > max_bytes {
        return Err(Fault::field(field, format!("it has at most {max_bytes} bytes, not {}", text.len())));
    }
    // No PostgreSQL can store or compare it.
    if text.contains('\0') {
        return Err(Fault::field(field, "it must not contain the character NUL"));
    }
    Ok(text.into())
}

/// The caller's key for a write, with a hash of `request`, whose own request_id must be taken out.
pub(super) fn request_id(rpc: &str, id: String, request: &impl Message) -> Result<Option<RequestId>, Fault> {
    let Some(id) = name("request_id", id)? else { return Ok(None) };
    let mut hash = Sha256::new();
    hash.update(rpc);
    hash.update([0]);
    hash.update(request.encode_to_vec());
    Ok(Some(RequestId { id, hash: hash.finalize().into() }))
}

pub(super) fn page_size(size: i32) -> Result<usize, Fault> {
    match size {
        0 => Ok(DEFAULT_PAGE as usize),
        1..=MAX_PAGE => Ok(size as usize),
        _ => Err(Fault::field("page_size", format!("it is from 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}"))),
    }
}

/// Each kind once, however often it was named: it is kept as long as the watch is open.
pub(super) fn change_kinds(field: &str, kinds: &[i32]) -> Result<HashSet<ChangeKind>, Fault> {
    let kind = |(index, kind): (usize, &i32)| match v1::ChangeKind::try_from(*kind) {
        Ok(v1::ChangeKind::UserCreated) => Ok(ChangeKind::UserCreated),
        Ok(v1::ChangeKind::AdminAdded) => Ok(ChangeKind::AdminAdded),
        Ok(v1::ChangeKind::AdminRemoved) => Ok(ChangeKind::AdminRemoved),
        Ok(v1::ChangeKind::AdminTransferred) => Ok(ChangeKind::AdminTransferred),
        Ok(v1::ChangeKind::RoleChanged) => Ok(ChangeKind::RoleChanged),
        Ok(v1::ChangeKind::UserDeleted) => Ok(ChangeKind::UserDeleted),
        Ok(v1::ChangeKind::Unspecified) | Err(_) => {
            Err(Fault::field(format!("{field}[{index}]"), format!("{kind} is no kind of change")))
        }
    };
    kinds.iter().enumerate().map(kind).collect()
}

pub(super) fn heartbeat_interval(interval: Option<prost_types::Duration>) -> Result<Duration, Fault> {
    let Some(interval) = interval else { return Ok(HEARTBEAT) };
    let (least, most) = HEARTBEAT_RANGE;
    // By hand: prost's own conversion takes nanoseconds beyond a second, and overflows at the extremes.
    u64::try_from(interval.seconds)
        .ok()
        .zip(u32::try_from(interval.nanos).ok().filter(|nanos| *nanos < 1_000_000_000))
        .map(|(seconds, nanos)| Duration::new(seconds, nanos))
        .filter(|interval| (least..=most).contains(interval))
        .ok_or_else(|| Fault::field("heartbeat_interval", "it is from 0.1 s to 1 h"))
}

// === domain to wire ===

pub(super) fn change(change: &Change, revision: Revision, at: SystemTime, admin: &RoleName) -> v1::RoleChange {
    let role = |role: &Option<RoleName>| role.as_ref().map_or_else(String::new, RoleName::to_string);
    let text = |text: &Option<Box<str>>| text.as_deref().unwrap_or_default().to_owned();
    v1::RoleChange {
        revision: revision.0,
        user_id: change.user.0,
        old_role: role(&change.old),
        new_role: role(&change.new),
        kind: kind(change.kind(admin)).into(),
        origin: origin(change.origin).into(),
        transfer: change.transfer.as_ref().map(transfer),
        username: text(&change.username),
        actor: change.actor.to_string(),
        reason: text(&change.reason),
        changed_at: Some(at.into()),
        index: i32::try_from(change.index).unwrap_or(i32::MAX),
    }
}

fn kind(kind: ChangeKind) -> v1::ChangeKind {
    match kind {
        ChangeKind::UserCreated => v1::ChangeKind::UserCreated,
        ChangeKind::AdminAdded => v1::ChangeKind::AdminAdded,
        ChangeKind::AdminRemoved => v1::ChangeKind::AdminRemoved,
        ChangeKind::AdminTransferred => v1::ChangeKind::AdminTransferred,
        ChangeKind::RoleChanged => v1::ChangeKind::RoleChanged,
        ChangeKind::UserDeleted => v1::ChangeKind::UserDeleted,
    }
}

fn origin(origin: Origin) -> v1::Origin {
    match origin {
        Origin::Rpc => v1::Origin::Rpc,
        Origin::Sql => v1::Origin::Sql,
        Origin::Broker => v1::Origin::Broker,
    }
}

fn transfer(transfer: &Transfer) -> v1::Transfer {
    v1::Transfer {
        from_user_id: transfer.from.0,
        to_user_id: transfer.to.0,
        mailbox_id: transfer.mailbox.map(|mailbox| mailbox.0),
    }
}

/// A message with `changes`, which are of `commit`. Only the last message of a commit has a token.
pub(super) fn commit(commit: &Commit, changes: Vec<v1::RoleChange>, partial: bool, store_id: Uuid) -> v1::Commit {
    let resume_token = if partial { String::new() } else { token::resume_token(store_id, commit.anchor()) };
    v1::Commit { revision: commit.revision.0, changes, partial, resume_token }
}

pub(super) fn heartbeat(seen: Anchor, feed: FeedState, store_id: Uuid) -> v1::Heartbeat {
    v1::Heartbeat {
        revision: seen.revision.0,
        sent_at: Some(SystemTime::now().into()),
        feed_state: feed_state(feed).into(),
        resume_token: token::resume_token(store_id, seen),
    }
}

pub(super) fn feed_state(feed: FeedState) -> v1::FeedState {
    match feed {
        FeedState::Live => v1::FeedState::Live,
        FeedState::CatchingUp => v1::FeedState::CatchingUp,
        FeedState::Disconnected => v1::FeedState::Disconnected,
    }
}

pub(super) fn user_role(row: UserRow) -> v1::UserRole {
    v1::UserRole {
        user_id: row.user.0,
        role: row.role.to_string(),
        username: row.username.unwrap_or_default().into_string(),
    }
}
