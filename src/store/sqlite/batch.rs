//! Group commit: all calls of a batch in one transaction, each under a savepoint of its own.
//!
//! The connection is out of its slot while a transaction is open on it, and goes back only after a clean end. Whatever else
//! happens, an error, a limit, a dropped future, it closes, which rolls back.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sqlx::SqliteConnection;
use tokio::time::timeout;

use super::{
    LIMIT, Live,
    call::Batch,
    error::{cause, is_busy, is_rejection, words},
};
use crate::{
    role::Anchor,
    store::{Call, Cause, Facts, Refusal, StoreError, WriteError, Written},
};

pub(super) type Answer = Result<Written, WriteError>;

/// Why a batch as a whole came to nothing.
#[derive(Debug)]
pub(super) enum Failed {
    /// Some call of it takes the transaction down: find out which.
    Guilty(Refusal),
    /// No call is at fault.
    All(WriteError),
}

/// A batch whose COMMIT was sent.
struct Sent {
    /// None where the batch logged nothing.
    commit: Option<Anchor>,
    answers: Vec<Answer>,
}

/// How long to wait for a lock that our own dying connection may hold.
const FIND_OUT_BUSY: Duration = Duration::from_secs(2);

pub(super) async fn write(live: &Live, facts: &Facts, calls: &[Call]) -> Vec<Answer> {
    let mut answers = Vec::with_capacity(calls.len());
    let mut parts = vec![calls];
    while let Some(part) = parts.pop() {
        match (attempt(live, facts, part).await, part) {
            (Ok(answered), _) => answers.extend(answered),
            (Err(_), []) => {}
            (Err(Failed::All(error)), _) => {
                answers.extend(part.iter().map(|_| Err(error.clone())));
                if let Some(error) = of_the_unsent(error) {
                    // They would find the same, one after the other, and wait for longer than their callers do.
                    answers.resize_with(calls.len(), || Err(error.clone()));
                    break;
                }
            }
            (Err(Failed::Guilty(refusal)), [_]) => answers.push(Err(WriteError::Refused(refusal))),
            (Err(Failed::Guilty(_)), _) => {
                let (first, second) = part.split_at(part.len() / 2);
                parts.extend([second, first]);
            }
        }
    }
    answers
}

/// What it is for the calls that have not been sent, where it is no matter of those that have.
fn of_the_unsent(error: WriteError) -> Option<WriteError> {
    match error {
        WriteError::Unreachable(cause) | WriteError::OutcomeUnknown(cause) => Some(WriteError::Unreachable(cause)),
        WriteError::AllHeld => Some(WriteError::AllHeld),
        _ => None,
    }
}

async fn attempt(live: &Live, facts: &Facts, calls: &[Call]) -> Result<Vec<Answer>, Failed> {
    let sent = Mutex::new(None);
    let done = timeout(LIMIT, run(live, facts, calls, &sent)).await;
    let error = match done {
        Ok(Ok(())) => return Ok(take(&sent).map(|sent| sent.answers).unwrap_or_default()),
        Ok(Err(failed)) if is_unsent(&sent) => return Err(failed),
        Ok(Err(Failed::Guilty(cause))) => return Err(Failed::Guilty(cause)),
        Ok(Err(Failed::All(error))) => cause(error),
        Err(_) if is_unsent(&sent) => {
            return Err(Failed::All(WriteError::Unreachable(words(format!("no answer within {} s", LIMIT.as_secs())))));
        }
        Err(_) => words(format!("COMMIT was not confirmed within {} s", LIMIT.as_secs())),
    };
    match take(&sent) {
        Some(sent) => find_out(live, sent, error).await,
        None => Err(Failed::All(WriteError::Unreachable(error))),
    }
}

fn take(sent: &Mutex<Option<Sent>>) -> Option<Sent> {
    sent.lock().unwrap_or_else(PoisonError::into_inner).take()
}

fn is_unsent(sent: &Mutex<Option<Sent>>) -> bool {
    sent.lock().unwrap_or_else(PoisonError::into_inner).is_none()
}

async fn run(live: &Live, facts: &Facts, calls: &[Call], sent: &Mutex<Option<Sent>>) -> Result<(), Failed> {
    let mut slot = live.writer.lock().await;
    let mut connection = match slot.take() {
        Some(connection) => connection,
        None => live.connect_writer(None).await.map_err(Failed::from)?,
    };
    match transaction(&mut connection, live, facts, calls, sent).await {
        Ok(()) => {
            *slot = Some(connection);
            Ok(())
        }
        Err(Failed::All(WriteError::AllHeld)) => {
            // Nothing was begun.
            *slot = Some(connection);
            Err(Failed::All(WriteError::AllHeld))
        }
        Err(failed) => {
            // Waited for, so that the next transaction does not meet this one's lock.
            let _ = timeout(FIND_OUT_BUSY, connection.close()).await;
            Err(failed)
        }
    }
}

async fn transaction(
    connection: &mut SqliteConnection,
    live: &Live,
    facts: &Facts,
    calls: &[Call],
    sent: &Mutex<Option<Sent>>,
) -> Result<(), Failed> {
    match sqlx::query("begin immediate").execute(&mut *connection).await {
        Ok(_) => {}
        Err(error) if is_busy(&error) => return Err(Failed::All(WriteError::AllHeld)),
        Err(error) => return Err(error.into()),
    }
    let mut batch = Batch::load(connection, &live.users, facts, calls).await?;
    let mut answers = Vec::with_capacity(calls.len());
    for call in calls {
        answers.push(batch.call(call).await?);
    }
    let (wrote, commit) = batch.finish().await?;
    let set_sent = |answers| *sent.lock().unwrap_or_else(PoisonError::into_inner) = Some(Sent { commit, answers });
    if !wrote {
        sqlx::query("rollback").execute(connection).await?;
        set_sent(answers);
        return Ok(());
    }
    set_sent(answers);
    match sqlx::query("commit").execute(connection).await {
        Ok(_) => Ok(()),
        // A deferred foreign key of the bot's own tables.
        Err(error) if is_rejection(&error) => Err(Failed::Guilty(Refusal::Rejected { cause: error.to_string() })),
        Err(error) => Err(error.into()),
    }
}

/// Looks whether a batch is committed whose COMMIT brought no answer. The file is local: once the write lock is ours, its
/// transaction is over, one way or the other.
async fn find_out(live: &Live, sent: Sent, error: Cause) -> Result<Vec<Answer>, Failed> {
    let unknown = || Failed::All(WriteError::OutcomeUnknown(error.clone()));
    let Some(commit) = sent.commit else { return Err(unknown()) };
    let look = async {
        let mut connection = live.connect_writer(Some(FIND_OUT_BUSY)).await?;
        sqlx::query("begin immediate").execute(&mut *connection).await?;
        let is_there: bool =
            sqlx::query_scalar("select exists (select 1 from rolecache_commits where id = ?1 and tag = ?2)")
                .bind(commit.revision.0)
                .bind(commit.tag.0)
                .fetch_one(&mut *connection)
                .await?;
        connection.close().await;
        Ok::<_, sqlx::Error>(is_there)
    };
    match timeout(LIMIT, look).await {
        Ok(Ok(true)) => Ok(sent.answers),
        Ok(Ok(false)) => Err(Failed::All(WriteError::Unreachable(error))),
        Ok(Err(_)) | Err(_) => Err(unknown()),
    }
}

// === impl Failed ===

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::All(match error {
            StoreError::Unreachable(cause) => WriteError::Unreachable(cause),
            StoreError::Broken(cause) => WriteError::Broken(cause),
        })
    }
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        StoreError::from(error).into()
    }
}
