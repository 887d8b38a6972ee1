//! Watchers that stop at any moment, also between the parts of a large commit, and go on with their last token on any
//! replica, also one that died meanwhile.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan, postgres},
    traffic::{Load, NO_REASON, Traffic},
    watcher::Watcher,
};

const WATCHERS: usize = 8;

/// In a large commit: several messages.
const MANY: i64 = 2_200;

/// A replica dies once in so many resumes.
const DEATH_EVERY: u64 = 40;

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "resumes",
        unit: "resumes",
        must_hold: "the union of what was seen is the log, each commit once",
        short: 200,
        nightly: 5_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

/// How watchers stopped.
#[derive(Default)]
struct Counts {
    resumes: AtomicU64,
    inside: AtomicU64,
    after_a_death: AtomicU64,
    /// Ends that nothing excuses.
    strange: Mutex<Vec<String>>,
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, ..Plan::default() }).await);
    let traffic = Traffic::start(&cluster, Load { readers: 2, ..Load::default() }, &mut rounds.random);
    outcome.proves_nothing(traffic.run_up(200).await.err());
    let left = Arc::new(AtomicI64::new(rounds.count as i64));
    let counts = Arc::new(Counts::default());
    let mut watchers = JoinSet::new();
    for _ in 0..WATCHERS {
        let random = rounds.random.fork();
        watchers.spawn(stop_and_go_on(cluster.clone(), random, left.clone(), counts.clone()));
    }
    let over = Arc::new(AtomicBool::new(false));
    let large = tokio::spawn(commit_much(cluster.clone(), rounds.random.fork(), over.clone()));
    let mut deaths = 0;
    while counts.resumes.load(Ordering::Relaxed) < rounds.count {
        let next = ((deaths + 1) * DEATH_EVERY).min(rounds.count);
        let waited = async {
            while counts.resumes.load(Ordering::Relaxed) < next {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(Duration::from_secs(60), waited).await.is_err() {
            outcome.violated([format!("{next} resumes did not come about in time")]);
            break;
        }
        let victim = &cluster.replicas[rounds.random.usize(..cluster.replicas.len())];
        victim.kill();
        victim.start().await;
        deaths += 1;
    }
    left.store(0, Ordering::Relaxed);
    over.store(true, Ordering::Relaxed);
    large.await.expect("the large commits do not panic");
    let mut done = Vec::new();
    while let Some(ended) = watchers.join_next().await {
        done.push(ended.expect("a watcher does not panic"));
    }
    outcome.proves_nothing(traffic.throughout().err());
    traffic.settle(&mut outcome).await;
    let log = cluster.log().await;
    let mut seen = Vec::new();
    for mut watcher in done {
        outcome.violated(watcher.until(log.head(), &cluster.replicas[0]).await.err());
        outcome.violated(checker::watches_are_the_log(&watcher.seen, &log));
        // Everything is kept here, and replicas die and start: nothing else may end a stream.
        let may_end = |end: &&String| end.contains(NO_REASON) || *end == "STORE_UNREACHABLE";
        let strange = watcher.seen.ends.iter().find(|end| !may_end(end));
        outcome.violated(strange.map(|end| format!("a watch from {} was told {end}", watcher.seen.from)));
        seen.push(watcher.seen);
    }
    outcome.violated(checker::watches_are_complete(&seen, &log));
    outcome.violated(std::mem::take(&mut *counts.strange.lock().unwrap()));
    outcome.fired = counts.resumes.load(Ordering::Relaxed).min(rounds.count);
    let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
    outcome.proves_nothing((of(&counts.inside) == 0).then(|| "nobody stopped inside a commit".to_owned()));
    outcome.figure("stopped inside a commit", of(&counts.inside));
    outcome.figure("went on after a replica had died", of(&counts.after_a_death));
    outcome.figure("deaths", deaths);
    outcome
}

async fn stop_and_go_on(
    cluster: Arc<Cluster>,
    mut random: fastrand::Rng,
    left: Arc<AtomicI64>,
    counts: Arc<Counts>,
) -> Watcher {
    let mut watcher = Watcher::after("");
    let mut lives: Option<Vec<_>> = None;
    while left.load(Ordering::Relaxed) > 0 {
        let replica = &cluster.replicas[random.usize(..cluster.replicas.len())];
        let process = replica.process();
        if let Err(status) = watcher.open(&mut replica.client()).await {
            if replica.is_still(process) {
                counts.strange.lock().unwrap().push(format!("a replica that was well opened no watch: {status}"));
            }
            sleep(Duration::from_millis(random.u64(1..20))).await;
            continue;
        }
        // From here on it counts, if there was a stream before this one.
        let now: Vec<_> = cluster.replicas.iter().map(|replica| replica.process()).collect();
        if let Some(before) = lives.replace(now.clone()) {
            left.fetch_sub(1, Ordering::Relaxed);
            counts.resumes.fetch_add(1, Ordering::Relaxed);
            counts.after_a_death.fetch_add((before != now).into(), Ordering::Relaxed);
        }
        // At a moment in time, or after so many messages.
        let until = Instant::now() + Duration::from_millis(random.u64(1..250));
        let mut messages = random.u32(0..60);
        while messages > 0 && Instant::now() < until && watcher.is_open() {
            if let Err(status) = watcher.next().await
                && replica.is_still(process)
            {
                counts.strange.lock().unwrap().push(format!("a watch of a replica that was well ended: {status}"));
            }
            messages -= 1;
        }
        counts.inside.fetch_add(watcher.stop().into(), Ordering::Relaxed);
        if random.u8(..4) == 0 {
            sleep(Duration::from_millis(random.u64(1..200))).await;
        }
    }
    watcher
}

/// Commits whose parts are several messages, one after another.
async fn commit_much(cluster: Arc<Cluster>, mut random: fastrand::Rng, over: Arc<AtomicBool>) {
    let mut turn = 0;
    while !over.load(Ordering::Relaxed) {
        let roles = ["admin", "moderator", "owner"];
        let (from, role) = (1_000 + MANY * random.i64(0..3), roles[turn % 3]);
        turn += 1;
        let change = format!(
            "insert into users (user_id, role) select n, '{role}' from generate_series({from}, {}) n
             on conflict (user_id) do update set role = excluded.role",
            from + MANY - 1
        );
        cluster.shell.go(change).await;
        sleep(Duration::from_millis(random.u64(150..600))).await;
    }
}
