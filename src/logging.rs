//! What the process says about itself: one line per thing that changed, to stderr, as text or JSON.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::panics;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogOptions {
    pub format: LogFormat,
    /// Which lines: a level, or directives such as `info,rolecache::feed=debug`. Checked by [`parse_filter`].
    pub filter: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one object per line.
    Json,
}

// === impl LogFormat ===

impl LogFormat {
    /// Text where a person reads along, JSON elsewhere.
    pub fn of_stderr() -> Self {
        if io::stderr().is_terminal() { Self::Text } else { Self::Json }
    }
}

/// Checks a filter, in a sentence without the name of the setting.
pub fn parse_filter(filter: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder()
        .parse(filter)
        .map_err(|error| format!("must be a level (error, warn, info, debug, trace) or directives such as info,rolecache::feed=debug: {error}"))
}

/// Starts logging. A second call in one process changes nothing.
pub fn init(options: &LogOptions) {
    let filter = parse_filter(&options.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    // A line that cannot be written is lost. Its error would go to the same stderr, by a macro that panics: whoever
    // read the log and left would take the server along.
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).log_internal_errors(false);
    panics::into_log();
    // An earlier subscriber, as of a test, stays.
    let _already_set = match options.format {
        LogFormat::Text => base.with_ansi(colours()).with_target(false).try_init(),
        LogFormat::Json => base.json().flatten_event(true).with_current_span(false).try_init(),
    };
}

fn colours() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
