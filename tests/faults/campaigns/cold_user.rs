//! One user whom nobody has asked for yet, asked for by thousands at once while the store is slow, or fails.

use std::{sync::Arc, time::Duration};

use futures::FutureExt;
use rolecache::proto::v1::{
    GetRoleRequest, StatsRequest, StatsResponse, role_cache_service_client::RoleCacheServiceClient,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tonic::transport::Channel;

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan, Replica, postgres},
    support::{postgres::Session, server::PATIENCE},
    traffic::{Load, ROLES, Traffic, reason},
};

/// Of all replicas together.
const CALLERS: usize = 5_000;

/// Of the short tier, only one round in so many has as many, or it would take longer than all others together; the rest have `FEW`.
const SHORT: u64 = 100;
const MANY_EVERY: u64 = 4;
const FEW: usize = 500;

/// One round in eight fails: of eight times so many one has to.
const ENOUGH: u64 = 10;

/// Connections of a replica's callers: each takes 256 of them.
const CONNECTIONS: usize = 16;

/// All of them are one caller, nameless. A self-check would be a query of its own.
const ALL_AT_ONCE: &[&str] = &["--max-calls-per-caller", "5000", "--self-check", "0s"];

/// Users whom no commit brings into memory: they were there before. The first of them are everybody's.
const USERS: i64 = 20_000;
const FIRST_COLD: i64 = 1_000;

/// Queries of a replica where they fail: the one that fails, and those of callers who come after that.
const MOST_WHERE_IT_FAILS: i64 = 3;

/// A statement waits for a lock for 2 s. All callers have to have come before.
const TO_COME: Duration = Duration::from_millis(1_800);

/// Sessions of ours.
const OPEN: &str =
    "coalesce(string_agg(pid::text, ','), '0') from pg_stat_activity where application_name = 'rolecache'";

/// Of them, those whose query waits for the lock.
const WAITING: &str = "select count(*) from pg_stat_activity
    where application_name = 'rolecache' and wait_event_type = 'Lock' and query like '%users%';";

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "cold-user",
        unit: "cold users",
        must_hold: "one query per replica, errors are not cached",
        short: SHORT,
        nightly: 1_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

/// What the callers of one replica were told.
#[derive(Default)]
struct Told {
    errors: Vec<String>,
    wrong: Vec<String>,
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let setup = Cluster::start(&url, Plan { replicas: 1, ..Plan::default() }).await;
    setup.shell.go(users()).await;
    drop(setup);
    let cluster =
        Arc::new(Cluster::start(&url, Plan { replicas: 2, args: ALL_AT_ONCE, proxied: true, ..Plan::default() }).await);
    // Users that are in memory: these reads are no queries.
    let load = Load { writers: 0, readers: 1, watchers: 1, excuses: checker::STORE_BROKEN, ..Load::default() };
    let mut traffic = Traffic::start(&cluster, load, &mut rounds.random);
    outcome.violated(cluster.check_caches(&traffic.users).await);
    let clients: Vec<Vec<_>> =
        cluster.replicas.iter().map(|replica| (0..CONNECTIONS).map(|_| replica.client()).collect()).collect();
    let (mut store, mut observer) = (Session::open(&url), Session::open(&url));
    let (mut failed, mut errors, mut many) = (0, 0, 0);
    let (mut queries, mut failing, mut came) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(round) = outcome.next_of(rounds.count) {
        let user = FIRST_COLD + round as i64;
        traffic.users.push(user);
        // One in eight: it is told when the lock has been waited for in vain.
        let fails = rounds.random.u8(..8) == 0;
        let is_long = rounds.count > SHORT;
        let callers = if is_long || round % MANY_EVERY == 0 { CALLERS } else { FEW };
        let each = callers / cluster.replicas.len();
        for replica in &cluster.replicas {
            replica.until_in_step().await;
        }
        let weak = traffic.run_up(20).await.err();
        let before = [stats(&cluster.replicas[0]).await, stats(&cluster.replicas[1]).await];
        // From now on the query of a fill does not come to its end; reads of the log do.
        store.run("begin; lock table users in access exclusive mode;");
        let begun = Instant::now();
        let asking: Vec<_> = clients.iter().map(|clients| ask_all(clients, user, each)).collect();
        let mut all_came = true;
        for (replica, before) in cluster.replicas.iter().zip(&before) {
            all_came &= until_all_wait(replica, before, each, begun + TO_COME).await;
        }
        came.push(begun.elapsed());
        let mut waiting = waiting_queries(&mut observer);
        while all_came && waiting < cluster.replicas.len() && begun.elapsed() < TO_COME {
            sleep(Duration::from_millis(5)).await;
            waiting = waiting_queries(&mut observer);
        }
        all_came &= waiting >= cluster.replicas.len();
        let open = observer.run(&format!("select {OPEN};"));
        if all_came && fails {
            cluster.replicas.iter().for_each(|replica| replica.proxy.as_ref().expect("it is proxied").cut());
        }
        let mut told = Vec::new();
        if fails && all_came {
            // Those who wait are told before the store is well again.
            for asking in asking {
                told.push(asking.await);
            }
            store.run("commit;");
            until_all_ended(&mut observer, &open).await;
        } else {
            store.run("commit;");
            for asking in asking {
                told.push(asking.await);
            }
        }
        if !all_came {
            outcome.weak.push(format!("user {user}: not all {callers} had come after {TO_COME:?}"));
            continue;
        }
        match weak {
            Some(weak) => outcome.weak.push(format!("user {user}: {weak}")),
            None if fails && told.iter().all(|told| told.errors.is_empty()) => {
                outcome.weak.push(format!("user {user}: nobody was told that it fails"));
            }
            None => outcome.fired += 1,
        }
        many += u64::from(callers == CALLERS);
        if waiting > cluster.replicas.len() {
            outcome.violated([format!("user {user}: {waiting} queries wait, failing: {fails}")]);
        }
        failed += u64::from(fails);
        for ((replica, before), told) in cluster.replicas.iter().zip(&before).zip(told) {
            let after = stats(replica).await;
            let asked = after.store_reads - before.store_reads;
            if fails { &mut failing } else { &mut queries }.push(asked);
            // Who comes back to its store may ask it for more, but not for each who waited.
            if asked != 1 && !(fails && asked <= MOST_WHERE_IT_FAILS) {
                outcome.violated([format!("user {user}: {asked} queries for {each} callers, failing: {fails}")]);
            }
            if !fails && !told.errors.is_empty() {
                outcome.violated([format!(
                    "user {user}: only slow, and {} were told {}",
                    told.errors.len(),
                    told.errors[0]
                )]);
            }
            outcome.violated(told.errors.iter().find(|error| *error != "STORE_UNREACHABLE").cloned());
            outcome.violated(told.wrong);
            errors += told.errors.len();
            // An error is not kept.
            replica.until_in_step().await;
            let next = replica.client().get_role(of(user)).await;
            match next {
                Ok(next) if next.get_ref().role == role(user) => {}
                next => outcome.violated([format!("user {user}: after the fault: {next:?}")]),
            }
        }
    }
    traffic.settle(&mut outcome).await;
    let is_enough = rounds.count >= 8 * ENOUGH;
    outcome.proves_nothing((is_enough && failed == 0).then(|| "the store failed for nobody".to_owned()));
    outcome.figure("failing", format!("{failed} of {} users, {errors} callers were told so", outcome.fired));
    outcome.figure("callers at once", format!("{CALLERS} for {many} users, {FEW} for the others"));
    let most = |queries: &[i64]| queries.iter().max().copied().unwrap_or(0);
    outcome.figure("queries of a replica", format!("{} at most, {} where they fail", most(&queries), most(&failing)));
    outcome.times("all callers had come after", came);
    outcome
}

