//! Pairs of strangers whose rows are written in order 1, 2 and committed in order 2, 1, or both at the same moment.

use std::{sync::Arc, time::Duration};

use futures::FutureExt;

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan, postgres},
    support::{postgres::Session, server::Shell},
    traffic::{Load, ROLES, Traffic},
};

/// Of two writers each.
const PAIRS: usize = 4;

/// Pairs of transactions between two looks at what was seen.
const BATCH: u64 = 20;

/// Users of the pairs, beside those of the traffic.
const USERS: std::ops::RangeInclusive<i64> = 101..=180;

/// A stranger's own deferred trigger: with it, a commit takes its time after it has been given its number.
const SLOW_COMMIT: &str = "
    create table pauses (seconds float8);
    create function pause() returns trigger language plpgsql as
      $$ begin perform pg_sleep(new.seconds); return null; end $$;
    create constraint trigger pause after insert on pauses deferrable initially deferred
      for each row execute function pause();";

/// A seeded bug, which `ROLECACHE_SEED_UNLOCKED=1` asks for: numbers are given without a lock.
const UNLOCK: &str = "do $$ begin execute replace(pg_get_functiondef('rolecache.number_commit'::regproc),
    'perform pg_advisory_xact_lock(7237966, 1);', ''); end $$";

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "out-of-order",
        unit: "pairs",
        must_hold: "nothing missed, caches equal the table",
        short: 200,
        nightly: 5_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

/// Two strangers, and what they did.
struct Pair {
    sessions: [Session; 2],
    random: fastrand::Rng,
    number: usize,
    inverted: u64,
    rolled_back: u64,
    errors: Vec<String>,
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, ..Plan::default() }).await);
    cluster.shell.go(SLOW_COMMIT).await;
    if std::env::var_os("ROLECACHE_SEED_UNLOCKED").is_some() {
        unlock(&cluster.shell).await;
    }
    let load = Load { writers: 2, readers: 2, watchers: 3, ..Load::default() };
    let mut traffic = Traffic::start(&cluster, load, &mut rounds.random);
    traffic.users.extend(USERS);
    outcome.proves_nothing(traffic.run_up(200).await.err());
    let mut pairs: Vec<Pair> = (0..PAIRS)
        .map(|number| Pair {
            sessions: [Session::open(&url), Session::open(&url)],
            random: rounds.random.fork(),
            number,
            inverted: 0,
            rolled_back: 0,
            errors: Vec::new(),
        })
        .collect();
    while outcome.fired < rounds.count {
        let each = BATCH.min(rounds.count - outcome.fired).div_ceil(PAIRS as u64);
        let running: Vec<_> = pairs
            .drain(..)
            .map(|mut pair| {
                tokio::task::spawn_blocking(move || {
                    (0..each).for_each(|_| pair.commit_out_of_order());
                    pair
                })
            })
            .collect();
        for pair in running {
            pairs.push(pair.await.expect("a pair does not panic"));
        }
        outcome.fired += each * PAIRS as u64;
        // What was seen first: the log has at least that.
        let seen = traffic.history.seen.lock().unwrap().clone();
        let log = cluster.log().await;
        let found: Vec<String> = seen.iter().flat_map(|seen| checker::watches_are_the_log(seen, &log)).collect();
        if !found.is_empty() {
            outcome.figure("found after", format!("{} pairs", outcome.fired));
            break;
        }
    }
    traffic.settle(&mut outcome).await;
    outcome.violated(pairs.iter_mut().flat_map(|pair| std::mem::take(&mut pair.errors)));
    let sum = |of: fn(&Pair) -> u64| pairs.iter().map(of).sum::<u64>();
    outcome.figure("committed in order 2, 1", sum(|pair| pair.inverted));
    outcome.figure("one of them rolled back", sum(|pair| pair.rolled_back));
    outcome
}

async fn unlock(shell: &Shell) {
    shell.go(UNLOCK).await;
    let source = shell.go("select prosrc from pg_proc where oid = 'rolecache.number_commit'::regproc").await;
    assert!(!source.contains("advisory"), "the lock is still there: {source}");
}

impl Pair {
    fn commit_out_of_order(&mut self) {
        let Self { sessions: [first, second], random, number, .. } = self;
        let mut printed = String::new();
        let base = USERS.start() + 20 * *number as i64;
        for (session, user) in [(&mut *first, base), (&mut *second, base + 10)] {
            let (user, role) = (user + random.i64(0..10), random.choice(ROLES).unwrap());
            let mut work = format!(
                "begin; insert into users (user_id, role) values ({user}, '{role}')
                 on conflict (user_id) do update set role = excluded.role;"
            );
            if random.u8(..3) == 0 {
                work += &format!("insert into pauses values ({});", random.f64() / 100.0);
            }
            printed += &session.run(&work);
        }
        std::thread::sleep(Duration::from_micros(random.u64(..3_000)));
        let end = if random.u8(..5) == 0 { "rollback;" } else { "commit;" };
        if random.bool() {
            printed += &second.run("commit;");
            printed += &first.run(end);
            self.inverted += u64::from(end == "commit;");
        } else {
            second.send("commit;\n");
            std::thread::sleep(Duration::from_micros(random.u64(..1_000)));
            printed += &first.run(end);
            printed += &second.run("");
        }
        self.rolled_back += u64::from(end == "rollback;");
        if printed.contains("ERROR") {
            self.errors.push(format!("a stranger was refused: {printed}"));
        }
    }
}
