//! Clients: writers, readers and watchers on all replicas, who write down what they are told until they are stopped.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rolecache::proto::v1::role_cache_service_client::RoleCacheServiceClient;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};
use tonic_types::StatusExt;

use super::{
    campaign::Outcome,
    checker::{self, Excuses},
    cluster::Cluster,
    history::{DECLINES, History, Process, Seen, Told},
    log::Log,
    support::server::PATIENCE,
};

mod reading;
mod watching;
mod writing;

/// Roles that writers set, and servers know.
pub const ROLES: [&str; 3] = ["user", "admin", "moderator"];

/// Below this, a load hides what it is to find.
const LEAST_CALLS_PER_SECOND: f64 = 100.0;

/// Servers that compare their caches every second have done so once by then, whatever is broken.
const COMPARED_WITHIN: Duration = Duration::from_secs(20);

/// In what is written down of a call that no server answered.
pub const NO_REASON: &str = "without a reason";

#[derive(Clone, Copy)]
pub struct Load {
    pub writers: usize,
    pub readers: usize,
    pub watchers: usize,
    pub users: i64,
    /// Between two calls of a reader, and of a writer.
    pub pause: Duration,
    /// The replica that writers, readers and watchers talk to; None for any.
    pub write_to: Option<usize>,
    pub read_from: Option<usize>,
    pub watch_at: Option<usize>,
    /// What calls may be told by what this campaign breaks, of the replica that it breaks it for; None for any.
    pub excuses: &'static [&'static str],
    pub excused: Option<usize>,
}

pub struct Traffic {
    pub history: Arc<History>,
    pub users: Vec<i64>,
    cluster: Arc<Cluster>,
    writing: CancellationToken,
    callers: JoinSet<()>,
    watchers: JoinSet<()>,
    watching: CancellationToken,
    excuses: &'static [&'static str],
    excused: Option<usize>,
    /// While nothing was broken: calls, and those that succeeded.
    calm: [AtomicU64; 2],
    /// When that was.
    calms: Mutex<Vec<(Duration, Duration)>>,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            writers: 4,
            readers: 4,
            watchers: 2,
            users: 40,
            pause: Duration::from_millis(4),
            write_to: None,
            read_from: None,
            watch_at: None,
            excuses: &[],
            excused: None,
        }
    }
}

// === impl Traffic ===

impl Traffic {
    pub fn start(cluster: &Arc<Cluster>, load: Load, random: &mut fastrand::Rng) -> Self {
        let mut traffic = Self {
            history: Arc::new(History::new()),
            users: (1..=load.users).collect(),
            cluster: cluster.clone(),
            writing: CancellationToken::new(),
            callers: JoinSet::new(),
            watchers: JoinSet::new(),
            watching: CancellationToken::new(),
            excuses: load.excuses,
            excused: load.excused,
            calm: Default::default(),
            calms: Mutex::default(),
        };
        for _ in 0..load.watchers {
            let watcher = watching::watch(traffic.caller(load, load.watch_at, random.fork()), traffic.watching.clone());
            traffic.watchers.spawn(watcher);
        }
        for _ in 0..load.writers {
            traffic
                .callers
                .spawn(writing::write(traffic.caller(load, load.write_to, random.fork()), traffic.writing.clone()));
        }
        for _ in 0..load.readers {
            traffic
                .callers
                .spawn(reading::read(traffic.caller(load, load.read_from, random.fork()), traffic.writing.clone()));
        }
        traffic
    }

    /// Writes that begin now, each by a writer of its own: those of before may all be stuck in what holds them up.
    pub fn write_now(&mut self, writes: usize, load: Load, random: &mut fastrand::Rng) {
        for _ in 0..writes {
            let mut writer = self.caller(load, load.write_to, random.fork());
            self.callers.spawn(async move { writing::write_once(&mut writer).await });
        }
    }

    fn caller(&self, load: Load, only: Option<usize>, random: fastrand::Rng) -> Caller {
        let clients = self.cluster.replicas.iter().map(|replica| replica.client()).collect();
        let (cluster, history) = (self.cluster.clone(), self.history.clone());
        Caller { cluster, clients, history, load, only, believed: BTreeMap::new(), random }
    }

    /// Lets it run for `calls` calls that succeed. What it had before a fault has to be a load that deserves the name: Err
    /// says that it was not.
    pub async fn run_up(&self, calls: u64) -> Result<(), String> {
        self.all_watch().await;
        let begun = self.history.now();
        let counts = || [self.history.calls(), self.history.succeeded()];
        let before = counts();
        let enough = async {
            while self.history.succeeded() < before[1] + calls {
                sleep(Duration::from_millis(2)).await;
            }
        };
        let _ = timeout(Duration::from_secs(20), enough).await;
        for ((calm, now), before) in self.calm.iter().zip(counts()).zip(before) {
            calm.fetch_add(now - before, Ordering::Relaxed);
        }
        let ended = self.history.now();
        self.calms.lock().unwrap().push((begun, ended));
        let rate = (self.history.succeeded() - before[1]) as f64 / (ended - begun).as_secs_f64();
        if rate < LEAST_CALLS_PER_SECOND {
            return Err(format!("{rate:.0} calls a second before the fault"));
        }
        Ok(())
    }

