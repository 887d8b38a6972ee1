//! The parts of the writer that need no store: who goes with whom, and who may be tried again.

use std::collections::VecDeque;

use super::*;
use crate::{
    role::{Revision, RoleName, UserId},
    store::{Grant, Op, RequestId},
};

type Outcome = oneshot::Receiver<Result<Written, WriteFailure>>;

fn pending(op: Op) -> (Pending, Outcome) {
    let (answer, outcome) = oneshot::channel();
    let call = Call { actor: "anonymous".into(), grant: Grant::Any, request: None, op };
    let (decided, arrived) = (Arc::default(), Instant::now());
    (Pending { call, answer, decided, arrived, tried: false, in_doubt_since: None, behind_since: None }, outcome)
}

fn set(user: i64) -> (Pending, Outcome) {
    let (user, role) = (UserId(user), RoleName::held("admin"));
    pending(Op::Set { user, role, username: None, expected: None, reason: None })
}

fn transfer(from: i64, to: i64) -> (Pending, Outcome) {
    let (from, to) = (UserId(from), UserId(to));
    pending(Op::Transfer { from, to, mailbox: None, demote_from: true, to_username: None, reason: None })
}

fn in_doubt((mut pending, outcome): (Pending, Outcome)) -> (Pending, Outcome) {
    pending.call.request = Some(RequestId { id: "a".into(), hash: [0; 32] });
    pending.in_doubt_since = Some(Instant::now());
    (pending, outcome)
}

fn cause() -> Cause {
    Arc::new(std::io::Error::other("on purpose"))
}

/// The users of each group that is taken, one after the other, until nobody is left.
fn groups(calls: Vec<(Pending, Outcome)>) -> Vec<Vec<Vec<i64>>> {
    let (pendings, _outcomes): (VecDeque<_>, Vec<_>) = calls.into_iter().unzip();
    let mut line = Line(pendings);
    let mut groups = Vec::new();
    while !line.0.is_empty() {
        let group = line.take_group(&Taken::default());
        groups.push(group.iter().map(|pending| pending.call.users().map(|user| user.0).collect()).collect());
    }
    groups
}

#[test]
fn nobody_overtakes_a_call_that_waits_for_one_before_it() {
    let calls = vec![set(1), transfer(1, 2), set(2), set(3), set(2)];
    assert_eq!(groups(calls), [vec![vec![1], vec![3]], vec![vec![1, 2]], vec![vec![2]], vec![vec![2]]]);
}

#[test]
fn a_group_is_full_at_its_limit() {
    let sizes: Vec<usize> = groups((1..=GROUP as i64 + 1).map(set).collect()).iter().map(Vec::len).collect();
    assert_eq!(sizes, [GROUP, 1]);
}

#[test]
fn who_is_held_keeps_those_behind_back() {
    let (pendings, _outcomes): (VecDeque<_>, Vec<_>) = [set(1), set(2)].into_iter().unzip();
    let mut line = Line(pendings);
    let mut held = Taken::default();
    held.take(&set(1).0.call);
    let group = line.take_group(&held);
    assert_eq!(group.len(), 1);
    assert_eq!(group[0].call, set(2).0.call);
    assert_eq!(line.0.len(), 1);
}

#[test]
fn a_call_that_nobody_waits_for_is_not_sent_even_if_it_may_have_happened() {
    let ((unsent, gone), (doubted, gone_too), (wanted, _outcome)) = (set(1), in_doubt(set(2)), in_doubt(set(3)));
    drop((gone, gone_too));
    let mut line = Line([unsent, doubted, wanted].into());
    let group = line.take_group(&Taken::default());
    assert_eq!(group.len(), 1);
    assert_eq!(group[0].call.users().next(), Some(UserId(3)));
    assert!(line.0.is_empty());
}

