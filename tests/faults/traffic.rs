//! Clients: writers, readers and watchers on all replicas, who write down what they are told until they are stopped.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rolecache::proto::v1::{
    GetRoleRequest, SetRoleRequest, WatchRoleChangesRequest, role_cache_service_client::RoleCacheServiceClient,
    watch_role_changes_response::Event,
};
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};
use tonic_types::StatusExt;

use super::{
    campaign::Outcome,
    checker::{self, Excuses},
    cluster::Cluster,
    history::{Answer, End, History, MISMATCH, Process, Read, Seen, Told, Write},
    log::Log,
};

/// Roles that writers set, and servers know.
pub const ROLES: [&str; 3] = ["user", "admin", "moderator"];

/// Below this, a load hides what it is to find.
const LEAST_CALLS_PER_SECOND: f64 = 100.0;

/// In what is written down of a call that no server answered.
pub const NO_REASON: &str = "without a reason";

/// For how long a writer goes on asking what became of a write.
const PERSISTENCE: Duration = Duration::from_secs(30);

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
    /// What calls may be told by what this campaign breaks.
    pub excuses: &'static [&'static str],
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
    /// While nothing was broken: calls, and those that succeeded.
    calm: [AtomicU64; 2],
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
            calm: Default::default(),
        };
        for _ in 0..load.watchers {
            let watcher = watch(traffic.caller(load, load.watch_at, random.fork()), traffic.watching.clone());
            traffic.watchers.spawn(watcher);
        }
        for _ in 0..load.writers {
            traffic.callers.spawn(write(traffic.caller(load, load.write_to, random.fork()), traffic.writing.clone()));
        }
        for _ in 0..load.readers {
            traffic.callers.spawn(read(traffic.caller(load, load.read_from, random.fork()), traffic.writing.clone()));
        }
        traffic
    }

    /// Writes that begin now, each by a writer of its own: those of before may all be stuck in what holds them up.
    pub fn write_now(&mut self, writes: usize, load: Load, random: &mut fastrand::Rng) {
        for _ in 0..writes {
            let mut writer = self.caller(load, load.write_to, random.fork());
            self.callers.spawn(async move { write_once(&mut writer).await });
        }
    }

    fn caller(&self, load: Load, only: Option<usize>, random: fastrand::Rng) -> Caller {
        let clients = self.cluster.replicas.iter().map(|replica| replica.client()).collect();
        let (cluster, history) = (self.cluster.clone(), self.history.clone());
        Caller { cluster, clients, history, load, only, believed: HashMap::new(), random }
    }

    /// Lets it run for `calls` calls that succeed. What it had before a fault has to be a load that deserves the name: Err
    /// says that it was not.
    pub async fn run_up(&self, calls: u64) -> Result<(), String> {
        let begun = Instant::now();
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
        let rate = (self.history.succeeded() - before[1]) as f64 / begun.elapsed().as_secs_f64();
        if rate < LEAST_CALLS_PER_SECOND {
            return Err(format!("{rate:.0} calls a second before the fault"));
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
        let excuses = Excuses { reasons: self.excuses, outages: self.cluster.outages(&self.history) };
        outcome.violated(checker::all(&self.history, log, &excuses));
        outcome.violated(checker::watches_are_complete(&self.history.seen.lock().unwrap(), log));
        let [calls, succeeded] = self.calm.map(AtomicU64::into_inner);
        outcome.violated(checker::most_succeed(calls, succeeded));
        let reads = self.history.reads.lock().unwrap();
        let newest = reads.iter().filter(|read| read.min_revision > 0 && read.answer.is_ok()).count();
        outcome.figure("reads of the newest revision that anybody was told of", newest);
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
    believed: HashMap<i64, String>,
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

async fn write(mut caller: Caller, stop: CancellationToken) {
    let mut pace = interval(caller.load.pause);
    while !stop.is_cancelled() {
        pace.tick().await;
        write_once(&mut caller).await;
    }
}

/// On any replica, until somebody says what became of it. Most give up on a refusal, as bots do.
async fn write_once(caller: &mut Caller) {
    let user_id = caller.random.i64(1..=caller.load.users);
    let id = format!("{:016x}", caller.random.u64(..));
    // One in four goes by what it believes.
    let expected_role = caller.believed.get(&user_id).cloned().filter(|_| caller.random.u8(..4) == 0);
    let request = SetRoleRequest {
        user_id,
        role: caller.random.choice(ROLES).unwrap().to_owned(),
        expected_role,
        reason: id.clone(),
        request_id: id,
        ..Default::default()
    };
    let until = Instant::now() + PERSISTENCE;
    loop {
        let told = set(caller, &request).await;
        match told {
            Told::Done { .. } => {
                caller.believed.insert(user_id, request.role);
                break;
            }
            Told::Refused(_) if caller.random.u8(..4) > 0 || Instant::now() > until => {
                caller.believed.remove(&user_id);
                break;
            }
            Told::Unknown(_) if Instant::now() > until => {
                caller.history.untold.lock().unwrap().push(format!("{request:?}: {told:?}"));
                break;
            }
            _ => sleep(Duration::from_millis(caller.random.u64(1..30))).await,
        }
    }
}

async fn set(caller: &mut Caller, request: &SetRoleRequest) -> Told {
    let (replica, mut client) = caller.pick();
    let (process, begun) = (caller.process(replica), caller.history.now());
    let told = match client.set_role(request.clone()).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            Told::Done { revision: answer.revision, changed: answer.change.is_some() }
        }
        Err(status) => told(&status),
    };
    // Asked of one process and answered by the next: of neither.
    let told = match told {
        Told::Done { .. } if caller.process(replica) != process => {
            Told::Unknown(format!("{NO_REASON}: of which process?"))
        }
        told => told,
    };
    let (id, user, role) = (request.request_id.clone(), request.user_id, request.role.clone());
    let (expected, ended, told_too) = (request.expected_role.clone(), caller.history.now(), told.clone());
    caller.history.wrote(Write { id, user, role, expected, process, begun, ended, told: told_too });
    told
}

