//! WatchRoleChanges: a cursor turned into messages.
//!
//! The stream is a future that the connection polls when the client has room for more, one part ahead. A client that does not read
//! is not polled, and costs its place in the log and what it has not taken yet.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_stream::try_stream;
use futures::{FutureExt, Stream, StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep_until, timeout_at},
};
use tonic::Status;

use super::{
    Core, convert,
    door::log_ended,
    fault::Fault,
    filter::Filter,
    snapshot::SnapshotReader,
    start::{Start, start},
};
use crate::{
    access::Caller,
    failpoint,
    feed::CursorError,
    proto::{
        Method,
        v1::{self, watch_role_changes_response::Event},
    },
    role::{Anchor, Commit},
    step::FeedState,
};

pub(super) type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchRoleChangesResponse, Status>> + Send>>;

/// Changes in one message, and about how many bytes: as much waits in memory for a client that does not read.
const MESSAGE_CHANGES: usize = 1_000;
const MESSAGE_BYTES: usize = 128 << 10;

/// Counts the open watches.
pub(super) struct Watches {
    open: Arc<AtomicUsize>,
    most: usize,
}

/// One open watch; counted until it is dropped.
struct Open(Arc<AtomicUsize>);

/// Opens a watch. Everything that can be refused is refused here, before the first message.
pub(super) async fn open(
    core: Arc<Core>,
    caller: Arc<Caller>,
    request: v1::WatchRoleChangesRequest,
    deadline: Option<Instant>,
) -> Result<WatchStream, Fault> {
    let filter = Filter::of(&request.user_ids, request.roles, &request.kinds)?;
    let interval = convert::heartbeat_interval(request.heartbeat_interval)?;
    let places = caller.begin_watch(filter.len()).ok_or(Fault::TooManyWatches)?;
    let open = core.watches.enter()?;
    let start = start(&core, &caller, &request.after, request.initial_snapshot).await?;
    let watch = Watch { core, caller, filter, interval, deadline, _open: open, _places: places };
    Ok(caught(watch.run(start)))
}

/// A panic ends one watch and is told to its client, instead of breaking the connection and all that goes over it.
fn caught(stream: impl Stream<Item = Result<v1::WatchRoleChangesResponse, Status>> + Send + 'static) -> WatchStream {
    let told = |item: Result<_, Box<dyn Any + Send>>| item.unwrap_or_else(|left| Err(Fault::panic(&*left).into()));
    Box::pin(AssertUnwindSafe(stream).catch_unwind().map(told))
}

struct Watch {
    core: Arc<Core>,
    /// Who may lose the right to it while it is open.
    caller: Arc<Caller>,
    filter: Filter,
    interval: Duration,
    /// When the client stops listening.
    deadline: Option<Instant>,
    _open: Open,
    /// Among its caller's own.
    _places: [OwnedSemaphorePermit; 2],
}

