//! The store of these tests: a list of states in memory, because a schedule has to decide when each query reads and when
//! its answer arrives. The stores themselves are tested elsewhere.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::{
    role::{Anchor, Change, Commit, MailboxId, Origin, Revision, RoleName, Tag, UserId, UserRow},
    store::{
        Call, ChangePage, Facts, ListPosition, LogError, Page, Position, Roles, Snapshot, Store, StoreError, StoreKind,
        Trimmed, UserPage, WriteError, Written,
    },
};

pub(super) const DEFAULT: &str = "user";

/// Who has which role; who is not in it has the default one.
pub(super) type State = BTreeMap<i64, &'static str>;

/// All that the store was, by revision, in one history.
pub(super) struct Truth {
    facts: Facts,
    pub(super) states: Mutex<Vec<State>>,
    /// While it is set, queries find commits of the same numbers in another history.
    pub(super) is_another: AtomicBool,
    pub(super) may_read: Semaphore,
    pub(super) may_arrive: Semaphore,
    pub(super) chunk_may_arrive: Arc<Semaphore>,
}

struct Chunks {
    at: Revision,
    rows: Vec<UserRow>,
    may_arrive: Arc<Semaphore>,
}

pub(super) fn role_in(state: &State, user: i64) -> &'static str {
    state.get(&user).copied().unwrap_or(DEFAULT)
}

pub(super) fn anchor(revision: usize) -> Anchor {
    Anchor { revision: Revision(revision as i64), tag: Tag(Uuid::nil()) }
}

/// A commit of these changes: a user, the role before and the role after, if there was one.
pub(super) fn commit<'a>(
    revision: usize,
    changes: impl IntoIterator<Item = (i64, Option<&'a str>, Option<&'a str>)>,
) -> Commit {
    let change = |(index, (user, old, new)): (u64, (i64, Option<&str>, Option<&str>))| Change {
        index,
        user: UserId(user),
        old: old.map(RoleName::held),
        new: new.map(RoleName::held),
        username: None,
        origin: Origin::Sql,
        actor: "test".into(),
        reason: None,
        transfer: None,
    };
    let changes: Vec<Change> = (0..).zip(changes).map(change).collect();
    let Anchor { revision, tag } = anchor(revision);
    Commit { revision, tag, at: SystemTime::UNIX_EPOCH, size: changes.len() as u64, changes }
}

// === impl Truth ===

impl Truth {
    pub(super) fn new() -> Self {
        let facts = Facts {
            kind: StoreKind::Sqlite,
            store_id: Uuid::nil(),
            default_role: RoleName::held(DEFAULT),
            admin_role: RoleName::held("admin"),
            about: String::new(),
            adopted: String::new(),
        };
        Self {
            facts,
            states: Mutex::new(vec![State::new()]),
            is_another: AtomicBool::new(false),
            may_read: Semaphore::new(0),
            may_arrive: Semaphore::new(0),
            chunk_may_arrive: Arc::new(Semaphore::new(0)),
        }
    }

    pub(super) fn newest(&self) -> (usize, State) {
        let states = self.states.lock().unwrap();
        (states.len() - 1, states.last().unwrap().clone())
    }
}

#[async_trait]
impl Store for Truth {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    async fn head(&self) -> Result<Anchor, StoreError> {
        Ok(anchor(self.newest().0))
    }

    async fn roles(&self, users: &[UserId]) -> Result<Roles, StoreError> {
        self.may_read.acquire().await.unwrap().forget();
        let (head, state) = self.newest();
        let mut head = anchor(head);
        if self.is_another.load(Ordering::SeqCst) {
            head.tag = Tag(Uuid::max());
        }
        self.may_arrive.acquire().await.unwrap().forget();
        let roles = users.iter().map(|user| RoleName::held(role_in(&state, user.0))).collect();
        Ok(Roles { head, roles })
    }

    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
        let (head, state) = self.newest();
        let row =
            |(user, role): (&i64, &&str)| UserRow { user: UserId(*user), role: RoleName::held(role), username: None };
        // Taken from the back.
        let rows = state.iter().rev().filter(|(_, role)| **role != DEFAULT).map(row).collect();
        Ok(Box::new(Chunks { at: Revision(head as i64), rows, may_arrive: self.chunk_may_arrive.clone() }))
    }

    async fn read_log(&self, _: &Position, _: usize) -> Result<Page, LogError> {
        unreachable!("the test itself is the tailer")
    }

    async fn locate(&self, _: Revision, _: Option<Tag>) -> Result<Anchor, LogError> {
        unreachable!()
    }

    async fn write(&self, _: &[Call]) -> Vec<Result<Written, WriteError>> {
        unreachable!()
    }

    async fn mailbox(&self, _: MailboxId) -> Result<Option<UserId>, StoreError> {
        unreachable!()
    }

    async fn list_users(&self, _: Option<&str>, _: Option<UserId>, _: usize) -> Result<UserPage, StoreError> {
        unreachable!()
    }

    async fn list_changes(&self, _: Option<UserId>, _: ListPosition, _: usize) -> Result<ChangePage, LogError> {
        unreachable!()
    }

    async fn trim(&self, _: Duration) -> Result<Trimmed, StoreError> {
        unreachable!()
    }

    async fn check_triggers(&self) -> Result<Vec<String>, StoreError> {
        unreachable!()
    }

    async fn listen(&self, _: &(dyn Fn() + Send + Sync)) -> StoreError {
        unreachable!()
    }

    fn poll_at_least_every(&self) -> Option<Duration> {
        None
    }

    async fn close(&self) {}
}

#[async_trait]
impl Snapshot for Chunks {
    fn anchor(&self) -> Anchor {
        anchor(self.at.0 as usize)
    }

    async fn next(&mut self) -> Result<Vec<UserRow>, StoreError> {
        self.may_arrive.acquire().await.unwrap().forget();
        Ok(self.rows.pop().into_iter().collect())
    }
}
