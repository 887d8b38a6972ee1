//! A whole server in this process, on a free port, over a store of the test's choice; and a client of it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use rolecache::{
    access::Allowance,
    cache, feed, grpc,
    proto::v1::{
        FeedState, GetRoleRequest, GetRoleResponse, SetRoleRequest, SetRoleResponse, StatsRequest, StatsResponse,
        WatchRoleChangesRequest, role_cache_service_client::RoleCacheServiceClient,
    },
    role::RoleName,
    server::{DoorOptions, Options, Server, ServerError},
    store::{self, Store},
};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::health_check_response::ServingStatus;

use super::{
    postgres::{Postgres, psql},
    watch::Watching,
};

/// The longest that a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A database for one test.
pub enum Db {
    Postgres { url: String },
    Sqlite { directory: TempDir },
}

/// The shell of a database, to be handed to other tasks.
#[derive(Clone)]
pub enum Shell {
    Psql(String),
    Sqlite(PathBuf),
}

/// How a server is to be built. The defaults are those of `serve`, with shorter intervals.
pub struct Setup {
    pub url: String,
    pub mode: cache::Mode,
    pub max_staleness: Duration,
    pub poll_interval: Duration,
    pub retain_changes: Duration,
    pub upkeep_interval: Duration,
    pub self_check: Option<Duration>,
    pub ring_bytes: usize,
    pub fallback_reads: usize,
    pub limits: grpc::Limits,
    pub doors: DoorOptions,
    pub roles: Vec<&'static str>,
    pub reflection: bool,
    /// Puts something between the server and its store.
    pub wrap: Option<Wrap>,
}

/// What one caller may do: nothing that a test meets by accident.
pub const ALLOWANCE: Allowance = Allowance { calls_per_second: None, calls: 10_000, watches: 10_000 };

/// Puts something in front of a store.
pub type Wrap = Box<dyn Fn(Arc<dyn Store>) -> Arc<dyn Store> + Send + Sync>;

/// A running server. Dropped, it ends hard; [`TestServer::stop`] drains it.
pub struct TestServer {
    pub address: SocketAddr,
    pub client: RoleCacheServiceClient<Channel>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServerError>>,
}

// === impl Db ===

impl Db {
    pub async fn postgres() -> Self {
        Self::Postgres { url: Postgres::shared().fresh_database().await.url.clone() }
    }

    pub fn sqlite() -> Self {
        Self::Sqlite { directory: tempfile::tempdir().unwrap() }
    }

    pub fn url(&self) -> String {
        match self {
            Self::Postgres { url } => url.clone(),
            Self::Sqlite { .. } => format!("sqlite://{}", self.file().display()),
        }
    }

    pub fn file(&self) -> PathBuf {
        match self {
            Self::Postgres { .. } => panic!("a PostgreSQL database is no file"),
            Self::Sqlite { directory } => directory.path().join("bot.db"),
        }
    }

    pub fn shell(&self) -> Shell {
        match self {
            Self::Postgres { url } => Shell::Psql(url.clone()),
            Self::Sqlite { .. } => Shell::Sqlite(self.file()),
        }
    }

    pub fn is_postgres(&self) -> bool {
        matches!(self, Self::Postgres { .. })
    }

    /// Runs SQL in the database's own shell, as a stranger would, and answers what it prints.
    #[track_caller]
    pub fn sql(&self, sql: &str) -> String {
        self.shell().run(sql)
    }

    /// Everything that a call could change: the bot's tables, the log, and the request ids.
    #[track_caller]
    pub fn contents(&self) -> String {
        let (prefix, bot) = match self {
            Self::Postgres { .. } => ("rolecache.", "public."),
            Self::Sqlite { .. } => ("rolecache_", ""),
        };
        let tables = [
            format!("{bot}users order by user_id"),
            format!("{bot}mailboxes order by id"),
            format!("{prefix}commits order by id"),
            format!("{prefix}changes order by commit_id, seq"),
            format!("{prefix}requests order by actor, request_id"),
        ];
        tables.map(|table| format!("{table}\n{}\n", self.sql(&format!("select * from {table}")))).concat()
    }

