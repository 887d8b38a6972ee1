//! What a watch has told so far, and from where it goes on: the part of `watch` that touches no network.
//!
//! A commit, and a snapshot, is held until its last part is here. So what a broken connection cut short was never
//! told, and is told once, whole, by the connection that resumes: resume tokens come only with whole commits.

use crate::proto::v1::{WatchRoleChangesResponse, watch_role_changes_response::Event};

/// The state of one watch across its connections.
#[derive(Debug)]
pub(super) struct Progress {
    /// From where the next connection resumes; empty for from now on.
    pub(super) after: String,
    /// The same as a number, for people; none before the first word of the server.
    pub(super) revision: Option<i64>,
    /// Parts of what is not whole yet.
    held: Vec<WatchRoleChangesResponse>,
    /// The revision of the snapshot that is being received, and where to resume from once it is whole.
    snapshot: Option<(i64, String)>,
}

/// What a message completes.
#[derive(PartialEq, Debug, Default)]
pub(super) struct Whole {
    pub(super) messages: Vec<WatchRoleChangesResponse>,
    /// Whether they are a commit.
    pub(super) commit: bool,
}

// === impl Progress ===

impl Progress {
    pub(super) fn new(after: String) -> Self {
        Self { after, revision: None, held: Vec::new(), snapshot: None }
    }

    /// Takes a message, and gives out what is whole with it.
    pub(super) fn take(&mut self, message: WatchRoleChangesResponse, wants_snapshot: bool) -> Whole {
        let mut commit = false;
        match &message.event {
            Some(Event::Started(started)) => {
                self.held.clear();
                self.snapshot = None;
                if wants_snapshot && !started.resumed {
                    self.snapshot = Some((started.revision, started.resume_token.clone()));
                } else {
                    self.reached(started.revision, started.resume_token.clone());
                }
            }
            Some(Event::Snapshot(part)) if part.last => {
                if let Some((revision, token)) = self.snapshot.take() {
                    self.reached(revision, token);
                }
            }
            Some(Event::Commit(part)) if !part.partial => {
                commit = true;
                self.reached(part.revision, part.resume_token.clone());
            }
            // Between the parts of something no heartbeat comes; one that did would skip what is held.
            Some(Event::Heartbeat(heartbeat)) if self.held.is_empty() => {
                self.reached(heartbeat.revision, heartbeat.resume_token.clone());
            }
            Some(Event::Snapshot(_) | Event::Commit(_)) => {
                self.held.push(message);
                return Whole::default();
            }
            Some(Event::Heartbeat(_)) | None => return Whole::default(),
        }
        if self.snapshot.is_some() {
            self.held.push(message);
            return Whole::default();
        }
        let mut messages = std::mem::take(&mut self.held);
        messages.push(message);
        Whole { messages, commit }
    }

    /// The connection is gone: what is not whole comes again.
    pub(super) fn broken(&mut self) {
        self.held.clear();
        self.snapshot = None;
    }

    /// Whether something is half here, which may take the server a while.
    pub(super) fn is_receiving(&self) -> bool {
        self.snapshot.is_some() || !self.held.is_empty()
    }

    fn reached(&mut self, revision: i64, token: String) {
        self.revision = Some(revision);
        if !token.is_empty() {
            self.after = token;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::{Commit, Heartbeat, Snapshot, UserRole, WatchStarted};

    fn message(event: Event) -> WatchRoleChangesResponse {
        WatchRoleChangesResponse { event: Some(event) }
    }

    fn started(revision: i64, resumed: bool) -> WatchRoleChangesResponse {
        let resume_token = format!("t{revision}");
        message(Event::Started(WatchStarted { revision, resumed, resume_token, ..Default::default() }))
    }

    fn part(revision: i64, partial: bool) -> WatchRoleChangesResponse {
        let resume_token = if partial { String::new() } else { format!("t{revision}") };
        message(Event::Commit(Commit { revision, partial, resume_token, ..Default::default() }))
    }

    fn heartbeat(revision: i64) -> WatchRoleChangesResponse {
        message(Event::Heartbeat(Heartbeat { revision, resume_token: format!("t{revision}"), ..Default::default() }))
    }

    fn snapshot(user_id: i64, last: bool) -> WatchRoleChangesResponse {
        message(Event::Snapshot(Snapshot { users: vec![UserRole { user_id, ..Default::default() }], last }))
    }

    #[test]
    fn a_commit_is_told_when_its_last_part_is_here() {
        let mut progress = Progress::new(String::new());
        assert_eq!(progress.take(started(3, false), false).messages, [started(3, false)]);
        assert_eq!(progress.take(part(4, true), false), Whole::default());
        assert_eq!((progress.after.as_str(), progress.is_receiving()), ("t3", true));
        let whole = progress.take(part(4, false), false);
        assert_eq!(whole, Whole { messages: vec![part(4, true), part(4, false)], commit: true });
        assert_eq!((progress.after.as_str(), progress.is_receiving()), ("t4", false));
    }

    #[test]
    fn half_a_commit_is_forgotten_with_its_connection() {
        let mut progress = Progress::new(String::new());
        progress.take(started(3, false), false);
        progress.take(part(4, true), false);
        progress.broken();
        assert_eq!(progress.after, "t3");
        progress.take(started(3, true), false);
        assert_eq!(progress.take(part(4, true), false), Whole::default());
        assert_eq!(progress.take(part(4, false), false).messages, [part(4, true), part(4, false)]);
    }

    #[test]
    fn a_snapshot_is_told_whole_and_only_then_resumed_from() {
        let mut progress = Progress::new("old".into());
        assert_eq!(progress.take(started(9, false), true), Whole::default());
        assert_eq!(progress.take(snapshot(1, false), true), Whole::default());
        progress.broken();
        assert_eq!(progress.after, "old");
        progress.take(started(10, false), true);
        let whole = progress.take(snapshot(2, true), true);
        assert_eq!(whole, Whole { messages: vec![started(10, false), snapshot(2, true)], commit: false });
        assert_eq!((progress.after.as_str(), progress.revision), ("t10", Some(10)));
    }

    #[test]
    fn a_resumed_watch_has_no_snapshot_to_wait_for() {
        let mut progress = Progress::new("t9".into());
        assert_eq!(progress.take(started(9, true), true).messages, [started(9, true)]);
        assert!(!progress.is_receiving());
    }

    #[test]
    fn a_heartbeat_moves_the_point_to_resume_from() {
        let mut progress = Progress::new(String::new());
        progress.take(started(3, false), false);
        progress.take(heartbeat(8), false);
        assert_eq!((progress.after.as_str(), progress.revision), ("t8", Some(8)));
        progress.take(part(9, true), false);
        progress.take(heartbeat(9), false);
        assert_eq!(progress.after, "t8", "half a commit would be skipped");
    }
}
