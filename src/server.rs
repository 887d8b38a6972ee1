//! The composition root: the one place that builds all parts, runs them, and takes them down in order.

use std::{
    convert::Infallible,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use futures::{FutureExt, future::BoxFuture};
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    access::{
        Access, Allowance,
        credentials::{self, Credential},
    },
    cache::{self, RoleCache},
    feed::{self, Apply},
    grpc::{self, Doors, Grpc, TlsOptions},
    panics,
    reload::{Contents, Files},
    role::{Commit, RoleName},
    step::{self, FeedState, Step},
    store::{Grant, OpenError, Store},
    writer,
};

/// From the stop signal to the end, whatever hangs; of it, the calls in flight get the most.
const DRAIN_LIMIT: Duration = Duration::from_secs(8);
const CLOSE_LIMIT: Duration = Duration::from_millis(1_500);

/// How often health looks at the clock.
const HEALTH_INTERVAL: Duration = Duration::from_millis(200);

/// Opens the store; called again while it cannot be reached.
pub type OpenStore = Box<dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Store>, OpenError>> + Send + Sync>;

/// What a server is built with.
pub struct Options {
    pub listen: SocketAddr,
    pub open_store: OpenStore,
    pub feed: feed::Options,
    pub cache: cache::Options,
    /// The roles that writes may set.
    pub roles: Vec<RoleName>,
    /// How long the change log is kept.
    pub retain_changes: Duration,
    /// How often it is trimmed, and the triggers that write it are checked.
    pub upkeep_interval: Duration,
    /// How often the cache is compared with the store, if at all.
    pub self_check: Option<Duration>,
    pub reflection: bool,
    pub doors: DoorOptions,
    pub limits: grpc::Limits,
}

/// Who may come in, and how.
#[derive(Clone, Debug)]
pub struct DoorOptions {
    /// None where everybody may do everything.
    pub credentials: Option<PathBuf>,
    pub allowance: Allowance,
    pub tls: Option<TlsOptions>,
    /// How often it is looked whether files have changed.
    pub reread: Duration,
}

/// A server that has its port.
pub struct Server {
    options: Options,
    listener: TcpListener,
}

/// Why a server ended that nobody stopped, or did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {address}: {cause}")]
    Listen { address: SocketAddr, cause: std::io::Error },
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Ended(String),
}

/// The tasks that run as long as the server does. One that ends takes the server with it.
#[derive(Default)]
struct Upkeep(JoinSet<String>);

