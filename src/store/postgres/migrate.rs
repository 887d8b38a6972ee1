//! The schema: what is applied, what is missing, and bringing it up to date.
//!
//! All of it is one transaction under one advisory lock, the adoption checks too: what is refused leaves no trace, and
//! of several servers that start at once one migrates and the others find it done.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use sqlx::{
    Acquire, PgConnection, Row, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};

use super::{
    adopt::{self, Adopted},
    session::{Failure, LOOK_LIMIT, within},
};
use crate::store::{OpenError, Options};

/// How long a start waits for long transactions of others on `users`, in short tries that block nobody for long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Of one try, from lock to COMMIT. It makes tables and triggers, and writes no row of the bot's.
const MIGRATE_LIMIT: Duration = Duration::from_secs(10 * 60);

/// Of several servers that start at once, one changes the schema.
pub(super) const LOCK: &str = "select pg_advisory_xact_lock(7237966, 3)";

const BOOKS: &str = "rolecache.migrations";

static MIGRATOR: LazyLock<Migrator> = LazyLock::new(|| {
    let log = include_str!("../../../migrations/postgres/0001_log.sql");
    let mut migrator = Migrator::with_migrations(vec![Migration::new(
        1,
        "log".into(),
        MigrationType::Simple,
        log.into_sql_str(),
        false,
    )]);
    migrator.set_locking(false);
    migrator.create_schema("rolecache");
    migrator.dangerous_set_table_name(BOOKS);
    migrator
});

/// Where the schema is, as seen from this program.
enum Standing {
    Current,
    Behind { at: i64 },
}

/// Makes sure that the schema is this program's, and says what the tables are like.
pub(super) async fn ensure(conn: &mut PgConnection, options: &Options) -> Result<String, OpenError> {
    match within(LOOK_LIMIT, standing(conn)).await? {
        Standing::Current => {
            let inspected = async { Ok(adopt::inspect(conn).await?) };
            let adopted = within(LOOK_LIMIT, inspected).await?.map_err(OpenError::Refused)?;
            for (table, found) in [("users", &adopted.users), ("mailboxes", &adopted.mailboxes)] {
                if found.is_none() {
                    return Err(OpenError::Refused(format!(
                        "the table public.{table} is gone; the store had it before"
                    )));
                }
            }
            return Ok(described(&adopted, "found"));
        }
        Standing::Behind { at } if !options.migrate => {
            return Err(OpenError::Refused(format!(
                "the schema of the store is at version {at} and this program needs {}; migrate it first, or start \
                 without --no-migrate",
                newest()
            )));
        }
        Standing::Behind { .. } => {}
    }
    let mut patience = Patience::to("migrate it");
    loop {
        // Behind another server that migrates it is waited for; behind one that is gone, the database ends its session.
        let migrated = async { Ok(migrate(conn, options).await) };
        match within(MIGRATE_LIMIT, migrated).await? {
            Ok(adopted) => return Ok(adopted),
            Err(stop) => patience.wait_out(stop).await?,
        }
    }
}

/// Waits for transactions of others that hold `users`, between one try and the next.
pub(super) struct Patience {
    what: &'static str,
    started: Instant,
    pauses: ExponentialBackoff,
}

impl Patience {
    pub(super) fn to(what: &'static str) -> Self {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(3))
            .with_jitter()
            .without_max_times()
            .build();
        Self { what, started: Instant::now(), pauses }
    }

    pub(super) async fn wait_out(&mut self, stop: Stop) -> Result<(), OpenError> {
        match stop {
            Stop::Failed(failure) if is_contention(&failure) && self.started.elapsed() < PATIENCE => {
                tracing::warn!("waiting for transactions that hold the table users, to {}", self.what);
                tokio::time::sleep(self.pauses.next().unwrap_or_default()).await;
                Ok(())
            }
            Stop::Failed(failure) => Err(refusal(failure)),
            Stop::Refused(sentence) => Err(OpenError::Refused(sentence)),
        }
    }
}

