//! The connection that listens for changes breaks, or goes silent, and everything else goes on.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::FutureExt;
use tokio::time::{Instant, sleep};

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, MIXED, Plan, postgres},
    history::{History, Told},
    support::{
        postgres::Session,
        proxy::{Fate, Proxy, Which},
    },
    traffic::{Load, Traffic},
};

/// Each loses what comes meanwhile.
const FATES: [Fate; 5] = [Fate::Reset, Fate::Cut, Fate::DeafClient, Fate::Hole, Fate::Stranded];

/// How late a change may reach a watcher.
const LATE: Duration = Duration::from_millis(1500);

/// How long the server may take to notice that it hears nothing.
const NOTICED: Duration = Duration::from_secs(15);

/// Users that plain SQL makes, each once.
const BY_SQL: i64 = 1_000_000;

pub fn campaigns() -> Vec<Campaign> {
    vec![
        Campaign {
            name: "listen-broken",
            unit: "broken connections",
            must_hold: "nothing missed; changes at most 1.5 s late",
            short: 6,
            nightly: 120,
            body: |rounds| polled(rounds).boxed(),
        },
        Campaign {
            name: "listen-unpolled",
            unit: "commits while nobody listened",
            must_hold: "the read after LISTEN finds them, where no poll does",
            short: 6,
            nightly: 120,
            body: |rounds| unpolled(rounds).boxed(),
        },
    ]
}

/// The listening connection of one replica breaks again and again; writes come through the other one and by plain SQL.
async fn polled(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    // A self-check reads the log too: none at the broken one.
    let each: &[&[&str]] = &[&["--cache-capacity", "20", "--self-check", "0s"], MIXED[1]];
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, each, proxied: true, ..Plan::default() }).await);
    let proxy = cluster.replicas[0].proxy.as_ref().unwrap();
    // A read that asks for a revision reads the log too: none at the broken one.
    let load = Load { write_to: Some(1), read_from: Some(1), watch_at: Some(0), ..Load::default() };
    let traffic = Traffic::start(&cluster, load, &mut rounds.random);
    let strangers = Strangers::new(&url, traffic.history.clone());
    let mut deaf = Vec::new();
    let first = rounds.random.usize(..FATES.len());
    while let Some(round) = outcome.next_of(rounds.count) {
        let fate = FATES[(first + round as usize) % FATES.len()];
        if until_listening(proxy).await > NOTICED {
            outcome.violated([format!("round {round}: it did not listen again within {NOTICED:?}")]);
            break;
        }
        // Now and then what it says is lost before that: it still hears, so that nothing is missed, and nothing counts.
        if rounds.random.u8(..5) == 0 {
            proxy.strike(Which::Listening, Fate::DeafServer);
            strangers.write().await;
        }
        let weak = traffic.run_up(200).await;
        let begun = Instant::now();
        // Nobody listens again before somebody has written.
        proxy.refuse(true);
        let struck = proxy.strike(Which::Listening, fate);
        strangers.write().await;
        let is_deaf = proxy.open(Which::Listening) == 0;
        proxy.refuse(false);
        match weak {
            Err(weak) => outcome.weak.push(format!("{fate:?} {round}: {weak}")),
            Ok(()) if struck == 0 || !is_deaf => outcome.weak.push(format!("{fate:?} {round}: somebody listened")),
            Ok(()) => outcome.fired += 1,
        }
        // Of what breaks the server hears at once; what is silent is silent for longer than a change may be late.
        let lasts = if matches!(fate, Fate::Reset | Fate::Cut) { 200..1000 } else { 1700..2500 };
        let until = begun + Duration::from_millis(rounds.random.u64(lasts));
        while Instant::now() < until {
            strangers.write().await;
            sleep(Duration::from_millis(rounds.random.u64(10..100))).await;
        }
        // To wait until the server notices by itself takes seconds.
        if rounds.random.u8(..8) == 0 {
            until_listening(proxy).await;
            deaf.push(begun.elapsed());
        } else {
            proxy.strike(Which::Listening, Fate::Reset);
        }
    }
    let history = traffic.history.clone();
    traffic.settle(&mut outcome).await;
    strangers.judge(&cluster, &history, &mut outcome).await;
    outcome.times("listening again, by itself", deaf);
    outcome
}