#[test]
fn in_doubt_a_call_is_tried_again_and_never_told_that_nothing_happened() {
    for error in [
        WriteError::Unreachable(cause()),
        WriteError::Busy,
        WriteError::AllHeld,
        WriteError::Underway,
        WriteError::OutcomeUnknown(cause()),
    ] {
        let (call, mut outcome) = in_doubt(set(1));
        let call = call.settle(Err(error)).expect("it is tried again");
        assert!(outcome.try_recv().is_err());
        call.give_up(WriteFailure::UserBusy);
        assert!(matches!(outcome.try_recv(), Ok(Err(WriteFailure::OutcomeUnknown))));
    }
    let (call, mut outcome) = in_doubt(set(1));
    call.give_up(WriteFailure::Unreachable(cause()));
    assert!(matches!(outcome.try_recv(), Ok(Err(WriteFailure::OutcomeUnknown))));
    // Of the second attempt, while the first may still find another role.
    let refused = |refusal| Err(WriteError::Refused(refusal));
    let (call, mut outcome) = in_doubt(set(1));
    assert!(call.settle(refused(Refusal::RoleMismatch { current: RoleName::held("user") })).is_none());
    assert!(matches!(outcome.try_recv(), Ok(Err(WriteFailure::OutcomeUnknown))));
    // Whenever it arrives, the request id refuses it as well.
    let (call, mut outcome) = in_doubt(set(1));
    assert!(call.settle(refused(Refusal::RequestIdReused)).is_none());
    assert!(matches!(outcome.try_recv(), Ok(Err(WriteFailure::Refused(Refusal::RequestIdReused)))));
}

#[test]
fn a_retry_that_meets_its_first_attempt_is_in_doubt_from_then_on() {
    let (mut call, mut outcome) = set(1);
    call.call.request = Some(RequestId { id: "a".into(), hash: [0; 32] });
    let call = call.settle(Err(WriteError::Underway)).expect("it is tried again");
    assert!(outcome.try_recv().is_err());
    call.give_up(WriteFailure::Unreachable(cause()));
    assert!(matches!(outcome.try_recv(), Ok(Err(WriteFailure::OutcomeUnknown))));

    // Past it there is no doubt: it ended without effect, or its answer would have been found.
    let (mut call, mut outcome) = set(1);
    call.call.request = Some(RequestId { id: "a".into(), hash: [0; 32] });
    let call = call.settle(Err(WriteError::Underway)).expect("it is tried again");
    let refusal = Refusal::RoleMismatch { current: RoleName::held("user") };
    assert!(call.settle(Err(WriteError::Refused(refusal.clone()))).is_none());
    assert!(matches!(outcome.try_recv(), Ok(Err(WriteFailure::Refused(it))) if it == refusal));
}

#[test]
fn a_first_attempt_that_was_not_sent_is_not_tried_again() {
    let (call, mut outcome) = set(1);
    assert!(call.settle(Err(WriteError::Unreachable(cause()))).is_none());
    assert!(matches!(outcome.try_recv(), Ok(Err(WriteFailure::Unreachable(_)))));
    // Nor is one in doubt that nothing can be found out about.
    let (call, mut outcome) = set(1);
    assert!(call.settle(Err(WriteError::OutcomeUnknown(cause()))).is_none());
    assert!(matches!(outcome.try_recv(), Ok(Err(WriteFailure::OutcomeUnknown))));
}

#[test]
fn the_answer_of_the_store_reaches_the_caller() {
    let (call, mut outcome) = set(1);
    let written =
        Written { revision: Revision(7), tag: None, at: std::time::SystemTime::UNIX_EPOCH, changes: Vec::new() };
    assert!(call.settle(Ok(written.clone())).is_none());
    assert_eq!(outcome.try_recv().unwrap().unwrap(), written);
}

#[test]
fn who_has_no_turn_is_told_what_kept_it() {
    let told = |answered: Option<Duration>, held_up: Option<Duration>| {
        let ago = |time: Option<Duration>| time.map(|time| Instant::now() - time);
        let moved = Moved { answered: ago(answered), held_up: ago(held_up) };
        let (queue, _) = mpsc::channel(1);
        Writer { queue, step: crate::step::start().1, moved: Arc::new(Mutex::new(moved)) }.why_no_turn()
    };
    let (now, before) = (Some(Duration::ZERO), Some(Duration::from_secs(2)));
    assert!(matches!(told(None, None), WriteFailure::Unreachable(_)));
    assert!(matches!(told(before, before), WriteFailure::Unreachable(_)));
    assert!(matches!(told(now, before), WriteFailure::Overloaded));
    assert!(matches!(told(now, now), WriteFailure::UserBusy));
}
