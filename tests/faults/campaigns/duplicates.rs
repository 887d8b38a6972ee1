//! The same write several times at once, on different replicas; now and then one that only has the same request id.

use std::{collections::HashMap, sync::Arc};

use futures::{FutureExt, future::join_all};
use tokio::{sync::Semaphore, task::JoinSet};
use tonic::Status;

use crate::{
    asking::{Attempt, until_told},
    campaign::{Campaign, Outcome, Rounds},
    cluster::{Cluster, Plan, postgres},
    history::{History, Told},
    request::{Done, Request},
    traffic::{Load, Traffic, reason},
};

const AT_ONCE: usize = 16;

const USERS: i64 = 40;

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "duplicates",
        unit: "writes",
        must_hold: "one effect, the same answer, and another body is refused",
        short: 500,
        nightly: 10_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

/// What came of one write and its copies.
struct Copies {
    copies: usize,
    /// Whether copies of one body were on their way at once on both replicas.
    together: bool,
    reused: usize,
    found: Vec<String>,
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, ..Plan::default() }).await);
    let load = Load { writers: 2, readers: 2, ..Load::default() };
    let traffic = Traffic::start(&cluster, load, &mut rounds.random);
    outcome.proves_nothing(traffic.run_up(200).await.err());
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut writes = JoinSet::new();
    let (mut copies, mut reused) = (0, 0);
    while outcome.next_of(rounds.count).is_some() {
        for _ in outcome.fired..rounds.count {
            let (cluster, history, turns) = (cluster.clone(), traffic.history.clone(), turns.clone());
            let random = rounds.random.fork();
            writes.spawn(async move {
                let _turn = turns.acquire().await.unwrap();
                several_at_once(&cluster, &history, random).await
            });
        }
        while let Some(ended) = writes.join_next().await {
            let one = ended.expect("a writer does not panic");
            match one.together {
                true => outcome.fired += 1,
                false => outcome.weak.push("the replicas had no two of the copies at once".into()),
            }
            copies += one.copies;
            reused += one.reused;
            outcome.violated(one.found);
        }
    }
    outcome.proves_nothing(traffic.throughout().err());
    traffic.settle(&mut outcome).await;
    outcome.figure("copies", copies);
    outcome.figure("refused as REQUEST_ID_REUSED", reused);
    outcome
}

async fn several_at_once(cluster: &Cluster, history: &History, mut random: fastrand::Rng) -> Copies {
    let clients: Vec<_> = cluster.replicas.iter().map(|replica| replica.client()).collect();
    let write = some_write(&mut random);
    // One on each replica at least.
    let first = random.usize(..2);
    let mut bodies: Vec<_> = (first..first + random.usize(2..=5)).map(|n| (n % 2, write.clone())).collect();
    if random.u8(..5) == 0 {
        let other = another_body(&write, &mut random);
        bodies.insert(random.usize(..=bodies.len()), (random.usize(..2), other));
    }
    let asked = bodies.iter().map(|(replica, body)| {
        let (replica, mut client) = (*replica, clients[*replica].clone());
        async move {
            let attempt = Attempt::begin(cluster, history, replica, body);
            let begun = history.now();
            let answer = body.send(&mut client, None).await;
            // Another body's answer says nothing about this one's; it is judged below.
            if !is_reused(&answer) {
                attempt.end(Some(&answer));
            }
            (replica, [begun, history.now()], answer)
        }
    });
    let answers = join_all(asked).await;
    let copies = || answers.iter().zip(&bodies).filter(|(_, (_, body))| *body == write).map(|(answer, _)| answer);
    let together = copies().any(|(one, [begun, ended], _)| {
        copies().any(|(other, [before, after], _)| one != other && begun < after && before < ended)
    });
    let bodies: Vec<_> = bodies.into_iter().map(|(_, body)| body).collect();
    let answers: Vec<_> = answers.into_iter().map(|(.., answer)| answer).collect();
    // Nobody may have been told that it is done; then somebody asks again.
    let mut found = Vec::new();
    let winner = match bodies.iter().zip(&answers).find(|(_, answer)| answer.is_ok()) {
        Some((body, _)) => body.clone(),
        None => {
            let again = until_told(cluster, &clients, history, &write, &mut random).await;
            found.extend(again.err());
            write
        }
    };
    let reused = answers.iter().filter(|answer| is_reused(answer)).count();
    found.extend(judge(&winner, &bodies, &answers));
    Copies { copies: bodies.len(), together, reused, found }
}

fn some_write(random: &mut fastrand::Rng) -> Request {
    let user = random.i64(1..=USERS);
    match random.u8(..8) {
        0 => Request::delete(user, random),
        1 => Request::transfer(user, user % USERS + 1, random),
        _ => {
            let role = *random.choice(&["user", "admin", "moderator"]).unwrap();
            Request::set(user, role, random)
        }
    }
}

/// With the same id.
fn another_body(write: &Request, random: &mut fastrand::Rng) -> Request {
    let mut other = write.clone();
    match &mut other {
        Request::Set(set) if random.bool() => set.role = if set.role == "user" { "admin" } else { "user" }.into(),
        Request::Set(set) => set.user_id += 2 * USERS,
        Request::Delete(delete) => delete.user_id += 2 * USERS,
        Request::Transfer(transfer) if random.bool() => transfer.demote_from = !transfer.demote_from,
        Request::Transfer(transfer) => transfer.to_user_id += 2 * USERS,
    }
    other
}

fn is_reused(answer: &Result<Done, Status>) -> bool {
    answer.as_ref().is_err_and(|status| reason(status) == "REQUEST_ID_REUSED")
}

/// Copies of the one that was done are told the same, in every field; any other body is told that the id is taken.
fn judge(winner: &Request, bodies: &[Request], answers: &[Result<Done, Status>]) -> Vec<String> {
    let mut found = Vec::new();
    let mut told: HashMap<String, &Request> = HashMap::new();
    for (body, answer) in bodies.iter().zip(answers) {
        match answer {
            Ok(answer) if body == winner => {
                told.insert(answer.whole.clone(), body);
            }
            Ok(answer) => found.push(format!("two bodies of one request_id are done: {body:?}: {answer:?}")),
            Err(_) if is_reused(answer) && body == winner => {
                found.push(format!("a copy is refused as another request: {body:?}"));
            }
            Err(status) => {
                if let Told::Unknown(why) = crate::traffic::told(status)
                    && why != "REQUEST_ID_REUSED"
                {
                    found.push(format!("{body:?} was told {why}, though nothing was broken"));
                }
            }
        }
    }
    if told.len() > 1 {
        found.push(format!("one request, several answers: {told:#?}"));
    }
    found
}
