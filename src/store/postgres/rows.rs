//! Rows to the words of the domain. Every statement names its columns alike, so each is read in one place.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::{Row, postgres::PgRow};
use uuid::Uuid;

use super::session::Failure;
use crate::{
    role::{Anchor, Change, MailboxId, Origin, Revision, RoleName, Tag, Transfer, UserId, UserRow},
    store::Facts,
};

/// A statement that begins with the columns of [`meta`], and so has a row at least: then `$columns`, from what
/// `$sources` joins.
macro_rules! with_head {
    ($($columns:literal $(, $sources:literal)?)?) => {
        concat!(
            "select pg_is_in_recovery() as is_standby, f.store_id, f.default_role, f.admin_role,
              f.trimmed_revision, f.trimmed_tag, h.revision as head_revision, h.tag as head_tag",
            $(", ", $columns,)?
            " from rolecache.feed f
            left join lateral (
              select c.revision, c.tag from rolecache.commits c
              where c.revision is not null order by c.revision desc limit 1
            ) h on true ",
            $($($sources,)?)?
        )
    };
}
pub(super) use with_head;

/// The head and the trim point.
pub(super) struct Meta {
    pub(super) head: Anchor,
    pub(super) trimmed: Anchor,
}

/// Whether what was read may be of long ago: only a primary says what is true now.
pub(super) fn is_of_standby(row: &PgRow) -> bool {
    row.try_get("is_standby").unwrap_or(false)
}

/// What every read begins with, if it was read from the store that was opened.
pub(super) fn meta(row: &PgRow, facts: &Facts) -> Result<Meta, Failure> {
    if is_of_standby(row) {
        return Err(Failure::Standby);
    }
    let is_ours = row.try_get::<Uuid, _>("store_id")? == facts.store_id
        && row.try_get::<&str, _>("default_role")? == facts.default_role.as_str()
        && row.try_get::<&str, _>("admin_role")? == facts.admin_role.as_str();
    if !is_ours {
        return Err(Failure::Another);
    }
    let trimmed =
        Anchor { revision: Revision(row.try_get("trimmed_revision")?), tag: Tag(row.try_get("trimmed_tag")?) };
    let head = match row.try_get::<Option<i64>, _>("head_revision")? {
        Some(revision) => Anchor { revision: Revision(revision), tag: Tag(row.try_get("head_tag")?) },
        None => trimmed,
    };
    Ok(Meta { head, trimmed })
}

/// The first row of a statement that always has one.
pub(super) fn first(rows: &[PgRow]) -> Result<&PgRow, Failure> {
    rows.first().ok_or_else(|| Failure::shape("rolecache.feed has no row"))
}

/// An optional anchor from the columns `revision` and `tag`.
pub(super) fn anchor(row: &PgRow) -> Result<Option<Anchor>, Failure> {
    let Some(revision) = row.try_get::<Option<i64>, _>("revision")? else { return Ok(None) };
    Ok(Some(Anchor { revision: Revision(revision), tag: Tag(row.try_get::<Uuid, _>("tag")?) }))
}

/// A change, and its key in its commit. None where the row has none.
pub(super) fn change(row: &PgRow, index: u64) -> Result<Option<(i64, Change)>, Failure> {
    let Some(seq) = row.try_get::<Option<i64>, _>("seq")? else { return Ok(None) };
    let transfer = match (row.try_get("transfer_from")?, row.try_get("transfer_to")?) {
        (Some(from), Some(to)) => Some(Transfer {
            from: UserId(from),
            to: UserId(to),
            mailbox: row.try_get::<Option<i64>, _>("mailbox_id")?.map(MailboxId),
        }),
        _ => None,
    };
    let origin = match row.try_get::<i16, _>("origin")? {
        1 => Origin::Rpc,
        3 => Origin::Broker,
        _ => Origin::Sql,
    };
    let change = Change {
        index,
        user: UserId(row.try_get("user_id")?),
        old: logged_role(row.try_get("old_role")?)?,
        new: logged_role(row.try_get("new_role")?)?,
        username: text(row.try_get("username")?),
        origin,
        actor: row.try_get::<&str, _>("actor")?.into(),
        reason: text(row.try_get("reason")?),
        transfer,
    };
    Ok(Some((seq, change)))
}

fn logged_role(text: Option<&str>) -> Result<Option<RoleName>, Failure> {
    match text {
        Some("") => Err(Failure::shape("the change log holds an empty role")),
        text => Ok(text.map(RoleName::held)),
    }
}

/// A user of the adopted table, where NULL and '' are the default role.
pub(super) fn user(row: &PgRow, default: &RoleName) -> Result<Option<UserRow>, Failure> {
    let Some(id) = row.try_get::<Option<i64>, _>("user_id")? else { return Ok(None) };
    let role = role(row.try_get("role")?, default);
    Ok(Some(UserRow { user: UserId(id), role, username: text(row.try_get("username")?) }))
}

pub(super) fn role(text: Option<&str>, default: &RoleName) -> RoleName {
    match text {
        None | Some("") => default.clone(),
        Some(text) if text == default.as_str() => default.clone(),
        Some(text) => RoleName::held(text),
    }
}

fn text(text: Option<&str>) -> Option<Box<str>> {
    text.filter(|text| !text.is_empty()).map(Into::into)
}

/// Microseconds since 1970, as our statements give times.
pub(super) fn time(us: i64) -> SystemTime {
    let off = Duration::from_micros(us.unsigned_abs());
    if us < 0 { UNIX_EPOCH - off } else { UNIX_EPOCH + off }
}
