//! Opening the store: what it is, whether it can be trusted, and what has to be put right first.

use std::{net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use sqlx::{
    Connection, PgConnection, Row,
    postgres::{PgConnectOptions, PgSslMode},
};

use super::{
    Postgres,
    listener::Listening,
    migrate, rights,
    session::{self, Failure, LOOK_LIMIT, Pools, within},
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

const LIMITS: &str = "
    select not '0' = any(array[current_setting('idle_in_transaction_session_timeout'),
        current_setting('statement_timeout'), current_setting('lock_timeout')])
      and current_setting('default_transaction_isolation') = 'read committed'
      and current_setting('row_security') = 'off'
      and current_setting('search_path') like 'pg_catalog%'";

const FEED: &str = "select store_id, default_role, admin_role from rolecache.feed";

const REPAIR: &str = "select rolecache.repair_sequences() as newest";

/// Of what may wait for others' locks.
const REPAIR_LIMIT: Duration = Duration::from_secs(90);

/// Connects, adopts or creates the tables, and checks that this program may serve them.
pub async fn open(options: &Options) -> Result<Arc<dyn Store>, OpenError> {
    let url = PgConnectOptions::from_str(&options.url).map_err(|_| {
        OpenError::Refused("--database-url is none that PostgreSQL understands: look at its parameters".to_owned())
    })?;
    // No statement limit: a migration takes as long as it takes. What it waits for has limits of its own, and the database
    // ends the session of a server that is stopped or cut off within it.
    let unlimited = session::session(&url, Duration::ZERO).options([("lock_timeout", "0")]);
    let mut conn = session::connect(&unlimited).await?;
    if can_be_read_on_its_way(&url) {
        tracing::warn!(
            host = url.get_host(),
            "whoever is between this server and its store can read and change roles: end --database-url with ?sslmode=verify-full"
        );
    }
    within(LOOK_LIMIT, limits(&url)).await?;
    let about = within(LOOK_LIMIT, server(&mut conn, &url)).await?;
    within(LOOK_LIMIT, rights::check(&mut conn)).await?;
    let adopted = migrate::ensure(&mut conn, options).await?;
    let facts = within(LOOK_LIMIT, feed(&mut conn, options, about, adopted)).await?;
    within(REPAIR_LIMIT, repair(&mut conn)).await?;
    within(REPAIR_LIMIT, triggers::ensure(&mut conn, options)).await?;
    within(LOOK_LIMIT, rights::warn(&mut conn)).await?;
    let _ = tokio::time::timeout(session::CONNECT_LIMIT, conn.close()).await;
    Ok(Arc::new(Postgres { pools: Pools::new(&url), url, facts, listening: Listening::default() }))
}

/// To another machine, and not by TLS that knows whom it talks to.
fn can_be_read_on_its_way(url: &PgConnectOptions) -> bool {
    let host = url.get_host();
    let is_here = url.get_socket().is_some()
        || host.starts_with('/')
        || host == "localhost"
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    !is_here && !matches!(url.get_ssl_mode(), PgSslMode::VerifyFull)
}

/// Behind a pooler that drops what a session starts with, nothing in the database would have a limit.
async fn limits(url: &PgConnectOptions) -> Result<(), OpenError> {
    let mut usual = session::connect(&session::session(url, session::STATEMENT_LIMIT)).await?;
    let arrived: bool = sqlx::query_scalar(LIMITS).fetch_one(&mut usual).await.map_err(Failure::from)?;
    let _ = tokio::time::timeout(session::CONNECT_LIMIT, usual.close()).await;
    if arrived {
        return Ok(());
    }
    Err(OpenError::Refused(
        "what our sessions start with does not arrive at PostgreSQL, as behind a pooler that ignores it: give our database \
         role the settings that docs/postgresql.md lists for that"
            .to_owned(),
    ))
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
    let row = sqlx::query(REPAIR).fetch_one(conn).await.map_err(Failure::from)?;
    if let Some(newest) = row.try_get::<Option<i64>, _>("newest").map_err(Failure::from)? {
        tracing::warn!(revision = newest, "the revision sequence was left behind, and is repaired");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_verified_store_elsewhere_is_safe() {
        for (url, can_be_read) in [
            ("postgres://db.internal/bot", true),
            ("postgres://db.internal/bot?sslmode=require", true),
            ("postgres://db.internal/bot?sslmode=verify-ca", true),
            ("postgres://db.internal/bot?sslmode=verify-full", false),
            ("postgres://localhost/bot", false),
            ("postgres://127.0.0.1/bot", false),
            ("postgres://%2Frun%2Fpostgresql/bot", false),
        ] {
            assert_eq!(can_be_read_on_its_way(&PgConnectOptions::from_str(url).unwrap()), can_be_read, "{url}");
        }
    }
}
