//! Reads of `users` and `mailboxes`, each together with the head, in one statement.

use sqlx::{AssertSqlSafe, Row};

use super::{Live, pool::Pool, rows, triggers};
use crate::{
    role::{MailboxId, RoleName, UserId},
    store::{Roles, StoreError, UserPage},
};

pub(super) async fn roles(pool: &Pool, default_role: &RoleName, users: &[UserId]) -> Result<Roles, StoreError> {
    let mut lease = pool.lease().await?;
    let found = sqlx::query(
        "select h.revision, h.tag, nullif(cast(u.role as text) collate binary, '')
         from rolecache_head h left join json_each(?1) j left join users u on u.user_id = j.value
         order by j.key",
    )
    .bind(json(users))
    .fetch_all(&mut *lease)
    .await;
    let found = lease.end(found)?;
    let head = rows::anchor(rows::first(&found)?, 0)?;
    let role = |row| Ok(rows::role(row, 2)?.unwrap_or_else(|| default_role.clone()));
    // Nobody asked for still gives the row with the head.
    let roles = found.iter().take(users.len()).map(role).collect::<Result<_, StoreError>>()?;
    Ok(Roles { head, roles })
}

/// Ids as a JSON array: one statement for any number.
pub(super) fn json(users: &[UserId]) -> String {
    let ids: Vec<_> = users.iter().map(|user| user.0).collect();
    serde_json::Value::from(ids).to_string()
}

/// Of the mailbox ?1. Whatever else the bot's table has there is nobody.
pub(super) const CREATOR: &str = "select creator_id from mailboxes where id = ?1 and typeof(creator_id) = 'integer'";

pub(super) async fn mailbox(pool: &Pool, mailbox: MailboxId) -> Result<Option<UserId>, StoreError> {
    let mut lease = pool.lease().await?;
    let creator: Result<Option<i64>, _> = sqlx::query_scalar(CREATOR).bind(mailbox.0).fetch_optional(&mut *lease).await;
    Ok(lease.end(creator)?.map(UserId))
}

pub(super) async fn list(
    live: &Live,
    role: Option<&str>,
    after: Option<UserId>,
    limit: usize,
) -> Result<UserPage, StoreError> {
    let norm = triggers::role("role");
    let username = username(live);
    let bound = if after.is_some() { "and user_id > ?1" } else { "" };
    let filter = if role.is_some() { format!("and {norm} = ?2") } else { String::new() };
    let sql = format!(
        "select h.revision, h.tag, u.user_id, u.role, u.username from rolecache_head h left join (
           select user_id, {norm} as role, {username} as username from users
           where typeof(user_id) = 'integer' {bound} {filter} order by user_id limit ?3
         ) u order by u.user_id"
    );
    let mut lease = live.lists.lease().await?;
    let found = sqlx::query(AssertSqlSafe(sql))
        .bind(after.map(|user| user.0))
        .bind(role)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&mut *lease)
        .await;
    let found = lease.end(found)?;
    let head = rows::anchor(rows::first(&found)?, 0)?;
    let is_user = |row: &&sqlx::sqlite::SqliteRow| matches!(row.try_get::<Option<i64>, _>(2), Ok(Some(_)));
    let users = found.iter().filter(is_user).map(|row| rows::user(row, 2)).collect::<Result<_, _>>()?;
    Ok(UserPage { head, users })
}

pub(super) fn username(live: &Live) -> &'static str {
    if live.users.has_username { "cast(username as text)" } else { "null" }
}
