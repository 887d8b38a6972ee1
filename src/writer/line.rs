//! Which calls may be committed together.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use super::{GROUP, Pending, WriteFailure};
use crate::{
    role::{MailboxId, UserId},
    store::Call,
};

/// Calls in the order in which they came, out of which groups are taken.
#[derive(Default)]
pub(super) struct Line(pub(super) VecDeque<Pending>);

/// What calls touch.
#[derive(Clone, Default)]
pub(super) struct Taken {
    users: HashSet<UserId>,
    mailboxes: HashSet<MailboxId>,
    requests: HashSet<(Arc<str>, Box<str>)>,
}

// === impl Line ===

impl Line {
    /// The first calls that touch nothing in common, and nothing of `held`.
    pub(super) fn take_group(&mut self, held: &Taken) -> Vec<Pending> {
        let mut group = Vec::new();
        let mut rest = VecDeque::new();
        let mut taken = held.clone();
        while let Some(pending) = self.0.pop_front() {
            if pending.is_abandoned() {
                continue;
            }
            if group.len() < GROUP && taken.take(&pending.call) {
                if pending.begin() {
                    group.push(pending);
                }
            } else {
                rest.push_back(pending);
            }
        }
        self.0 = rest;
        group
    }

    /// Answers those whose time is up.
    pub(super) fn end_overdue(&mut self) {
        let (waiting, overdue) = self.0.drain(..).partition(Pending::may_try_again);
        self.0 = waiting;
        let overdue: VecDeque<Pending> = overdue;
        overdue.into_iter().for_each(|pending| pending.give_up(WriteFailure::UserBusy));
    }
}

// === impl Taken ===

impl Taken {
    /// Whether `call` touches nothing that was taken before. What it touches is taken in any case: a third call must
    /// not overtake a second one that has to wait.
    pub(super) fn take(&mut self, call: &Call) -> bool {
        let mut free = true;
        for user in call.users() {
            free &= self.users.insert(user);
        }
        if let Some(mailbox) = call.mailbox() {
            free &= self.mailboxes.insert(mailbox);
        }
        if let Some(request) = &call.request {
            free &= self.requests.insert((call.actor.clone(), request.id.clone()));
        }
        free
    }
}
