//! Several replicas on one store, and nothing broken: what is committed through one is in the caches and the watches of the
//! others at once.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::FutureExt;
use rolecache::proto::v1::{GetRoleRequest, Source, role_cache_service_client::RoleCacheServiceClient};
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{
    asking::until_told,
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan, postgres},
    history::{Answer, History, Process, Read},
    request::Request,
    support::server::PATIENCE,
    traffic::{Load, ROLES, Traffic, reason},
    watcher::Watcher,
};

/// Where it is written; the others only hear of it.
const WRITTEN: usize = 0;
const REPLICAS: usize = 3;

/// Between two commits.
const PACE: Duration = Duration::from_millis(5);

/// From COMMIT to the message of another replica: in the middle, and of a long run of 99 in 100. A poll would bring it
/// after 250 ms.
const SOON: Duration = Duration::from_millis(50);
const SHORT: u64 = 300;

/// Users of the commits that are measured, beside those of the traffic.
const FIRST: i64 = 100;
const USERS: i64 = 200;

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "replicas",
        unit: "commits",
        must_hold: "heard of on the others at once, in their caches before that, and there for who asks for the revision",
        short: SHORT,
        nightly: 5_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: REPLICAS, ..Plan::default() }).await);
    let load = Load { writers: 1, readers: 2, watchers: 1, ..Load::default() };
    let mut traffic = Traffic::start(&cluster, load, &mut rounds.random);
    traffic.users.extend(FIRST..FIRST + USERS);
    outcome.proves_nothing(traffic.run_up(200).await.err());
    let others: Vec<usize> = (0..REPLICAS).filter(|replica| *replica != WRITTEN).collect();
    let clients: Vec<_> = cluster.replicas.iter().map(|replica| replica.client()).collect();
    // From here on all of them are in every cache.
    for client in &clients {
        for user_id in FIRST..FIRST + USERS {
            client.clone().get_role(GetRoleRequest { user_id, ..Default::default() }).await.expect("a read");
        }
    }
    let stop = CancellationToken::new();
    let mut hearing = JoinSet::new();
    let heard_to: Vec<_> = others.iter().map(|_| Arc::new(Mutex::new(0))).collect();
    for (replica, heard_to) in others.iter().zip(&heard_to) {
        let mut watcher = Watcher::after("");
        let mut client = clients[*replica].clone();
        watcher.open(&mut client).await.expect("a watch starts");
        let process = cluster.replicas[*replica].process();
        hearing.spawn(hear(watcher, client, process, traffic.history.clone(), heard_to.clone(), stop.clone()));
    }
    let mut pace = interval(PACE);
    let mut waited = Vec::new();
    for round in 0..rounds.count {
        pace.tick().await;
        // Each changes something: a role that the user had not the turn before.
        let user = FIRST + round as i64 % USERS;
        let role = ROLES[1 + (round as usize / USERS as usize) % 2];
        let write = Request::set(user, role, &mut rounds.random);
        let written = until_told(&cluster, &clients[..=WRITTEN], &traffic.history, &write, &mut rounds.random).await;
        match written {
            Ok(None) => outcome.violated([format!("declined: {write:?}")]),
            Ok(Some(written)) => {
                outcome.fired += 1;
                let other = *rounds.random.choice(&others).unwrap();
                let begun = Instant::now();
                let process = cluster.replicas[other].process();
                let mut client = clients[other].clone();
                outcome.violated(sees(&mut client, process, &traffic.history, user, role, written.revision).await);
                waited.push(begun.elapsed());
            }
            Err(why) => outcome.violated([why]),
        }
    }
    let head = traffic.history.newest();
    let all_heard = async {
        while heard_to.iter().any(|heard_to| *heard_to.lock().unwrap() < head) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    outcome
        .violated(timeout(PATIENCE, all_heard).await.is_err().then(|| format!("not all had heard of {head} in time")));
    stop.cancel();
    let mut late = Vec::new();
    let mut heard = Vec::new();
    while let Some(ended) = hearing.join_next().await {
        let (watcher, times, found) = ended.expect("a watcher does not panic");
        outcome.violated(found);
        late.extend(times);
        heard.push(watcher.seen);
    }
    outcome.proves_nothing(traffic.throughout().err());
    traffic.settle(&mut outcome).await;
    let log = cluster.log().await;
    outcome.violated(heard.iter().flat_map(|seen| checker::watches_are_the_log(seen, &log)));
    late.sort();
    let of = |share: usize| late.get(late.len() * share / 100).copied().unwrap_or(Duration::MAX);
    let [middle, p99] = [50, 99].map(of);
    let (judged, share) = if rounds.count > SHORT { (p99, "99 in 100") } else { (middle, "half") };
    outcome.violated(
        (judged > SOON).then(|| format!("from COMMIT to another replica's watch: {judged:.1?} for {share} of them")),
    );
    let longest = late.last().copied().unwrap_or_default();
    let times = format!("{middle:.1?} median, {p99:.1?} p99, {longest:.1?} at most of {}", late.len());
    outcome.figure("from COMMIT to another replica's watch", times);
    outcome.times("a read of the revision on another replica", waited);
    outcome
}