impl Server {
    /// Takes the port, so that a wrong address fails before anything else is begun.
    pub async fn bind(options: Options) -> Result<Self, ServerError> {
        let address = options.listen;
        let listener = TcpListener::bind(address).await.map_err(|cause| ServerError::Listen { address, cause })?;
        Ok(Self { options, listener })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`, then drains: refuse new calls, let those in flight finish, end the tasks, close the store.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), ServerError> {
        let Self { options, listener } = self;
        let mut upkeep = Upkeep::default();
        let doors = doors(&options.doors, &options.roles, &mut upkeep).map_err(ServerError::Refused)?;
        let limits = options.limits.clone();
        let (grpc, accept) = Grpc::new(listener, doors, limits, options.reflection, options.roles.clone()).await;
        let grpc = Arc::new(grpc);
        tokio::pin!(stop);
        upkeep.spawn("accept loop", async move {
            accept.await;
            "connections are accepted no more".to_owned()
        });

        let opened = tokio::select! {
            () = &mut stop => None,
            opened = open(&options.open_store) => Some(opened),
            ended = upkeep.ended() => Some(Err(ended)),
        };
        let (store, ended) = match opened {
            None => (None, Ok(())),
            Some(Err(error)) => (None, Err(error)),
            Some(Ok(store)) => {
                start(&options, store.clone(), &grpc, &mut upkeep);
                let ended = tokio::select! {
                    () = &mut stop => Ok(()),
                    ended = upkeep.ended() => Err(ended),
                };
                (Some(store), ended)
            }
        };

        match &ended {
            Ok(()) => tracing::info!("stopping: calls in flight may finish"),
            Err(ServerError::Ended(reason)) => tracing::error!(reason, "stopping: a background task ended"),
            Err(_) => {}
        }
        let limit = Instant::now() + DRAIN_LIMIT;
        if timeout_at(limit, grpc.drain()).await.is_err() {
            tracing::warn!("calls that did not finish in {} s are cut off", DRAIN_LIMIT.as_secs());
            grpc.cut();
        }
        upkeep.0.shutdown().await;
        if let Some(store) = store
            && timeout(CLOSE_LIMIT, store.close()).await.is_err()
        {
            tracing::warn!("the store did not close its connections in time");
        }
        tracing::info!("stopped");
        ended
    }
}

/// Reads what the doors are made of, and goes on reading it.
fn doors(options: &DoorOptions, roles: &[RoleName], upkeep: &mut Upkeep) -> Result<Doors, String> {
    let access = match &options.credentials {
        None => Arc::new(Access::open(options.allowance)),
        Some(path) => {
            let files = Files { what: "credentials", paths: vec![path.clone()] };
            let contents = files.read()?;
            let known = callers(path, &contents, roles)?;
            if known.is_empty() {
                return Err(format!("{}: it has no caller in it, so nobody could call", path.display()));
            }
            tracing::info!(credentials = known.len(), "doors: closed to all but the callers in {}", path.display());
            let access = Arc::new(Access::closed(known, options.allowance));
            let (path, replaced, roles) = (path.clone(), access.clone(), roles.to_vec());
            let take =
                move |contents: &Contents| callers(&path, contents, &roles).map(|callers| replaced.replace(callers));
            upkeep.spawn("credentials", never(files.keep_read(options.reread, contents, take)));
            access
        }
    };
    let tls = match &options.tls {
        None => None,
        Some(tls) => {
            let files = tls.files();
            let contents = files.read()?;
            let (newest, receiver) = watch::channel(Arc::new(tls.load(&contents)?));
            tracing::info!("TLS: by {}", tls.certificate.display());
            let tls = tls.clone();
            let take =
                move |contents: &Contents| tls.load(contents).map(|tls| drop(newest.send_replace(Arc::new(tls))));
            upkeep.spawn("certificates", never(files.keep_read(options.reread, contents, take)));
            Some(receiver)
        }
    };
    Ok(Doors { access, tls })
}

fn callers(path: &Path, contents: &Contents, roles: &[RoleName]) -> Result<Vec<Credential>, String> {
    let text = contents.first().and_then(|contents| std::str::from_utf8(contents).ok());
    let text = text.ok_or_else(|| format!("{}: it is no text", path.display()))?;
    let callers = credentials::parse(text).map_err(|error| format!("{}: {error}", path.display()))?;
    for Credential { name, scopes, .. } in &callers {
        // By a slip such as `write:moderatr` nobody gets too much, but somebody wonders. What stands there may be a secret.
        if let Grant::Only(granted) = scopes.grant()
            && granted.iter().any(|role| !roles.contains(role))
        {
            tracing::warn!("{}: {name} has the scope of a role that no write may set", path.display());
        }
    }
    Ok(callers)
}

/// Waits for the store with growing pauses; a store that refuses is not asked again.
async fn open(open_store: &OpenStore) -> Result<Arc<dyn Store>, ServerError> {
    let mut delays = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times()
        .build();
    loop {
        match open_store().await {
            Ok(store) => return Ok(store),
            Err(OpenError::Refused(sentence)) => return Err(ServerError::Refused(sentence)),
            Err(OpenError::Unreachable(cause)) => {
                let delay = delays.next().unwrap_or(Duration::from_secs(5));
                tracing::warn!(%cause, retry_ms = delay.as_millis() as u64, "the store cannot be reached: trying again");
                sleep(delay).await;
            }
        }
    }
}

/// Builds the parts over a store and sets them going.
fn start(options: &Options, store: Arc<dyn Store>, grpc: &Arc<Grpc>, upkeep: &mut Upkeep) {
    let facts = store.facts();
    tracing::info!(store = facts.kind.as_str(), store_id = %facts.store_id, "store: {}", facts.about);
    tracing::info!("tables: {}", facts.adopted);
    match options.cache.mode {
        cache::Mode::Lazy { capacity: None } => tracing::info!("cache: lazy, without a bound"),
        cache::Mode::Lazy { capacity: Some(users) } => tracing::info!("cache: lazy, up to {users} users"),
        cache::Mode::Complete => tracing::info!("cache: complete"),
    }

    let (stepper, step) = step::start();
    let (cache, filler) = cache::cache(options.cache.clone(), store.clone(), step.clone());
    let apply = Arc::new(IntoCache(cache.clone()));
    let (feed, tailer) = feed::feed(options.feed.clone(), store.clone(), stepper, apply);
    let (writer, writer_task, busy_task) = writer::writer(store.clone(), step.clone());

    upkeep.spawn("tailer", async move { tailer.run().await.to_string() });
    upkeep.spawn("filler", never(filler.run()));
    upkeep.spawn("writer", never(writer_task.run()));
    upkeep.spawn("writer of what was locked", never(busy_task.run()));
    if options.cache.mode == cache::Mode::Complete {
        upkeep.spawn("loader", never(cache.clone().keep_complete()));
    }
    if let Some(interval) = options.self_check {
        upkeep.spawn("self-check", never(cache.clone().keep_checked(interval)));
    }
    upkeep.spawn("listener", listen(store.clone(), step.clone()));
    upkeep.spawn("trimmer", never(trim(store.clone(), options.retain_changes, options.upkeep_interval)));
    upkeep.spawn("trigger check", never(check_triggers(store.clone(), options.upkeep_interval)));
    upkeep.spawn("health report", never(report_health(grpc.clone(), step.clone(), cache.clone())));
    let grpc = grpc.clone();
    upkeep.spawn("opening of the service", async move {
        // Before the first look at the log there is no history: what began before it would end with it, watches by
        // HISTORY_CHANGED and writes by an unknown outcome.
        step.started().await;
        grpc.open(cache, feed, writer, store, step);
        std::future::pending().await
    });
}

impl Upkeep {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = String> + Send + 'static) {
        #[cfg(feature = "failpoints")]
        let task = async move {
            match crate::failpoint::armed::told(&format!("task::{name}")) {
                Some(reason) => reason,
                None => task.await,
            }
        };
        let task = AssertUnwindSafe(task).catch_unwind();
        self.0.spawn(async move {
            task.await.unwrap_or_else(|left| format!("the task \"{name}\" panicked: {}", panics::text(&*left)))
        });
    }

    /// Why the first of them ended.
    async fn ended(&mut self) -> ServerError {
        match self.0.join_next().await {
            Some(Ok(reason)) => ServerError::Ended(reason),
            Some(Err(error)) => ServerError::Ended(error.to_string()),
            None => std::future::pending().await,
        }
    }
}

async fn never(task: impl Future<Output = Infallible>) -> String {
    match task.await {}
}

async fn listen(store: Arc<dyn Store>, step: Step) -> String {
    let broken = store.listen(&|| step.nudge()).await;
    format!("the store's listener ended: {broken}")
}

/// Keeps the log at the length that it may have.
async fn trim(store: Arc<dyn Store>, retain: Duration, interval: Duration) -> Infallible {
    loop {
        match store.trim(retain).await {
            Ok(trimmed) if trimmed.commits + trimmed.requests > 0 => {
                tracing::debug!(commits = trimmed.commits, requests = trimmed.requests, "trimmed");
            }
            Ok(_) => sleep(interval).await,
            Err(cause) => {
                tracing::warn!(%cause, "the change log could not be trimmed");
                sleep(interval).await;
            }
        }
    }
}

/// Says aloud when something no longer logs what it should: changes would be missed.
async fn check_triggers(store: Arc<dyn Store>, interval: Duration) -> Infallible {
    loop {
        match store.check_triggers().await {
            Ok(problems) => {
                for problem in problems {
                    tracing::error!("changes are not logged any more: {problem}");
                }
            }
            Err(cause) => tracing::debug!(%cause, "the triggers could not be checked"),
        }
        sleep(interval).await;
    }
}

/// Serving is: in step once, and not out of step for longer than stale answers are given.
async fn report_health(grpc: Arc<Grpc>, step: Step, cache: Arc<RoleCache>) -> Infallible {
    let mut ready = false;
    let mut told = false;
    loop {
        if !ready && step.standing().is_proven() && cache.is_loaded() {
            ready = true;
            tracing::info!(revision = step.applied().0, "ready");
        }
        let age = step.standing().proof_age();
        // A new history has no proof for a moment, which is no reason to send everybody away, unless the store is lost.
        let answers = match age {
            Some(age) => age <= cache.max_staleness(),
            None => step.feed() != FeedState::Disconnected,
        };
        let serving = ready && answers;
        if serving != told {
            grpc.set_serving(serving).await;
            told = serving;
        }
        sleep(HEALTH_INTERVAL).await;
    }
}

/// Where it is decided that commits go to the cache before anybody hears of them.
struct IntoCache(Arc<RoleCache>);

impl Apply for IntoCache {
    fn apply(&self, commit: &Commit) {
        self.0.apply(commit);
    }

    fn reset(&self) {
        self.0.reset();
    }
}
