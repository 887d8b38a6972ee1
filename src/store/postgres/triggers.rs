//! The triggers that log changes: whether they are as they should be, and what a start does where they are not.

use sqlx::{Connection, PgConnection, Row, postgres::PgRow};

use super::{
    Postgres, migrate,
    session::{self, Failure},
};
use crate::store::{OpenError, Options, StoreError};

// tgtype: 1 row, 2 before, 4 insert, 8 delete, 16 update, 32 truncate
const TRIGGERS: &str = "
    select w.place, w.name, g.oid is not null as there, g.tgenabled::text as enabled,
      coalesce(p.proname = w.function and n.nspname = 'rolecache' and g.tgtype = w.kind and g.tgattr = ''
        and (g.tgqual is not null) = w.has_condition and g.tginitdeferred = w.is_deferred, false) as ours
    from (values
      ('public.users', '_rolecache_insert', 'log_row', 5, false, false),
      ('public.users', '_rolecache_update', 'log_row', 17, true, false),
      ('public.users', '_rolecache_delete', 'log_row', 9, false, false),
      ('public.users', '_rolecache_truncate', 'log_truncate', 34, false, false),
      ('rolecache.commits', 'number_commit', 'number_commit', 5, true, true)
    ) as w (place, name, function, kind, has_condition, is_deferred)
    left join pg_trigger g on g.tgrelid = to_regclass(w.place) and g.tgname = w.name and not g.tgisinternal
    left join pg_proc p on p.oid = g.tgfoid
    left join pg_namespace n on n.oid = p.pronamespace
    order by w.name";

impl Postgres {
    pub(super) async fn check_triggers(&self) -> Result<Vec<String>, StoreError> {
        let rows = session::fetch(&self.pools.upkeep, || sqlx::query(TRIGGERS)).await?;
        Ok(sentences(&rows)?)
    }
}

/// What was changed while a trigger was missing is in no log: whoever goes on from before would never hear of it. So
/// making them anew ends the history, and everybody starts over.
pub(super) async fn ensure(conn: &mut PgConnection, options: &Options) -> Result<(), OpenError> {
    let found = wrong(conn).await?;
    if found.is_empty() {
        return Ok(());
    }
    if !options.migrate {
        return Err(OpenError::Refused(format!(
            "{}; start once without --no-migrate, which puts it right and has every reader start over",
            found.join("; ")
        )));
    }
    let mut patience = migrate::Patience::to("make its triggers anew");
    while let Err(stop) = mend(conn).await {
        patience.wait_out(stop).await?;
    }
    Ok(())
}

async fn mend(conn: &mut PgConnection) -> Result<(), migrate::Stop> {
    let mut tx = conn.begin().await?;
    sqlx::query(migrate::LOCK).execute(&mut *tx).await?;
    let found = wrong(&mut tx).await?;
    if found.is_empty() {
        return Ok(());
    }
    // Every transaction that wrote without a trigger is over once we hold these.
    for step in [
        "set local lock_timeout = '1s'",
        "lock table public.users, rolecache.commits in access exclusive mode",
        "select rolecache.install_triggers()",
    ] {
        sqlx::query(step).execute(&mut *tx).await?;
    }
    let row = sqlx::query("select rolecache.end_history() as newest").fetch_one(&mut *tx).await?;
    let newest: i64 = row.try_get("newest")?;
    tx.commit().await?;
    for sentence in found {
        tracing::warn!("{sentence}");
    }
    tracing::warn!(
        revision = newest,
        "the triggers are made anew; changes may have been missed, so every reader of the log starts over"
    );
    Ok(())
}

async fn wrong(conn: &mut PgConnection) -> Result<Vec<String>, Failure> {
    sentences(&sqlx::query(TRIGGERS).fetch_all(conn).await?)
}

fn sentences(rows: &[PgRow]) -> Result<Vec<String>, Failure> {
    let mut sentences = Vec::new();
    for row in rows {
        let (place, name): (&str, &str) = (row.try_get("place")?, row.try_get("name")?);
        let what = if !row.try_get::<bool, _>("there")? {
            "is missing"
        } else if row.try_get::<&str, _>("enabled")? != "A" {
            "does not always fire"
        } else if !row.try_get::<bool, _>("ours")? {
            "is not the one that logs changes of roles"
        } else {
            continue;
        };
        sentences
            .push(format!("the trigger {name} of {place} {what}, so changes of roles may be missing from the log"));
    }
    Ok(sentences)
}
