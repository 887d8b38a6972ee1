//! Rows of the store as domain types.
//!
//! SQLite stores what it is given: a role may be bytes that are no text. Those are read with U+FFFD in their place, so that
//! one odd row never breaks an answer about others.

use std::time::{Duration, SystemTime};

use futures::{Stream, TryStreamExt};
use sqlx::{Row, sqlite::SqliteRow};

use super::error::broken;
use crate::{
    role::{Anchor, Change, MailboxId, Origin, Revision, RoleName, Tag, Transfer, UserId, UserRow},
    store::StoreError,
};

/// The columns that [`change`] reads, from its first one on.
pub(super) const CHANGE_COLUMNS: &str = "seq, commit_id, user_id, old_role, new_role, username, origin, actor, reason, \
     transfer_from, transfer_to, mailbox_id";

/// A row of `rolecache_changes`.
pub(super) struct LoggedChange {
    pub(super) row: i64,
    pub(super) revision: Revision,
    pub(super) change: Change,
}

/// Rows as what they say, one by one: as the driver has them they take many times as much memory.
pub(super) async fn each<T>(
    mut rows: impl Stream<Item = Result<SqliteRow, sqlx::Error>> + Unpin,
    read: impl Fn(&SqliteRow) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    let mut all = Vec::new();
    while let Some(row) = rows.try_next().await? {
        all.push(read(&row)?);
    }
    Ok(all)
}

/// The first row of a statement that has the head beside whatever it looks for.
pub(super) fn first(rows: &[SqliteRow]) -> Result<&SqliteRow, StoreError> {
    rows.first().ok_or_else(|| broken("rolecache_feed has no row"))
}

pub(super) fn text(row: &SqliteRow, column: usize) -> Result<Option<String>, sqlx::Error> {
    match row.try_get(column) {
        Err(sqlx::Error::ColumnDecode { .. }) => {
            let bytes: Option<Vec<u8>> = row.try_get_unchecked(column)?;
            Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
        }
        text => text,
    }
}

pub(super) fn held(text: &str) -> Result<RoleName, StoreError> {
    if text.is_empty() {
        return Err(broken("the log holds an empty role"));
    }
    Ok(RoleName::held(text))
}

pub(super) fn role(row: &SqliteRow, column: usize) -> Result<Option<RoleName>, StoreError> {
    text(row, column)?.as_deref().map(held).transpose()
}

pub(super) fn tag(row: &SqliteRow, column: usize) -> Result<Tag, StoreError> {
    Ok(Tag(row.try_get(column)?))
}

/// An anchor in two columns.
pub(super) fn anchor(row: &SqliteRow, column: usize) -> Result<Anchor, StoreError> {
    Ok(Anchor { revision: Revision(row.try_get(column)?), tag: tag(row, column + 1)? })
}

pub(super) fn time(row: &SqliteRow, column: usize) -> Result<SystemTime, StoreError> {
    let millis: i64 = row.try_get(column)?;
    let distance = Duration::from_millis(millis.unsigned_abs());
    let time = match millis < 0 {
        true => SystemTime::UNIX_EPOCH.checked_sub(distance),
        false => SystemTime::UNIX_EPOCH.checked_add(distance),
    };
    time.ok_or_else(|| broken(format!("the log holds the time {millis}")))
}

/// A row of `users` in three columns.
pub(super) fn user(row: &SqliteRow, column: usize) -> Result<UserRow, StoreError> {
    let user = UserId(row.try_get(column)?);
    let role = role(row, column + 1)?.ok_or_else(|| broken("a user without a role"))?;
    Ok(UserRow { user, role, username: text(row, column + 2)?.map(Into::into) })
}

/// The columns of [`CHANGE_COLUMNS`]; the index is the caller's to know.
pub(super) fn change(row: &SqliteRow, column: usize) -> Result<LoggedChange, StoreError> {
    let id = |offset: usize| row.try_get::<Option<i64>, _>(column + offset);
    let origin = match row.try_get::<i64, _>(column + 6)? {
        1 => Origin::Rpc,
        2 => Origin::Sql,
        3 => Origin::Broker,
        other => return Err(broken(format!("the log holds the origin {other}"))),
    };
    let transfer = match (id(9)?, id(10)?) {
        (Some(from), Some(to)) => {
            Some(Transfer { from: UserId(from), to: UserId(to), mailbox: id(11)?.map(MailboxId) })
        }
        _ => None,
    };
    Ok(LoggedChange {
        row: row.try_get(column)?,
        revision: Revision(row.try_get(column + 1)?),
        change: Change {
            index: 0,
            user: UserId(row.try_get(column + 2)?),
            old: role(row, column + 3)?,
            new: role(row, column + 4)?,
            username: text(row, column + 5)?.map(Into::into),
            origin,
            actor: text(row, column + 7)?.unwrap_or_default().into(),
            reason: text(row, column + 8)?.map(Into::into),
            transfer,
        },
    })
}