fn users() -> String {
    let roles = ROLES.map(|role| format!("'{role}'")).join(", ");
    format!(
        "insert into users (user_id, role) select n, (array[{roles}])[1 + n % 3] from generate_series(1, {USERS}) n"
    )
}

fn role(user: i64) -> &'static str {
    ROLES[user as usize % 3]
}

fn of(user_id: i64) -> GetRoleRequest {
    GetRoleRequest { user_id, ..Default::default() }
}

async fn stats(replica: &Replica) -> StatsResponse {
    replica.client().stats(StatsRequest {}).await.expect("Stats").into_inner()
}

/// The callers of one replica, all on their way from here on.
fn ask_all(
    clients: &[RoleCacheServiceClient<Channel>],
    user: i64,
    callers: usize,
) -> impl Future<Output = Told> + use<> {
    let mut asking = JoinSet::new();
    for n in 0..callers {
        let mut client = clients[n % clients.len()].clone();
        asking.spawn(async move { client.get_role(of(user)).await });
    }
    async move {
        let mut told = Told::default();
        while let Some(answer) = asking.join_next().await {
            match answer.expect("a caller does not panic") {
                Ok(answer) if answer.get_ref().role == role(user) => {}
                Ok(answer) => told.wrong.push(format!("user {user}: {answer:?}")),
                Err(status) => told.errors.push(reason(&status)),
            }
        }
        told
    }
}

fn waiting_queries(observer: &mut Session) -> usize {
    observer.run(WAITING).parse().expect("a number")
}

/// Waits until nothing is left of the connections that were cut.
async fn until_all_ended(observer: &mut Session, open: &str) {
    let until = Instant::now() + PATIENCE;
    while observer.run(&format!("select {OPEN} and pid in ({open});")) != "0" {
        assert!(Instant::now() < until, "sessions should end with their connections: {open}");
        sleep(Duration::from_millis(2)).await;
    }
}

/// Whether all callers wait for the one fill in time.
async fn until_all_wait(replica: &Replica, before: &StatsResponse, callers: usize, until: Instant) -> bool {
    while Instant::now() < until {
        let now = stats(replica).await;
        if now.coalesced_misses - before.coalesced_misses == callers as i64 - 1 {
            return true;
        }
        sleep(Duration::from_millis(5)).await;
    }
    false
}
