//! A watcher that a campaign leads by the hand: where it stops, where it goes on, and what it has seen by then.

use std::time::Duration;

use rolecache::proto::v1::{
    Commit, WatchRoleChangesRequest, WatchRoleChangesResponse, role_cache_service_client::RoleCacheServiceClient,
    watch_role_changes_response::Event,
};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

use super::{cluster::Replica, history::Seen, support::server::PATIENCE, traffic::reason};

/// Three heartbeats missing: the server is gone, and nobody said so.
const SILENCE: Duration = Duration::from_secs(3);

pub struct Watcher {
    pub seen: Seen,
    /// Where it goes on.
    pub token: String,
    /// What it has of a commit that is not whole yet.
    part: Option<Commit>,
    stream: Option<Streaming<WatchRoleChangesResponse>>,
    origin: Instant,
}

impl Watcher {
    /// From a token or a revision; from the head where that is empty.
    pub fn after(token: impl ToString) -> Self {
        Self { seen: Seen::default(), token: token.to_string(), part: None, stream: None, origin: Instant::now() }
    }

    /// Opens a stream where the last one ended.
    pub async fn open(&mut self, client: &mut RoleCacheServiceClient<Channel>) -> Result<(), Status> {
        let request = WatchRoleChangesRequest {
            after: self.token.clone(),
            heartbeat_interval: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            ..Default::default()
        };
        let opened = timeout(SILENCE, client.watch_role_changes(request)).await;
        let opened = opened.unwrap_or_else(|_| Err(Status::cancelled("no answer in time")));
        self.part = None;
        self.stream = Some(opened.map_err(|status| self.ended(status))?.into_inner());
        // The start, which comes at once.
        self.next().await
    }

    /// Takes the next message.
    pub async fn next(&mut self) -> Result<(), Status> {
        let stream = self.stream.as_mut().expect("it is open");
        let message = match timeout(SILENCE, stream.message()).await {
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => return Err(self.ended(Status::cancelled("an end without a status"))),
            Ok(Err(status)) => return Err(self.ended(status)),
            Err(_) => return Err(self.ended(Status::cancelled("no heartbeat in time"))),
        };
        match message.event {
            Some(Event::Started(started)) => {
                if self.seen.opened == 0 {
                    self.seen.from = started.revision;
                }
                self.seen.opened += 1;
                self.token = started.resume_token;
            }
            Some(Event::Commit(part)) => {
                let (is_whole, token) = (!part.partial, part.resume_token.clone());
                match &mut self.part {
                    Some(commit) => commit.changes.extend(part.changes),
                    None => self.part = Some(part),
                }
                if is_whole {
                    let commit = self.part.take().unwrap();
                    self.seen.commits.push((self.origin.elapsed(), commit));
                    self.token = token;
                }
            }
            Some(Event::Heartbeat(heartbeat)) => {
                self.seen.heartbeats.push((heartbeat.revision, self.seen.commits.len()));
                self.token = heartbeat.resume_token;
            }
            Some(Event::Snapshot(_)) | None => {}
        }
        Ok(())
    }

    fn ended(&mut self, status: Status) -> Status {
        self.stream = None;
        self.seen.ends.push(reason(&status));
        status
    }

    /// Hangs up; whether in the midst of a commit.
    pub fn stop(&mut self) -> bool {
        self.stream = None;
        self.part.take().is_some()
    }

    pub fn is_open(&self) -> bool {
        self.stream.is_some()
    }

    /// The newest revision that it was told of, by a commit or by a heartbeat.
    pub fn at(&self) -> i64 {
        let commit = self.seen.commits.last().map_or(self.seen.from, |(_, commit)| commit.revision);
        commit.max(self.seen.heartbeats.last().map_or(0, |(revision, _)| *revision))
    }

    /// Goes on until it has been told of `revision`; Err says that it was not in time.
    pub async fn until(&mut self, revision: i64, replica: &Replica) -> Result<(), String> {
        let mut client = replica.client();
        let reached = async {
            while self.at() < revision {
                self.step(&mut client).await;
            }
        };
        match timeout(PATIENCE, reached).await {
            Ok(()) => Ok(()),
            Err(_) => Err(format!("a watch from {} did not get to {revision}, only to {}", self.seen.from, self.at())),
        }
    }

    /// Goes on until it is stopped, on one replica.
    pub async fn follow(mut self, mut client: RoleCacheServiceClient<Channel>, stop: CancellationToken) -> Self {
        loop {
            tokio::select! {
                () = stop.cancelled() => return self,
                () = self.step(&mut client) => {}
            }
        }
    }

    /// Takes a message; opens a stream where there is none.
    async fn step(&mut self, client: &mut RoleCacheServiceClient<Channel>) {
        if self.is_open() {
            let _ = self.next().await;
        } else if self.open(client).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    }
}
