//! The one server of an SQLite file dies while writes are on their way.

use std::sync::Arc;

use futures::FutureExt;

use super::server_killed;
use crate::{
    campaign::{Campaign, Outcome, Rounds},
    cluster::{Cluster, Plan},
};

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "sqlite-killed",
        unit: "kills",
        must_hold: "no acknowledged write lost, none doubled; the file opens again",
        short: 10,
        nightly: 200,
        body: |rounds| run(rounds).boxed(),
    }]
}

async fn run(rounds: Rounds) -> Outcome {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bot.db");
    let url = format!("sqlite://{}", file.display());
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 1, ..Plan::default() }).await);
    let mut outcome = server_killed::kill(rounds, &cluster).await;
    let shell = cluster.shell.clone();
    let check = shell.go("pragma integrity_check").await;
    if check != "ok" {
        outcome.violated([format!("the file is broken: {check}")]);
    }
    outcome
}
