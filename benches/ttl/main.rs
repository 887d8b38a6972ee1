//! The cache beside what it replaces, an in-process cache with a TTL: the same day of requests and changes for both, on a clock that
//! is simulated. Prints what came of each day, as JSON; `scripts/compare-ttl` makes a document of it.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a bench")]

#[path = "../support/heart.rs"]
mod heart;
mod ours;
mod trace;
mod ttl;

use serde::Serialize;

use self::{ours::Ours, trace::Trace, ttl::TtlCache};

/// What a cache did in a day.
#[derive(Serialize, Default, Clone, Copy)]
pub struct Day {
    hits: u64,
    /// Reads of users from the store.
    store_reads: u64,
    /// Answers that were not the truth of their moment.
    stale: u64,
    /// For how long at most, in seconds.
    stale_for: f64,
    /// Entries that were looked at because time had passed.
    swept: u64,
    /// Entries at the end of the day.
    entries: u64,
}

#[derive(Serialize)]
struct Row {
    trace: Trace,
    ttl: Day,
    lazy: Day,
    complete: Day,
}

#[tokio::main]
async fn main() {
    let mut rows = Vec::new();
    for trace in trace::all() {
        let events = trace.events();
        let mut ttl = TtlCache::default();
        let ttl = events.iter().fold(&mut ttl, |ttl, event| ttl.on(event)).day();
        let mut days = [Day::default(); 2];
        for (day, mode) in days.iter_mut().zip(ours::MODES) {
            let mut ours = Ours::start(mode, trace.users).await;
            for event in &events {
                ours.on(event).await;
            }
            *day = ours.day();
        }
        let [lazy, complete] = days;
        rows.push(Row { trace, ttl, lazy, complete });
    }
    println!("{}", serde_json::to_string_pretty(&rows).unwrap());
}
