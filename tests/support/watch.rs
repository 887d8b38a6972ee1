//! What a watch tells, written down, and the promises that a transcript can break, each a function with its name.

use std::{collections::HashMap, time::Duration};

use rolecache::proto::v1::{
    Commit, FeedState, GetRoleRequest, RoleChange, UserRole, WatchRoleChangesRequest, WatchRoleChangesResponse,
    WatchStarted, role_cache_service_client::RoleCacheServiceClient, watch_role_changes_response::Event,
};
use tokio::time::timeout;
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_types::StatusExt;

use super::server::PATIENCE;

/// An open watch and all that it has told.
pub struct Watching {
    pub client: RoleCacheServiceClient<Channel>,
    pub started: WatchStarted,
    pub transcript: Vec<Event>,
    stream: Streaming<WatchRoleChangesResponse>,
}

// === impl Watching ===

impl Watching {
    pub async fn open(
        mut client: RoleCacheServiceClient<Channel>,
        request: WatchRoleChangesRequest,
    ) -> Result<Self, Status> {
        let mut stream = client.watch_role_changes(request).await?.into_inner();
        match next(&mut stream).await? {
            Event::Started(started) => {
                let transcript = vec![Event::Started(started.clone())];
                Ok(Self { client, started, transcript, stream })
            }
            other => panic!("a watch began with {other:?}"),
        }
    }

    /// The next message, or the error that ended the watch.
    pub async fn try_next(&mut self) -> Result<Event, Status> {
        let event = next(&mut self.stream).await?;
        self.transcript.push(event.clone());
        Ok(event)
    }

    pub async fn next(&mut self) -> Event {
        self.try_next().await.unwrap_or_else(|status| panic!("the watch ended with {status:?}\n{:#?}", self.transcript))
    }

    /// The next message of a commit; heartbeats before it are passed over.
    #[track_caller]
    pub fn next_commit_message(&mut self) -> impl Future<Output = Commit> {
        in_time("a commit", async {
            loop {
                match self.next().await {
                    Event::Commit(commit) => return commit,
                    Event::Heartbeat(_) => {}
                    other => panic!("{other:?} where a commit was due"),
                }
            }
        })
    }

    /// The next commit, put together from its parts.
    pub async fn next_commit(&mut self) -> Commit {
        let mut whole = self.next_commit_message().await;
        while whole.partial {
            let part = self.next_commit_message().await;
            assert_eq!(part.revision, whole.revision, "a part of another commit came in between");
            whole.changes.extend(part.changes);
            whole.partial = part.partial;
            whole.resume_token = part.resume_token;
        }
        whole
    }

    /// The snapshot that follows the start.
    pub async fn snapshot(&mut self) -> Vec<UserRole> {
        let mut users = Vec::new();
        loop {
            match self.next().await {
                Event::Snapshot(chunk) => {
                    users.extend(chunk.users);
                    if chunk.last {
                        return users;
                    }
                }
                other => panic!("{other:?} inside a snapshot"),
            }
        }
    }

    /// Reads until a commit or heartbeat of at least `revision`.
    #[track_caller]
    pub fn until(&mut self, revision: i64) -> impl Future<Output = ()> {
        in_time("a revision", async move {
            loop {
                match self.next().await {
                    Event::Commit(commit) if !commit.partial && commit.revision >= revision => return,
                    Event::Heartbeat(heartbeat) if heartbeat.revision >= revision => return,
                    _ => {}
                }
            }
        })
    }

    /// Reads until a heartbeat says that the replica has lost its store.
    pub async fn until_disconnected(&mut self) {
        loop {
            if let Event::Heartbeat(heartbeat) = self.next().await
                && heartbeat.feed_state() == FeedState::Disconnected
            {
                return;
            }
        }
    }

    /// Reads to the error that ends the watch.
    #[track_caller]
    pub fn until_end(&mut self) -> impl Future<Output = Status> {
        in_time("the end of the watch", async {
            loop {
                if let Err(status) = self.try_next().await {
                    return status;
                }
            }
        })
    }

    /// Nothing comes for so long but heartbeats.
    pub async fn quiet_for(&mut self, time: Duration) {
        let _ = timeout(time, async {
            loop {
                match self.next().await {
                    Event::Heartbeat(_) => {}
                    other => panic!("{other:?} where nothing was due"),
                }
            }
        })
        .await;
    }

    /// The token of the last thing told that may be resumed from.
    pub fn resume_token(&self) -> String {
        let token = |event: &Event| match event {
            Event::Started(started) => Some(started.resume_token.clone()),
            Event::Commit(commit) if !commit.partial => Some(commit.resume_token.clone()),
            Event::Heartbeat(heartbeat) => Some(heartbeat.resume_token.clone()),
            _ => None,
        };
        self.transcript.iter().rev().find_map(token).unwrap()
    }

    pub fn changes(&self) -> Vec<RoleChange> {
        changes(&self.transcript)
    }

    /// Every promise that one transcript can break.
    #[track_caller]
    pub fn check(&self) {
        ordered(&self.transcript);
        unique(&self.transcript);
        atomic(&self.transcript);
        progress_safe(&self.transcript);
    }

