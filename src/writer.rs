//! The writer: all writes, group by group.
//!
//! Callers hand a write over and wait; a task owns it from then on, because a request future may be dropped at any
//! moment and a dropped write would leave its transaction open. Whatever has queued up is committed together. A group
//! holds one call per user, mailbox and request id: the second waits for the next group, so that no write is merged
//! away. What finds its row locked moves to a lane of its own and is tried again there, so that it delays nobody else.

mod line;
mod pending;

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout, timeout_at},
};

use self::{
    line::{Line, Taken},
    pending::Pending,
};
use crate::{
    failpoint,
    role::Anchor,
    step::{HistoryEnded, Place, Step},
    store::{Call, Cause, Refusal, Store, WriteError, Written},
};

/// Calls that wait for their group; more are refused.
const QUEUE: usize = 4_096;

/// Calls in one group.
const GROUP: usize = 256;

/// How long a call waits for its group, while a store that does not answer keeps the one before.
const TURN_LIMIT: Duration = Duration::from_millis(1900);

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
    moved: Arc<Mutex<Moved>>,
}

/// When groups last got somewhere.
#[derive(Clone, Copy, Default)]
struct Moved {
    /// The store had an answer for one.
    answered: Option<Instant>,
    /// It said that nobody can commit, for somebody else's transaction.
    held_up: Option<Instant>,
}

/// The task that commits what callers hand over.
pub struct WriterTask {
    store: Arc<dyn Store>,
    step: Step,
    queue: mpsc::Receiver<Pending>,
    busy: mpsc::Sender<Pending>,
    moved: Arc<Mutex<Moved>>,
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

/// A writer to `store`, and its two tasks.
pub fn writer(store: Arc<dyn Store>, step: Step) -> (Writer, WriterTask, BusyTask) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let (busy_sender, busy_queue) = mpsc::channel(QUEUE);
    let moved = Arc::default();
    let task =
        WriterTask { store: store.clone(), step: step.clone(), queue, busy: busy_sender, moved: Arc::clone(&moved) };
    let busy = BusyTask { store, step: step.clone(), queue: busy_queue };
    (Writer { queue: sender, step, moved }, task, busy)
}

// === impl Writer ===

impl Writer {
    /// Commits a call and waits until this replica has applied it: store, then cache, then watchers. A caller who stops
    /// waiting leaves the write to its fate.
    pub async fn write(&self, call: Call) -> Result<Written, WriteFailure> {
        let limit = Instant::now() + TURN_LIMIT;
        let Ok(before) = timeout_at(limit, self.step.settled()).await else {
            return Err(WriteFailure::Unreachable(Arc::new(io::Error::new(io::ErrorKind::TimedOut, "no history"))));
        };
        let (answer, mut outcome) = oneshot::channel();
        let decided = Arc::new(AtomicBool::new(false));
        let pending = Pending {
            call,
            answer,
            decided: decided.clone(),
            arrived: Instant::now(),
            tried: false,
            in_doubt_since: None,
            behind_since: None,
        };
        self.queue.try_send(pending).map_err(|_| WriteFailure::Overloaded)?;
        let outcome = match timeout_at(limit, &mut outcome).await {
            Ok(outcome) => outcome,
            Err(_) if !decided.swap(true, Ordering::SeqCst) => {
                return Err(self.why_no_turn());
            }
            Err(_) => outcome.await,
        };
        // A task that ends takes the process with it; until then the outcome is what it says.
        let written = outcome.map_err(|_| WriteFailure::OutcomeUnknown)??;
        match timeout(CONFIRM_LIMIT, self.confirm(before, &written)).await {
            Ok(Ok(())) => {
                failpoint::kill!("writer::before_answer");
                Ok(written)
            }
            _ => Err(WriteFailure::OutcomeUnknown),
        }
    }

    /// What kept a call from its turn: a foreign transaction, calls that came before it, or a store without an answer.
    fn why_no_turn(&self) -> WriteFailure {
        let Moved { answered, held_up } = *self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        let within = |moment: Option<Instant>, limit| moment.is_some_and(|moment| moment.elapsed() < limit);
        if within(held_up, TURN_LIMIT) {
            WriteFailure::UserBusy
        } else if within(answered, TURN_LIMIT / 2) {
            WriteFailure::Overloaded
        } else {
            WriteFailure::Unreachable(no_turn())
        }
    }

