//! The writer: all writes, group by group.
//!
//! Callers hand a write over and wait; a task owns it from then on, because a request future may be dropped at any
//! moment and a dropped write would leave its transaction open. Whatever has queued up is committed together. A group
//! holds one call per user, mailbox and request id: the second waits for the next group, so that no write is merged
//! away. What finds its row locked moves to a lane of its own and is tried again there, so that it delays nobody else.

use std::{
    collections::{HashSet, VecDeque},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};

use crate::{
    role::{MailboxId, UserId},
    step::{HistoryEnded, Place, Step},
    store::{Call, Cause, Refusal, Store, WriteError, Written},
};

/// Calls that wait for their group; more are refused.
const QUEUE: usize = 4_096;

/// Calls in one group.
const GROUP: usize = 256;

/// How often, and for how long, a call is tried again whose row somebody holds.
const BUSY_RETRY: Duration = Duration::from_millis(50);
const BUSY_LIMIT: Duration = Duration::from_secs(2);

/// How long the outcome of a broken commit is looked for, and how long a commit may take to arrive in the cache.
const CONFIRM_LIMIT: Duration = Duration::from_secs(5);

/// Hands writes over. Cheap to clone.
#[derive(Clone)]
pub struct Writer {
    queue: mpsc::Sender<Pending>,
    step: Step,
}

/// The task that commits what callers hand over.
pub struct WriterTask {
    store: Arc<dyn Store>,
    step: Step,
    queue: mpsc::Receiver<Pending>,
    busy: mpsc::Sender<Pending>,
}

/// The task that tries again what was held by others.
pub struct BusyTask {
    store: Arc<dyn Store>,
    step: Step,
    queue: mpsc::Receiver<Pending>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteFailure {
    #[error("refused: {0:?}")]
    Refused(Refusal),
    /// Nothing was changed.
    #[error("somebody's transaction held the row")]
    UserBusy,
    /// Nothing was changed.
    #[error("the store does not answer: {0}")]
    Unreachable(Cause),
    /// It may have happened.
    #[error("the outcome of the commit is not known")]
    OutcomeUnknown,
    /// Nothing was changed.
    #[error("too many writes wait")]
    Overloaded,
    #[error("the store is broken: {0}")]
    Broken(Cause),
}

/// A call on its way.
struct Pending {
    call: Call,
    answer: oneshot::Sender<Result<Written, WriteFailure>>,
    /// Of the first attempt; from then on it is tried again only for so long.
    first_tried: Option<Instant>,
    /// When the answer of an attempt was lost, so that no later one can prove that nothing happened.
    in_doubt_since: Option<Instant>,
}

/// Calls in the order in which they came, out of which groups are taken.
#[derive(Default)]
struct Line(VecDeque<Pending>);

/// A writer to `store`, and its two tasks.
pub fn writer(store: Arc<dyn Store>, step: Step) -> (Writer, WriterTask, BusyTask) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let (busy_sender, busy_queue) = mpsc::channel(QUEUE);
    let task = WriterTask { store: store.clone(), step: step.clone(), queue, busy: busy_sender };
    let busy = BusyTask { store, step: step.clone(), queue: busy_queue };
    (Writer { queue: sender, step }, task, busy)
}

// === impl Writer ===

impl Writer {
    /// Commits a call and waits until this replica has applied it: store, then cache, then watchers. A caller who stops
    /// waiting leaves the write to its fate.
    pub async fn write(&self, call: Call) -> Result<Written, WriteFailure> {
        let before = self.step.place();
        let (answer, outcome) = oneshot::channel();
        let pending = Pending { call, answer, first_tried: None, in_doubt_since: None };
        self.queue.try_send(pending).map_err(|_| WriteFailure::Overloaded)?;
        // A task that ends takes the process with it; until then the outcome is what it says.
        let written = outcome.await.map_err(|_| WriteFailure::OutcomeUnknown)??;
        match timeout(CONFIRM_LIMIT, self.confirm(before, &written)).await {
            Ok(Ok(())) => Ok(written),
            _ => Err(WriteFailure::OutcomeUnknown),
        }
    }

    /// Waits until a write is applied, in the history in which it was handed over.
    async fn confirm(&self, before: Place, written: &Written) -> Result<(), HistoryEnded> {
        let applied = before.applied.revision;
        if written.revision < applied || (written.revision == applied && !written.changes.is_empty()) {
            // The first attempt of long ago; or the store has gone back in time, and the tailer is about to find out.
            self.step.proven_anew().await;
        }
        self.step.reach_in(before.history, written.revision).await
    }
}

// === impl WriterTask ===

impl WriterTask {
    /// Commits what comes. Never returns.
    pub async fn run(mut self) -> Infallible {
        let mut line = Line::default();
        let mut arrived = Vec::new();
        loop {
            if line.0.is_empty() {
                self.queue.recv_many(&mut arrived, GROUP).await;
            } else {
                while line.0.len() + arrived.len() < QUEUE
                    && let Ok(pending) = self.queue.try_recv()
                {
                    arrived.push(pending);
                }
            }
            line.0.extend(arrived.drain(..));
            let Committed { again, lost } = commit(&*self.store, &self.step, line.take_group(&Taken::default())).await;
            for pending in again {
                // A full lane means that thousands of rows are held: no more can wait.
                if let Err(refused) = self.busy.try_send(pending) {
                    refused.into_inner().give_up(WriteFailure::UserBusy);
                }
            }
            if let Some(cause) = lost {
                // The others would find the same, one group after the other, and wait for longer than their callers do.
                line.0.drain(..).for_each(|pending| pending.give_up(WriteFailure::Unreachable(cause.clone())));
            }
        }
    }
}