    pub async fn serve(&self) -> TestServer {
        Setup::new(self).serve().await
    }
}

// === impl Shell ===

impl Shell {
    #[track_caller]
    pub fn run(&self, sql: &str) -> String {
        match self {
            Self::Psql(url) => psql(url, sql),
            Self::Sqlite(file) => {
                let ran = std::process::Command::new("sqlite3")
                    .args(["-batch", "-bail", "-cmd", ".timeout 20000"])
                    .arg(file)
                    .arg(sql)
                    .output()
                    .expect("run the sqlite3 shell");
                assert!(ran.status.success(), "{sql}: {}", String::from_utf8_lossy(&ran.stderr));
                // Blobs are no text.
                String::from_utf8_lossy(&ran.stdout).into_owned().trim_end().to_owned()
            }
        }
    }

    /// The same, while the test's other tasks go on.
    pub async fn go(&self, sql: impl Into<String>) -> String {
        let (shell, sql) = (self.clone(), sql.into());
        tokio::task::spawn_blocking(move || shell.run(&sql)).await.unwrap()
    }
}

// === impl Setup ===

impl Setup {
    pub fn new(db: &Db) -> Self {
        Self {
            url: db.url(),
            mode: cache::Mode::Lazy { capacity: None },
            max_staleness: Duration::from_secs(60),
            poll_interval: Duration::from_millis(100),
            retain_changes: Duration::from_secs(30 * 24 * 60 * 60),
            upkeep_interval: Duration::from_millis(200),
            self_check: None,
            ring_bytes: 16 << 20,
            fallback_reads: 64,
            limits: limits(),
            doors: DoorOptions {
                credentials: None,
                allowance: ALLOWANCE,
                tls: None,
                reread: Duration::from_millis(20),
            },
            roles: vec!["user", "admin", "moderator"],
            reflection: true,
            wrap: None,
        }
    }

    pub fn complete(self) -> Self {
        Self { mode: cache::Mode::Complete, ..self }
    }

    pub fn capacity(self, users: usize) -> Self {
        Self { mode: cache::Mode::Lazy { capacity: Some(users) }, ..self }
    }

    pub fn wrap(self, wrap: impl Fn(Arc<dyn Store>) -> Arc<dyn Store> + Send + Sync + 'static) -> Self {
        Self { wrap: Some(Box::new(wrap)), ..self }
    }

    /// Starts the server and waits until health says that it serves.
    pub async fn serve(self) -> TestServer {
        let server = self.start().await;
        server.until_serving().await;
        server
    }

    /// Starts the server, and waits for nothing.
    pub async fn start(self) -> TestServer {
        let store = store::Options {
            url: self.url,
            default_role: RoleName::held("user"),
            admin_role: RoleName::held("admin"),
            migrate: true,
        };
        let wrap = self.wrap.map(Arc::new);
        let options = Options {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            open_store: Box::new(move || {
                let (store, wrap) = (store.clone(), wrap.clone());
                Box::pin(async move {
                    let store = store::open(&store).await?;
                    Ok(match &wrap {
                        Some(wrap) => wrap(store),
                        None => store,
                    })
                })
            }),
            feed: feed::Options { poll_interval: self.poll_interval, ring_bytes: self.ring_bytes },
            cache: cache::Options {
                mode: self.mode,
                max_staleness: self.max_staleness,
                fallback_reads: self.fallback_reads,
                oversized: feed::OVERSIZED,
            },
            roles: self.roles.into_iter().map(RoleName::held).collect(),
            retain_changes: self.retain_changes,
            upkeep_interval: self.upkeep_interval,
            self_check: self.self_check,
            reflection: self.reflection,
            doors: self.doors,
            limits: self.limits,
        };
        let is_tls = options.doors.tls.is_some();
        let server = Server::bind(options).await.expect("bind a free port");
        let address = server.address().unwrap();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        // With TLS it is the test that knows how to connect.
        let client =
            if is_tls { RoleCacheServiceClient::new(endpoint(address).connect_lazy()) } else { client(address).await };
        TestServer { address, client, stop: Some(stop), task }
    }
}

