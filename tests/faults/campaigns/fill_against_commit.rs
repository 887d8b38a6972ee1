//! Fills beside commits, in very many orders: the cache's own test under `shuttle` (`src/cache/tests/schedules.rs`).
//!
//! The same races on whole servers, each step held by a gate, are in `tests/service/races.rs`.

use std::process::Command;

use futures::FutureExt;

use crate::campaign::{Campaign, Outcome, Rounds};

/// Lazy, bounded and complete caches; by chance, and by few preemptions.
const WAYS: u64 = 6;

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "fill-against-commit",
        unit: "schedules",
        must_hold: "no stale fill",
        short: 12_000,
        nightly: 200_000,
        body: |rounds| async { tokio::task::spawn_blocking(|| run(rounds)).await.unwrap() }.boxed(),
    }]
}

/// Another build: every lock and number of the cache is shuttle's in it.
fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    // A bug that is asked for has to be in it.
    let features = if std::env::var_os("FAILPOINTS").is_some() { "shuttle,failpoints" } else { "shuttle" };
    let ran = Command::new(env!("CARGO"))
        .args(["test", "--locked", "--lib", "--features", features])
        // As this one was built.
        .args((!cfg!(debug_assertions)).then_some("--release"))
        .args(["--", "cache::tests::schedules", "--nocapture"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("ROLECACHE_SCHEDULES", rounds.count.div_ceil(WAYS).to_string())
        .env("ROLECACHE_SEED", rounds.random.u32(..).to_string())
        .output()
        .unwrap();
    let (printed, errors) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    let counted = |line: &str| line.strip_suffix(" schedules")?.rsplit(' ').next()?.parse::<u64>().ok();
    outcome.fired = printed.lines().filter_map(counted).sum::<u64>().min(rounds.count);
    let broken = errors.lines().chain(printed.lines()).filter(|line| line.contains("breaks a promise"));
    outcome.violated(broken.map(str::to_owned));
    if !ran.status.success() && outcome.violations.is_empty() {
        outcome.violated([format!("it did not run: {errors}")]);
    }
    outcome
}
