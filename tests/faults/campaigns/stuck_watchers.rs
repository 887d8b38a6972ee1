//! Watchers that never read, beside healthy ones: rounds with and without them take turns.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::FutureExt;
use prost::Message;
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan, Replica, postgres},
    history::Seen,
    support::server::PATIENCE,
    traffic::{Load, Traffic},
    watcher::Watcher,
};

const HEALTHY: usize = 8;

/// Rounds of either kind.
const TURNS: usize = 5;

/// Commits of a round: far more than a stuck stream has room for.
const COMMITS: usize = 300;

/// Changes of a commit: what waited for a watcher would be seen in memory.
const CHANGES: usize = 40;

/// Users, of whom a commit changes `CHANGES` in a row.
const USERS: usize = 5 * CHANGES;

/// Stuck streams of one connection.
const OF_A_CONNECTION: u64 = 100;

/// Of the server's memory, in MiB, for each of them.
const BOUND_EACH: f64 = 0.125;

/// What may come on top, for them all: the ring, and what the allocator keeps.
const BOUND_FOR_ALL: f64 = 8.0;

const MIB: f64 = 1_048_576.0;

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "stuck-watchers",
        unit: "stuck watchers",
        must_hold: "the healthy ones' p99 at most doubles, memory is bounded",
        short: 50,
        nightly: 1_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let args = &["--log-level", "warn,rolecache=info,rolecache::audit=off"];
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 1, args, ..Plan::default() }).await);
    let replica = &cluster.replicas[0];
    let users = format!("insert into users (user_id, role) select n, 'user' from generate_series(1, {USERS}) n");
    cluster.shell.go(users).await;
    let load = Load { writers: 1, readers: 1, watchers: 0, ..Load::default() };
    let mut traffic = Traffic::start(&cluster, load, &mut rounds.random);
    traffic.users = (1..=USERS as i64).collect();
    // What the first calls cost is not theirs.
    turn(&cluster, &mut outcome).await;
    let (mut without, mut beside, mut stuck) = (Vec::new(), Vec::new(), Vec::new());
    // In MiB: what memory grew by in a round, and what was sent to those who did not read it.
    let (mut grown, mut unread) = (0f64, f64::INFINITY);
    for _ in 0..TURNS {
        stuck.clear();
        without.extend(turn(&cluster, &mut outcome).await.late);
        outcome.proves_nothing(traffic.run_up(100).await.err());
        replica.forget_peak();
        let before = replica.memory("VmRSS");
        stuck = open(replica, rounds.count).await;
        let turn = turn(&cluster, &mut outcome).await;
        grown = grown.max(replica.memory("VmHWM") - before);
        unread = unread.min((turn.bytes * stuck.len()) as f64 / MIB);
        beside.extend(turn.late);
    }
    let (calm, crowded) = (p99(&mut without), p99(&mut beside));
    if crowded > 2 * calm {
        outcome.violated([format!("the healthy ones' p99 went from {calm:.1?} to {crowded:.1?}")]);
    }
    let bound = BOUND_FOR_ALL + BOUND_EACH * rounds.count as f64;
    outcome.violated((grown > bound).then(|| format!("memory grew by {grown:.1} MiB, more than {bound:.1}")));
    // Or a queue for each of them would not be noticed.
    let is_little = unread < 2.0 * bound;
    outcome.proves_nothing(is_little.then(|| format!("{unread:.1} MiB were not read, and {bound:.1} may be kept")));
    outcome.proves_nothing(traffic.throughout().err());
    traffic.settle(&mut outcome).await;
    // Now they read, and nothing is missing.
    let log = cluster.log().await;
    for mut watcher in stuck {
        outcome.violated(watcher.until(log.head(), replica).await.err());
        outcome.violated(checker::watches_are_the_log(&watcher.seen, &log));
        match watcher.seen.opened {
            1 => outcome.fired += 1,
            _ => outcome.violated([format!("its stream had ended: {:?}", watcher.seen.ends)]),
        }
    }
    outcome.figure("commit to message, p99", format!("{calm:.1?} without, {crowded:.1?} beside them"));
    outcome.figure("messages measured", format!("{} and {}", without.len(), beside.len()));
    outcome.figure("memory", format!("grew by {grown:.1} MiB at most, of {unread:.0} MiB that were not read"));
    outcome
}

/// Streams that nobody reads from here on.
async fn open(replica: &Replica, count: u64) -> Vec<Watcher> {
    let mut stuck = Vec::new();
    let mut client = replica.narrow_client().await;
    for n in 0..count {
        if n % OF_A_CONNECTION == 0 {
            client = replica.narrow_client().await;
        }
        let mut watcher = Watcher::after("");
        watcher.open(&mut client).await.expect("a watch starts");
        stuck.push(watcher);
    }
    stuck
}

/// What the healthy watchers saw.
struct Turn {
    /// From each commit to its message.
    late: Vec<Duration>,
    /// All commits as one of them got them.
    bytes: usize,
}

/// Commits that the healthy watchers have to see, all of them.
async fn turn(cluster: &Arc<Cluster>, outcome: &mut Outcome) -> Turn {
    let end = watch::Sender::new(i64::MAX);
    let mut watchers = JoinSet::new();
    for _ in 0..HEALTHY {
        let mut client = cluster.replicas[0].client();
        let mut watcher = Watcher::after("");
        watcher.open(&mut client).await.expect("a watch starts");
        watchers.spawn(measure(watcher, end.subscribe()));
    }
    let commits = format!(
        "do $$ begin for i in 1..{COMMITS} loop
           update users set role = case role when 'user' then 'admin' else 'user' end
             where user_id between 1 + i % 5 * {CHANGES} and {CHANGES} + i % 5 * {CHANGES};
           commit;
           perform pg_sleep(0.003);
         end loop; end $$"
    );
    cluster.shell.go(commits).await;
    end.send_replace(cluster.log().await.head());
    let healthy = timeout(PATIENCE, watchers.join_all()).await.expect("healthy watchers see all of it in time");
    let log = cluster.log().await;
    let mut turn = Turn { late: Vec::new(), bytes: 0 };
    for (seen, times) in healthy {
        outcome.violated(checker::watches_are_the_log(&seen, &log));
        turn.late.extend(times);
        turn.bytes = seen.commits.iter().map(|(_, commit)| commit.encoded_len()).sum();
    }
    turn
}

/// From each commit to its message, on the clock that both are on; up to the end, once it is known.
async fn measure(mut watcher: Watcher, end: watch::Receiver<i64>) -> (Seen, Vec<Duration>) {
    let mut late = Vec::new();
    while watcher.at() < *end.borrow() {
        let told = watcher.seen.commits.len();
        watcher.next().await.expect("a healthy watch goes on");
        for (_, commit) in &watcher.seen.commits[told..] {
            let at = commit.changes[0].changed_at.expect("every change has its time");
            let at = Duration::new(at.seconds as u64, at.nanos as u32);
            late.push(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().saturating_sub(at));
        }
    }
    (watcher.seen, late)
}

fn p99(late: &mut [Duration]) -> Duration {
    late.sort();
    late[late.len() * 99 / 100]
}
