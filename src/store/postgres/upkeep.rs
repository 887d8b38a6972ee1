//! What keeps the log small.

use std::time::Duration;

use sqlx::{Row, postgres::PgRow};

use super::{
    Postgres,
    session::{Failure, Lease, UPKEEP_LIMIT},
};
use crate::store::{KEEP_COMMITS, KEEP_REQUESTS, StoreError, Trimmed};

/// About so many changes go in one batch.
const TRIM_CHANGES: i64 = 100_000;

const TRIM: &str = "
    select commits, requests
    from rolecache.trim($1 * interval '1 microsecond', $2, $3 * interval '1 microsecond', $4)";

impl Postgres {
    pub(super) async fn trim(&self, retain: Duration) -> Result<Trimmed, StoreError> {
        let query =
            sqlx::query(TRIM).bind(micros(retain)).bind(KEEP_COMMITS).bind(micros(KEEP_REQUESTS)).bind(TRIM_CHANGES);
        let rows = Lease::with_limit(&self.pools.upkeep, UPKEEP_LIMIT).await?.fetch(query).await?;
        Ok(trimmed(&rows)?)
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn trimmed(rows: &[PgRow]) -> Result<Trimmed, Failure> {
    let row = rows.first().ok_or_else(|| Failure::shape("rolecache.trim answered nothing"))?;
    let count = |name| Ok::<_, Failure>(row.try_get::<i64, _>(name)?.unsigned_abs());
    Ok(Trimmed { commits: count("commits")?, requests: count("requests")? })
}
