//! Several replicas start at the same moment on a database that has nothing in it.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, future::join_all};
use rolecache::proto::v1::SetRoleRequest;

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    cluster::{Cluster, Plan},
    support::{
        postgres::{Postgres, Session},
        server::PATIENCE,
    },
    traffic,
};

/// The lock of whoever migrates.
const HOLD: &str = "begin; select pg_advisory_xact_lock(7237966, 3);";
const WAITING: &str = "select count(*) from pg_stat_activity
    where application_name = 'rolecache' and wait_event_type = 'Lock' and wait_event = 'advisory';";

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "starting-together",
        unit: "starts",
        must_hold: "one migration, all serve",
        short: 3,
        nightly: 50,
        body: |rounds| run(rounds).boxed(),
    }]
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let postgres = Arc::new(tokio::task::spawn_blocking(Postgres::start_own).await.unwrap());
    while let Some(round) = outcome.next_of(rounds.count) {
        let url = postgres.fresh_database().await.url;
        let replicas = rounds.random.usize(3..6);
        let cluster = Cluster::planned(&url, Plan { replicas, ..Plan::default() }).await;
        let all = url.clone();
        let mut hold = tokio::task::spawn_blocking(move || Hold::begin(&all)).await.unwrap();
        let met = tokio::task::spawn_blocking(move || hold.until_all_wait(replicas));
        join_all(cluster.replicas.iter().map(|replica| replica.start())).await;
        let met = met.await.expect("holding the lock does not panic");
        let created = cluster.replicas.iter().filter(|replica| replica.logged("created users")).count();
        let books = cluster.shell.go("select version, success from rolecache.migrations").await;
        if created != 1 || books != "1|t" {
            outcome.violated([format!("start {round}: {created} of {replicas} migrated, the books say {books:?}")]);
        }
        outcome.violated(serve(&cluster, round).await);
        match met {
            true => outcome.fired += 1,
            false => outcome.weak.push(format!("start {round}: not all {replicas} came to the migration at once")),
        }
    }
    outcome
}

/// Holds all of them up where they migrate.
struct Hold {
    holder: Session,
    observer: Session,
}

impl Hold {
    fn begin(url: &str) -> Self {
        let (mut holder, observer) = (Session::open(url), Session::open(url));
        holder.run(HOLD);
        Self { holder, observer }
    }

    /// Lets them go on when they are all there; whether they came.
    fn until_all_wait(&mut self, replicas: usize) -> bool {
        let until = Instant::now() + PATIENCE / 2;
        let all_wait = loop {
            let waiting: usize = self.observer.run(WAITING).parse().expect("a number");
            if waiting == replicas || Instant::now() > until {
                break waiting == replicas;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        self.holder.run("rollback;");
        all_wait
    }
}

/// Each takes a write, and answers all of them.
async fn serve(cluster: &Cluster, round: u64) -> Vec<String> {
    let mut found = Vec::new();
    for (replica, user_id) in cluster.replicas.iter().zip(1..) {
        let request = SetRoleRequest { user_id, role: "admin".into(), ..Default::default() };
        if let Err(status) = replica.client().set_role(request).await {
            found.push(format!("start {round}: replica {} refuses: {}", replica.number, traffic::reason(&status)));
        }
    }
    let users: Vec<i64> = (1..=cluster.replicas.len() as i64).collect();
    found.extend(cluster.check_caches(&users).await);
    let stats = join_all(cluster.replicas.iter().map(|replica| replica.stats())).await;
    let stores: BTreeSet<String> = stats.into_iter().map(|stats| stats.store_id).collect();
    if stores.len() != 1 {
        found.push(format!("start {round}: they serve several stores: {stores:?}"));
    }
    found
}
