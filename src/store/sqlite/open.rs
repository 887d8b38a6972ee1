//! Opens a file: what must hold before anything is touched, then the schema, then the connections.
//!
//! A refusal leaves the file as it was. Everything that can refuse looks before the first write.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sqlx::{
    ConnectOptions, Connection, SqliteConnection,
    migrate::MigrateError,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};

use super::{
    Live, Sqlite,
    adopt::{AdoptError, Found, Users},
    error::{cause, code, code_of, words},
    file,
    lock::{Lock, LockError},
    schema, triggers,
};
use crate::store::{Facts, OpenError, Options, Store, StoreKind};

/// Long enough to wait out any write of a program that behaves.
const SETUP_BUSY: Duration = Duration::from_secs(5);
const READ_BUSY: Duration = Duration::from_secs(2);
/// The writer never waits for others' locks; SQLite sleeps 1, 2 and 5 ms in this time, and looks again.
const WRITE_BUSY: Duration = Duration::from_millis(10);
const READERS: u32 = 8;
const ACQUIRE: Duration = Duration::from_secs(2);

/// Opens the store that `options.url` names, and creates it where that is allowed and needed.
pub async fn open(options: &Options) -> Result<Arc<dyn Store>, OpenError> {
    if options.default_role == options.admin_role {
        return refuse(format!("the default role and the admin role are both {}", options.default_role));
    }
    let path = path_of(&options.url)?;
    refuse_place(&path, options.migrate)?;
    let lock = match Lock::take(&path) {
        Ok(lock) => lock,
        Err(LockError::Held) => {
            return refuse(format!("another server process holds {}: one at a time can serve it", path.display()));
        }
        Err(LockError::Io(error)) => {
            let lock = Lock::path_for(&path);
            return refuse(format!("{} cannot be written: {error}", lock.display()));
        }
    };
    match establish(&path, options).await {
        Ok((live, facts)) => Ok(Arc::new(Sqlite::new(path, options.clone(), facts, live, lock))),
        Err(error) => {
            lock.release();
            Err(error)
        }
    }
}

/// Brings the file up to date and connects to it. The caller holds its lock.
pub(super) async fn establish(path: &Path, options: &Options) -> Result<(Live, Facts), OpenError> {
    refuse_contents(path)?;
    let is_new = file::is_empty(path);
    let explain = |error: sqlx::Error| sql_error(path, error);
    let mut connection =
        base(path).create_if_missing(is_new).busy_timeout(SETUP_BUSY).connect().await.map_err(explain)?;
    let set_up = set_up(&mut connection, path, options).await;
    let closed = connection.close().await;
    let (users, facts) = set_up?;
    closed.map_err(explain)?;

    let identity = file::Identity::of(path).map_err(|error| OpenError::Unreachable(cause(error)))?;
    let readers = base(path).busy_timeout(READ_BUSY).pragma("query_only", "on");
    let same = (path.to_owned(), identity);
    let pool = SqlitePoolOptions::new()
        .max_connections(READERS)
        .acquire_timeout(ACQUIRE)
        .test_before_acquire(false)
        .idle_timeout(None)
        .max_lifetime(None)
        .after_connect(move |_, _| {
            let (path, identity) = same.clone();
            Box::pin(async move { identity.must_be_at(&path).await })
        })
        .connect_lazy_with(readers.clone());
    let live = Live {
        path: path.to_owned(),
        pool,
        readers,
        writer: tokio::sync::Mutex::new(None),
        writes: base(path).busy_timeout(WRITE_BUSY),
        identity: std::sync::Mutex::new(identity),
        users,
    };
    Ok((live, facts))
}

fn base(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(path).disable_statement_logging()
}