// === impl BusyTask ===

impl BusyTask {
    /// Tries again what comes, until it succeeds or its time is up. Never returns.
    pub async fn run(mut self) -> Infallible {
        let mut line = Line::default();
        let mut next_round = Instant::now();
        loop {
            tokio::select! {
                arrived = self.queue.recv(), if line.0.len() < QUEUE => line.0.extend(arrived),
                () = sleep_until(next_round), if !line.0.is_empty() => {
                    self.try_all(&mut line).await;
                    next_round = Instant::now() + BUSY_RETRY;
                }
            }
        }
    }

    /// One round: everybody once, but nobody behind one who has just been found held.
    async fn try_all(&self, line: &mut Line) {
        let mut held = Taken::default();
        let mut again = Vec::new();
        loop {
            line.end_overdue();
            let group = line.take_group(&held);
            if group.is_empty() {
                break;
            }
            let committed = commit(&*self.store, &self.step, group).await;
            committed.again.iter().for_each(|pending| {
                held.take(&pending.call);
            });
            again.extend(committed.again);
        }
        // In front of those who came after them.
        again.into_iter().rev().for_each(|pending| line.0.push_front(pending));
    }
}

// === impl Line ===

impl Line {
    /// The first calls that touch nothing in common, and nothing of `held`.
    fn take_group(&mut self, held: &Taken) -> Vec<Pending> {
        let mut group = Vec::new();
        let mut rest = VecDeque::new();
        let mut taken = held.clone();
        while let Some(pending) = self.0.pop_front() {
            if pending.is_abandoned() {
                continue;
            }
            if group.len() < GROUP && taken.take(&pending.call) {
                group.push(pending);
            } else {
                rest.push_back(pending);
            }
        }
        self.0 = rest;
        group
    }

    /// Answers those whose time is up.
    fn end_overdue(&mut self) {
        let (waiting, overdue) = self.0.drain(..).partition(Pending::may_try_again);
        self.0 = waiting;
        let overdue: VecDeque<Pending> = overdue;
        overdue.into_iter().for_each(|pending| pending.give_up(WriteFailure::UserBusy));
    }
}

/// What calls touch.
#[derive(Clone, Default)]
struct Taken {
    users: HashSet<UserId>,
    mailboxes: HashSet<MailboxId>,
    requests: HashSet<(Arc<str>, Box<str>)>,
}

impl Taken {
    /// Whether `call` touches nothing that was taken before. What it touches is taken in any case: a third call must
    /// not overtake a second one that has to wait.
    fn take(&mut self, call: &Call) -> bool {
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

/// What became of a group, beside the calls that have their answers.
struct Committed {
    /// To be tried again.
    again: Vec<Pending>,
    /// The store could not be reached with any of them.
    lost: Option<Cause>,
}

/// Commits a group and answers its callers.
async fn commit(store: &dyn Store, step: &Step, group: Vec<Pending>) -> Committed {
    if group.is_empty() {
        return Committed { again: group, lost: None };
    }
    let now = Instant::now();
    let (calls, waiting): (Vec<Call>, Vec<Pending>) = group
        .into_iter()
        .map(|mut pending| {
            pending.first_tried.get_or_insert(now);
            (pending.call.clone(), pending)
        })
        .unzip();
    let outcomes = store.write(&calls).await;
    assert_eq!(outcomes.len(), waiting.len(), "the store answers for each call");
    step.nudge();
    let lost = outcomes.iter().try_fold(None, |_, outcome| match outcome {
        Err(WriteError::Unreachable(cause)) => Some(Some(cause.clone())),
        _ => None,
    });
    let answered = waiting.into_iter().zip(outcomes);
    let again = answered.filter_map(|(pending, outcome)| pending.settle(outcome)).collect();
    Committed { again, lost: lost.flatten() }
}

// === impl Pending ===

impl Pending {
    /// Nobody waits for it any more, and it is known not to have happened.
    fn is_abandoned(&self) -> bool {
        self.in_doubt_since.is_none() && self.answer.is_closed()
    }

    /// Answers, or comes back to be tried again.
    fn settle(mut self, outcome: Result<Written, WriteError>) -> Option<Self> {
        let failure = match outcome {
            Ok(written) => {
                // Who does not wait any more is not told.
                let _ = self.answer.send(Ok(written));
                return None;
            }
            Err(WriteError::Refused(refusal)) => WriteFailure::Refused(refusal),
            Err(WriteError::Broken(cause)) => WriteFailure::Broken(cause),
            Err(WriteError::Busy) if self.may_try_again() => return Some(self),
            Err(WriteError::Busy) => WriteFailure::UserBusy,
            Err(WriteError::Unreachable(_)) if self.in_doubt_since.is_some() && self.may_try_again() => {
                return Some(self);
            }
            Err(WriteError::Unreachable(cause)) => WriteFailure::Unreachable(cause),
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

    fn may_try_again(&self) -> bool {
        // In doubt it counts from the doubt: to find a connection silent may take longer than the limit.
        match self.in_doubt_since {
            Some(doubt) => doubt.elapsed() < CONFIRM_LIMIT,
            None => self.first_tried.is_none_or(|first| first.elapsed() < BUSY_LIMIT),
        }
    }

    fn give_up(self, failure: WriteFailure) {
        let nothing_happened = matches!(failure, WriteFailure::UserBusy | WriteFailure::Unreachable(_));
        let failure =
            if self.in_doubt_since.is_some() && nothing_happened { WriteFailure::OutcomeUnknown } else { failure };
        let _ = self.answer.send(Err(failure));
    }
}
