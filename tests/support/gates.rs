//! A store with gates: a test holds a call at a gate, lets something else happen, and opens the gate.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use rolecache::{
    role::{Anchor, MailboxId, Revision, Tag, UserId},
    store::{
        Call, ChangePage, Facts, ListPosition, LogError, Page, Position, Roles, Snapshot, Store, StoreError, Trimmed,
        UserPage, WriteError, Written,
    },
};
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

use super::server::PATIENCE;

/// Holds calls while it is closed.
#[derive(Clone)]
pub struct Gate {
    closed: watch::Sender<bool>,
    /// A permit per call that has come to the closed gate.
    arrived: Arc<Semaphore>,
    /// A permit per call that may pass the closed gate.
    passes: Arc<Semaphore>,
}

/// The gates of one store, each before or after the real call.
#[derive(Clone, Default)]
pub struct Gates {
    /// After the answer to a fill's query is read, before it is handed over.
    pub roles_read: Gate,
    /// Before a fill's query is sent.
    pub roles: Gate,
    /// Before a page of the log is read.
    pub read_log: Gate,
    /// After a snapshot is begun, so that its revision is fixed, before its first chunk.
    pub snapshot: Gate,
    /// After a page of the log is read, before it is handed over.
    pub log_read: Gate,
    /// After a snapshot is begun, before anybody is told.
    pub snapshot_begun: Gate,
    /// After a list is read, before it is handed over.
    pub listed: Gate,
    /// After a group is committed, before its answer is handed over.
    pub written: Gate,
    /// Before a group is sent.
    pub write: Gate,
    pub head: Gate,
    pub locate: Gate,
    /// While it is set, every look for a mailbox panics.
    pub mailbox_panics: Arc<AtomicBool>,
    /// While it is set, every snapshot panics.
    pub snapshot_panics: Arc<AtomicBool>,
    /// Fills' queries fail, as they do when the store is out of reach.
    roles_fail: Arc<AtomicBool>,
    snapshots: Arc<AtomicUsize>,
    sent: Arc<Mutex<Vec<Call>>>,
}

pub struct GatedStore {
    inner: Arc<dyn Store>,
    gates: Gates,
}

struct GatedSnapshot {
    inner: Box<dyn Snapshot>,
    gate: Gate,
}

// === impl Gate ===

impl Default for Gate {
    fn default() -> Self {
        let none = || Arc::new(Semaphore::new(0));
        Self { closed: watch::Sender::new(false), arrived: none(), passes: none() }
    }
}

impl Gate {
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    pub fn open(&self) {
        self.closed.send_replace(false);
    }

    /// Lets one call through the closed gate: the one that waits, or the next that comes.
    pub fn let_one_pass(&self) {
        self.passes.add_permits(1);
    }

    /// Waits until a call has come to the closed gate, one that nobody has waited for yet.
    pub async fn arrived(&self) {
        timeout(PATIENCE, self.arrived.acquire()).await.expect("a call should come to the gate").unwrap().forget();
    }

    /// Calls that have come to the closed gate and that nobody has waited for.
    pub fn waiting(&self) -> usize {
        self.arrived.available_permits()
    }

    async fn pass(&self) {
        let mut closed = self.closed.subscribe();
        if *closed.borrow_and_update() {
            self.arrived.add_permits(1);
            tokio::select! {
                _ = closed.wait_for(|closed| !closed) => {}
                pass = self.passes.acquire() => pass.unwrap().forget(),
            }
        }
    }
}

// === impl Gates ===

impl Gates {
    pub fn fail_roles(&self, fail: bool) {
        self.roles_fail.store(fail, Ordering::SeqCst);
    }

    pub fn snapshots_begun(&self) -> usize {
        self.snapshots.load(Ordering::SeqCst)
    }

    /// Every call that was sent, as often as it was.
    pub fn sent(&self) -> Vec<Call> {
        self.sent.lock().unwrap().clone()
    }

    /// For [`super::server::Setup::wrap`].
    pub fn guard(&self) -> impl Fn(Arc<dyn Store>) -> Arc<dyn Store> + Send + Sync + 'static {
        let gates = self.clone();
        move |inner| Arc::new(GatedStore { inner, gates: gates.clone() })
    }
}

#[async_trait]
impl Store for GatedStore {
    fn facts(&self) -> &Facts {
        self.inner.facts()
    }

    async fn head(&self) -> Result<Anchor, StoreError> {
        self.gates.head.pass().await;
        self.inner.head().await
    }

    async fn read_log(&self, from: &Position, limit: usize) -> Result<Page, LogError> {
        self.gates.read_log.pass().await;
        let page = self.inner.read_log(from, limit).await;
        self.gates.log_read.pass().await;
        page
    }

    async fn locate(&self, revision: Revision, tag: Option<Tag>) -> Result<Anchor, LogError> {
        self.gates.locate.pass().await;
        self.inner.locate(revision, tag).await
    }

    async fn roles(&self, users: &[UserId]) -> Result<Roles, StoreError> {
        self.gates.roles.pass().await;
        if self.gates.roles_fail.load(Ordering::SeqCst) {
            return Err(StoreError::Unreachable(Arc::new(std::io::Error::other("on purpose"))));
        }
        let roles = self.inner.roles(users).await;
        self.gates.roles_read.pass().await;
        roles
    }

    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
        self.gates.snapshots.fetch_add(1, Ordering::SeqCst);
        assert!(!self.gates.snapshot_panics.load(Ordering::SeqCst), "a snapshot that nobody may take");
        let inner = self.inner.snapshot().await?;
        self.gates.snapshot_begun.pass().await;
        Ok(Box::new(GatedSnapshot { inner, gate: self.gates.snapshot.clone() }))
    }

    async fn write(&self, calls: &[Call]) -> Vec<Result<Written, WriteError>> {
        self.gates.write.pass().await;
        self.gates.sent.lock().unwrap().extend_from_slice(calls);
        let written = self.inner.write(calls).await;
        self.gates.written.pass().await;
        written
    }

    async fn mailbox(&self, mailbox: MailboxId) -> Result<Option<UserId>, StoreError> {
        assert!(!self.gates.mailbox_panics.load(Ordering::SeqCst), "a mailbox that nobody may look for");
        self.inner.mailbox(mailbox).await
    }

    async fn list_users(
        &self,
        role: Option<&str>,
        after: Option<UserId>,
        limit: usize,
    ) -> Result<UserPage, StoreError> {
        let page = self.inner.list_users(role, after, limit).await;
        self.gates.listed.pass().await;
        page
    }

    async fn list_changes(
        &self,
        user: Option<UserId>,
        from: ListPosition,
        limit: usize,
    ) -> Result<ChangePage, LogError> {
        let page = self.inner.list_changes(user, from, limit).await;
        self.gates.listed.pass().await;
        page
    }

    async fn trim(&self, retain: Duration) -> Result<Trimmed, StoreError> {
        self.inner.trim(retain).await
    }

    async fn check_triggers(&self) -> Result<Vec<String>, StoreError> {
        self.inner.check_triggers().await
    }

    async fn listen(&self, wake: &(dyn Fn() + Send + Sync)) -> StoreError {
        self.inner.listen(wake).await
    }

    fn poll_at_least_every(&self) -> Option<Duration> {
        self.inner.poll_at_least_every()
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

#[async_trait]
impl Snapshot for GatedSnapshot {
    fn anchor(&self) -> Anchor {
        self.inner.anchor()
    }

    async fn next(&mut self) -> Result<Vec<rolecache::role::UserRow>, StoreError> {
        self.gate.pass().await;
        self.inner.next().await
    }
}