    /// Waits until a write is applied, in the history in which it was handed over.
    async fn confirm(&self, before: Place, written: &Written) -> Result<(), HistoryEnded> {
        if written.revision <= before.applied.revision {
            // Nothing changed, or the first attempt did it long ago; or the store has gone back in time, shows the same
            // numbers again, and the tailer is about to find out.
            self.step.found_anew(before.history).await;
        }
        self.step.reach_in(before.history, written.revision).await?;
        // The number alone may be another commit's by now: of a standby that lacks this one and took over before it was read.
        let is_new = written.revision > before.applied.revision;
        match written.tag.and_then(|tag| self.step.has(Anchor { revision: written.revision, tag })) {
            Some(true) => Ok(()),
            None if !is_new || written.tag.is_none() => Ok(()),
            _ => Err(HistoryEnded),
        }
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
            failpoint::kill!("writer::task");
            line.0.extend(arrived.drain(..));
            let Committed { again, lost, held_up } =
                commit(&*self.store, &self.step, line.take_group(&Taken::default())).await;
            {
                let mut moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
                let now = Some(Instant::now());
                match (held_up, &lost) {
                    (true, _) => moved.held_up = now,
                    (false, None) => moved.answered = now,
                    (false, Some(_)) => {}
                }
            }
            for pending in again {
                // A full lane means that thousands of rows are held: no more can wait.
                if let Err(refused) = self.busy.try_send(pending) {
                    refused.into_inner().give_up(WriteFailure::Overloaded);
                }
            }
            if let Some(cause) = lost {
                // The others would find the same, one group after the other, and wait for longer than their callers do.
                while let Ok(pending) = self.queue.try_recv() {
                    line.0.push_back(pending);
                }
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
            if let Some(cause) = committed.lost {
                // As in the other lane, but for those whose first attempt may yet be found.
                let (in_doubt, others) = line.0.drain(..).partition(Pending::is_in_doubt);
                line.0 = in_doubt;
                let others: VecDeque<Pending> = others;
                others.into_iter().for_each(|pending| pending.give_up(WriteFailure::Unreachable(cause.clone())));
                break;
            }
        }
        // In front of those who came after them.
        again.into_iter().rev().for_each(|pending| line.0.push_front(pending));
    }
}

/// What became of a group, beside the calls that have their answers.
struct Committed {
    /// To be tried again.
    again: Vec<Pending>,
    /// The store could not be reached with them, or fell silent.
    lost: Option<Cause>,
    /// Nobody can commit: somebody's transaction holds what every commit needs.
    held_up: bool,
}

/// Commits a group and answers its callers.
async fn commit(store: &dyn Store, step: &Step, group: Vec<Pending>) -> Committed {
    if group.is_empty() {
        return Committed { again: group, lost: None, held_up: false };
    }
    let now = Instant::now();
    let (calls, waiting): (Vec<Call>, Vec<Pending>) = group
        .into_iter()
        .map(|mut pending| {
            pending.tried = true;
            (pending.call.clone(), pending)
        })
        .unzip();
    failpoint::kill!("writer::before_commit");
    let outcomes = store.write(&calls).await;
    failpoint::kill!("writer::after_commit");
    assert_eq!(outcomes.len(), waiting.len(), "the store answers for each call");
    step.nudge();
    // After a connection that broke the next one may be sound; after silence it is not.
    let silent = now.elapsed() >= TURN_LIMIT;
    let lost = outcomes.iter().find_map(|outcome| match outcome {
        Err(WriteError::Unreachable(cause)) => Some(cause.clone()),
        Err(WriteError::OutcomeUnknown(cause)) if silent => Some(cause.clone()),
        _ => None,
    });
    let held_up = outcomes.iter().any(|outcome| matches!(outcome, Err(WriteError::AllHeld)));
    let answered = waiting.into_iter().zip(outcomes);
    let again = answered.filter_map(|(pending, outcome)| pending.settle(outcome)).collect();
    Committed { again, lost, held_up }
}

fn no_turn() -> Cause {
    Arc::new(io::Error::new(io::ErrorKind::TimedOut, "the write before has no answer"))
}

#[cfg(test)]
mod tests;
