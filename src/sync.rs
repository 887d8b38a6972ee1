//! Locks, numbers and limits that tasks share. Under the feature `shuttle` a test decides in which order everybody comes
//! to them, and nothing ever takes too long.

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

#[cfg(not(feature = "shuttle"))]
pub(crate) use tokio::time::{timeout, timeout_at};

#[cfg(feature = "shuttle")]
pub(crate) use self::patient::{timeout, timeout_at};

#[cfg(feature = "shuttle")]
mod patient {
    use std::{convert::Infallible, future::Future};

    pub(crate) async fn timeout<T>(_: std::time::Duration, wait: impl Future<Output = T>) -> Result<T, Infallible> {
        Ok(wait.await)
    }

    pub(crate) async fn timeout_at<T>(_: tokio::time::Instant, wait: impl Future<Output = T>) -> Result<T, Infallible> {
        Ok(wait.await)
    }
}

/// Somebody else may come first here, where what is shared is not of this module.
pub(crate) fn point() {
    #[cfg(feature = "shuttle")]
    let _ = AtomicU64::new(0).load(Ordering::SeqCst);
}