impl Watch {
    fn run(self, start: Start) -> impl Stream<Item = Result<v1::WatchRoleChangesResponse, Status>> + Send {
        try_stream! {
            let store_id = self.core.store.facts().store_id;
            let mut cursor = match start {
                Start::Resumed(anchor, history) => {
                    yield self.started(anchor, true);
                    #[cfg(feature = "failpoints")]
                    let anchor = match failpoint::is_on!("bug::resume_off_by_one") {
                        true => self.one_further(anchor).await,
                        false => anchor,
                    };
                    self.core.feed.after(anchor, history)
                }
                Start::Now(anchor, history) => {
                    yield self.started(anchor, false);
                    self.core.feed.after(anchor, history)
                }
                Start::Snapshot => {
                    let history = self.unless_over(self.core.step.settled()).await?.history;
                    let mut snapshot = SnapshotReader::start(self.core.clone(), self.caller.clone());
                    let anchor = self.unless_over(snapshot.anchor()).await??;
                    yield self.started(anchor, false);
                    let mut last = false;
                    while !last {
                        let users = self.unless_over(self.chunk(&mut snapshot)).await??;
                        last = users.is_empty();
                        for users in in_messages(users) {
                            yield response(Event::Snapshot(v1::Snapshot { users, last }));
                        }
                    }
                    self.core.feed.after(anchor, history)
                }
            };

            let mut told = FeedState::Live;
            // Polled only when they are woken: what asks each of them for every message takes a third of its time.
            let mut interrupts = FuturesUnordered::from_iter([self.over().boxed(), self.heartbeat_due(told).boxed()]);
            // Parts of a commit have been sent and more are to come: nothing else may come between.
            let mut inside = false;
            let mut is_due = false;
            loop {
                if is_due && !inside {
                    is_due = false;
                    told = self.core.step.feed();
                    interrupts.push(self.heartbeat_due(told).boxed());
                    let seen = cursor.seen();
                    #[cfg(feature = "failpoints")]
                    let seen = match failpoint::is_on!("bug::heartbeat_ahead") {
                        true => self.core.step.place().applied,
                        false => seen,
                    };
                    yield response(Event::Heartbeat(convert::heartbeat(seen, told, store_id)));
                }
                let happened = tokio::select! {
                    biased;
                    Some(interrupt) = interrupts.next() => interrupt,
                    commit = cursor.next() => Happened::Commit(commit),
                };
                match happened {
                    Happened::HeartbeatDue => is_due = true,
                    Happened::Commit(commit) => {
                        let commit = commit.map_err(|error| {
                            Fault::cursor(error, store_id, self.core.step.place().applied)
                        })?;
                        let ends = !cursor.is_inside_a_commit();
                        // One message at a time: a client that does not read holds one, whatever the commit's size.
                        let mut from = 0;
                        while let Some(message) = self.message(&commit, &mut from, ends, inside) {
                            inside = message.partial;
                            failpoint::kill!("watch::message");
                            yield response(Event::Commit(message));
                        }
                    }
                    Happened::Shutdown => {
                        if !inside {
                            let feed = self.core.step.feed();
                            yield response(Event::Heartbeat(convert::heartbeat(cursor.seen(), feed, store_id)));
                        }
                        Err(Fault::ShuttingDown)?;
                    }
                    Happened::Revoked => {
                        log_ended(&self.caller, Method::WatchRoleChanges);
                        Err(Fault::BadCredentials)?
                    }
                    Happened::Deadline => Err(Fault::Deadline)?,
                }
            }
        }
    }

