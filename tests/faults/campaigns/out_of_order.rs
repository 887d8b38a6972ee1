//! Pairs of strangers whose rows are written in order 1, 2 and committed in order 2, 1; between them others who commit at the
//! same moment, and who roll back.

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
    /// Which of the roles each of its users has, so that every write changes one.
    roles: [usize; 20],
    inverted: u64,
    at_once: u64,
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
            roles: [0; 20],
            inverted: 0,
            at_once: 0,
            rolled_back: 0,
            errors: Vec::new(),
        })
        .collect();
    let mut all = 0;
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
        outcome.fired = pairs.iter().map(|pair| pair.inverted).sum();
        all += each * PAIRS as u64;
        // What was seen first: the log has at least that.
        let seen = traffic.history.seen.lock().unwrap().clone();
        let log = cluster.log().await;
        let found: Vec<String> = seen.iter().flat_map(|seen| checker::watches_are_the_log(seen, &log)).collect();
        if !found.is_empty() {
            outcome.figure("found after", format!("{all} pairs"));
            break;
        }
    }
    outcome.proves_nothing(traffic.throughout().err());
    traffic.settle(&mut outcome).await;
    outcome.violated(pairs.iter_mut().flat_map(|pair| std::mem::take(&mut pair.errors)));
    let sum = |of: fn(&Pair) -> u64| pairs.iter().map(of).sum::<u64>();
    let at_once = sum(|pair| pair.at_once);
    outcome.proves_nothing((at_once == 0).then(|| "nobody committed at the same moment".to_owned()));
    outcome.figure("others who committed at the same moment", at_once);
    outcome.figure("others of whom one rolled back", sum(|pair| pair.rolled_back));
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
        let users = [random.usize(..10), 10 + random.usize(..10)];
        for (session, user) in [&mut *first, &mut *second].into_iter().zip(users) {
            let role = ROLES[(self.roles[user] + 1) % ROLES.len()];
            let user = base + user as i64;
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
        let in_turn = random.bool();
        if in_turn {
            printed += &second.run("commit;");
            printed += &first.run(end);
        } else {
            second.send("commit;\n");
            std::thread::sleep(Duration::from_micros(random.u64(..1_000)));
            printed += &first.run(end);
            printed += &second.run("");
        }
        self.roles[users[1]] += 1;
        match (end, in_turn) {
            ("rollback;", _) => self.rolled_back += 1,
            (_, true) => self.inverted += 1,
            (_, false) => self.at_once += 1,
        }
        if end == "commit;" {
            self.roles[users[0]] += 1;
        }
        if printed.contains("ERROR") {
            self.errors.push(format!("a stranger was refused: {printed}"));
        }
    }
}
