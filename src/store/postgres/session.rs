//! Connections: how each is set up, how long it may be silent, and what its errors mean.
//!
//! A connection whose answer was not read to the end never goes back to its pool: an answer that is cut off by a
//! timeout or a cancelled caller would be read by the next one.

use std::{fmt, io, sync::Arc, time::Duration};

use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool, Postgres,
    error::DatabaseError,
    pool::PoolConnection,
    postgres::{PgArguments, PgConnectOptions, PgDatabaseError, PgPoolOptions, PgRow},
    query::Query,
};

use super::rows;
use crate::store::{Cause, OpenError, StoreError};

/// A prepared statement is not there, or is there already: a pooler gives sessions that do not know ours.
pub(super) const STATEMENT_MISSING: &str = "26000";
pub(super) const STATEMENT_KNOWN: &str = "42P05";

/// How long a statement may take on the server; the client gives up a little later, in case the connection is dead.
pub(super) const STATEMENT_LIMIT: Duration = Duration::from_secs(5);
/// Of a look at what is there, when the store is opened.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(10);
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const ACQUIRE_LIMIT: Duration = Duration::from_secs(2);
/// Of the writer, whose callers have waited for their turn before.
const WRITER_ACQUIRE_LIMIT: Duration = Duration::from_secs(1);
/// Shorter than they wait for their turn: who comes next is to be told of the lock as well.
const WRITER_LOCK_LIMIT: &str = "1500ms";
const MARGIN: Duration = Duration::from_secs(1);
/// Of a connection's answer whether it is still there; what is left of the limit above is for a new one.
const PING_LIMIT: Duration = Duration::from_millis(400);
/// Of upkeep: a commit of a million changes is trimmed as a whole.
pub(super) const UPKEEP_LIMIT: Duration = Duration::from_secs(120);
/// After this long without use a connection is asked whether it is still there.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);

/// Each kind of work has its own connections, so that none waits behind another.
pub(super) struct Pools {
    /// The roles of users.
    pub(super) reads: PgPool,
    /// What callers list and look up, as many as they like.
    pub(super) lists: PgPool,
    /// The tailer, and as many watchers as may page the log at once.
    pub(super) log: PgPool,
    /// The two lanes of the writer.
    pub(super) writer: PgPool,
    pub(super) upkeep: PgPool,
}

