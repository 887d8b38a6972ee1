//! A snapshot for one watch, read by a task of its own.
//!
//! The watch is not polled while its client does not read; the task ends in time all the same, and with it the
//! transaction that it holds open in the store and its turn, which others wait for.

use std::{panic, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::{Core, fault::Fault};
use crate::{
    access::Caller,
    role::{Anchor, UserRow},
    store::SNAPSHOT_LIMIT,
};

/// How long a watch waits for its turn.
const TURN_LIMIT: Duration = Duration::from_secs(15);

/// How long a snapshot waits for a client to take the next chunk: others wait for their turn meanwhile.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// Where the chunks come from. Dropped, it ends the task.
pub(super) struct SnapshotReader {
    anchor: Option<oneshot::Receiver<Result<Anchor, Fault>>>,
    chunks: mpsc::Receiver<Result<Vec<UserRow>, Fault>>,
    task: AbortOnDropHandle<()>,
}

impl SnapshotReader {
    pub(super) fn start(core: Arc<Core>, caller: Arc<Caller>) -> Self {
        let (begun, anchor) = oneshot::channel();
        let (sender, chunks) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            let _ = timeout(SNAPSHOT_LIMIT, read(core, caller, begun, sender)).await;
        });
        Self { anchor: Some(anchor), chunks, task: AbortOnDropHandle::new(task) }
    }

    /// The commit that the snapshot is as of, once this replica has applied it too.
    ///
    /// # Panics
    /// On a second call.
    pub(super) async fn anchor(&mut self) -> Result<Anchor, Fault> {
        let anchor = self.anchor.take().expect("asked once");
        match anchor.await {
            Ok(anchor) => anchor,
            Err(_) => Err(self.ended(Fault::Overloaded).await),
        }
    }

    /// The next chunk; empty at the end.
    pub(super) async fn next(&mut self) -> Result<Vec<UserRow>, Fault> {
        match self.chunks.recv().await {
            Some(chunk) => chunk,
            // Closed before the end: the client took too long.
            None => Err(self.ended(Fault::Deadline).await),
        }
    }

    /// Why the task ended before its work did: `fault`, unless it panicked; then the watch does, too, and says so.
    async fn ended(&mut self, fault: Fault) -> Fault {
        match (&mut self.task).await {
            Err(error) if error.is_panic() => panic::resume_unwind(error.into_panic()),
            _ => fault,
        }
    }
}

async fn read(
    core: Arc<Core>,
    caller: Arc<Caller>,
    begun: oneshot::Sender<Result<Anchor, Fault>>,
    chunks: mpsc::Sender<Result<Vec<UserRow>, Fault>>,
) {
    // First among the caller's own, so that they do not stand before others.
    let turn = async { (caller.begin_snapshot().await, core.snapshots.acquire().await) };
    let Ok((_own, Ok(_turn))) = timeout(TURN_LIMIT, turn).await else {
        let _ = begun.send(Err(Fault::Overloaded));
        return;
    };
    let opened = async {
        let snapshot = core.store.snapshot().await.map_err(Fault::store)?;
        // Who learns of a role from the snapshot and then reads must not get an older one.
        core.applied(snapshot.anchor()).await?;
        Ok(snapshot)
    };
    let mut snapshot = match opened.await {
        Ok(snapshot) => {
            let _ = begun.send(Ok(snapshot.anchor()));
            snapshot
        }
        Err(fault) => {
            let _ = begun.send(Err(fault));
            return;
        }
    };
    loop {
        let chunk = snapshot.next().await.map_err(Fault::store);
        let is_last = chunk.as_ref().map_or(true, Vec::is_empty);
        if chunks.send_timeout(chunk, PAUSE_LIMIT).await.is_err() || is_last {
            return;
        }
    }
}