/// Commits in a moment in which nobody listens, and silence after it: only the read after LISTEN can find them.
async fn unpolled(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    // A poll is at most a second away, which is what this is about.
    let plan =
        Plan { replicas: 2, proxied: true, env: &[("FAILPOINTS", "tailer::unpolled=return")], ..Plan::default() };
    let cluster = Arc::new(Cluster::start(&url, plan).await);
    let proxy = cluster.replicas[0].proxy.as_ref().unwrap();
    // A read whose proof is too old reads the log too: none at the broken one.
    let load = Load { writers: 0, read_from: Some(1), watch_at: Some(0), ..Load::default() };
    let traffic = Traffic::start(&cluster, load, &mut rounds.random);
    let history = traffic.history.clone();
    let strangers = Strangers::new(&url, history.clone());
    let are_watching = || history.seen.lock().unwrap().iter().all(|seen| seen.opened > 0);
    until(Duration::from_secs(10), are_watching).await;
    while let Some(round) = outcome.next_of(rounds.count) {
        if until_listening(proxy).await > NOTICED {
            outcome.violated([format!("round {round}: it did not listen again within {NOTICED:?}")]);
            break;
        }
        let weak = traffic.run_up(50).await;
        let fate = *rounds.random.choice([Fate::Reset, Fate::Cut].iter()).unwrap();
        proxy.refuse(true);
        let struck = proxy.strike(Which::Listening, fate);
        strangers.write().await;
        let is_deaf = proxy.open(Which::Listening) == 0;
        proxy.refuse(false);
        match weak {
            Err(weak) => outcome.weak.push(format!("round {round}: {weak}")),
            Ok(()) if struck == 0 || !is_deaf => outcome.weak.push(format!("round {round}: somebody listened")),
            Ok(()) => outcome.fired += 1,
        }
        let due = round as usize + 1;
        let have_seen = || history.seen.lock().unwrap().iter().all(|seen| seen.commits.len() >= due);
        until(2 * LATE, have_seen).await;
    }
    traffic.settle(&mut outcome).await;
    strangers.judge(&cluster, &history, &mut outcome).await;
    outcome
}

/// Waits until a connection listens and has heard something; how long that took, at most a little over [`NOTICED`].
async fn until_listening(proxy: &Proxy) -> Duration {
    let begun = Instant::now();
    until(NOTICED + Duration::from_secs(1), || proxy.open(Which::Hearing) > 0).await;
    begun.elapsed()
}

async fn until(limit: Duration, holds: impl Fn() -> bool) {
    let end = Instant::now() + limit;
    while !holds() && Instant::now() < end {
        sleep(Duration::from_millis(2)).await;
    }
}

/// Plain SQL: each write makes another user.
struct Strangers {
    session: Arc<Mutex<Session>>,
    history: Arc<History>,
    /// When each user was there.
    made: Mutex<HashMap<i64, Duration>>,
}

impl Strangers {
    fn new(url: &str, history: Arc<History>) -> Self {
        Self { session: Arc::new(Mutex::new(Session::open(url))), history, made: Mutex::default() }
    }

    async fn write(&self) {
        let user = BY_SQL + self.made.lock().unwrap().len() as i64;
        let session = self.session.clone();
        let sql = format!("insert into users (user_id, role) values ({user}, 'admin');");
        let printed = tokio::task::spawn_blocking(move || session.lock().unwrap().run(&sql)).await.unwrap();
        assert_eq!(printed, "");
        self.made.lock().unwrap().insert(user, self.history.now());
    }

    /// Whether every change, by whomever, came in time.
    async fn judge(&self, cluster: &Cluster, history: &History, outcome: &mut Outcome) {
        let log = cluster.log().await;
        let made = self.made.lock().unwrap().clone();
        let by_sql = log.entries.iter().filter_map(|entry| Some((entry.revision, *made.get(&entry.user)?)));
        let mut known: HashMap<i64, Duration> = by_sql.collect();
        for write in &*history.writes.lock().unwrap() {
            if let Told::Done { revision, changed: true } = write.told {
                let first = known.entry(revision).or_insert(write.ended);
                *first = (*first).min(write.ended);
            }
        }
        let mut times = Vec::new();
        for seen in &*history.seen.lock().unwrap() {
            let (found, late) = checker::changes_come_in_time(seen, &known, LATE);
            outcome.violated(found);
            times.extend(late);
        }
        outcome.times("changes late by", times);
    }
}