async fn set_up(
    connection: &mut SqliteConnection,
    path: &Path,
    options: &Options,
) -> Result<(Users, Facts), OpenError> {
    let explain = |error: sqlx::Error| sql_error(path, error);
    let pending = schema::pending_migrations(connection, path).await?;
    if pending > 0 && !options.migrate {
        let path = path.display();
        return refuse(format!(
            "the schema in {path} is not up to date: run `rolecache migrate`, or serve without --no-migrate"
        ));
    }
    let found = Found::look(connection).await.map_err(|error| adopt_error(path, error))?;
    let known = schema::settings(connection).await.map_err(explain)?;
    if let Some((_, default, admin)) = &known {
        schema::refuse_settings(path, options, default, admin)?;
    }
    let sql = if options.migrate { "pragma journal_mode = wal" } else { "pragma journal_mode" };
    let mode: String = sqlx::query_scalar(sql).fetch_one(&mut *connection).await.map_err(explain)?;
    if !mode.eq_ignore_ascii_case("wal") {
        let path = path.display();
        return refuse(format!(
            "{path} is in journal mode {mode} and not in WAL mode, which network file systems cannot have"
        ));
    }
    if options.migrate {
        schema::migrator()
            .run_direct(None, &mut *connection, false)
            .await
            .map_err(|error| migrate_error(path, error))?;
    }
    let is_new = known.is_none();
    let (store_id, ..) = match known {
        Some(known) => known,
        None => schema::make_settings(connection, options).await.map_err(explain)?,
    };
    let now = Found::look(connection).await.map_err(|error| adopt_error(path, error))?;
    let Some(users) = now.users.clone() else {
        return refuse(format!("{} has no table users", path.display()));
    };
    if options.migrate {
        triggers::install(connection, &users, is_new).await.map_err(explain)?;
    } else {
        let missing = triggers::differences(connection, &users).await.map_err(explain)?;
        if !missing.is_empty() {
            return refuse(format!(
                "{}: {}; start once without --no-migrate, which puts it right and has every reader start over",
                path.display(),
                missing.join("; ")
            ));
        }
    }
    let version: String =
        sqlx::query_scalar("select sqlite_version()").fetch_one(&mut *connection).await.map_err(explain)?;
    let facts = Facts {
        kind: StoreKind::Sqlite,
        store_id,
        default_role: options.default_role.clone(),
        admin_role: options.admin_role.clone(),
        about: format!("SQLite {version} in {}", path.display()),
        // On a schema of ours nothing is created or adopted any more; what was found is what there is.
        adopted: if pending > 0 { found.sentence() } else { now.sentence() },
    };
    Ok((users, facts))
}

/// `sqlite://relative`, `sqlite:///absolute`; the rest of the text is the path as it is.
fn path_of(url: &str) -> Result<PathBuf, OpenError> {
    let path = url.strip_prefix("sqlite://").or_else(|| url.strip_prefix("sqlite:")).unwrap_or_default();
    if path.is_empty() || path.starts_with(':') || path.starts_with("file:") || path.contains('?') {
        return refuse(format!("{url} names no file: write sqlite://rolecache.db or sqlite:///srv/bot/rolecache.db"));
    }
    Ok(PathBuf::from(path))
}

/// Where nothing has to be opened to know that it cannot work.
fn refuse_place(path: &Path, migrate: bool) -> Result<(), OpenError> {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    };
    if !directory.is_dir() {
        return refuse(format!("the directory {} does not exist", directory.display()));
    }
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => refuse(format!("{} is not a file", path.display())),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !migrate => {
            refuse(format!("there is no database {}: run `rolecache migrate` first", path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => refuse(format!("{} cannot be read: {error}", path.display())),
    }
}

/// Must come before any connection of this process: closing the handle drops SQLite's locks on the file.
fn refuse_contents(path: &Path) -> Result<(), OpenError> {
    let file = match std::fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return refuse(format!("{} cannot be written: {error}", path.display())),
    };
    let mut head = Vec::new();
    if let Err(error) = file.take(16).read_to_end(&mut head) {
        return refuse(format!("{} cannot be read: {error}", path.display()));
    }
    if !head.is_empty() && head != b"SQLite format 3\0" {
        return refuse(format!("{} is not an SQLite database", path.display()));
    }
    Ok(())
}

pub(super) fn refuse<T>(sentence: String) -> Result<T, OpenError> {
    Err(OpenError::Refused(sentence))
}

pub(super) fn sql_error(path: &Path, error: sqlx::Error) -> OpenError {
    let path = path.display();
    match code_of(&error) {
        Some(code::NOTADB | code::CORRUPT) => {
            OpenError::Refused(format!("{path} is not an SQLite database, or is damaged: {error}"))
        }
        Some(code::READONLY) => OpenError::Refused(format!("{path} cannot be written: {error}")),
        Some(code::ERROR | code::CONSTRAINT | code::MISMATCH) => {
            OpenError::Refused(format!("{path} cannot be used: {error}"))
        }
        Some(code::BUSY | code::LOCKED) => {
            OpenError::Unreachable(words(format!("another program holds {path} locked")))
        }
        _ => OpenError::Unreachable(cause(error)),
    }
}

fn adopt_error(path: &Path, error: AdoptError) -> OpenError {
    match error {
        AdoptError::Refused(sentence) => OpenError::Refused(format!("{}: {sentence}", path.display())),
        AdoptError::Sql(error) => sql_error(path, error),
    }
}

fn migrate_error(path: &Path, error: MigrateError) -> OpenError {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => sql_error(path, error),
        other => OpenError::Refused(format!("{}: {other}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_a_file() {
        for (url, path) in [
            ("sqlite://rolecache.db", "rolecache.db"),
            ("sqlite:///srv/bot.db", "/srv/bot.db"),
            ("sqlite:bot.db", "bot.db"),
            ("sqlite://./a b.db", "./a b.db"),
        ] {
            assert_eq!(path_of(url).expect("a path"), Path::new(path), "{url}");
        }
        for url in ["sqlite://", "sqlite::memory:", "sqlite://a.db?mode=ro", "postgres://x", ""] {
            assert!(path_of(url).is_err(), "{url}");
        }
    }
}
