//! The schema and its version, and what was settled when it was made.

use std::path::Path;

use sqlx::{Row, SqliteConnection, migrate::Migrator};
use uuid::Uuid;

use super::open::{refuse, sql_error};
use crate::{
    role::RoleName,
    store::{OpenError, Options},
};

pub(super) fn refuse_settings(path: &Path, options: &Options, default: &str, admin: &str) -> Result<(), OpenError> {
    for (what, flag, stored, given) in [
        ("default", "--default-role", default, &options.default_role),
        ("admin", "--admin-role", admin, &options.admin_role),
    ] {
        if stored != given.as_str() {
            let path = path.display();
            return refuse(format!(
                "the log in {path} is written with the {what} role {stored}, and {flag} is {given}"
            ));
        }
    }
    Ok(())
}

pub(super) fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("migrations/sqlite");
    migrator.dangerous_set_table_name("rolecache_migrations");
    migrator
}

/// How many of ours are not applied yet. Refuses a schema that this program does not know.
pub(super) async fn pending_migrations(connection: &mut SqliteConnection, path: &Path) -> Result<usize, OpenError> {
    let explain = |error: sqlx::Error| sql_error(path, error);
    let ours = migrator();
    if !has_table(connection, "rolecache_migrations").await.map_err(explain)? {
        return Ok(ours.iter().count());
    }
    let applied = sqlx::query("select version, checksum from rolecache_migrations order by version")
        .fetch_all(connection)
        .await
        .map_err(explain)?;
    let newest = ours.iter().map(|migration| migration.version).max().unwrap_or(0);
    for row in &applied {
        let version: i64 = row.try_get(0).map_err(explain)?;
        let checksum: Vec<u8> = row.try_get(1).map_err(explain)?;
        let Some(known) = ours.iter().find(|migration| migration.version == version) else {
            return refuse(format!(
                "the schema in {} is at version {version}, and this program knows versions up to {newest}: use a newer one",
                path.display()
            ));
        };
        if *known.checksum != *checksum {
            return refuse(format!(
                "version {version} of the schema in {} is not the one that this program knows",
                path.display()
            ));
        }
    }
    Ok(ours.iter().count() - applied.len())
}

async fn has_table(connection: &mut SqliteConnection, name: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select exists (select 1 from sqlite_schema where type = 'table' and name = ?1)")
        .bind(name)
        .fetch_one(connection)
        .await
}

/// The store's id, default role and admin role, once they are settled.
pub(super) async fn settings(connection: &mut SqliteConnection) -> Result<Option<(Uuid, String, String)>, sqlx::Error> {
    if !has_table(connection, "rolecache_feed").await? {
        return Ok(None);
    }
    let row =
        sqlx::query("select store_id, default_role, admin_role from rolecache_feed").fetch_optional(connection).await?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))).transpose()
}

pub(super) async fn make_settings(
    connection: &mut SqliteConnection,
    options: &Options,
) -> Result<(Uuid, String, String), sqlx::Error> {
    let store_id = Uuid::new_v4();
    let role = |role: &RoleName| role.as_str().to_owned();
    let (default, admin) = (role(&options.default_role), role(&options.admin_role));
    sqlx::query(
        "insert into rolecache_feed (one, store_id, default_role, admin_role, trimmed_tag)
         values (1, ?1, ?2, ?3, randomblob(16))",
    )
    .bind(store_id)
    .bind(&default)
    .bind(&admin)
    .execute(connection)
    .await?;
    Ok((store_id, default, admin))
}
