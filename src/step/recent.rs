//! Which commits were applied last, by their tags.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::role::Anchor;

/// More than one page of the log can have, which is applied without a pause.
const KEPT: usize = 16_384;

/// Of the history that is followed, in order of revision. Never held across an await.
#[derive(Default)]
pub(super) struct Recent(Mutex<VecDeque<Anchor>>);

impl Recent {
    pub(super) fn begin(&self, anchor: Anchor) {
        *self.anchors() = VecDeque::from([anchor]);
    }

    pub(super) fn push(&self, anchor: Anchor) {
        let mut anchors = self.anchors();
        if anchors.len() == KEPT {
            anchors.pop_front();
        }
        anchors.push_back(anchor);
    }

    /// Whether this very commit was applied; None where that was too long ago, or is yet to come.
    pub(super) fn has(&self, seen: Anchor) -> Option<bool> {
        let anchors = self.anchors();
        match anchors.binary_search_by_key(&seen.revision, |anchor| anchor.revision) {
            Ok(at) => Some(anchors[at] == seen),
            // Between two that follow each other there is none.
            Err(at) => (0 < at && at < anchors.len()).then_some(false),
        }
    }

    fn anchors(&self) -> MutexGuard<'_, VecDeque<Anchor>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
