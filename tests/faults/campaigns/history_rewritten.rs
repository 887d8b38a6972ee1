//! PostgreSQL's data directory is taken back to a copy of before: what was acknowledged since then never happened.

use std::{collections::HashSet, path::Path, process::Command, sync::Arc, time::Duration};

use futures::{FutureExt, future::join_all};
use rolecache::proto::v1::{
    RoleChange, SetRoleRequest, WatchRoleChangesRequest, role_cache_service_client::RoleCacheServiceClient,
};
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, timeout, timeout_at},
};
use tonic::transport::Channel;

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker::{self, Excuses},
    cluster::{Cluster, MIXED, Plan, postgres},
    support::{postgres::Postgres, watch::Watching},
    traffic::{Load, ROLES, Traffic, reason},
};

/// How soon every replica has to find out, from when PostgreSQL accepts connections again.
const NOTICED: Duration = Duration::from_secs(10);

const AWAY: std::ops::Range<u64> = 0..3_000;

const USERS: i64 = 30;

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "history-rewritten",
        unit: "histories",
        must_hold: "noticed by every replica and every resume with a token",
        short: 1,
        nightly: 20,
        body: |rounds| run(rounds).boxed(),
    }]
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (postgres, url) = postgres().await;
    let postgres = Arc::new(postgres);
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, each: MIXED, ..Plan::default() }).await);
    let copies = tempfile::tempdir().unwrap();
    let mut noticed = Vec::new();
    while let Some(round) = outcome.next_of(rounds.count) {
        write(&cluster, &mut rounds.random).await;
        let kept: Vec<String> = join_all(watches(&cluster, "")).await.into_iter().map(|it| it.resume_token()).collect();
        let copy = copies.path().join(round.to_string());
        away(&postgres, |data| copy_all(data, &copy)).await;
        join_all(cluster.replicas.iter().map(|replica| replica.until_in_step())).await;

        // From here on nothing will have happened.
        let kept_to = cluster.log().await.head();
        let mut open = join_all(watches(&cluster, "")).await;
        let last = write(&cluster, &mut rounds.random).await;
        let mut lost = Vec::new();
        for watch in &mut open {
            loop {
                let revision = watch.next_commit().await.revision;
                // A replica may be in step, and yet to hear of the end of what stays.
                if revision > kept_to {
                    lost.push(watch.resume_token());
                }
                if revision >= last {
                    break;
                }
            }
        }
        let load = Load { writers: 0, watchers: 0, users: USERS, excuses: checker::HISTORY_LOST, ..Load::default() };
        let mut reading = Traffic::start(&cluster, load, &mut rounds.random);
        let weak = reading.run_up(200).await;
        let before = cluster.log().await;
        let away_for = Duration::from_millis(rounds.random.u64(AWAY));
        let stops = reading.history.now();
        away(&postgres, |data| {
            std::fs::remove_dir_all(data).unwrap();
            copy_all(&copy, data);
            // Away for longer than an answer may be old, or for a moment.
            std::thread::sleep(away_for);
        })
        .await;
        let accepts = Instant::now();
        let trying: JoinSet<_> = cluster
            .replicas
            .iter()
            .flat_map(|it| lost.iter().map(|token| refused(it.client(), token.clone())))
            .collect();
        // Numbers that were given out before stand for something else now, before anybody looks or after it.
        let more = rounds.random.usize(0..60);
        for n in 0..more {
            cluster
                .shell
                .go(format!("insert into users values ({}, 'admin')", 1000 + round as i64 * 100 + n as i64))
                .await;
        }
        for (watch, replica) in open.iter_mut().zip(0..) {
            match timeout(NOTICED, watch.until_end()).await {
                Ok(status) if reason(&status) == "HISTORY_CHANGED" => noticed.push(accepts.elapsed()),
                Ok(status) => outcome.violated([format!("history {round}: a watch ended with {status}")]),
                Err(_) => {
                    outcome.violated([format!("history {round}: replica {replica} does not notice, {more} more")])
                }
            }
        }
        // Numbers that stand for something else now are not told of before the end.
        let happened: HashSet<_> =
            before.entries.iter().map(|entry| (entry.revision, entry.user, entry.new.clone())).collect();
        for change in open.iter().flat_map(|watch| watch.changes()) {
            if !happened.contains(&told_of(&change)) {
                outcome.violated([format!("history {round}: a watch of the lost one was told of {change:?}")]);
            }
        }
        join_all(cluster.replicas.iter().map(|replica| replica.until_in_step())).await;
        reading.stop_calling().await;
        let after = cluster.log().await;
        outcome.violated(checker::answers_follow(&reading.history.reads.lock().unwrap(), [&before, &after], stops));
        let excuses = Excuses { reasons: load.excuses, ..Excuses::default() };
        outcome.violated(checker::failures_have_reasons(&[], &reading.history.reads.lock().unwrap(), &excuses));
        // The new history is one like any other.
        let traffic = Traffic::start(&cluster, Load { users: USERS, ..Load::default() }, &mut rounds.random);
        match weak.and(traffic.run_up(200).await) {
            Err(weak) => outcome.weak.push(format!("history {round}: {weak}")),
            Ok(()) => outcome.fired += 1,
        }
        traffic.settle_after(after.head(), &mut outcome).await;
        for told in trying.join_all().await {
            match told {
                Ok(changes) => {
                    let strange = changes.iter().find(|change| !happened.contains(&told_of(change)));
                    outcome.violated(strange.map(|it| format!("history {round}: a resumed watch was told of {it:?}")));
                }
                Err(why) => outcome.violated([format!("history {round}: with a token of the lost one: {why}")]),
            }
        }
        for watch in join_all(kept.iter().flat_map(|token| watches(&cluster, token))).await {
            if !watch.started.resumed {
                outcome.violated([format!("history {round}: a token of before it does not go on")]);
            }
        }
    }
    outcome.times("noticed after", noticed);
    outcome
}

