//! Replicas, each a process of its own, over one store, with a proxy in between where a campaign wants one.

use std::{collections::HashMap, net::TcpListener, process::ExitStatus, sync::Mutex, time::Duration};

use rolecache::proto::v1::{
    BatchGetRolesRequest, GetRoleRequest, StatsRequest, StatsResponse,
    role_cache_service_client::RoleCacheServiceClient,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use super::{
    checker,
    history::{History, Process},
    log::Log,
    support::{
        child::{ChildServer, Start},
        postgres::Postgres,
        proxy::Proxy,
        server::{PATIENCE, Shell},
    },
    traffic::ROLES,
};

/// In which it has to serve after a fault has ended.
pub const RECOVERY: Duration = Duration::from_secs(5);

/// Several servers over one store.
pub struct Cluster {
    pub replicas: Vec<Replica>,
    pub shell: Shell,
}

/// One server: the same port over all its lives.
pub struct Replica {
    pub number: usize,
    pub url: String,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Between it and its store.
    pub proxy: Option<Proxy>,
    port: u16,
    life: Mutex<Life>,
    /// What self-checks logged in earlier lives.
    checks: Mutex<Vec<String>>,
    /// From when to when it did not run, or was to end at any moment.
    outages: Mutex<Vec<(std::time::Instant, Option<std::time::Instant>)>>,
}

#[derive(Default)]
struct Life {
    starts: usize,
    server: Option<ChildServer>,
}

/// How a cluster is built.
#[derive(Clone, Default)]
pub struct Plan<'a> {
    pub replicas: usize,
    pub args: &'a [&'a str],
    /// More of them, of each replica its own.
    pub each: &'a [&'a [&'a str]],
    /// Of every replica, such as failpoints.
    pub env: &'a [(&'a str, &'a str)],
    /// With a proxy before the store of each.
    pub proxied: bool,
}

/// For two replicas: one keeps few users, the other all. Each compares its cache with the store every second, and says so.
pub const MIXED: &[&[&str]] = &[
    &["--cache-capacity", "20", "--self-check", "1s", "--log-level", COMPARISONS_TOLD],
    &["--cache", "complete", "--self-check", "1s", "--log-level", COMPARISONS_TOLD],
];
const COMPARISONS_TOLD: &str = "info,rolecache::cache::check=debug,rolecache::audit=off";

/// What a server logs where its self-check finds something.
const MISMATCH: &str = "the cache has another role than the store";

/// What it logs at the end of each.
const COMPARED: &str = "the cache was compared with the store";
/// With whom it then says that it compared.
const NOBODY: &str = "\"users\":0";

/// A PostgreSQL of its own, to be broken.
pub async fn postgres() -> (Postgres, String) {
    let postgres = tokio::task::spawn_blocking(Postgres::start_own).await.unwrap();
    let url = postgres.fresh_database().await.url;
    (postgres, url)
}

fn checks(server: &ChildServer) -> Vec<String> {
    server.log().into_iter().filter(|line| [MISMATCH, COMPARED].iter().any(|told| line.contains(told))).collect()
}

// === impl Cluster ===

impl Cluster {
    /// Starts all replicas, one after the other, and waits until they are ready.
    pub async fn start(url: &str, plan: Plan<'_>) -> Self {
        let cluster = Self::planned(url, plan).await;
        for replica in &cluster.replicas {
            replica.start().await;
        }
        cluster
    }

    /// Starts nothing yet.
    pub async fn planned(url: &str, plan: Plan<'_>) -> Self {
        let shell = match url.strip_prefix("sqlite://") {
            Some(file) => Shell::Sqlite(file.into()),
            None => Shell::Psql(url.to_owned()),
        };
        let mut replicas = Vec::new();
        for number in 0..plan.replicas {
            let proxy = if plan.proxied { Some(Proxy::before(url).await) } else { None };
            let own = plan.each.get(number).copied().unwrap_or_default();
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            replicas.push(Replica {
                number,
                url: proxy.as_ref().map_or(url, |proxy| &proxy.url).to_owned(),
                args: plan.args.iter().chain(own).map(|arg| (*arg).to_owned()).collect(),
                env: plan.env.iter().map(owned).collect(),
                proxy,
                // Free at this moment, and nobody else is told of it.
                port: TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port(),
                life: Mutex::default(),
                checks: Mutex::default(),
                outages: Mutex::default(),
            });
        }
        Self { replicas, shell }
    }

