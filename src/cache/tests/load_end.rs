//! The end of a load, beside commits and fills: nobody with the default role takes memory in a complete cache.

use std::{
    sync::{Arc, Barrier},
    time::Duration,
};

use super::truth::{DEFAULT, Truth, anchor, commit};
use crate::{
    cache::{Mode, Options, RoleCache, cache},
    role::Commit,
    step::{self, Stepper},
};

/// On two cores one round in 1,700 met the moment that matters (12 of these).
const ROUNDS: u64 = 20_000;
const USERS: i64 = 8;

fn complete() -> (Arc<RoleCache>, Stepper) {
    let (stepper, step) = step::start();
    stepper.begin_history();
    stepper.follow_from(anchor(0));
    let options =
        Options { mode: Mode::Complete, max_staleness: Duration::from_secs(60), fallback_reads: 1, oversized: 10_000 };
    let (cache, _filler) = cache(options, Arc::new(Truth::new()), step);
    (cache, stepper)
}

/// Takes the admin role from everybody.
fn demotion() -> Commit {
    commit(1, (1..=USERS).map(|user| (user, Some("admin"), Some(DEFAULT))))
}

#[test]
fn a_commit_beside_the_end_of_a_load_leaves_nobody_with_the_default_role() {
    let (cache, _stepper) = complete();
    let commit = demotion();
    let line = Barrier::new(2);
    let mut left_over = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                line.wait();
                for _ in 0..round % 200 {
                    std::hint::spin_loop();
                }
                cache.apply(&commit);
                line.wait();
            }
        });
        for round in 0..ROUNDS {
            cache.completeness.lose(|| cache.entries.clear());
            let before = cache.completeness.before_load();
            line.wait();
            for _ in 0..round % 170 {
                std::hint::spin_loop();
            }
            cache.end_load(before).unwrap();
            line.wait();
            // Told at the end: the other thread waits for every round.
            left_over += u64::from(cache.entries.len() > 0);
        }
    });
    assert_eq!(left_over, 0, "of {ROUNDS} rounds left somebody in the table");
}
