//! A replica dies while writes are on their way: at any moment, and at those that matter most.

use std::{collections::BTreeMap, os::unix::process::ExitStatusExt, sync::Arc, time::Duration};

use futures::FutureExt;
use tokio::time::{Instant, sleep};

use crate::{
    asking::until_serving,
    campaign::{Campaign, Outcome, Rounds},
    cluster::{Cluster, MIXED, Plan, RECOVERY, postgres},
    traffic::{Load, Traffic},
};

/// Where it dies; None for anywhere.
const MOMENTS: [Option<&str>; 6] = [
    None,
    Some("writer::before_commit"),
    Some("writer::after_commit"),
    Some("writer::before_answer"),
    Some("tailer::before_apply"),
    Some("tailer::before_ring"),
];

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "server-killed",
        unit: "kills",
        must_hold: "no acknowledged write lost, none doubled, a retry has one effect, caches equal the table",
        short: 10,
        nightly: 300,
        body: |rounds| run(rounds).boxed(),
    }]
}

async fn run(rounds: Rounds) -> Outcome {
    let (_postgres, url) = postgres().await;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, each: MIXED, ..Plan::default() }).await);
    kill(rounds, &cluster).await
}

pub(super) async fn kill(mut rounds: Rounds, cluster: &Arc<Cluster>) -> Outcome {
    let mut outcome = Outcome::default();
    let traffic = Traffic::start(cluster, Load::default(), &mut rounds.random);
    let mut back = Vec::new();
    let mut met = BTreeMap::new();
    let first = rounds.random.usize(..MOMENTS.len());
    while let Some(round) = outcome.next_of(rounds.count) {
        let victim = &cluster.replicas[rounds.random.usize(..cluster.replicas.len())];
        let moment = MOMENTS[(first + round as usize) % MOMENTS.len()];
        let weak = traffic.run_up(200).await.err();
        let died = match moment {
            None => {
                sleep(Duration::from_millis(rounds.random.u64(0..50))).await;
                victim.kill();
                true
            }
            Some(moment) => {
                victim.kill();
                let point = format!("{moment}={}*off->1*return", rounds.random.u32(20..120));
                // Some die so fast that nobody sees them ready.
                let ended = match victim.start_to_end_at(&point).await {
                    Ok(()) => victim.ended(Duration::from_secs(10)).await,
                    Err(ended) => ended,
                };
                if let Some(by_itself) = ended.filter(|ended| ended.signal().is_none()) {
                    outcome.violated([format!("kill {round}: it ended by itself, before {moment}: {by_itself}")]);
                }
                if ended.is_none() && victim.is_up() {
                    victim.kill();
                }
                ended.is_some()
            }
        };
        match weak {
            Some(weak) => outcome.weak.push(format!("kill {round}: {weak}")),
            None if !died => outcome.weak.push(format!("kill {round}: it never came to {moment:?}")),
            None => {
                outcome.fired += 1;
                *met.entry(moment.unwrap_or("anywhere")).or_insert(0) += 1;
            }
        }
        let started = Instant::now();
        victim.start().await;
        let serving = until_serving(cluster, victim.number, &traffic.history, rounds.random.fork()).await;
        outcome.violated(serving.err().map(|why| format!("kill {round}: {why}")));
        let after = started.elapsed();
        if after > RECOVERY {
            outcome.violated([format!("kill {round}: serving only {after:?} after it was started")]);
        }
        back.push(after);
    }
    traffic.settle(&mut outcome).await;
    outcome.figure("died at", format!("{met:?}"));
    outcome.times("a write committed and read again after the start", back);
    outcome
}
