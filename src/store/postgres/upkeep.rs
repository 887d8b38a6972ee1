//! What keeps the log small and trusted: trimming, and looking whether the triggers are still there.

use std::time::Duration;

use sqlx::{Row, postgres::PgRow};

use super::{
    Postgres,
    session::{self, Failure, Lease, UPKEEP_LIMIT},
};
use crate::store::{KEEP_COMMITS, KEEP_REQUESTS, StoreError, Trimmed};

/// About so many changes go in one batch.
const TRIM_CHANGES: i64 = 100_000;

const TRIM: &str = "
    select commits, requests
    from rolecache.trim($1 * interval '1 microsecond', $2, $3 * interval '1 microsecond', $4)";

// tgtype: 1 row, 2 before, 4 insert, 8 delete, 16 update, 32 truncate
const TRIGGERS: &str = "
    select w.place, w.name, w.function, g.oid is not null as there, g.tgenabled::text as enabled,
      coalesce(p.proname = w.function and n.nspname = 'rolecache' and g.tgtype = w.kind, false) as ours
    from (values
      ('public.users', 'rolecache_insert', 'log_row', 5),
      ('public.users', 'rolecache_update', 'log_row', 17),
      ('public.users', 'rolecache_delete', 'log_row', 9),
      ('public.users', 'rolecache_truncate', 'log_truncate', 34),
      ('rolecache.commits', 'number_commit', 'number_commit', 5)
    ) as w (place, name, function, kind)
    left join pg_trigger g on g.tgrelid = to_regclass(w.place) and g.tgname = w.name and not g.tgisinternal
    left join pg_proc p on p.oid = g.tgfoid
    left join pg_namespace n on n.oid = p.pronamespace";

impl Postgres {
    pub(super) async fn trim(&self, retain: Duration) -> Result<Trimmed, StoreError> {
        let query =
            sqlx::query(TRIM).bind(micros(retain)).bind(KEEP_COMMITS).bind(micros(KEEP_REQUESTS)).bind(TRIM_CHANGES);
        let rows = Lease::with_limit(&self.pools.upkeep, UPKEEP_LIMIT).await?.fetch(query).await?;
        Ok(trimmed(&rows)?)
    }

    pub(super) async fn check_triggers(&self) -> Result<Vec<String>, StoreError> {
        let rows = session::fetch(&self.pools.upkeep, sqlx::query(TRIGGERS)).await?;
        Ok(wrong(&rows)?)
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

fn wrong(rows: &[PgRow]) -> Result<Vec<String>, Failure> {
    let mut sentences = Vec::new();
    for row in rows {
        let (place, name): (&str, &str) = (row.try_get("place")?, row.try_get("name")?);
        if !row.try_get::<bool, _>("there")? {
            sentences.push(format!("the trigger {name} of {place} is missing, so changes of roles are not logged"));
        } else if row.try_get::<&str, _>("enabled")? != "A" {
            sentences.push(format!(
                "the trigger {name} of {place} does not always fire, so changes of roles may not be logged: \
                 `alter table {place} enable always trigger {name}`"
            ));
        } else if !row.try_get::<bool, _>("ours")? {
            sentences.push(format!("the trigger {name} of {place} is not the one that logs changes of roles"));
        }
    }
    Ok(sentences)
}
