//! File descriptors: as many as the system gives, and no more connections than leave some for everything else.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// For what is no caller's: the store's connections, files that are read again, the listener. Without them a revoked token
/// would live for as long as somebody keeps the others.
const OWN: u64 = 200;

/// Raises what this process may have open to what it is allowed to ask for, and says how many of `connections` there is room
/// for.
pub(crate) fn room_for(connections: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    // Some systems give less than they say; then it stays as it was.
    let files = if raised.is_ok() { limit.maximum } else { limit.current };
    let Some(files) = files else { return connections };
    let room = connections.min(usize::try_from(files.saturating_sub(OWN)).unwrap_or(usize::MAX).max(1));
    if room < connections {
        tracing::warn!(files, "as many connections as leave files for everything else: {room}, not {connections}");
    }
    room
}
