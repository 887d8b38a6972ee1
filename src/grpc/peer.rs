//! The other end of a connection, and the calls that go over it.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::{Limits, meter::Meter};
use crate::access::Caller;

/// Calls of one connection at once that need no credentials: it takes many connections to keep others from theirs.
const OPEN_TO_ALL: usize = 16;

/// The other end of a connection.
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    /// Of its certificate, where it has shown one.
    pub(super) names: Vec<String>,
    pub(super) meter: Arc<Meter>,
    /// For calls that need no credentials.
    open_to_all: Arc<Semaphore>,
    /// Never held across an await.
    use_: Mutex<Use>,
}

/// How a connection is used.
struct Use {
    /// In the order in which they came.
    calls: BTreeMap<u64, Call>,
    next: u64,
    /// Since when there is none.
    idle_since: Instant,
}

/// A call whose answer is not sent yet.
#[derive(Default)]
struct Call {
    caller: Option<Arc<Caller>>,
    /// When its whole answer was there to be read.
    answered: Option<Instant>,
}

/// A call on a connection, until its answer is sent or given up.
pub(super) struct Active {
    peer: Arc<Peer>,
    number: u64,
}

// === impl Peer ===

impl Peer {
    pub(super) fn new(address: SocketAddr, names: Vec<String>, limits: &Limits) -> Self {
        let use_ = Use { calls: BTreeMap::new(), next: 0, idle_since: Instant::now() };
        let open_to_all = Arc::new(Semaphore::new(OPEN_TO_ALL));
        Self { address, names, meter: Arc::new(Meter::new(limits)), open_to_all, use_: Mutex::new(use_) }
    }

    /// A call begins, with a head of so many bytes.
    pub(super) fn begin(self: &Arc<Self>, head: usize) -> Active {
        self.meter.begin_call(head);
        let mut use_ = self.use_();
        let number = use_.next;
        use_.next += 1;
        use_.calls.insert(number, Call::default());
        drop(use_);
        Active { peer: self.clone(), number }
    }

    /// A place for a call that needs no credentials, as long as it is held.
    pub(super) fn begin_open_to_all(&self) -> Option<OwnedSemaphorePermit> {
        self.open_to_all.clone().try_acquire_owned().ok()
    }

    /// Since when nothing goes over it; None while something does.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let use_ = self.use_();
        use_.calls.is_empty().then_some(use_.idle_since)
    }

    /// Whether some answer has been there for so long, and is still not read.
    pub(super) fn leaves_unread(&self, limit: Duration) -> bool {
        self.use_().calls.values().any(|call| call.answered.is_some_and(|answered| answered.elapsed() >= limit))
    }

    /// Whether a caller has a call here whose credential is gone.
    pub(super) fn is_revoked(&self) -> bool {
        self.use_().calls.values().any(|call| call.caller.as_ref().is_some_and(|caller| caller.is_revoked()))
    }

    fn use_(&self) -> MutexGuard<'_, Use> {
        self.use_.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Active ===

impl Active {
    pub(super) fn is_of(&self, caller: &Arc<Caller>) {
        if let Some(call) = self.peer.use_().calls.get_mut(&self.number) {
            call.caller = Some(caller.clone());
        }
    }

    /// A part of its answer goes out.
    pub(super) fn sent(&self, bytes: usize) {
        self.peer.meter.sent(bytes);
    }

    pub(super) fn is_answered(&self) {
        if let Some(call) = self.peer.use_().calls.get_mut(&self.number) {
            call.answered = Some(Instant::now());
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let mut use_ = self.peer.use_();
        use_.calls.remove(&self.number);
        if use_.calls.is_empty() {
            use_.idle_since = Instant::now();
        }
    }
}
