//! Reads of users, mailboxes and one user's history, each as of one moment with the head beside it.

use sqlx::{Row, postgres::PgRow};

use super::{
    Postgres,
    log::compacted,
    rows::{self, with_head},
    session,
};
use crate::{
    role::{Revision, UserId},
    store::{ChangePage, Facts, ListPosition, ListedChange, LogError, Roles, StoreError, UserPage},
};

// A name that the inner row lacks is looked for outside: a table without username has null.
const ROLES: &str =
    with_head!("u.user_id::bigint as user_id, u.role::text as role", "left join public.users u on u.user_id = any($1)");

// $1 first id, $2 role or null, $3 limit
const USERS: &str = with_head!(
    "u.*",
    "left join lateral (
      select s.user_id::bigint as user_id, s.role::text as role, (select username::text from (select s.*) x) as username
      from public.users s cross join (select null::text as username) absent
      where s.user_id >= $1
        and ($2::text is null or s.role = $2 or (f.default_role = $2 and (s.role is null or s.role = '')))
      order by s.user_id
      limit $3
    ) u on true
    order by u.user_id"
);

// $1 revision, $2 first key inside it or null, $3 limit, $4 how many changes of that commit came before
const CHANGES: &str = with_head!(
    "null::bigint as place, ch.*",
    "left join lateral (
      select c.revision, (extract(epoch from c.committed_at) * 1000000)::bigint as at_us,
        x.seq, x.user_id, x.old_role, x.new_role, x.username, x.origin, x.actor, x.reason,
        x.transfer_from, x.transfer_to, x.mailbox_id
      from (
        select s.*, sum(s.size) over (order by s.revision) - s.size as before
        from (
          select c.id, c.revision, c.committed_at, c.size
          from rolecache.commits c
          where c.revision >= $1 and (c.revision > $1 or $2::bigint is not null)
          order by c.revision
          limit $3 + 1
        ) s
      ) c
      cross join lateral (
        select y.* from rolecache.changes y
        where y.commit_id = c.id and (c.revision > $1 or y.seq >= $2)
        order by y.seq
        limit $3
      ) x
      where c.before < $3 + $4
      order by c.revision, x.seq
      limit $3
    ) ch on true
    order by ch.revision, ch.seq"
);

// $1 revision, $2 first key inside it or null, $3 limit, $4 user
const USER_CHANGES: &str = with_head!(
    "case when ch.size = 1 then 0 else (
        select count(*) from rolecache.changes z where z.commit_id = ch.commit_id and z.seq < ch.seq
      ) end as place, ch.*",
    "left join lateral (
      select c.revision, c.size, (extract(epoch from c.committed_at) * 1000000)::bigint as at_us,
        x.commit_id, x.seq, x.user_id, x.old_role, x.new_role, x.username, x.origin, x.actor, x.reason,
        x.transfer_from, x.transfer_to, x.mailbox_id
      from rolecache.changes x
      join rolecache.commits c on c.id = x.commit_id
      where x.user_id = $4 and (c.revision > $1 or (c.revision = $1 and x.seq >= $2))
      order by c.revision, x.seq
      limit $3
    ) ch on true
    order by ch.revision, ch.seq"
);

const MAILBOX: &str = with_head!("m.creator_id::bigint as creator_id", "left join public.mailboxes m on m.id = $1");

impl Postgres {
    pub(super) async fn roles(&self, users: &[UserId]) -> Result<Roles, StoreError> {
        let ids: Vec<i64> = users.iter().map(|user| user.0).collect();
        let rows = session::fetch(&self.pools.reads, || sqlx::query(ROLES).bind(&ids)).await?;
        Ok(self.found(users, &rows)?)
    }

    fn found(&self, users: &[UserId], rows: &[PgRow]) -> Result<Roles, session::Failure> {
        let head = rows::meta(rows::first(rows)?, &self.facts)?.head;
        let default = &self.facts.default_role;
        let mut found = std::collections::HashMap::with_capacity(rows.len());
        for row in rows {
            if let Some(id) = row.try_get::<Option<i64>, _>("user_id")? {
                found.insert(UserId(id), rows::role(row.try_get("role")?, default));
            }
        }
        let roles = users.iter().map(|user| found.get(user).unwrap_or(default).clone()).collect();
        Ok(Roles { head, roles })
    }