/// Nothing that a test meets by accident.
fn limits() -> grpc::Limits {
    grpc::Limits {
        connections: 20_000,
        streams: 10_000,
        calls: 10_000,
        watches: 10_000,
        message_bytes: 256 * 1024,
        header_bytes: 16 * 1024,
        deadline: PATIENCE,
        handshake: Duration::from_secs(10),
        keepalive: Duration::from_secs(20),
        idle: Duration::from_secs(900),
    }
}

/// A client with a connection of its own.
pub async fn client(address: SocketAddr) -> RoleCacheServiceClient<Channel> {
    try_client(address).await.expect("connect to the server")
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Channel::from_shared(format!("http://{address}")).unwrap()
}

/// None where nobody is there.
pub async fn try_client(address: SocketAddr) -> Option<RoleCacheServiceClient<Channel>> {
    let channel = endpoint(address).connect().await.ok()?;
    Some(RoleCacheServiceClient::new(channel).max_decoding_message_size(64 << 20))
}

// === impl TestServer ===

impl TestServer {
    pub async fn until_serving(&self) {
        self.until_health(ServingStatus::Serving).await;
    }

    /// Waits until health says so of the whole server.
    pub async fn until_health(&self, status: ServingStatus) {
        let channel = Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap();
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
        let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
        let mut answers = health.watch(request).await.unwrap().into_inner();
        tokio::time::timeout(PATIENCE, async {
            while let Some(answer) = answers.message().await.unwrap() {
                if answer.status() == status {
                    return;
                }
            }
            panic!("the server ended before its health was {status:?}");
        })
        .await
        .unwrap_or_else(|_| panic!("health should be {status:?} in time"));
    }

    /// Waits until the feed is live, as it is after the store has answered again. Health bridges short outages.
    pub async fn until_live(&self) {
        let live = async { while self.stats().await.feed_state() != FeedState::Live {} };
        tokio::time::timeout(PATIENCE, live).await.expect("the feed should be live in time");
    }

    pub async fn get(&self, user_id: i64) -> GetRoleResponse {
        self.try_get(GetRoleRequest { user_id, ..Default::default() }).await.expect("GetRole")
    }

    pub async fn try_get(&self, request: GetRoleRequest) -> Result<GetRoleResponse, Status> {
        Ok(self.client.clone().get_role(request).await?.into_inner())
    }

    pub async fn set(&self, user_id: i64, role: &str) -> SetRoleResponse {
        let request = SetRoleRequest { user_id, role: role.into(), ..Default::default() };
        self.try_set(request).await.expect("SetRole")
    }

    pub async fn try_set(&self, request: SetRoleRequest) -> Result<SetRoleResponse, Status> {
        Ok(self.client.clone().set_role(request).await?.into_inner())
    }

    pub async fn stats(&self) -> StatsResponse {
        self.client.clone().stats(StatsRequest {}).await.expect("Stats").into_inner()
    }

    /// Opens a watch, whose first message it takes.
    pub async fn watch(&self, request: WatchRoleChangesRequest) -> Watching {
        Watching::open(self.client.clone(), request).await.expect("open a watch")
    }

    /// Waits until this server has applied `revision`.
    pub async fn reach(&self, revision: i64) {
        let request = GetRoleRequest { user_id: i64::MAX, min_revision: revision, ..Default::default() };
        self.try_get(request).await.expect("wait for a revision");
    }

    /// Asks it to stop, and waits for the end.
    pub async fn stop(mut self) -> Result<(), ServerError> {
        self.stop.take().unwrap().send(()).unwrap();
        (&mut self.task).await.unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