    /// When each replica did not run, on the clock of a history.
    pub fn outages(&self, history: &History) -> HashMap<usize, Vec<(Duration, Duration)>> {
        let of = |replica: &Replica| {
            let outages = replica.outages.lock().unwrap();
            let until = |to: &Option<_>| to.map_or(Duration::MAX, |to| history.at(to));
            outages.iter().map(|(from, to)| (history.at(*from), until(to))).collect()
        };
        self.replicas.iter().map(|replica| (replica.number, of(replica))).collect()
    }

    /// What replicas found wrong with their caches by themselves.
    pub fn mismatches(&self) -> Vec<String> {
        self.checks().into_iter().filter(|line| line.contains(MISMATCH)).collect()
    }

    /// Whether some of them say so.
    pub fn compares(&self) -> bool {
        self.replicas.iter().any(Replica::compares)
    }

    /// How often they looked at some user, each of those that say so.
    pub fn comparisons(&self) -> Vec<usize> {
        let checks = self.checks();
        let of = |replica: &Replica| {
            let own = format!("replica {}: ", replica.number);
            let is_own = |line: &&String| line.starts_with(&own) && line.contains(COMPARED) && !line.contains(NOBODY);
            checks.iter().filter(is_own).count()
        };
        self.replicas.iter().filter(|replica| replica.compares()).map(of).collect()
    }

    fn checks(&self) -> Vec<String> {
        let of = |replica: &Replica| {
            let now = replica.life.lock().unwrap().server.as_ref().map(checks);
            let lines = [replica.checks.lock().unwrap().clone(), now.unwrap_or_default()].concat();
            lines.into_iter().map(|line| format!("replica {}: {line}", replica.number)).collect::<Vec<_>>()
        };
        self.replicas.iter().flat_map(of).collect()
    }

    pub async fn log(&self) -> Log {
        let shell = self.shell.clone();
        tokio::task::spawn_blocking(move || Log::read(&shell)).await.unwrap()
    }

    /// Every replica is in step with the store's head, and what it answers of each user is what the table holds.
    pub async fn check_caches(&self, users: &[i64]) -> Vec<String> {
        let log = self.log().await;
        let mut found = Vec::new();
        for replica in &self.replicas {
            let request =
                BatchGetRolesRequest { user_ids: users.to_vec(), min_revision: log.head(), ..Default::default() };
            let until = Instant::now() + RECOVERY;
            let answer = loop {
                match replica.client().batch_get_roles(request.clone()).await {
                    // It found a connection broken, and has others: callers are told to come again.
                    Err(status) if status.code() == Code::Unavailable && Instant::now() < until => {
                        sleep(Duration::from_millis(100)).await;
                    }
                    answer => break answer,
                }
            };
            match answer {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    let roles = answer.role_indexes.iter().map(|index| answer.roles[*index as usize].clone());
                    let answers: Vec<(i64, String)> = users.iter().copied().zip(roles).collect();
                    found.extend(checker::cache_equals_table(replica.number, &answers, &log));
                    if answer.stale {
                        found.push(format!("replica {} is stale though all is well", replica.number));
                    }
                }
                Err(status) => found.push(format!("replica {} does not answer in the end: {status}", replica.number)),
            }
        }
        found
    }
}

// === impl Replica ===

impl Replica {
    pub fn process(&self) -> Process {
        Process { replica: self.number, start: self.life.lock().unwrap().starts }
    }

    /// Starts it, and waits until it is ready.
    pub async fn start(&self) {
        let env: Vec<(&str, &str)> = self.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let launched = self.launch(&env).await;
        assert!(launched.is_ok(), "replica {} ended before it was ready: {launched:?}", self.number);
        self.is_back();
    }

    /// The same, to end at a failpoint; Err where that is before it is ready, with how.
    pub async fn start_to_end_at(&self, point: &str) -> Result<(), Option<ExitStatus>> {
        self.goes_away();
        self.launch(&[("FAILPOINTS", point)]).await
    }

