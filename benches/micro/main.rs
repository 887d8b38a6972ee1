//! What the parts of a call cost that are ours: nanoseconds, without a network and without a store.
//!
//! `cargo bench --bench micro`; figures of one run compare with each other, and with no other machine's.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a bench")]

#[path = "../support/heart.rs"]
mod heart;

use std::{hint::black_box, sync::Arc, time::SystemTime};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use prost::Message;
use rolecache::{
    cache::{Mode, Query},
    feed::ring::{Lookup, Ring},
    proto::v1::{GetRoleResponse, Source, WatchRoleChangesResponse, watch_role_changes_response::Event},
    role::{Anchor, Change, Commit, Origin, Revision, Tag, UserId},
};
use tokio::runtime::Runtime;
use uuid::Uuid;

use self::heart::{Heart, role};

const USERS: u32 = 1_000;
const SIMPLE: Query = Query { min_revision: Revision(0), fully_consistent: false, deadline: None };

const MODES: [(&str, Mode); 3] = [
    ("lazy", Mode::Lazy { capacity: None }),
    ("bounded", Mode::Lazy { capacity: Some(10 * USERS as usize) }),
    ("complete", Mode::Complete),
];

fn commit(revision: i64, changes: u64) -> Commit {
    let change = |index: u64| Change {
        index,
        user: UserId(1 + (revision + index as i64) % i64::from(USERS)),
        old: Some(role(false)),
        new: Some(role(true)),
        username: None,
        origin: Origin::Rpc,
        actor: "bot".into(),
        reason: None,
        transfer: None,
    };
    Commit {
        revision: Revision(revision),
        tag: Tag(Uuid::from_u128(revision as u128)),
        at: SystemTime::UNIX_EPOCH,
        size: changes,
        changes: (0..changes).map(change).collect(),
    }
}

fn cache_hit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cache hit");
    for (name, mode) in MODES {
        let runtime = Runtime::new().unwrap();
        let heart = runtime.block_on(async {
            let heart = Heart::start(mode, USERS).await;
            for user in 1..=i64::from(USERS) {
                heart.cache.get(UserId(user), SIMPLE).await.unwrap();
            }
            heart
        });
        let mut user = 0;
        group.bench_function(name, |bencher| {
            bencher.to_async(&runtime).iter(|| {
                user = user % i64::from(USERS) + 1;
                heart.cache.get(UserId(user), SIMPLE)
            });
        });
        // Its tasks end inside the runtime that they are of.
        runtime.block_on(async { drop(heart) });
    }
}

fn apply(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply");
    for (name, mode) in MODES {
        let runtime = Runtime::new().unwrap();
        let heart = runtime.block_on(Heart::start(mode, USERS));
        for changes in [1, 1_000] {
            let commit = commit(1, changes);
            group.bench_function(BenchmarkId::new(name, changes), |bencher| {
                bencher.iter(|| heart.cache.apply(black_box(&commit)));
            });
        }
        runtime.block_on(async { drop(heart) });
    }
}

fn ring(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    let commits: Vec<_> = (1..=10_000).map(|revision| Arc::new(commit(revision, 1))).collect();
    let floor = Anchor { revision: Revision(0), tag: Tag(Uuid::nil()) };
    let filled = || {
        let mut ring = Ring::new(floor, 64 << 20);
        commits[..9_999].iter().for_each(|commit| ring.append(commit.clone()));
        ring
    };
    group.bench_function("append", |bencher| {
        let append = |mut ring: Ring| {
            ring.append(commits[9_999].clone());
            ring
        };
        bencher.iter_batched(filled, append, BatchSize::SmallInput);
    });
    let ring = filled();
    let mut at = floor;
    group.bench_function("read", |bencher| {
        bencher.iter(|| {
            at = match ring.after(at) {
                Lookup::Next(commit) => commit.anchor(),
                _ => floor,
            };
        });
    });
}

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    let answer = GetRoleResponse {
        role: "user".to_owned(),
        revision: 1_000_000,
        source: Source::Cache.into(),
        ..GetRoleResponse::default()
    };
    group.bench_function("an answer of GetRole", |bencher| bencher.iter(|| black_box(&answer).encode_to_vec()));
    let change = rolecache::proto::v1::RoleChange {
        revision: 1_000_000,
        user_id: 1_000_000_000,
        old_role: "user".to_owned(),
        new_role: "admin".to_owned(),
        actor: "bot".to_owned(),
        ..rolecache::proto::v1::RoleChange::default()
    };
    let commit = rolecache::proto::v1::Commit {
        revision: 1_000_000,
        changes: vec![change],
        resume_token: "a".repeat(70),
        ..rolecache::proto::v1::Commit::default()
    };
    let message = WatchRoleChangesResponse { event: Some(Event::Commit(commit)) };
    group.bench_function("a message of a watch", |bencher| bencher.iter(|| black_box(&message).encode_to_vec()));
}

criterion_group!(benches, cache_hit, apply, ring, encode);
criterion_main!(benches);