/// Follows one replica: how late each commit was, and whether its users are in the cache by then.
async fn hear(
    mut watcher: Watcher,
    mut client: RoleCacheServiceClient<Channel>,
    process: Process,
    history: Arc<History>,
    heard_to: Arc<Mutex<i64>>,
    stop: CancellationToken,
) -> (Watcher, Vec<Duration>, Vec<String>) {
    let (mut late, mut found) = (Vec::new(), Vec::new());
    loop {
        let told = watcher.seen.commits.len();
        let taken = tokio::select! {
            () = stop.cancelled() => return (watcher, late, found),
            taken = watcher.next() => taken,
        };
        if let Err(status) = taken {
            found.push(format!("a watch ended with {}, though nothing was broken", reason(&status)));
            return (watcher, late, found);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        for (_, commit) in &watcher.seen.commits[told..] {
            let change = &commit.changes[0];
            let at = change.changed_at.expect("every change has its time");
            late.push(now.saturating_sub(Duration::new(at.seconds as u64, at.nanos as u32)));
            // Cache before watchers: no revision is asked for.
            let request = GetRoleRequest { user_id: change.user_id, ..Default::default() };
            found.extend(ask(&mut client, process, &history, request, commit.revision).await.err());
        }
        *heard_to.lock().unwrap() = watcher.at();
    }
}

/// Whether who asks for the revision of a write sees it, or what came after it.
async fn sees(
    client: &mut RoleCacheServiceClient<Channel>,
    process: Process,
    history: &History,
    user_id: i64,
    role: &str,
    revision: i64,
) -> Option<String> {
    let request = GetRoleRequest { user_id, min_revision: revision, ..Default::default() };
    match ask(client, process, history, request, revision).await {
        // Nobody else writes this user.
        Ok(answer) if answer.role != role => Some(format!("user {user_id} was made {role} at {revision}: {answer:?}")),
        Ok(_) => None,
        Err(why) => Some(why),
    }
}

/// A read that is written down, and that has to show at least `revision`.
async fn ask(
    client: &mut RoleCacheServiceClient<Channel>,
    process: Process,
    history: &History,
    request: GetRoleRequest,
    revision: i64,
) -> Result<Answer, String> {
    let begun = history.now();
    let answer = client.get_role(request).await.map(|answer| Answer::from(answer.into_inner()));
    let answer = answer.map_err(|status| reason(&status));
    let (user, min_revision) = (request.user_id, request.min_revision);
    history.read(Read { user, process, begun, ended: history.now(), min_revision, answer: answer.clone() });
    let answer = answer?;
    match answer.revision < revision || answer.stale || answer.source != Source::Cache {
        true => Err(format!("user {user}: {revision} was told of before, {process:?} answers {answer:?}")),
        false => Ok(answer),
    }
}
