//! PostgreSQL dies as a whole while writes are on their way, and comes back.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::join_all};
use tokio::time::sleep;

use crate::{
    asking::until_serving,
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, MIXED, Plan, RECOVERY, postgres},
    traffic::{Load, Traffic},
};

/// A seeded bug, which `ROLECACHE_SEED_UNFLUSHED=1` asks for: a commit is answered before it is on disk.
const UNFLUSH: &str = "do $$ begin
    execute replace(pg_get_functiondef('rolecache.write'::regproc), $q$'synchronous_commit', 'on'$q$,
      $q$'synchronous_commit', 'off'$q$);
    execute format('alter database %I set synchronous_commit = off', current_database()); end $$";

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "postgres-killed",
        unit: "kills",
        must_hold: "no acknowledged write lost, none doubled, caches equal the table, serving 5 s after it accepts",
        short: 5,
        nightly: 150,
        body: |rounds| run(rounds).boxed(),
    }]
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (postgres, url) = postgres().await;
    let postgres = Arc::new(postgres);
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, each: MIXED, ..Plan::default() }).await);
    if std::env::var_os("ROLECACHE_SEED_UNFLUSHED").is_some() {
        cluster.shell.go(UNFLUSH).await;
    }
    let traffic =
        Traffic::start(&cluster, Load { excuses: checker::STORE_BROKEN, ..Load::default() }, &mut rounds.random);
    let (mut back, mut kills) = (Vec::new(), Vec::new());
    while let Some(round) = outcome.next_of(rounds.count) {
        if let Err(weak) = traffic.run_up(200).await {
            outcome.weak.push(format!("kill {round}: {weak}"));
        } else {
            outcome.fired += 1;
        }
        sleep(Duration::from_millis(rounds.random.u64(0..50))).await;
        kills.push(traffic.history.now());
        let broken = postgres.clone();
        tokio::task::spawn_blocking(move || {
            broken.kill_hard();
            broken.start();
        })
        .await
        .unwrap();
        let serving = (0..cluster.replicas.len())
            .map(|replica| until_serving(&cluster, replica, &traffic.history, rounds.random.fork()));
        for served in join_all(serving.collect::<Vec<_>>()).await {
            match served {
                Ok(after) if after > RECOVERY => {
                    outcome.violated([format!("kill {round}: serving only {after:?} after it accepted")]);
                }
                Ok(after) => back.push(after),
                Err(why) => outcome.violated([format!("kill {round}: {why}")]),
            }
        }
    }
    let history = traffic.history.clone();
    traffic.settle(&mut outcome).await;
    let writes = history.writes.lock().unwrap();
    let met = kills.iter().filter(|kill| writes.iter().any(|write| write.begun < **kill && **kill < write.ended));
    let met = met.count();
    outcome.proves_nothing((met == 0).then(|| "no kill met a write on its way".to_owned()));
    outcome.figure("kills that met a write on its way", format!("{met} of {}", kills.len()));
    outcome.times("a write committed and read again after", back);
    outcome
}