    /// Waits until every watcher has heard of something: until its snapshot is whole, a watch hears no heartbeat, and ends with
    /// the store.
    async fn all_watch(&self) {
        let hears = |seen: &Seen| !seen.commits.is_empty() || !seen.heartbeats.is_empty();
        let all = async {
            loop {
                let count = self.history.seen.lock().unwrap().iter().filter(|seen| hears(seen)).count();
                if count >= self.watchers.len() {
                    return;
                }
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, all).await.expect("watches begin in time");
    }

    /// Of a campaign whose many rounds go on without a pause: Err says that it was no such load from begin to end.
    pub fn throughout(&self) -> Result<(), String> {
        let rate = self.history.succeeded() as f64 / self.history.now().as_secs_f64();
        if rate < LEAST_CALLS_PER_SECOND {
            return Err(format!("{rate:.0} calls a second on average"));
        }
        Ok(())
    }

    /// Stops the callers; each writer finds out first what became of its last write.
    pub async fn stop_calling(&mut self) {
        self.writing.cancel();
        while let Some(ended) = self.callers.join_next().await {
            ended.expect("a caller does not panic");
        }
    }

    /// Stops the callers, lets the watchers see the end of it, stops them, and has all of it judged.
    pub async fn settle(mut self, outcome: &mut Outcome) {
        self.stop_calling().await;
        let log = self.cluster.log().await;
        self.judge(&log, outcome).await;
    }

    /// The same, where others have written up to a revision before.
    pub async fn settle_after(mut self, revision: i64, outcome: &mut Outcome) {
        self.stop_calling().await;
        let mut log = self.cluster.log().await;
        log.forget_reasons(revision);
        self.judge(&log, outcome).await;
    }

    /// The same, by a log that was kept, when nobody calls any more.
    pub async fn judge(mut self, log: &Log, outcome: &mut Outcome) {
        outcome.violated(self.cluster.check_caches(&self.users).await);
        outcome.violated(self.cluster.mismatches());
        // A heartbeat a second tells each of them that it has seen all.
        let complete = async {
            loop {
                let seen = self.history.seen.lock().unwrap().clone();
                if checker::watches_are_complete(&seen, log).is_empty() {
                    return;
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        let _ = timeout(Duration::from_secs(15), complete).await;
        self.watching.cancel();
        while let Some(ended) = self.watchers.join_next().await {
            ended.expect("a watcher does not panic");
        }
        let (reasons, outages) = (self.excuses, self.cluster.outages(&self.history));
        let calms = self.calms.into_inner().unwrap();
        let excuses = Excuses { reasons, excused: self.excused, calms, outages };
        outcome.violated(checker::all(&self.history, log, &excuses));
        outcome.violated(checker::watches_are_complete(&self.history.seen.lock().unwrap(), log));
        let [calls, succeeded] = self.calm.map(AtomicU64::into_inner);
        outcome.violated(checker::most_succeed(calls, succeeded));
        let reads = self.history.reads.lock().unwrap();
        let newest = reads.iter().filter(|read| read.min_revision > 0 && read.answer.is_ok()).count();
        outcome.figure("reads of the newest revision that anybody was told of", newest);
        let comparisons = self.cluster.comparisons();
        if self.cluster.compares() {
            outcome.figure("self-checks that compared", format!("{comparisons:?}"));
            let is_due = self.history.now() > COMPARED_WITHIN && comparisons.contains(&0);
            outcome.proves_nothing(is_due.then(|| format!("a replica compared nobody: {comparisons:?}")));
        }
    }
}

/// One client's side of things.
struct Caller {
    cluster: Arc<Cluster>,
    clients: Vec<RoleCacheServiceClient<Channel>>,
    history: Arc<History>,
    load: Load,
    only: Option<usize>,
    /// The role that it gave a user last, which others may have changed since.
    believed: BTreeMap<i64, String>,
    random: fastrand::Rng,
}

impl Caller {
    fn pick(&mut self) -> (usize, RoleCacheServiceClient<Channel>) {
        let replica = self.only.unwrap_or_else(|| self.random.usize(..self.clients.len()));
        (replica, self.clients[replica].clone())
    }

    fn process(&self, replica: usize) -> Process {
        self.cluster.replicas[replica].process()
    }
}

/// What a failed write tells about itself.
pub fn told(status: &Status) -> Told {
    let what = reason(status);
    match what.as_str() {
        "STORE_UNREACHABLE" | "USER_BUSY" | "OVERLOADED" | "SHUTTING_DOWN" => Told::Refused(what),
        what if DECLINES.contains(&what) => {
            let metadata = status.get_details_error_info().map(|info| info.metadata).unwrap_or_default();
            Told::Declined { current: metadata.get("current_role").cloned().unwrap_or_default(), why: what.into() }
        }
        _ => Told::Unknown(what),
    }
}

/// The reason of the contract, or what the transport says.
pub fn reason(status: &Status) -> String {
    match status.get_details_error_info() {
        Some(info) => info.reason,
        None => format!("{:?} {NO_REASON}: {}", status.code(), status.message()),
    }
}
