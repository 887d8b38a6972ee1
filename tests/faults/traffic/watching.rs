//! Watchers: each goes on from its last token on any replica, whatever ends its streams; every other one begins with a
//! snapshot.

use std::time::Duration;

use rolecache::proto::v1::{
    Commit, WatchRoleChangesRequest, WatchRoleChangesResponse, watch_role_changes_response::Event,
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Caller, reason};
use crate::history::{End, History, Seen, Snapshot};

/// A watcher's place in the history, and where it goes on.
struct Watcher<'a> {
    history: &'a History,
    number: usize,
    /// Empty until it has begun: until its snapshot is whole, where it wants one.
    token: String,
    wants_snapshot: bool,
    /// What it has of a commit that is not whole yet, and of its snapshot.
    part: Option<Commit>,
    snapshot: Snapshot,
}

pub(super) async fn watch(mut caller: Caller, stop: CancellationToken) {
    let history = caller.history.clone();
    let mut watcher = Watcher::new(&history);
    while !stop.is_cancelled() {
        let (replica, mut client) = caller.pick();
        let (process, mut last) = (caller.process(replica), history.now());
        let end = |was_open, last, why| {
            let ended = history.now();
            history.ends.lock().unwrap().push(End { process, last, ended, was_open, why });
        };
        // Without a deadline: it goes on as long as it goes on.
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            // Where its store is silent it takes that long to be told so.
            opened = timeout(Duration::from_secs(9), client.watch_role_changes(watcher.request())) => opened,
        };
        let mut stream = match opened {
            Ok(Ok(stream)) => stream.into_inner(),
            refused => {
                let silent = || Status::cancelled("no answer in time");
                end(false, last, reason(&refused.map_or_else(|_| silent(), |refused| refused.unwrap_err())));
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        loop {
            let message = tokio::select! {
                () = stop.cancelled() => return,
                // Three heartbeats missing: the server is gone, and nobody said so.
                message = timeout(Duration::from_secs(3), stream.message()) => message,
            };
            match message {
                Ok(Ok(Some(message))) => watcher.take(message),
                Ok(Ok(None)) => break end(true, last, reason(&Status::cancelled("an end without a status"))),
                Ok(Err(status)) => break end(true, last, reason(&status)),
                Err(_) => break end(true, last, reason(&Status::cancelled("no heartbeat in time"))),
            }
            last = history.now();
        }
    }
}

// === impl Watcher ===

impl<'a> Watcher<'a> {
    fn new(history: &'a History) -> Self {
        let mut seen = history.seen.lock().unwrap();
        seen.push(Seen::default());
        let number = seen.len() - 1;
        let snapshot = Snapshot::default();
        Self { history, number, token: String::new(), wants_snapshot: number % 2 == 1, part: None, snapshot }
    }

    fn request(&self) -> WatchRoleChangesRequest {
        WatchRoleChangesRequest {
            after: self.token.clone(),
            initial_snapshot: self.wants_snapshot,
            heartbeat_interval: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            ..Default::default()
        }
    }

    fn take(&mut self, message: WatchRoleChangesResponse) {
        let at = self.history.now();
        let seen = &mut self.history.seen.lock().unwrap()[self.number];
        match message.event {
            Some(Event::Started(started)) => {
                self.part = None;
                seen.opened += 1;
                if self.token.is_empty() {
                    seen.from = started.revision;
                    seen.snapshot = None;
                    self.snapshot = Snapshot { revision: started.revision, users: Vec::new() };
                    if !self.wants_snapshot {
                        self.token = started.resume_token;
                    }
                } else if !started.resumed {
                    seen.started_over.push(started.revision);
                }
            }
            Some(Event::Snapshot(part)) => {
                let users = part.users.into_iter().map(|user| (user.user_id, user.role));
                self.snapshot.users.extend(users);
                if part.last {
                    seen.snapshot = Some(std::mem::take(&mut self.snapshot));
                }
            }
            Some(Event::Commit(part)) => {
                let (is_whole, token) = (!part.partial, part.resume_token.clone());
                match &mut self.part {
                    Some(commit) => commit.changes.extend(part.changes),
                    None => self.part = Some(part),
                }
                if is_whole && let Some(commit) = self.part.take() {
                    self.history.told_of(commit.revision);
                    seen.commits.push((at, commit));
                    self.token = token;
                }
            }
            Some(Event::Heartbeat(heartbeat)) => {
                seen.heartbeats.push((heartbeat.revision, seen.commits.len()));
                self.token = heartbeat.resume_token;
            }
            None => {}
        }
    }
}
