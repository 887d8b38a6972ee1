//! Fills beside commits in very many orders: `shuttle` decides who comes next at every lock, number and table.
//!
//! `ROLECACHE_SCHEDULES` says how many, `ROLECACHE_SEED` which. The same races on whole servers, staged with gates, are in
//! `tests/service/races.rs`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use shuttle::{
    future::{block_on, spawn, yield_now},
    scheduler::{PctScheduler, RandomScheduler, Scheduler},
};

use super::truth::{DEFAULT, State, Truth, anchor, commit, role_in};
use crate::{
    cache::{Answer, Filler, Mode, Options, Query, RoleCache, cache},
    role::{Revision, UserId},
    step::{self, Moment, Stepper},
};

const USERS: i64 = 2;
const COMMITS: usize = 3;
const READERS: usize = 2;
const READS: usize = 2;

/// Of each mode, and of each of two ways to choose an order, without the variable.
const SCHEDULES: u64 = 2_000;

/// Preemptions that PCT looks for.
const DEPTH: usize = 3;

/// Commits, each applied some time after it is in the store.
async fn commit_and_apply(truth: Arc<Truth>, cache: Arc<RoleCache>, stepper: Stepper) {
    const ROLES: [&str; 3] = ["admin", DEFAULT, "owner"];
    for revision in 1..=COMMITS {
        let before: State = truth.newest().1;
        let user = 1 + (revision as i64 / 2) % USERS;
        let role = ROLES[revision % 3];
        let mut after = before.clone();
        after.insert(user, role);
        let commit = commit(revision, [(user, Some(role_in(&before, user)), Some(role))]);
        truth.states.lock().unwrap().push(after);
        yield_now().await;
        cache.apply(&commit);
        yield_now().await;
        stepper.advance(commit.anchor());
        yield_now().await;
    }
}

/// The real fills, without the tasks of the real filler.
async fn fill(mut filler: Filler) {
    while let Some(next) = filler.queue.recv().await {
        filler.cache.fill(vec![next]).await;
    }
}

async fn read(truth: Arc<Truth>, cache: Arc<RoleCache>, first: i64) {
    let mut newest = Revision(0);
    for n in 0..READS as i64 {
        let user = 1 + (first + n) % USERS;
        let query = Query { min_revision: Revision(0), fully_consistent: false, deadline: None };
        let answer = cache.get(UserId(user), query).await.expect("the store is well");
        assert!(answer.revision >= newest, "it went back behind {newest}: {answer:?}");
        newest = answer.revision;
        was_true(&truth, user, &answer);
    }
}

/// The role that the user had at the answer's revision or at a later one.
fn was_true(truth: &Truth, user: i64, answer: &Answer) {
    let states = truth.states.lock().unwrap();
    let since = &states[answer.revision.0 as usize..];
    let ever = since.iter().any(|state| role_in(state, user) == answer.role.as_str());
    assert!(ever, "user {user} never had this role from then on: {answer:?}: {states:?}");
}

/// One schedule: two readers, one who commits, and in the end nothing old in the table.
fn schedule(mode: Mode) {
    let truth = Arc::new(Truth::new());
    for gate in [&truth.may_read, &truth.may_arrive, &*truth.chunk_may_arrive] {
        gate.add_permits(1_000);
    }
    truth.states.lock().unwrap()[0].insert(2, "admin");
    let (stepper, step) = step::start();
    stepper.begin_history();
    stepper.follow_from(anchor(0));
    stepper.prove(Moment::now());
    let options = Options { mode, max_staleness: Duration::from_secs(60), fallback_reads: 10, oversized: 10_000 };
    let (cache, filler) = cache(options, truth.clone(), step);
    block_on(async move {
        let committing = spawn(commit_and_apply(truth.clone(), cache.clone(), stepper));
        spawn(fill(filler));
        let loading = (mode == Mode::Complete).then(|| {
            let cache = cache.clone();
            spawn(async move { cache.load().await })
        });
        let readers: Vec<_> = (0..READERS).map(|n| spawn(read(truth.clone(), cache.clone(), n as i64))).collect();
        for reader in readers {
            reader.await.unwrap();
        }
        committing.await.unwrap();
        if let Some(loading) = loading {
            loading.await.unwrap().expect("the load ends");
        }
        let (_, newest) = truth.newest();
        for user in 1..=USERS {
            let due = role_in(&newest, user);
            let held = cache.entries.get(UserId(user)).map(|id| cache.names.name(id));
            match held {
                Some(held) => assert_eq!(held.as_str(), due, "a stale fill of user {user}"),
                None if mode == Mode::Complete => assert_eq!(due, DEFAULT, "user {user} is not in a complete cache"),
                None => {}
            }
        }
    });
}

/// Runs as many as are asked for, and says after how many one failed.
fn explore(mode: Mode) {
    let told = |name| std::env::var(name).map(|value| value.parse::<u64>().unwrap());
    let count = told("ROLECACHE_SCHEDULES").unwrap_or(SCHEDULES);
    let seed = told("ROLECACHE_SEED").unwrap_or(1);
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    let by_chance = || Box::new(RandomScheduler::new_from_seed(seed, count as usize)) as Box<dyn Scheduler + Send>;
    let by_depth = || Box::new(PctScheduler::new_from_seed(seed, DEPTH, count as usize)) as Box<dyn Scheduler + Send>;
    for (way, scheduler) in [("random", by_chance()), ("pct", by_depth())] {
        let tried = Arc::new(AtomicU64::new(0));
        let counting = tried.clone();
        let runner = shuttle::Runner::new(scheduler, shuttle::Config::default());
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            runner.run(move || {
                counting.fetch_add(1, Ordering::Relaxed);
                schedule(mode);
            })
        }));
        let tried = tried.load(Ordering::Relaxed);
        println!("{mode:?}, {way}: {tried} schedules");
        assert!(ran.is_ok(), "{mode:?}, {way}: schedule {tried} of {count}, seed {seed}, breaks a promise");
    }
}

#[test]
fn no_fill_is_stale_in_a_lazy_cache() {
    explore(Mode::Lazy { capacity: None });
}

#[test]
fn no_fill_is_stale_in_a_bounded_cache() {
    explore(Mode::Lazy { capacity: Some(1) });
}

#[test]
fn no_fill_is_stale_in_a_complete_cache() {
    explore(Mode::Complete);
}
