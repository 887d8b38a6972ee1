//! A call from when it is handed over until somebody knows what became of it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{sync::oneshot, time::Instant};

use super::{BUSY_LIMIT, CONFIRM_LIMIT, WriteFailure};
use crate::store::{Call, Refusal, WriteError, Written};

/// A call on its way.
pub(super) struct Pending {
    pub(super) call: Call,
    pub(super) answer: oneshot::Sender<Result<Written, WriteFailure>>,
    /// Whether somebody has decided what becomes of it: the task that begins it, or the caller who gives up before.
    pub(super) decided: Arc<AtomicBool>,
    /// From then on it is tried again only for so long.
    pub(super) arrived: Instant,
    /// Whether it was in a group before.
    pub(super) tried: bool,
    /// When the answer of an attempt was lost, so that no later one can prove that nothing happened.
    pub(super) in_doubt_since: Option<Instant>,
    /// When somebody else's attempt with the same request id was found at it. Whoever gets past it later knows how it ended.
    pub(super) behind_since: Option<Instant>,
}

impl Pending {
    /// Nobody waits for it any more. One that is in doubt is not sent again either: that finds out for its caller what became of
    /// it, and may do it after all, later than what somebody else has done since. Who comes back with its request id finds out as well.
    pub(super) fn is_abandoned(&self) -> bool {
        self.answer.is_closed()
    }

    /// Whether it is still wanted; from then on its caller cannot withdraw it.
    pub(super) fn begin(&self) -> bool {
        self.tried || !self.decided.swap(true, Ordering::SeqCst)
    }

    /// Answers, or comes back to be tried again.
    pub(super) fn settle(mut self, outcome: Result<Written, WriteError>) -> Option<Self> {
        if !matches!(outcome, Err(WriteError::Underway | WriteError::Unreachable(_) | WriteError::OutcomeUnknown(_))) {
            self.behind_since = None;
        }
        let failure = match outcome {
            Ok(written) => {
                // Who does not wait any more is not told.
                let _ = self.answer.send(Ok(written));
                return None;
            }
            Err(WriteError::Refused(refusal)) => WriteFailure::Refused(refusal),
            Err(WriteError::Broken(cause)) => WriteFailure::Broken(cause),
            // To ask again finds out no more.
            Err(WriteError::Forgotten) => WriteFailure::OutcomeUnknown,
            Err(WriteError::Busy | WriteError::AllHeld) if self.may_try_again() => return Some(self),
            Err(WriteError::Busy | WriteError::AllHeld) => WriteFailure::UserBusy,
            Err(WriteError::Unreachable(_)) if self.is_in_doubt() && self.may_try_again() => {
                return Some(self);
            }
            Err(WriteError::Unreachable(cause)) => WriteFailure::Unreachable(cause),
            Err(WriteError::Underway) => {
                self.behind_since.get_or_insert_with(Instant::now);
                if self.may_try_again() {
                    return Some(self);
                }
                WriteFailure::OutcomeUnknown
            }
            Err(WriteError::OutcomeUnknown(cause)) => {
                tracing::warn!(%cause, "a commit was not confirmed");
                self.in_doubt_since.get_or_insert_with(Instant::now);
                // The request id finds out: a second attempt waits for the first one and gets its answer.
                if self.call.request.is_some() && self.may_try_again() {
                    return Some(self);
                }
                WriteFailure::OutcomeUnknown
            }
        };
        self.give_up(failure);
        None
    }

    pub(super) fn is_in_doubt(&self) -> bool {
        self.in_doubt_since.is_some() || self.behind_since.is_some()
    }

    pub(super) fn may_try_again(&self) -> bool {
        // In doubt it counts from the doubt: to find a connection silent may take longer than the limit.
        match self.in_doubt_since.or(self.behind_since) {
            Some(doubt) => doubt.elapsed() < CONFIRM_LIMIT,
            None => self.arrived.elapsed() < BUSY_LIMIT,
        }
    }

    pub(super) fn give_up(self, failure: WriteFailure) {
        use WriteFailure::{OutcomeUnknown, Overloaded, Refused, Unreachable, UserBusy};
        // What a later attempt is told holds for the one in doubt too only where the request id itself refuses both: what it
        // depends on otherwise may change before that one arrives.
        let nothing_happened = match &failure {
            Refused(refusal) => *refusal != Refusal::RequestIdReused,
            UserBusy | Unreachable(_) | Overloaded => true,
            OutcomeUnknown | WriteFailure::Broken(_) => false,
        };
        let failure = if self.is_in_doubt() && nothing_happened { OutcomeUnknown } else { failure };
        let _ = self.answer.send(Err(failure));
    }
}
