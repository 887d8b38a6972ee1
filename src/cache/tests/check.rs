//! The self-check: it finds each kind of difference, and starts the cache anew.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::truth::{State, Truth, anchor, commit, role_in};
use crate::{
    cache::{Mode, Options, RoleCache, cache},
    role::{Commit, RoleName, UserId},
    step::{self, Moment},
};

const LAZY: Mode = Mode::Lazy { capacity: None };
const PATIENCE: Duration = Duration::from_secs(20);

/// A cache in step with a store that has users 1 and 2 as admins and 3 as a moderator, who are all held.
async fn in_step(mode: Mode) -> (Arc<RoleCache>, Arc<Truth>) {
    let truth = Arc::new(Truth::new());
    truth.states.lock().unwrap().push(State::from([(1, "admin"), (2, "admin"), (3, "moderator")]));
    for gate in [&truth.may_read, &truth.may_arrive, &truth.chunk_may_arrive] {
        gate.add_permits(1_000);
    }
    let (stepper, step) = step::start();
    let options = Options { mode, max_staleness: Duration::from_secs(60), fallback_reads: 1, oversized: 10_000 };
    let (cache, _filler) = cache(options, truth.clone(), step);
    stepper.begin_history();
    stepper.follow_from(anchor(0));
    let commit = first_commit();
    cache.apply(&commit);
    stepper.advance(commit.anchor());
    // The tailer, to whom nothing happens any more.
    tokio::spawn(async move {
        loop {
            stepper.prove(Moment::now());
            stepper.nudged().await;
        }
    });
    if mode == Mode::Complete {
        cache.load().await.unwrap();
    }
    (cache, truth)
}

fn first_commit() -> Commit {
    commit(1, [(1, None, Some("admin")), (2, None, Some("admin")), (3, None, Some("moderator"))])
}

async fn check(cache: &Arc<RoleCache>) {
    timeout(PATIENCE, cache.check()).await.expect("a check ends").unwrap();
}

fn put(cache: &RoleCache, user: i64, role: &str) {
    cache.entries.insert(UserId(user), cache.names.intern(&RoleName::held(role)).unwrap());
}

#[tokio::test]
async fn a_cache_that_is_right_stays() {
    for mode in [LAZY, Mode::Complete] {
        let (cache, _truth) = in_step(mode).await;
        check(&cache).await;
        assert_eq!((cache.stats().mismatches, cache.entries.len()), (0, 3), "{mode:?}");
        assert!(cache.is_loaded());
        assert!(cache.marks.marks.is_empty());
        let stats = cache.stats();
        assert_eq!((stats.hits, stats.misses, stats.store_reads), (0, 0, 0), "{mode:?}");
    }
}

#[tokio::test]
async fn a_wrong_entry_is_found_and_the_cache_starts_anew() {
    for mode in [LAZY, Mode::Complete] {
        let (cache, _truth) = in_step(mode).await;
        put(&cache, 2, "user");
        check(&cache).await;
        assert_eq!((cache.stats().mismatches, cache.entries.len()), (1, 0), "{mode:?}");
        assert_eq!(cache.is_loaded(), mode == LAZY);
    }
}

#[tokio::test]
async fn a_complete_cache_is_found_to_lack_an_entry_and_to_have_one_too_many() {
    for spoil in [
        |cache: &RoleCache| cache.entries.remove(UserId(1)),
        |cache: &RoleCache| cache.entries.remove(UserId(3)),
        |cache: &RoleCache| put(cache, 0, "admin"),
        |cache: &RoleCache| put(cache, 9, "admin"),
    ] {
        let (cache, truth) = in_step(Mode::Complete).await;
        spoil(&cache);
        check(&cache).await;
        assert_eq!((cache.stats().mismatches, cache.entries.len()), (1, 0));
        // Until it is loaded again, it says nothing.
        assert!(cache.look(UserId(1)).is_none());
        cache.load().await.unwrap();
        let (_, state) = truth.newest();
        for user in 0..10 {
            assert_eq!(cache.look(UserId(user)).unwrap().as_str(), role_in(&state, user));
        }
        check(&cache).await;
        assert_eq!(cache.stats().mismatches, 1);
    }
}

#[tokio::test]
async fn it_goes_on_by_itself() {
    let (cache, _truth) = in_step(LAZY).await;
    put(&cache, 1, "user");
    let checking = tokio::spawn(cache.clone().keep_checked(Duration::from_millis(20)));
    let found = async {
        while cache.stats().mismatches == 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, found).await.expect("the difference is found");
    checking.abort();
}
