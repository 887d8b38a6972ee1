//! Panics: none is hidden. Whoever answers a call with one counts it, and says what it said.

use std::{
    any::Any,
    backtrace::{Backtrace, BacktraceStatus},
    panic,
    sync::atomic::{AtomicU64, Ordering},
};

static CAUGHT: AtomicU64 = AtomicU64::new(0);

/// Counts a panic that did not end the process: how many there have been.
pub(crate) fn count() -> u64 {
    CAUGHT.fetch_add(1, Ordering::Relaxed) + 1
}

/// How many there have been.
pub(crate) fn counted() -> u64 {
    CAUGHT.load(Ordering::Relaxed)
}

/// What a panic said.
pub(crate) fn text(left: &(dyn Any + Send)) -> &str {
    let text = left.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| left.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}

/// From now on the log says where a panic was, in lines like all others.
pub(crate) fn into_log() {
    panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or_else(String::new, ToString::to_string);
        let backtrace = Backtrace::capture();
        let backtrace = (backtrace.status() == BacktraceStatus::Captured).then_some(backtrace);
        let backtrace = backtrace.as_ref().map(tracing::field::display);
        tracing::error!(place, backtrace, "a panic: {}", panic.payload_as_str().unwrap_or("without a message"));
    }));
}
