//! Opens a file: what must hold before anything is touched, then the schema, then the connections.
//!
//! A refusal leaves the file as it was. Everything that can refuse looks before the first write.

use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use sqlx::{ConnectOptions, Connection, SqliteConnection, migrate::MigrateError, sqlite::SqliteConnectOptions};
use uuid::Uuid;

use super::{
    Live, Sqlite,
    adopt::{AdoptError, Found, Users},
    connection::Source,
    error::{cause, code, code_of, words},
    file::{self, Looker},
    lock::{Lock, LockError},
    place::{path_of, refuse_contents, refuse_place},
    pool::Pool,
    schema, triggers,
};
use crate::store::{Facts, OpenError, Options, Store, StoreKind};

/// Long enough to wait out any write of a program that behaves.
const SETUP_BUSY: Duration = Duration::from_secs(5);
const READ_BUSY: Duration = Duration::from_secs(2);
/// The writer never waits for others' locks; SQLite sleeps 1, 2 and 5 ms in this time, and looks again.
const WRITE_BUSY: Duration = Duration::from_millis(10);
/// The tailer, four pagers and one more.
const LOG_READERS: u32 = 6;
/// As many as the cache asks for at once.
const FILL_READERS: u32 = 8;
/// Lists and look-ups, places in the log, and upkeep.
const LIST_READERS: u32 = 8;
/// Those of callers, the cache's own, and one that is closing.
const SNAPSHOT_READERS: u32 = 6;
/// One that writes, one that finds out what became of a write, and the same while both are stuck.
pub(super) const WRITERS: u32 = 4;

/// Why a file cannot be connected to.
pub(super) enum EstablishError {
    Open(OpenError),
    /// It holds something else than what was looked for.
    Another,
}

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
    let opened = match Looker::start(path.clone()) {
        Ok(looker) => establish(&path, options, &looker, None).await.map(|(live, facts)| (live, facts, looker)),
        Err(error) => Err(OpenError::Unreachable(cause(error)).into()),
    };
    match opened {
        Ok((live, facts, looker)) => Ok(Arc::new(Sqlite::new(path, options.clone(), facts, live, looker, lock))),
        Err(error) => {
            lock.release();
            Err(match error {
                EstablishError::Open(error) => error,
                EstablishError::Another => OpenError::Refused(format!("{} is another database", path.display())),
            })
        }
    }
}

/// Brings the file up to date and connects to it. The caller holds its lock. With `known`, only the store of this id is
/// taken; anything else is left untouched.
pub(super) async fn establish(
    path: &Path,
    options: &Options,
    looker: &Arc<Looker>,
    known: Option<Uuid>,
) -> Result<(Live, Facts), EstablishError> {
    let place = path.to_owned();
    let looked = file::aside(move || {
        // Once the store is open its file is not opened like this again: by then a connection may be there already, when
        // the disk was slow and the call that asked is gone.
        if known.is_none() {
            refuse_contents(&place)?;
        }
        Ok::<_, OpenError>(file::is_empty(&place))
    });
    let is_new = looked.await.map_err(|error| OpenError::Unreachable(cause(error)))??;
    if is_new && known.is_some() {
        return Err(OpenError::Unreachable(words(format!("{} is empty", path.display()))).into());
    }
    let explain = |error: sqlx::Error| sql_error(path, error);
    let mut connection =
        base(path).create_if_missing(is_new).busy_timeout(SETUP_BUSY).connect().await.map_err(explain)?;
    let set_up = match is_another(&mut connection, known).await {
        Ok(false) => set_up(&mut connection, path, options).await.map_err(EstablishError::from),
        Ok(true) => Err(EstablishError::Another),
        Err(error) => Err(explain(error).into()),
    };
    let closed = connection.close().await;
    let (users, facts) = set_up?;
    closed.map_err(explain)?;

    let identity = looker.look().await.map_err(|error| OpenError::Unreachable(cause(error)))?;
    let readers = base(path).busy_timeout(READ_BUSY).pragma("query_only", "on");
    let over = Arc::new(AtomicBool::new(false));
    let source = |options, places| Source::new(options, identity, looker.clone(), over.clone(), places);
    let pool = |size| Pool::new(source(readers.clone(), size), size);
    let live = Live {
        log: pool(LOG_READERS),
        fills: pool(FILL_READERS),
        lists: pool(LIST_READERS),
        snapshots: pool(SNAPSHOT_READERS),
        writer: tokio::sync::Mutex::new(None),
        writers: source(base(path).busy_timeout(WRITE_BUSY), WRITERS),
        identity: std::sync::Mutex::new(identity),
        users,
        over: over.clone(),
    };
    Ok((live, facts))
}

/// Whether the file holds something else than the store of the id `known`. Looks only.
async fn is_another(connection: &mut SqliteConnection, known: Option<Uuid>) -> Result<bool, sqlx::Error> {
    let Some(known) = known else { return Ok(false) };
    let settings = schema::settings(connection).await?;
    Ok(settings.is_none_or(|(store_id, ..)| store_id != known))
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

impl From<OpenError> for EstablishError {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
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
