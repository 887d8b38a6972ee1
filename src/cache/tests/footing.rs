//! Reads while nothing is proven: what may answer them, and what may not any more.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    task::{JoinHandle, yield_now},
    time::{sleep, timeout},
};

use super::truth::{State, Truth, anchor, commit};
use crate::{
    cache::{Answer, Mode, Options, Query, ReadError, RoleCache, cache},
    role::{Revision, RoleName, UserId},
    step::{self, FeedState, Moment, PROOF_HOLDS, Stepper},
};

const PATIENCE: Duration = Duration::from_secs(20);

/// A cache that has applied everything up to `revision`, and of which that was proven too long ago.
fn unproven(truth: &Arc<Truth>, revision: usize) -> (Arc<RoleCache>, Stepper) {
    let (stepper, step) = step::start();
    let max_staleness = Duration::from_secs(60);
    let options = Options { mode: Mode::Lazy { capacity: None }, max_staleness, fallback_reads: 10, oversized: 10_000 };
    let (cache, filler) = cache(options, truth.clone(), step);
    tokio::spawn(filler.run());
    stepper.begin_history();
    stepper.follow_from(anchor(revision));
    stepper.prove(Moment::now().before(2 * PROOF_HOLDS));
    (cache, stepper)
}

fn begin_get(cache: &Arc<RoleCache>, min_revision: i64) -> JoinHandle<Result<Answer, ReadError>> {
    let cache = cache.clone();
    let query = Query { min_revision: Revision(min_revision), fully_consistent: false, deadline: None };
    tokio::spawn(async move { cache.get(UserId(7), query).await })
}

async fn until(happened: impl Fn() -> bool) {
    let wait = async {
        while !happened() {
            yield_now().await;
        }
    };
    timeout(PATIENCE, wait).await.expect("it should happen in time");
}

#[tokio::test]
async fn a_revision_that_the_store_lost_while_a_proof_was_waited_for_is_unknown() {
    let truth = Arc::new(Truth::new());
    let (cache, stepper) = unproven(&truth, 100);
    truth.may_read.add_permits(10);
    truth.may_arrive.add_permits(10);
    let read = begin_get(&cache, 100);
    // It has found 100 to be applied, and asked for a proof.
    timeout(PATIENCE, stepper.nudged()).await.expect("it asks for a proof");
    stepper.begin_history();
    stepper.follow_from(anchor(50));
    until(|| {
        stepper.prove(Moment::now());
        read.is_finished()
    })
    .await;
    let answer = read.await.unwrap();
    assert!(matches!(answer, Err(ReadError::UnknownRevision { requested: Revision(100), .. })), "{answer:?}");
}

#[tokio::test]
async fn a_read_of_the_store_does_not_join_a_query_from_before_it() {
    let truth = Arc::new(Truth::new());
    truth.states.lock().unwrap().push(State::from([(7, "admin")]));
    let (cache, stepper) = unproven(&truth, 1);
    stepper.set_feed(FeedState::CatchingUp);
    truth.may_read.add_permits(1);
    let early = begin_get(&cache, 0);
    until(|| truth.may_read.available_permits() == 0).await;
    // It has read "admin", and that is over before the next one asks.
    truth.states.lock().unwrap().push(State::new());
    let late = begin_get(&cache, 0);
    until(|| cache.stats().misses == 2).await;
    truth.may_arrive.add_permits(1);
    assert_eq!(early.await.unwrap().unwrap().role.as_str(), "admin");
    truth.may_read.add_permits(1);
    truth.may_arrive.add_permits(1);
    assert_eq!(late.await.unwrap().unwrap().role.as_str(), "user");
}

#[tokio::test]
async fn what_was_in_memory_is_looked_at_again_where_its_proof_ran_out_meanwhile() {
    let truth = Arc::new(Truth::new());
    truth.states.lock().unwrap().push(State::from([(7, "admin")]));
    let (cache, stepper) = unproven(&truth, 1);
    let step = stepper.reader();
    stepper.prove(Moment::now());
    truth.may_read.add_permits(1);
    truth.may_arrive.add_permits(1);
    assert_eq!(begin_get(&cache, 0).await.unwrap().unwrap().role.as_str(), "admin");
    // It holds for a little longer, and the query takes more than that.
    stepper.prove(Moment::now().before(PROOF_HOLDS - Duration::from_millis(200)));
    truth.may_read.add_permits(1);
    let both = tokio::spawn({
        let cache = cache.clone();
        let query = Query { min_revision: Revision(0), fully_consistent: false, deadline: None };
        async move { cache.get_many(&[UserId(7), UserId(8)], query).await }
    });
    until(|| truth.may_read.available_permits() == 0).await;
    until(|| !step.standing().is_proven()).await;
    truth.states.lock().unwrap().push(State::new());
    cache.apply(&commit(2, [(7, Some("admin"), Some("user"))]));
    stepper.advance(anchor(2));
    stepper.prove(Moment::now());
    truth.may_read.add_permits(1);
    truth.may_arrive.add_permits(2);
    until(|| both.is_finished()).await;
    let answers = both.await.unwrap().unwrap();
    assert_eq!(answers.roles.iter().map(RoleName::as_str).collect::<Vec<_>>(), ["user", "user"]);
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses), (1, 2), "each is counted once");
}

/// Of a primary that is gone: the one that is followed has others in its place, and went on from what both have.
#[tokio::test]
async fn a_role_of_a_commit_that_never_was_is_read_again() {
    for applied_in_time in [true, false] {
        let truth = Arc::new(Truth::new());
        truth.states.lock().unwrap().push(State::from([(7, "admin")]));
        let (cache, stepper) = unproven(&truth, 1);
        stepper.prove(Moment::now());
        truth.states.lock().unwrap().push(State::from([(7, "owner")]));
        truth.is_another.store(true, Ordering::SeqCst);
        truth.may_read.add_permits(1);
        let read = begin_get(&cache, 0);
        until(|| truth.may_read.available_permits() == 0).await;
        truth.is_another.store(false, Ordering::SeqCst);
        truth.states.lock().unwrap().splice(2.., [State::from([(7, "admin")]), State::from([(7, "admin")])]);
        let go_on = || {
            cache.apply(&commit(2, [(8, None, Some("user"))]));
            stepper.advance(anchor(2));
            stepper.advance(anchor(3));
        };
        if applied_in_time {
            go_on();
            truth.may_arrive.add_permits(1);
        } else {
            // It is answered, though not kept, once the cache is as far.
            truth.may_arrive.add_permits(1);
            until(|| cache.stats().store_reads == 1 && truth.may_arrive.available_permits() == 0).await;
            sleep(Duration::from_millis(1_200)).await;
            go_on();
        }
        truth.may_read.add_permits(1);
        truth.may_arrive.add_permits(1);
        until(|| {
            stepper.find(Moment::now());
            stepper.prove(Moment::now());
            read.is_finished()
        })
        .await;
        let answer = read.await.unwrap().unwrap();
        assert_eq!(answer.role.as_str(), "admin", "in time: {applied_in_time}");
        assert_eq!(cache.look(UserId(7)).unwrap().as_str(), "admin");
    }
}