    /// Resolves once the watch has to end.
    fn over(&self) -> impl Future<Output = Happened> + Send + 'static {
        let (core, caller, deadline) = (self.core.clone(), self.caller.clone(), self.deadline);
        async move {
            tokio::select! {
                biased;
                () = core.shutdown.cancelled() => Happened::Shutdown,
                () = caller.revoked() => Happened::Revoked,
                () = until(deadline) => Happened::Deadline,
            }
        }
    }

    /// Resolves once a heartbeat has been silent for long enough, or would not say `told` any more.
    fn heartbeat_due(&self, told: FeedState) -> impl Future<Output = Happened> + Send + 'static {
        let next = Instant::now() + self.interval;
        let mut feed = self.core.step.subscribe_feed();
        async move {
            match timeout_at(next, feed.wait_for(|feed| *feed != told)).await {
                Ok(Err(_)) => Happened::Shutdown,
                Ok(Ok(_)) | Err(_) => Happened::HeartbeatDue,
            }
        }
    }

    /// A bug for tests: past the first commit that the client has not seen.
    #[cfg(feature = "failpoints")]
    async fn one_further(&self, anchor: Anchor) -> Anchor {
        let page = self.core.store.read_log(&anchor.into(), 1).await;
        page.ok().and_then(|page| Some(page.commits.first()?.anchor())).unwrap_or(anchor)
    }

    fn started(&self, anchor: Anchor, resumed: bool) -> v1::WatchRoleChangesResponse {
        let facts = self.core.store.facts();
        response(Event::Started(v1::WatchStarted {
            store_id: facts.store_id.to_string(),
            revision: anchor.revision.0,
            default_role: facts.default_role.to_string(),
            resumed,
            resume_token: super::token::resume_token(facts.store_id, anchor),
        }))
    }

    /// What `step` brings, unless the server or the client ends first.
    async fn unless_over<T>(&self, step: impl Future<Output = T>) -> Result<T, Fault> {
        tokio::select! {
            () = self.core.shutdown.cancelled() => Err(Fault::ShuttingDown),
            () = self.caller.revoked() => {
                log_ended(&self.caller, Method::WatchRoleChanges);
                Err(Fault::BadCredentials)
            }
            () = until(self.deadline) => Err(Fault::Deadline),
            done = step => Ok(done),
        }
    }

    /// The next users of a snapshot that pass the filter; none at the end.
    async fn chunk(&self, snapshot: &mut SnapshotReader) -> Result<Vec<v1::UserRole>, Fault> {
        loop {
            let rows = snapshot.next().await?;
            let is_end = rows.is_empty();
            let users: Vec<_> =
                rows.into_iter().filter(|row| self.filter.passes_user(row)).map(convert::user_role).collect();
            if is_end || !users.is_empty() {
                return Ok(users);
            }
        }
    }

    /// The next message for a commit, or for a run of one: of its changes from `from` on those that pass the filter.
    /// `inside` says that parts have been sent before, `ends` that none follow this run.
    fn message(&self, commit: &Commit, from: &mut usize, ends: bool, inside: bool) -> Option<v1::Commit> {
        let facts = self.core.store.facts();
        let mut changes: Vec<v1::RoleChange> = Vec::new();
        let mut bytes = 0;
        let mut is_last = ends;
        while let Some(change) = commit.changes.get(*from) {
            if self.filter.passes(change, &facts.admin_role) {
                let change = convert::change(change, commit.revision, commit.at, &facts.admin_role);
                bytes += prost::Message::encoded_len(&change);
                if !changes.is_empty() && (changes.len() == MESSAGE_CHANGES || bytes > MESSAGE_BYTES) {
                    is_last = false;
                    break;
                }
                changes.push(change);
            }
            *from += 1;
        }
        // The end of a commit of which parts have been sent has to be told, if need be with nothing in it.
        let is_due = !changes.is_empty() || (ends && inside);
        is_due.then(|| convert::commit(commit, changes, !is_last, facts.store_id))
    }
}

/// Users in runs that fit into a message each; one empty run of none.
fn in_messages(users: Vec<v1::UserRole>) -> Vec<Vec<v1::UserRole>> {
    let mut runs = vec![Vec::new()];
    let mut bytes = 0;
    for user in users {
        let size = prost::Message::encoded_len(&user);
        match runs.last_mut() {
            Some(run) if run.is_empty() || bytes + size <= MESSAGE_BYTES => {
                bytes += size;
                run.push(user);
            }
            _ => {
                bytes = size;
                runs.push(vec![user]);
            }
        }
    }
    runs
}

enum Happened {
    HeartbeatDue,
    Commit(Result<Arc<Commit>, CursorError>),
    Shutdown,
    Revoked,
    Deadline,
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn response(event: Event) -> v1::WatchRoleChangesResponse {
    v1::WatchRoleChangesResponse { event: Some(event) }
}

// === impl Watches ===

impl Watches {
    pub(super) fn new(most: usize) -> Self {
        Self { open: Arc::default(), most }
    }

    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    fn enter(&self) -> Result<Open, Fault> {
        let open = Open(self.open.clone());
        if self.open.fetch_add(1, Ordering::SeqCst) >= self.most {
            return Err(Fault::TooManyWatches);
        }
        Ok(open)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn a_panic_ends_the_watch_with_a_status() {
        let broken = try_stream! {
            yield response(Event::Snapshot(v1::Snapshot { users: Vec::new(), last: true }));
            panic!("a bug");
        };
        let items: Vec<Result<_, Status>> = caught(broken).collect().await;
        assert_eq!(items.len(), 2);
        assert!(items[0].is_ok());
        assert_eq!(items[1].as_ref().unwrap_err().code(), Code::Internal);
    }
}
