//! The floor: how far the cache has to be before it may answer again, after the store has answered ahead of it.

use crate::{
    role::Revision,
    step::{History, Standing},
    sync::{AtomicBool, Mutex, Ordering, PoisonError},
};

#[derive(Default)]
pub(super) struct Floor {
    /// Whether there may be one: nearly never, so that reads pay for a look at this only.
    is_raised: AtomicBool,
    /// The newest revision that an answer has told of before it was applied, in the history that it is of.
    at: Mutex<Option<(History, Revision)>>,
}

impl Floor {
    /// An answer as of `revision` goes out.
    pub(super) fn raise(&self, history: History, revision: Revision) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        *at = match *at {
            Some((of, _)) if of > history => return,
            Some((of, floor)) if of == history => Some((of, floor.max(revision))),
            _ => Some((history, revision)),
        };
        self.is_raised.store(true, Ordering::SeqCst);
    }

    /// Whether nobody has been told of more than `standing`.
    pub(super) fn is_under(&self, standing: &Standing) -> bool {
        if !self.is_raised.load(Ordering::SeqCst) {
            return true;
        }
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        match *at {
            Some((of, floor)) if of == standing.history && floor > standing.applied => false,
            // Of a later history than this look at things: that look is not to be answered from.
            Some((of, _)) if of > standing.history => false,
            _ => {
                *at = None;
                self.is_raised.store(false, Ordering::SeqCst);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_holds_until_it_is_reached_and_only_in_its_history() {
        let (stepper, step) = crate::step::start();
        let anchor =
            |revision| crate::role::Anchor { revision: Revision(revision), tag: crate::role::Tag(uuid::Uuid::nil()) };
        stepper.begin_history();
        stepper.follow_from(anchor(1));
        let floor = Floor::default();
        assert!(floor.is_under(&step.standing()));
        floor.raise(step.history(), Revision(3));
        floor.raise(step.history(), Revision(2));
        stepper.advance(anchor(2));
        assert!(!floor.is_under(&step.standing()));
        stepper.advance(anchor(3));
        assert!(floor.is_under(&step.standing()));
        floor.raise(step.history(), Revision(9));
        let of_before = step.history();
        stepper.begin_history();
        stepper.follow_from(anchor(1));
        assert!(floor.is_under(&step.standing()));
        floor.raise(step.history(), Revision(2));
        floor.raise(of_before, Revision(9));
        stepper.advance(anchor(2));
        assert!(floor.is_under(&step.standing()));
    }
}