fn told_of(change: &RoleChange) -> (i64, i64, String) {
    (change.revision, change.user_id, change.new_role.clone())
}

/// Resumes from a token of the lost history until it is refused for that; what the streams told that began before. Err says that
/// somebody goes on.
async fn refused(client: RoleCacheServiceClient<Channel>, token: String) -> Result<Vec<RoleChange>, String> {
    let mut told = Vec::new();
    let until = Instant::now() + NOTICED;
    loop {
        let status = match timeout_at(until, Watching::open(client.clone(), resuming(&token))).await {
            Ok(Ok(mut watch)) => {
                let end = timeout_at(until, watch.until_end()).await;
                told.extend(watch.changes());
                end.map_err(|_| "a watch goes on".to_owned())?
            }
            Ok(Err(status)) if reason(&status) == "HISTORY_CHANGED" => return Ok(told),
            Ok(Err(status)) => status,
            Err(_) => return Err("a watch does not begin".into()),
        };
        match reason(&status).as_str() {
            // Of a watch that had begun: again, to be refused now.
            "HISTORY_CHANGED" => {}
            "STORE_UNREACHABLE" if Instant::now() < until => sleep(Duration::from_millis(5)).await,
            other => return Err(format!("a watch was told {other}")),
        }
    }
}

fn resuming(token: &str) -> WatchRoleChangesRequest {
    WatchRoleChangesRequest { after: token.to_owned(), ..Default::default() }
}

/// One at each replica.
fn watches(cluster: &Cluster, token: &str) -> impl Iterator<Item = impl Future<Output = Watching>> {
    let clients: Vec<_> = cluster.replicas.iter().map(|replica| replica.client()).collect();
    let request = resuming(token);
    clients.into_iter().map(move |client| {
        let request = request.clone();
        async move { Watching::open(client, request).await.expect("a watch") }
    })
}

/// Through all replicas; the revision of the last one.
async fn write(cluster: &Cluster, random: &mut fastrand::Rng) -> i64 {
    let mut revision = 0;
    for n in 0..random.i64(10..40) {
        // Each changes something: no role is there twice in a row.
        let role = ROLES[(n % 3) as usize].to_owned();
        let request = SetRoleRequest { user_id: random.i64(1..=USERS), role, ..Default::default() };
        let mut client = cluster.replicas[random.usize(..cluster.replicas.len())].client();
        revision = revision.max(client.set_role(request).await.expect("a write").into_inner().revision);
    }
    revision
}

/// Something is done to the data while the server is stopped.
async fn away(postgres: &Arc<Postgres>, work: impl FnOnce(&Path)) {
    let stopped = postgres.clone();
    spawn_blocking(move || stopped.stop()).await.unwrap();
    tokio::task::block_in_place(|| work(&postgres.data()));
    let started = postgres.clone();
    spawn_blocking(move || started.start()).await.unwrap();
}

fn copy_all(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}