/// A pool's connection for one statement after another, closed if any of them was left half read.
pub(super) struct Lease {
    conn: PoolConnection<Postgres>,
    limit: Duration,
    sound: bool,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Nothing was sent.
    #[error("no connection: {0}")]
    NoConnection(#[source] sqlx::Error),
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Sql(#[from] sqlx::Error),
    /// The primary that it was follows another one now.
    #[error("it is a standby now, behind the primary or cut off from it")]
    Standby,
    /// What was restored or renamed into its place.
    #[error("it is another database now, or its default role or admin role is another")]
    Another,
    /// An answer that the schema rules out.
    #[error("{0}")]
    Shape(String),
}

/// What every session of ours has, given in the start-up packet: a SET would outlive us behind a pooler.
pub(super) fn session(url: &PgConnectOptions, statement_limit: Duration) -> PgConnectOptions {
    url.clone()
        .application_name("rolecache")
        // We read no such numbers, and PgBouncer refuses the setting.
        .extra_float_digits(None)
        .options([
            ("default_transaction_isolation", "read committed"),
            ("statement_timeout", &format!("{}ms", statement_limit.as_millis())),
            ("lock_timeout", "2s"),
            ("idle_in_transaction_session_timeout", "10s"),
            ("search_path", "pg_catalog, pg_temp"),
            // A user whom a policy hides would be taken for one who does not exist: an error instead.
            ("row_security", "off"),
            // What a migration finds there already is nothing to tell an operator of.
            ("client_min_messages", "warning"),
            // Compiling costs more than any of our statements.
            ("jit", "off"),
        ])
        .disable_statement_logging()
}

/// A connection of its own, outside every pool.
pub(super) async fn connect(options: &PgConnectOptions) -> Result<PgConnection, Failure> {
    match tokio::time::timeout(CONNECT_LIMIT, PgConnection::connect_with(options)).await {
        Ok(connected) => connected.map_err(Failure::NoConnection),
        Err(_) => Err(Failure::Silent(CONNECT_LIMIT)),
    }
}

/// Why TLS came to nothing, where that will stay so. What rustls finds wrong comes as invalid data.
fn distrust(error: &sqlx::Error) -> Option<String> {
    match error {
        sqlx::Error::Tls(why) => Some(why.to_string()),
        sqlx::Error::Io(why) if why.kind() == io::ErrorKind::InvalidData => Some(why.to_string()),
        _ => None,
    }
}

// === impl Pools ===

impl Pools {
    /// Connects to nothing yet.
    pub(super) fn new(url: &PgConnectOptions) -> Self {
        let usual = session(url, STATEMENT_LIMIT);
        // Without statistics the planner would rather sort a commit of a million changes than walk its key.
        let log = usual.clone().options([("enable_bitmapscan", "off"), ("enable_seqscan", "off")]);
        Self {
            reads: pool(12, TRUSTED_IDLE).connect_lazy_with(usual.clone()),
            lists: pool(8, TRUSTED_IDLE).connect_lazy_with(log.clone()),
            log: pool(6, TRUSTED_IDLE).connect_lazy_with(log),
            // Asked before each use: a write that finds its connection gone would be one with an unknown outcome.
            writer: pool(2, Duration::ZERO)
                .acquire_timeout(WRITER_ACQUIRE_LIMIT)
                .connect_lazy_with(usual.options([("lock_timeout", WRITER_LOCK_LIMIT)])),
            upkeep: pool(2, TRUSTED_IDLE).connect_lazy_with(session(url, UPKEEP_LIMIT)),
        }
    }

    fn all(&self) -> [&PgPool; 5] {
        [&self.reads, &self.lists, &self.log, &self.writer, &self.upkeep]
    }

    pub(super) async fn close(&self) {
        let all = futures::future::join_all(self.all().map(PgPool::close));
        // A connection that is stuck is not worth waiting for.
        let _ = tokio::time::timeout(ACQUIRE_LIMIT, all).await;
    }
}

/// Connections that are trusted for so long after their last use, and then asked.
fn pool(most: u32, trusted: Duration) -> PgPoolOptions {
    PgPoolOptions::new().max_connections(most).acquire_timeout(ACQUIRE_LIMIT).test_before_acquire(false).before_acquire(
        move |conn, meta| {
            Box::pin(async move {
                Ok(meta.idle_for < trusted
                    || tokio::time::timeout(PING_LIMIT, conn.ping()).await.is_ok_and(|it| it.is_ok()))
            })
        },
    )
}

// === impl Lease ===

impl Lease {
    pub(super) async fn of(pool: &PgPool) -> Result<Self, Failure> {
        Self::with_limit(pool, STATEMENT_LIMIT).await
    }

    pub(super) async fn with_limit(pool: &PgPool, limit: Duration) -> Result<Self, Failure> {
        let conn = pool.acquire().await.map_err(Failure::NoConnection)?;
        Ok(Self { conn, limit: limit + MARGIN, sound: true })
    }

    /// Runs one statement to its end: with a write, its COMMIT is part of that.
    pub(super) async fn fetch(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<Vec<PgRow>, Failure> {
        self.sound = false;
        match tokio::time::timeout(self.limit, query.fetch_all(&mut *self.conn)).await {
            Err(_) => Err(Failure::Silent(self.limit)),
            Ok(Ok(rows)) => {
                // It would be asked for as long as it lives, and the primary be elsewhere.
                self.sound = !rows.first().is_some_and(rows::is_of_standby);
                Ok(rows)
            }
            Ok(Err(error)) => {
                // An error is sent before its transaction is rolled back, and its locks are held till then.
                // What may only be read is a standby by now; and what a pooler has mixed up stays so.
                let is_over = |it: &dyn DatabaseError| {
                    it.code().is_some_and(|code| ["25006", STATEMENT_MISSING, STATEMENT_KNOWN].contains(&&*code))
                };
                self.sound = error.as_database_error().is_some_and(|it| !is_over(it))
                    && tokio::time::timeout(MARGIN, self.conn.ping()).await.is_ok_and(|ready| ready.is_ok());
                Err(error.into())
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.sound {
            self.conn.close_on_drop();
            return;
        }
        // The pool asks a connection before it takes it back, and would wait for an answer that does not come for as long as
        // TCP does, with its place among the few.
        let taken_back = self.conn.return_to_pool();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(MARGIN, taken_back));
        }
    }
}

/// One statement on a connection of `pool`, which may run twice: where its connection is found broken it is run on
/// another. After an outage every connection of the pool may be broken, and who asks first is not to pay for each.
pub(super) async fn fetch<'q>(
    pool: &PgPool,
    query: impl Fn() -> Query<'q, Postgres, PgArguments>,
) -> Result<Vec<PgRow>, Failure> {
    for _ in 0..pool.options().get_max_connections() {
        match Lease::of(pool).await?.fetch(query()).await {
            Err(failure) if failure.is_broken_connection() => {}
            answer => return answer,
        }
    }
    Lease::of(pool).await?.fetch(query()).await
}

/// A step of opening: a server that falls silent in it counts as out of reach.
pub(super) async fn within<T>(
    limit: Duration,
    step: impl Future<Output = Result<T, OpenError>>,
) -> Result<T, OpenError> {
    tokio::time::timeout(limit, step).await.unwrap_or_else(|_| Err(Failure::Silent(limit).into()))
}

// === impl Failure ===

impl Failure {
    pub(super) fn shape(what: impl fmt::Display) -> Self {
        Self::Shape(what.to_string())
    }

    /// The five characters by which PostgreSQL names an error.
    pub(super) fn code(&self) -> Option<String> {
        let Self::Sql(error) = self else { return None };
        Some(error.as_database_error()?.code()?.into_owned())
    }

    /// What PostgreSQL says, or a function of ours.
    pub(super) fn message(&self) -> Option<String> {
        let Self::Sql(error) = self else { return None };
        Some(error.as_database_error()?.message().to_owned())
    }

    /// Whether PostgreSQL was inside this function of ours.
    pub(super) fn is_in(&self, function: &str) -> bool {
        self.context().is_some_and(|context| context.contains(function))
    }

    /// Whether PostgreSQL was inside a function that is none of ours: a trigger of the table's own.
    pub(super) fn is_in_a_foreign_function(&self) -> bool {
        let functions = ["PL/pgSQL function ", "SQL function "];
        let is_function = |line: &&str| functions.iter().any(|begin| line.starts_with(begin));
        let innermost = self.context().and_then(|context| context.lines().find(is_function));
        innermost.is_some_and(|line| !line.contains(" function rolecache."))
    }

    fn context(&self) -> Option<&str> {
        let Self::Sql(sqlx::Error::Database(error)) = self else { return None };
        error.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::r#where)
    }

    /// Whether it says so at once; one that is silent may be sound.
    fn is_broken_connection(&self) -> bool {
        matches!(self, Self::Sql(sqlx::Error::Io(_))) || self.code().is_some_and(|code| code.starts_with("57P"))
    }

    pub(super) fn cause(self) -> Cause {
        Arc::new(self)
    }

    /// Whether trying again later may help.
    pub(super) fn passes(&self) -> bool {
        match self {
            Self::NoConnection(_) | Self::Silent(_) | Self::Standby => true,
            Self::Shape(_) | Self::Another => false,
            Self::Sql(sqlx::Error::Database(error)) => {
                let code = error.code().unwrap_or_default();
                ["08", "25", "40", "53", "55", "57", "58"].iter().any(|class| code.starts_with(class))
                    || [STATEMENT_MISSING, STATEMENT_KNOWN].contains(&&*code)
            }
            Self::Sql(error) => matches!(
                error,
                sqlx::Error::Io(_)
                    | sqlx::Error::Tls(_)
                    | sqlx::Error::Protocol(_)
                    | sqlx::Error::PoolTimedOut
                    | sqlx::Error::PoolClosed
                    | sqlx::Error::WorkerCrashed
            ),
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        if failure.passes() { Self::Unreachable(failure.cause()) } else { Self::Broken(failure.cause()) }
    }
}

impl From<Failure> for OpenError {
    /// What a person has to put right is refused; the rest is worth another try.
    fn from(failure: Failure) -> Self {
        if let Failure::NoConnection(error) = &failure
            && let Some(why) = distrust(error)
        {
            return Self::Refused(format!(
                "there is no trusted connection to PostgreSQL: {why}; look at the host, sslmode and sslrootcert of the \
                 database URL"
            ));
        }
        let code = match &failure {
            Failure::NoConnection(error) | Failure::Sql(error) => {
                error.as_database_error().and_then(|error| Some(error.code()?.into_owned())).unwrap_or_default()
            }
            Failure::Silent(_) | Failure::Standby | Failure::Another | Failure::Shape(_) => String::new(),
        };
        let sentence = match code.as_str() {
            "3D000" => "the database that the URL names does not exist",
            "42501" => {
                "our database role lacks rights on the schema rolecache; docs/postgresql.md has all that it needs"
            }
            "08P01" => "our start-up options are refused, as by a pooler: docs/postgresql.md has what to do behind one",
            code if code.starts_with("28") => "PostgreSQL refuses the user or the password of the database URL",
            _ if failure.passes() => return Self::Unreachable(failure.cause()),
            _ => "the store answers what it should not; the log has the cause",
        };
        tracing::error!(error = %failure, "the store cannot be opened");
        Self::Refused(sentence.to_owned())
    }
}
