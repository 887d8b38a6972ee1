//! A replica is cut off from the store, or stands still, while the other one goes on writing.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::{FutureExt, future::join_all};
use rolecache::proto::v1::GetRoleRequest;
use tokio::time::sleep;

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, MIXED, Plan, Replica, postgres},
    history::{Answer, Read, Told},
    support::proxy::{Fate, Which},
    traffic::{self, Load, Traffic},
};

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Every connection is reset, and every new one.
    Refused,
    /// Nothing comes through, and nobody is told.
    Hole,
    /// All that is sent to the store arrives, and no answer comes back: what is written is done, and nobody is told.
    Unanswered,
    /// SIGSTOP, then SIGCONT.
    Paused,
    /// The same while every answer of the store is on its way for a while: what arrives afterwards is old.
    PausedInFlight,
}

const FAULTS: [Fault; 5] = [Fault::Unanswered, Fault::Paused, Fault::Refused, Fault::PausedInFlight, Fault::Hole];

/// Reads at once: while it is cut off, and in its sockets when it goes on after a pause.
const BURST: usize = 200;

/// In milliseconds: longer than an answer may be old, so that none of them is let off.
const LASTS: std::ops::Range<u64> = 2_200..4_000;

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "replica-cut-off",
        unit: "cuts and pauses",
        must_hold: "nothing older than two seconds is answered as truth",
        short: 6,
        nightly: 120,
        body: |rounds| both(rounds).boxed(),
    }]
}

/// Half of the rounds with either cache.
async fn both(mut rounds: Rounds) -> Outcome {
    let half = rounds.count / 2;
    let first = run(Rounds { count: rounds.count - half, random: rounds.random.fork() }, MIXED).await;
    if half == 0 {
        return first;
    }
    let swapped = &[MIXED[1], MIXED[0]];
    first.and(run(Rounds { count: half, random: rounds.random }, swapped).await)
}

/// The one that is cut off is the first of them.
async fn run(mut rounds: Rounds, each: &[&[&str]]) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, each, proxied: true, ..Plan::default() }).await);
    // Few users: each changes often enough that an old answer is a wrong one.
    let load = Load { users: 12, excuses: checker::STORE_BROKEN, excused: Some(0), ..Load::default() };
    let traffic = Traffic::start(&cluster, load, &mut rounds.random);
    let victim = &cluster.replicas[0];
    let proxy = victim.proxy.as_ref().unwrap();
    let (mut back, mut cut_off, mut paused) = (Vec::new(), 0, 0);
    while let Some(round) = outcome.next_of(rounds.count) {
        let fault = FAULTS[round as usize % FAULTS.len()];
        // Its store's answers in whatever pieces.
        proxy.strike(Which::All, *rounds.random.choice([Fate::Open, Fate::Sliced].iter()).unwrap());
        let weak = traffic.run_up(200).await;
        let met = match fault {
            Fault::Refused | Fault::Hole | Fault::Unanswered => {
                match fault {
                    Fault::Refused => {
                        proxy.refuse(true);
                        proxy.strike(Which::All, Fate::Reset);
                    }
                    Fault::Unanswered => {
                        proxy.strike(Which::All, Fate::DeafClient);
                        // Whoever connects again has to wait.
                        proxy.freeze();
                    }
                    _ => {
                        proxy.freeze();
                        proxy.strike(Which::All, Fate::Hole);
                    }
                }
                sleep(Duration::from_millis(rounds.random.u64(LASTS))).await;
                // The usual readers are stuck by now, each at a revision that cannot come.
                let answered = burst(victim, &traffic).await;
                proxy.refuse(false);
                // Or what is in the hole stays there, whoever waits for it.
                if rounds.random.bool() {
                    proxy.strike(Which::All, Fate::Reset);
                }
                proxy.thaw();
                cut_off += answered.all;
                // Marked as old: it is cut off indeed.
                answered.stale
            }
            Fault::Paused | Fault::PausedInFlight => {
                if matches!(fault, Fault::PausedInFlight) {
                    proxy.strike(Which::All, Fate::Slow(Duration::from_millis(40)));
                    sleep(Duration::from_millis(rounds.random.u64(100..300))).await;
                }
                victim.signal("STOP");
                sleep(Duration::from_millis(rounds.random.u64(LASTS))).await;
                let go_on = async {
                    // Connected by the kernel, and sent: nobody reads it yet.
                    sleep(Duration::from_millis(150)).await;
                    victim.signal("CONT");
                };
                let (answered, ()) = tokio::join!(burst(victim, &traffic), go_on);
                proxy.strike(Which::All, Fate::Open);
                paused += answered.all;
                answered.all
            }
        };
        match weak {
            Err(weak) => outcome.weak.push(format!("{fault:?} {round}: {weak}")),
            Ok(()) if met < BURST / 2 => outcome.weak.push(format!("{fault:?} {round}: only {met} reads met it")),
            Ok(()) => outcome.fired += 1,
        }
        back.push(victim.until_in_step().await);
    }
    let history = traffic.history.clone();
    traffic.settle(&mut outcome).await;
    let log = cluster.log().await;
    let logged: HashSet<&str> = log.entries.iter().map(|entry| entry.reason.as_str()).collect();
    let writes = history.writes.lock().unwrap();
    let in_doubt = writes.iter().filter(|write| matches!(&write.told, Told::Unknown(_)));
    let done: HashSet<&str> = in_doubt.map(|write| write.id.as_str()).filter(|id| logged.contains(id)).collect();
    outcome.figure("writes that were done and not answered", done.len());
    outcome.figure("answers while cut off", cut_off);
    outcome.figure("answers at the end of a pause", paused);
    outcome.times("in step again after", back);
    outcome
}

struct Answered {
    all: usize,
    stale: usize,
}

/// Asks a replica many times at once.
async fn burst(victim: &Replica, traffic: &Traffic) -> Answered {
    let history = &traffic.history;
    let clients: Vec<_> = (0..10).map(|_| victim.client()).collect();
    let asked = (0..BURST).map(|n| {
        let (user, mut client) = (traffic.users[n % traffic.users.len()], clients[n % clients.len()].clone());
        async move {
            let begun = history.now();
            let request = GetRoleRequest { user_id: user, ..Default::default() };
            let answer = match client.get_role(request).await {
                Ok(answer) => Ok(Answer::from(answer.into_inner())),
                Err(status) => Err(traffic::reason(&status)),
            };
            let stale = answer.as_ref().map(|answer| answer.stale).ok();
            let (process, ended) = (victim.process(), history.now());
            history.read(Read { user, process, begun, ended, min_revision: 0, answer });
            stale
        }
    });
    let answers: Vec<bool> = join_all(asked).await.into_iter().flatten().collect();
    Answered { all: answers.len(), stale: answers.into_iter().filter(|stale| *stale).count() }
}