    /// *Cache-first*: who hears of a change and then reads gets it, or a newer one.
    pub async fn cache_first(&mut self, change: &RoleChange, default_role: &str) {
        let request = GetRoleRequest { user_id: change.user_id, ..Default::default() };
        let answer = self.client.get_role(request).await.unwrap().into_inner();
        let heard = if change.new_role.is_empty() { default_role } else { &change.new_role };
        assert!(
            answer.revision >= change.revision || answer.role == heard,
            "heard of {change:?}, then read {answer:?}"
        );
    }
}

/// Heartbeats alone must not keep a test waiting.
#[track_caller]
fn in_time<T>(what: &str, wait: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move { timeout(3 * PATIENCE, wait).await.unwrap_or_else(|_| panic!("{caller}: {what} should come in time")) }
}

async fn next(stream: &mut Streaming<WatchRoleChangesResponse>) -> Result<Event, Status> {
    let message = timeout(PATIENCE, stream.message()).await.expect("a watch should not be silent for so long")?;
    Ok(message.expect("a watch never ends without a status").event.expect("no message is empty"))
}

pub fn changes(transcript: &[Event]) -> Vec<RoleChange> {
    let of = |event: &Event| match event {
        Event::Commit(commit) => commit.changes.clone(),
        _ => Vec::new(),
    };
    transcript.iter().flat_map(of).collect()
}

fn commits(transcript: &[Event]) -> impl Iterator<Item = &Commit> {
    transcript.iter().filter_map(|event| match event {
        Event::Commit(commit) => Some(commit),
        _ => None,
    })
}

/// *Ordered*: revisions grow, and within a commit the indexes do.
#[track_caller]
pub fn ordered(transcript: &[Event]) {
    let mut last = (-1, -1);
    for change in changes(transcript) {
        let place = (change.revision, change.index);
        assert!(place > last, "{place:?} came after {last:?}\n{transcript:#?}");
        last = place;
    }
}

/// *Unique*: no change comes twice.
#[track_caller]
pub fn unique(transcript: &[Event]) {
    let mut seen = HashMap::new();
    for change in changes(transcript) {
        let twice = seen.insert((change.revision, change.index), change);
        assert!(twice.is_none(), "{twice:?} came twice\n{transcript:#?}");
    }
}

/// *Atomic*: the parts of a commit come together, and nothing comes between them; only its last message may be resumed
/// from.
#[track_caller]
pub fn atomic(transcript: &[Event]) {
    let mut open: Option<i64> = None;
    let mut closed = i64::MIN;
    for event in transcript {
        match event {
            Event::Commit(commit) => {
                assert!(open.is_none_or(|open| open == commit.revision), "a commit inside {open:?}\n{transcript:#?}");
                assert!(commit.revision > closed, "commit {} came again\n{transcript:#?}", commit.revision);
                assert!(commit.changes.iter().all(|change| change.revision == commit.revision));
                assert_eq!(commit.partial, commit.resume_token.is_empty());
                open = commit.partial.then_some(commit.revision);
                if !commit.partial {
                    closed = commit.revision;
                }
            }
            other => assert!(open.is_none(), "{other:?} inside commit {open:?}\n{transcript:#?}"),
        }
    }
}

/// *Progress-safe*: a heartbeat never names a revision of which a commit is still to come, and never goes back.
#[track_caller]
pub fn progress_safe(transcript: &[Event]) {
    let mut promised = i64::MIN;
    for event in transcript {
        match event {
            Event::Heartbeat(heartbeat) => {
                assert!(heartbeat.revision >= promised, "a heartbeat went back\n{transcript:#?}");
                promised = heartbeat.revision;
            }
            Event::Commit(commit) => {
                assert!(
                    commit.revision > promised,
                    "commit {} came after a heartbeat of {promised}\n{transcript:#?}",
                    commit.revision
                );
            }
            _ => {}
        }
    }
}

/// *Reliable*: exactly these changes were told, from `log`, all that is after `after`.
#[track_caller]
pub fn reliable(transcript: &[Event], log: &[RoleChange], after: i64) {
    let told: Vec<_> = changes(transcript);
    let expected: Vec<_> = log.iter().filter(|change| change.revision > after).cloned().collect();
    assert_eq!(told.len(), expected.len(), "{} changes were told of {}", told.len(), expected.len());
    for (told, expected) in told.iter().zip(&expected) {
        assert_eq!(told, expected);
    }
}

/// *Resumable*: what several watches told, each resumed from the token of the one before, is the log without a hole.
#[track_caller]
pub fn resumable(transcripts: &[&[Event]], log: &[RoleChange], after: i64) {
    let joined: Vec<Event> = transcripts.iter().flat_map(|transcript| transcript.iter().cloned()).collect();
    reliable(&joined, log, after);
}

/// The code and the reason of an error, which every error has, with its metadata.
#[track_caller]
pub fn reason(status: &Status) -> (Code, String, HashMap<String, String>) {
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("an error without a reason: {status:?}"));
    assert_eq!(info.domain, "rolecache");
    assert!(status.message().ends_with('.'), "no sentence: {}", status.message());
    (status.code(), info.reason, info.metadata)
}
