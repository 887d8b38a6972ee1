//! Lists of changes, of everybody or of one user.

use sqlx::{AssertSqlSafe, Connection, Row, SqliteConnection};

use super::{
    log::State,
    pool::Pool,
    rows::{self, CHANGE_COLUMNS},
};
use crate::{
    role::{Change, Revision, UserId},
    store::{ChangePage, ListPosition, ListedChange, LogError, StoreError},
};

pub(super) async fn changes(
    pool: &Pool,
    user: Option<UserId>,
    from: ListPosition,
    limit: usize,
) -> Result<ChangePage, LogError> {
    let mut lease = pool.lease().await?;
    let answer = read(&mut lease, user, from, limit).await;
    lease.end(answer)
}

async fn read(
    connection: &mut SqliteConnection,
    user: Option<UserId>,
    from: ListPosition,
    limit: usize,
) -> Result<ChangePage, LogError> {
    let mut moment = connection.begin().await?;
    let state = State::at(&mut moment, from.revision).await?;
    if from.revision > state.head.revision {
        return Err(LogError::Unknown { requested: from.revision, head: state.head.revision });
    }
    let is_trimmed = match from.inside {
        Some(_) => from.revision <= state.trimmed.revision,
        None => from.revision < state.trimmed.revision,
    };
    if is_trimmed && !from.kept_only {
        return Err(state.compacted(from.revision));
    }
    let first = match from.inside {
        Some((_, row)) if !is_trimmed => row,
        _ => {
            sqlx::query_scalar("select seq from rolecache_changes where commit_id > ?1 order by commit_id, seq limit 1")
                .bind(from.revision.0)
                .fetch_optional(&mut *moment)
                .await?
                .unwrap_or(i64::MAX)
        }
    };
    let of_user = if user.is_some() { "and user_id = ?2" } else { "" };
    let sql = format!(
        "select {CHANGE_COLUMNS}, k.committed_at, k.size from rolecache_changes h
         join rolecache_commits k on k.id = h.commit_id
         where h.seq >= ?1 {of_user} order by h.seq limit ?3"
    );
    let found = sqlx::query(AssertSqlSafe(sql))
        .bind(first)
        .bind(user.map(|user| user.0))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&mut *moment)
        .await?;
    let mut changes: Vec<ListedChange> = Vec::with_capacity(found.len());
    for row in &found {
        let logged = rows::change(row, 0)?;
        let size: i64 = row.try_get(13).map_err(StoreError::from)?;
        let index = match (changes.last(), from.inside) {
            _ if size == 1 => 0,
            (Some(before), _) if user.is_none() && before.revision == logged.revision => before.change.index + 1,
            (None, Some((index, row))) if row == logged.row => index,
            (_, None) if user.is_none() => 0,
            _ => index_of(&mut moment, logged.revision, logged.row).await?,
        };
        changes.push(ListedChange {
            revision: logged.revision,
            at: rows::time(row, 12)?,
            change: Change { index, ..logged.change },
            row: logged.row,
        });
    }
    moment.commit().await?;
    Ok(ChangePage { head: state.head, changes })
}

async fn index_of(moment: &mut SqliteConnection, revision: Revision, row: i64) -> Result<u64, StoreError> {
    let before: i64 = sqlx::query_scalar("select count(*) from rolecache_changes where commit_id = ?1 and seq < ?2")
        .bind(revision.0)
        .bind(row)
        .fetch_one(moment)
        .await?;
    Ok(before.unsigned_abs())
}
