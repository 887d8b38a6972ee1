//! Removes the oldest part of the log, always a whole prefix of it.

use std::time::{Duration, SystemTime};

use sqlx::{Connection, Row};

use super::{Live, error::is_busy, rows};
use crate::{
    role::Anchor,
    store::{KEEP_COMMITS, KEEP_REQUESTS, StoreError, Trimmed},
};

/// Commits, and request ids, of one batch.
const BATCH: i64 = 1_000;
/// Changes of one batch, where its first commit has not more: the writer waits meanwhile.
const BATCH_CHANGES: i64 = 100_000;

pub(super) async fn trim(live: &Live, retain: Duration) -> Result<Trimmed, StoreError> {
    let now = SystemTime::now();
    let (commits_before, requests_before) = (millis_before(now, retain), millis_before(now, KEEP_REQUESTS));
    // Looks without the write lock first: most of the time there is nothing to do.
    let mut lease = live.lists.lease().await?;
    let is_due: Result<bool, _> = sqlx::query_scalar(
        "select exists (select 1 from rolecache_requests where answered_at < ?2)
             or (select count(*) from (select 1 from rolecache_commits limit ?3 + 1)) > ?3
            and (select committed_at from rolecache_commits order by id limit 1) < ?1",
    )
    .bind(commits_before)
    .bind(requests_before)
    .bind(KEEP_COMMITS)
    .fetch_one(&mut *lease)
    .await;
    if !lease.end(is_due)? {
        return Ok(Trimmed::default());
    }
    let mut slot = live.writer.lock().await;
    // Out of the slot as long as its transaction is open: dropped in between, it closes, which rolls back.
    let mut writer = match slot.take() {
        Some(writer) => writer,
        None => live.connect_writer(None).await?,
    };
    let mut transaction = match writer.begin_with("begin immediate").await {
        Ok(transaction) => transaction,
        Err(error) if is_busy(&error) => return Ok(Trimmed::default()),
        Err(error) => return Err(error.into()),
    };
    let last_to_go: Option<i64> =
        sqlx::query_scalar("select id from rolecache_commits order by id desc limit 1 offset ?1")
            .bind(KEEP_COMMITS)
            .fetch_optional(&mut *transaction)
            .await?;
    let oldest =
        sqlx::query("select id, tag, committed_at, size from rolecache_commits where id <= ?1 order by id limit ?2")
            .bind(last_to_go.unwrap_or(0))
            .bind(BATCH)
            .fetch_all(&mut *transaction)
            .await?;
    let mut trimmed: Option<Anchor> = None;
    let (mut commits, mut changes) = (0, 0);
    for row in &oldest {
        let committed_at: i64 = row.try_get(2)?;
        changes += row.try_get::<i64, _>(3)?;
        // Clocks step: what is old but stands after something younger stays, or the log would have a hole.
        if committed_at >= commits_before || (trimmed.is_some() && changes > BATCH_CHANGES) {
            break;
        }
        trimmed = Some(rows::anchor(row, 0)?);
        commits += 1;
    }
    if let Some(Anchor { revision, tag }) = trimmed {
        sqlx::query(
            "delete from rolecache_changes where commit_id <= ?1;
             delete from rolecache_commits where id <= ?1;
             update rolecache_feed set trimmed_revision = ?1, trimmed_tag = ?2 where trimmed_revision < ?1",
        )
        .bind(revision.0)
        .bind(tag.0)
        .execute(&mut *transaction)
        .await?;
    }
    let requests = sqlx::query(
        "delete from rolecache_requests where (actor, request_id) in (
           select actor, request_id from rolecache_requests where answered_at < ?1 order by answered_at limit ?2)",
    )
    .bind(requests_before)
    .bind(BATCH)
    .execute(&mut *transaction)
    .await?
    .rows_affected();
    transaction.commit().await?;
    *slot = Some(writer);
    Ok(Trimmed { commits, requests })
}

pub(super) fn millis_before(now: SystemTime, age: Duration) -> i64 {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.saturating_sub(age).as_millis() as i64
}