/// What a failed write tells about itself.
pub fn told(status: &Status) -> Told {
    let what = reason(status);
    match what.as_str() {
        "STORE_UNREACHABLE" | "USER_BUSY" | "OVERLOADED" | "SHUTTING_DOWN" | MISMATCH => Told::Refused(what),
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

async fn read(mut caller: Caller, stop: CancellationToken) {
    let mut pace = interval(caller.load.pause);
    while !stop.is_cancelled() {
        pace.tick().await;
        let (replica, mut client) = caller.pick();
        let user = caller.random.i64(1..=caller.load.users);
        // One in eight wants the newest that anybody was told of.
        let min_revision = if caller.random.u8(..8) == 0 { caller.history.newest() } else { 0 };
        let request = GetRoleRequest { user_id: user, min_revision, ..Default::default() };
        let (process, begun) = (caller.process(replica), caller.history.now());
        let answer = match client.get_role(request).await {
            Ok(answer) => Ok(Answer::from(answer.into_inner())),
            Err(status) => Err(reason(&status)),
        };
        if caller.process(replica) == process {
            caller.history.read(Read { user, process, begun, ended: caller.history.now(), min_revision, answer });
        }
    }
}

/// Goes on from its last token on any replica, whatever ends its streams.
async fn watch(mut caller: Caller, stop: CancellationToken) {
    let number = {
        let mut seen = caller.history.seen.lock().unwrap();
        seen.push(Seen::default());
        seen.len() - 1
    };
    let history = caller.history.clone();
    let note = |change: &dyn Fn(&mut Seen)| change(&mut history.seen.lock().unwrap()[number]);
    let mut token = String::new();
    while !stop.is_cancelled() {
        let (replica, mut client) = caller.pick();
        let (process, mut last) = (caller.process(replica), history.now());
        let end = |was_open, last, why| {
            let ended = history.now();
            history.ends.lock().unwrap().push(End { process, last, ended, was_open, why });
        };
        let request = WatchRoleChangesRequest {
            after: token.clone(),
            heartbeat_interval: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            ..Default::default()
        };
        // Without a deadline: it goes on as long as it goes on.
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            // Where its store is silent it takes that long to be told so.
            opened = timeout(Duration::from_secs(9), client.watch_role_changes(request)) => opened,
        };
        let mut stream = match opened {
            Ok(Ok(stream)) => stream.into_inner(),
            refused => {
                let silent = || Status::cancelled("no answer in time");
                end(false, last, reason(&refused.map_or_else(|_| silent(), |refused| refused.unwrap_err())));
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let mut whole: Option<rolecache::proto::v1::Commit> = None;
        loop {
            let message = tokio::select! {
                () = stop.cancelled() => return,
                // Three heartbeats missing: the server is gone, and nobody said so.
                message = timeout(Duration::from_secs(3), stream.message()) => message,
            };
            let event = match message {
                Ok(Ok(Some(message))) => message.event,
                Ok(Ok(None)) => break end(true, last, reason(&Status::cancelled("an end without a status"))),
                Ok(Err(status)) => break end(true, last, reason(&status)),
                Err(_) => break end(true, last, reason(&Status::cancelled("no heartbeat in time"))),
            };
            let at = history.now();
            last = at;
            match event {
                Some(Event::Started(started)) => {
                    note(&|seen| {
                        if seen.opened == 0 {
                            seen.from = started.revision;
                        }
                        seen.opened += 1;
                    });
                    if token.is_empty() {
                        token = started.resume_token;
                    }
                }
                Some(Event::Commit(part)) => {
                    let is_whole = !part.partial;
                    let part_token = part.resume_token.clone();
                    match &mut whole {
                        Some(commit) => commit.changes.extend(part.changes),
                        None => whole = Some(part),
                    }
                    if is_whole {
                        let commit = whole.take().unwrap();
                        history.told_of(commit.revision);
                        note(&|seen| seen.commits.push((at, commit.clone())));
                        token = part_token;
                    }
                }
                Some(Event::Heartbeat(heartbeat)) => {
                    note(&|seen| seen.heartbeats.push((heartbeat.revision, seen.commits.len())));
                    token = heartbeat.resume_token;
                }
                Some(Event::Snapshot(_)) | None => {}
            }
        }
    }
}