    pub(super) async fn mailbox(&self, mailbox: i64) -> Result<Option<UserId>, StoreError> {
        let rows = session::fetch(&self.pools.lists, || sqlx::query(MAILBOX).bind(mailbox)).await?;
        let row = rows::first(&rows)?;
        rows::meta(row, &self.facts)?;
        let creator: Option<i64> = row.try_get("creator_id").map_err(session::Failure::from)?;
        Ok(creator.map(UserId))
    }

    pub(super) async fn list_users(
        &self,
        role: Option<&str>,
        after: Option<UserId>,
        limit: usize,
    ) -> Result<UserPage, StoreError> {
        // Past the largest id there is nobody; the head is asked for all the same.
        let first = after.map_or(Some(i64::MIN), |after| after.0.checked_add(1));
        let limit = if first.is_some() { bound(limit) } else { 0 };
        let query = || sqlx::query(USERS).bind(first.unwrap_or(i64::MAX)).bind(role).bind(limit);
        let rows = session::fetch(&self.pools.lists, query).await?;
        let head = rows::meta(rows::first(&rows)?, &self.facts)?.head;
        let mut users = Vec::with_capacity(rows.len());
        for row in &rows {
            users.extend(rows::user(row, &self.facts.default_role)?);
        }
        Ok(UserPage { head, users })
    }

    pub(super) async fn list_changes(
        &self,
        user: Option<UserId>,
        from: ListPosition,
        limit: usize,
    ) -> Result<ChangePage, LogError> {
        let row = from.inside.map(|(_, row)| row);
        let query = || match user {
            None => {
                let before = from.inside.map_or(0, |(index, _)| i64::try_from(index).unwrap_or(i64::MAX / 2));
                sqlx::query(CHANGES).bind(from.revision.0).bind(row).bind(bound(limit)).bind(before)
            }
            Some(user) => sqlx::query(USER_CHANGES).bind(from.revision.0).bind(row).bind(bound(limit)).bind(user.0),
        };
        let rows = session::fetch(&self.pools.lists, query).await.map_err(StoreError::from)?;
        changes(from, &rows, &self.facts).map_err(StoreError::from)?
    }
}

fn bound(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX / 4)
}

fn changes(
    from: ListPosition,
    rows: &[PgRow],
    facts: &Facts,
) -> Result<Result<ChangePage, LogError>, session::Failure> {
    let rows::Meta { head, trimmed } = rows::meta(rows::first(rows)?, facts)?;
    // Inside a commit that was trimmed meanwhile there is nothing to go on with.
    let gone = from.revision < trimmed.revision || (from.inside.is_some() && from.revision == trimmed.revision);
    if gone && !from.kept_only {
        return Ok(Err(compacted(from.revision, trimmed, head)));
    }
    if from.revision > head.revision {
        return Ok(Err(LogError::Unknown { requested: from.revision, head: head.revision }));
    }
    let mut changes: Vec<ListedChange> = Vec::with_capacity(rows.len());
    for row in rows {
        let Some(revision) = row.try_get::<Option<i64>, _>("revision")?.map(Revision) else { break };
        let index = match (row.try_get::<Option<i64>, _>("place")?, changes.last(), from.inside) {
            (Some(counted), _, _) => counted.unsigned_abs(),
            (None, Some(last), _) if last.revision == revision => last.change.index + 1,
            (None, None, Some((index, _))) if from.revision == revision => index,
            _ => 0,
        };
        if let Some((row_key, change)) = rows::change(row, index)? {
            let at = rows::time(row.try_get("at_us")?);
            changes.push(ListedChange { revision, at, change, row: row_key });
        }
    }
    Ok(Ok(ChangePage { head, changes }))
}