pub(super) enum Stop {
    Refused(String),
    Failed(Failure),
}

impl<E: Into<Failure>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

async fn migrate(conn: &mut PgConnection, options: &Options) -> Result<String, Stop> {
    let mut tx = conn.begin().await?;
    sqlx::query(LOCK).execute(&mut *tx).await?;
    let before = adopt::inspect(&mut tx).await?.map_err(Stop::Refused)?;
    MIGRATOR.run_direct(None, &mut *tx, false).await.map_err(|error| match error {
        sqlx::migrate::MigrateError::Execute(error) | sqlx::migrate::MigrateError::ExecuteMigration(error, _) => {
            Stop::Failed(error.into())
        }
        other => Stop::Failed(Failure::shape(other)),
    })?;
    // Again, now that nobody else can change the table.
    let after = adopt::inspect(&mut tx).await?.map_err(Stop::Refused)?;
    sqlx::query("insert into rolecache.feed (default_role, admin_role) values ($1, $2) on conflict do nothing")
        .bind(options.default_role.as_str())
        .bind(options.admin_role.as_str())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(match (before.users.is_some(), before.mailboxes.is_some()) {
        (true, true) => described(&after, "adopted"),
        (true, false) => {
            format!("{}; created mailboxes", described(&Adopted { mailboxes: None, ..after }, "adopted"))
        }
        (false, true) => format!("{}; created users", described(&Adopted { users: None, ..after }, "adopted")),
        (false, false) => "created users and mailboxes".to_owned(),
    })
}

async fn standing(conn: &mut PgConnection) -> Result<Standing, OpenError> {
    let there = sqlx::query("select to_regclass($1) is not null as there").bind(BOOKS).fetch_one(&mut *conn).await;
    let there: bool = there.and_then(|row| row.try_get("there")).map_err(Failure::from)?;
    if !there {
        return Ok(Standing::Behind { at: 0 });
    }
    let rows = sqlx::query("select version, checksum from rolecache.migrations where success order by version")
        .fetch_all(conn)
        .await
        .map_err(Failure::from)?;
    let mut at = 0;
    for row in &rows {
        let version: i64 = row.try_get("version").map_err(Failure::from)?;
        let checksum: &[u8] = row.try_get("checksum").map_err(Failure::from)?;
        let Some(ours) = MIGRATOR.iter().find(|ours| ours.version == version) else {
            return Err(OpenError::Refused(format!(
                "the schema of the store is at version {version}, newer than the {} of this program; upgrade rolecache",
                newest()
            )));
        };
        if *ours.checksum != *checksum {
            return Err(OpenError::Refused(format!(
                "migration {version} of the store is not the one of this program; it comes from another build"
            )));
        }
        at = version;
    }
    Ok(if at == newest() { Standing::Current } else { Standing::Behind { at } })
}

fn newest() -> i64 {
    MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0)
}

fn described(adopted: &Adopted, how: &str) -> String {
    let tables: Vec<&str> = [&adopted.users, &adopted.mailboxes].into_iter().flatten().map(String::as_str).collect();
    format!("{how} {}", tables.join(" and "))
}

fn is_contention(failure: &Failure) -> bool {
    matches!(failure.code().as_deref(), Some("55P03" | "40P01" | "40001"))
}

/// What the database says to a migration: a matter of rights is one for the operator.
fn refusal(failure: Failure) -> OpenError {
    let code = failure.code().unwrap_or_default();
    if failure.passes() && code != "25006" {
        return OpenError::Unreachable(failure.cause());
    }
    tracing::error!(error = %failure, "the migration failed");
    OpenError::Refused(match code.as_str() {
        "42501" => {
            "the migration was refused: the database role has to own the tables users and mailboxes, and needs the \
                    right to create a schema in the database and tables in its schema public"
                .to_owned()
        }
        "25006" => "the migration was refused: the database is read-only".to_owned(),
        _ => "the migration failed and changed nothing; the log has the cause".to_owned(),
    })
}
