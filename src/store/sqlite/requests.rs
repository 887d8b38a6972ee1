//! Calls with a request id: the second one gets the answer of the first.

use std::time::SystemTime;

use sqlx::{AssertSqlSafe, Row, sqlite::SqliteRow};

use super::{
    call::Batch,
    rows::{self, CHANGE_COLUMNS},
    trim::millis_before,
};
use crate::{
    role::{Change, Revision},
    store::{Call, KEEP_REQUESTS, RequestId, StoreError, WriteError, Written},
};

/// An answer that was given before.
pub(super) struct Before {
    pub(super) hash: Vec<u8>,
    revision: Revision,
    at: SystemTime,
    first_row: i64,
    first_index: i64,
    size: i64,
}

impl Batch<'_> {
    /// The answer that this request id got, unless that is too long ago; then it is forgotten.
    pub(super) async fn answered_before(
        &mut self,
        call: &Call,
        request: &RequestId,
    ) -> Result<Option<Before>, StoreError> {
        let found = sqlx::query(
            "delete from rolecache_requests where actor = ?1 and request_id = ?2 and answered_at < ?3;
             select hash, revision, answered_at, first_seq, first_index, size from rolecache_requests
             where actor = ?1 and request_id = ?2",
        )
        .bind(&*call.actor)
        .bind(&*request.id)
        .bind(millis_before(SystemTime::now(), KEEP_REQUESTS))
        .fetch_optional(&mut *self.connection)
        .await?;
        let before = |row: SqliteRow| {
            Ok(Before {
                hash: row.try_get(0)?,
                revision: Revision(row.try_get(1)?),
                at: rows::time(&row, 2)?,
                first_row: row.try_get(3)?,
                first_index: row.try_get(4)?,
                size: row.try_get(5)?,
            })
        };
        found.map(before).transpose()
    }

    pub(super) async fn repeat(&mut self, before: &Before) -> Result<Result<Written, WriteError>, StoreError> {
        let sql = format!(
            "select {CHANGE_COLUMNS} from rolecache_changes
             where seq >= ?1 and commit_id = ?2 order by seq limit ?3"
        );
        let found = sqlx::query(AssertSqlSafe(sql))
            .bind(before.first_row)
            .bind(before.revision.0)
            .bind(before.size)
            .fetch_all(&mut *self.connection)
            .await?;
        if found.len() as i64 != before.size {
            return Ok(Err(WriteError::Forgotten));
        }
        let change = |(index, row): (u64, &SqliteRow)| Ok(Change { index, ..rows::change(row, 0)?.change });
        let changes =
            (before.first_index.unsigned_abs()..).zip(&found).map(change).collect::<Result<_, StoreError>>()?;
        Ok(Ok(Written { revision: before.revision, tag: None, at: before.at, changes }))
    }

    pub(super) async fn keep(
        &mut self,
        call: &Call,
        request: &RequestId,
        written: &Written,
        first_row: i64,
    ) -> Result<(), StoreError> {
        let at = written.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        sqlx::query(
            "insert into rolecache_requests (actor, request_id, hash, revision, answered_at, first_seq, first_index, size)
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )
        .bind(&*call.actor)
        .bind(&*request.id)
        .bind(&request.hash[..])
        .bind(written.revision.0)
        .bind(at as i64)
        .bind(first_row)
        .bind(written.changes.first().map_or(0, |change| change.index as i64))
        .bind(written.changes.len() as i64)
        .execute(&mut *self.connection)
        .await?;
        self.wrote = true;
        Ok(())
    }
}