    async fn launch(&self, env: &[(&str, &str)]) -> Result<(), Option<ExitStatus>> {
        {
            let mut life = self.life.lock().unwrap();
            assert!(life.server.is_none(), "it runs");
            life.starts += 1;
        }
        let roles = ROLES.join(",");
        let own: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let args = [&["--roles", &roles], &own[..]].concat();
        // Bugs that the caller of all this asks for are in every server, beside what the campaign wants there.
        let asked = std::env::var("FAILPOINTS").ok();
        let joined = |(name, value): &(&str, &str)| match &asked {
            Some(asked) if *name == "FAILPOINTS" => format!("{asked};{value}"),
            _ => (*value).to_owned(),
        };
        let values: Vec<String> = env.iter().map(joined).collect();
        let env: Vec<(&str, &str)> =
            env.iter().zip(&values).map(|((name, _), value)| (*name, value.as_str())).collect();
        let server = Start { url: &self.url, port: self.port, args: &args, env: &env, ..Start::default() }
            .spawn()
            .ready_or_ended()
            .await?;
        self.life.lock().unwrap().server = Some(server);
        Ok(())
    }

    fn goes_away(&self) {
        let mut outages = self.outages.lock().unwrap();
        if outages.last().is_none_or(|(_, to)| to.is_some()) {
            outages.push((std::time::Instant::now(), None));
        }
    }

    fn is_back(&self) {
        if let Some((_, to)) = self.outages.lock().unwrap().last_mut() {
            to.get_or_insert_with(std::time::Instant::now);
        }
    }

    pub fn kill(&self) {
        self.goes_away();
        let server = self.life.lock().unwrap().server.take().expect("it runs");
        self.checks.lock().unwrap().extend(checks(&server));
        server.kill();
    }

    /// Stops its process, or lets it go on.
    pub fn signal(&self, name: &str) {
        if name == "STOP" {
            self.goes_away();
        }
        self.with(|server| server.signal(name));
        if name == "CONT" {
            self.is_back();
        }
    }

    pub fn logged(&self, text: &str) -> bool {
        self.with(|server| server.logged(text))
    }

    fn compares(&self) -> bool {
        self.args.iter().any(|arg| arg == COMPARISONS_TOLD)
    }

    pub fn memory(&self, figure: &str) -> f64 {
        self.with(|server| server.memory(figure))
    }

    /// From now on `VmHWM` is the most that it takes from now on.
    pub fn forget_peak(&self) {
        self.with(|server| server.forget_peak());
    }

    pub fn is_up(&self) -> bool {
        self.life.lock().unwrap().server.is_some()
    }

    /// Whether it is the same process as then, and nobody is about to end it.
    pub fn is_still(&self, process: Process) -> bool {
        let life = self.life.lock().unwrap();
        life.starts == process.start && life.server.is_some()
    }

    /// Waits until it has ended by itself; how.
    pub async fn ended(&self, limit: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            {
                let mut life = self.life.lock().unwrap();
                let server = life.server.as_mut().expect("it ran");
                if let Some(status) = server.has_ended() {
                    let server = life.server.take().expect("it ran");
                    self.checks.lock().unwrap().extend(checks(&server));
                    return Some(status);
                }
            }
            if Instant::now() > until {
                return None;
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn with<T>(&self, look: impl FnOnce(&ChildServer) -> T) -> T {
        look(self.life.lock().unwrap().server.as_ref().expect("it runs"))
    }

    /// A client that connects when it is used, again each time the server is new. A call ends after eight seconds.
    pub fn client(&self) -> RoleCacheServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", self.port)).unwrap();
        let endpoint = endpoint.connect_timeout(Duration::from_millis(500)).timeout(Duration::from_secs(8));
        RoleCacheServiceClient::new(endpoint.connect_lazy()).max_decoding_message_size(64 << 20)
    }

    /// A client whose streams take a few messages before it reads them.
    pub async fn narrow_client(&self) -> RoleCacheServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", self.port)).unwrap();
        let endpoint = endpoint.initial_stream_window_size(300).initial_connection_window_size(1 << 20);
        RoleCacheServiceClient::new(endpoint.connect().await.expect("connect to a replica"))
    }

    /// Waits until it answers from a cache that is in step; how long that took.
    pub async fn until_in_step(&self) -> Duration {
        let begun = Instant::now();
        let mut client = self.client();
        let in_step = async {
            loop {
                let request = GetRoleRequest { user_id: i64::MAX, ..Default::default() };
                if let Ok(answer) = client.get_role(request).await
                    && !answer.into_inner().stale
                {
                    return;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, in_step).await.expect("a replica should be in step again in time");
        begun.elapsed()
    }

    pub async fn stats(&self) -> StatsResponse {
        self.client().stats(StatsRequest {}).await.expect("Stats").into_inner()
    }
}
