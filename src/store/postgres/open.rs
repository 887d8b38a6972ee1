//! Opening the store: what it is, whether it can be trusted, and what has to be put right first.

use std::{str::FromStr, sync::Arc, time::Duration};

use sqlx::{Connection, PgConnection, Row, postgres::PgConnectOptions};

use super::{
    Postgres,
    listener::Listening,
    migrate,
    session::{self, Failure, Pools},
    triggers,
};
use crate::{
    role::RoleName,
    store::{Facts, OpenError, Options, Store, StoreKind},
};

const OLDEST_SERVER: i32 = 130_000;

const SERVER: &str = "
    select current_setting('server_version_num')::int as number, current_setting('server_version') as version,
      pg_is_in_recovery() as is_standby, current_database()::text as database";

const FEED: &str = "select store_id, default_role, admin_role from rolecache.feed";

// A sequence that gives numbers out below those that are there; the second is that of the commits' own ids.
const BEHIND: &str = "
    select
      greatest(f.trimmed_revision, (
        select c.revision from rolecache.commits c where c.revision is not null order by c.revision desc limit 1
      )) as newest,
      (select case when s.is_called then s.last_value else s.last_value - 1 end from rolecache.revision s) as drawn,
      (select max(c.id) from rolecache.commits c) as newest_id,
      (select case when s.is_called then s.last_value else s.last_value - 1 end from rolecache.commits_id_seq s)
        as drawn_id
    from rolecache.feed f";

const REPAIR: &str = "
    select setval('rolecache.revision', greatest($1, 1)), setval('rolecache.commits_id_seq', greatest($2, 0) + 1000)";

/// Of a look at what is there, and of what may wait for others' locks.
const LOOK_LIMIT: Duration = Duration::from_secs(10);
const REPAIR_LIMIT: Duration = Duration::from_secs(90);

/// Connects, adopts or creates the tables, and checks that this program may serve them.
pub async fn open(options: &Options) -> Result<Arc<dyn Store>, OpenError> {
    let url = PgConnectOptions::from_str(&options.url).map_err(|_| {
        OpenError::Refused("--database-url is none that PostgreSQL understands: look at its parameters".to_owned())
    })?;
    // No statement limit: a migration takes as long as it takes. What it waits for has limits of its own.
    let unlimited = session::session(&url, Duration::ZERO)
        .options([("lock_timeout", "0"), ("idle_in_transaction_session_timeout", "0")]);
    let mut conn = session::connect(&unlimited).await?;
    let about = within(LOOK_LIMIT, server(&mut conn, &url)).await?;
    let adopted = migrate::ensure(&mut conn, options).await?;
    let facts = within(LOOK_LIMIT, feed(&mut conn, options, about, adopted)).await?;
    within(REPAIR_LIMIT, repair(&mut conn)).await?;
    within(REPAIR_LIMIT, triggers::ensure(&mut conn, options)).await?;
    let _ = tokio::time::timeout(session::CONNECT_LIMIT, conn.close()).await;
    Ok(Arc::new(Postgres { pools: Pools::new(&url), url, facts, listening: Listening::default() }))
}

/// A step of opening: a server that falls silent in it counts as out of reach.
async fn within<T>(limit: Duration, step: impl Future<Output = Result<T, OpenError>>) -> Result<T, OpenError> {
    tokio::time::timeout(limit, step).await.unwrap_or_else(|_| Err(Failure::Silent(limit).into()))
}

async fn server(conn: &mut PgConnection, url: &PgConnectOptions) -> Result<String, OpenError> {
    let row = sqlx::query(SERVER).fetch_one(conn).await.map_err(Failure::from)?;
    let (number, version, database) = (|| {
        Ok::<_, sqlx::Error>((
            row.try_get::<i32, _>("number")?,
            row.try_get::<String, _>("version")?,
            row.try_get::<String, _>("database")?,
        ))
    })()
    .map_err(Failure::from)?;
    let version = version.split(' ').next().unwrap_or_default();
    let place = match url.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", url.get_host(), url.get_port()),
    };
    let about = format!("PostgreSQL {version} at {place}, database {database}");
    if number < OLDEST_SERVER {
        return Err(OpenError::Refused(format!("{about} is too old: rolecache needs 13 or newer")));
    }
    if row.try_get("is_standby").map_err(Failure::from)? {
        return Err(OpenError::Refused(format!("{about} is a standby; rolecache needs the primary")));
    }
    Ok(about)
}

async fn feed(conn: &mut PgConnection, options: &Options, about: String, adopted: String) -> Result<Facts, OpenError> {
    let row = sqlx::query(FEED).fetch_optional(conn).await.map_err(Failure::from)?;
    let Some(row) = row else {
        return Err(OpenError::Refused(
            "the table rolecache.feed has lost its row; restore it from a backup".to_owned(),
        ));
    };
    let text = |name| row.try_get::<String, _>(name).map_err(Failure::from);
    let (default_role, admin_role) = (text("default_role")?, text("admin_role")?);
    for (setting, stored, given) in
        [("default-role", &default_role, &options.default_role), ("admin-role", &admin_role, &options.admin_role)]
    {
        if stored.as_str() != given.as_str() {
            return Err(OpenError::Refused(format!(
                "the store was set up with --default-role {default_role} and --admin-role {admin_role}, and this server \
                 has --{setting} {given}; all servers of a store need the same"
            )));
        }
    }
    Ok(Facts {
        kind: StoreKind::Postgres,
        store_id: row.try_get("store_id").map_err(Failure::from)?,
        default_role: RoleName::held(&default_role),
        admin_role: RoleName::held(&admin_role),
        about,
        adopted,
    })
}

/// A failover or a restore may have left a sequence behind the rows; every change would be refused then.
async fn repair(conn: &mut PgConnection) -> Result<(), OpenError> {
    if behind(conn).await?.is_none() {
        return Ok(());
    }
    let mut tx = conn.begin().await.map_err(Failure::from)?;
    // The feed lock: nobody draws a revision meanwhile, and all that were drawn are visible. Ids are drawn without it,
    // and so leave a gap for those.
    sqlx::query("select pg_advisory_xact_lock(7237966, 1)").execute(&mut *tx).await.map_err(Failure::from)?;
    if let Some((newest, newest_id)) = behind(&mut tx).await? {
        sqlx::query(REPAIR).bind(newest).bind(newest_id).execute(&mut *tx).await.map_err(Failure::from)?;
        tracing::warn!(revision = newest, "the revision sequence was left behind, and is repaired");
    }
    tx.commit().await.map_err(Failure::from)?;
    Ok(())
}

/// Where both sequences have to be, if one of them is not.
async fn behind(conn: &mut PgConnection) -> Result<Option<(i64, i64)>, Failure> {
    let row = sqlx::query(BEHIND).fetch_one(conn).await?;
    let (newest, drawn) = (row.try_get::<Option<i64>, _>("newest")?.unwrap_or(0), row.try_get::<i64, _>("drawn")?);
    let (newest_id, drawn_id) =
        (row.try_get::<Option<i64>, _>("newest_id")?.unwrap_or(0), row.try_get::<i64, _>("drawn_id")?);
    Ok((newest > drawn || newest_id > drawn_id).then_some((newest.max(drawn), newest_id.max(drawn_id))))
}
