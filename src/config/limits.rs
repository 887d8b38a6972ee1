//! How much the server takes on, from whom, and how long it waits.

use std::{num::NonZeroU32, time::Duration};

use clap::Args;

use super::{ConfigError, within};
use crate::{access::Allowance, grpc::Limits};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Connections at once; further ones wait until one ends.
    #[arg(long, env = "ROLECACHE_MAX_CONNECTIONS", value_name = "COUNT", default_value_t = 16_384)]
    pub max_connections: usize,

    /// Calls and watches at once of one connection; a client waits with further ones.
    #[arg(long, env = "ROLECACHE_MAX_STREAMS", value_name = "COUNT", default_value_t = 256)]
    pub max_streams: u32,

    /// Calls in flight of all callers; further ones are refused with OVERLOADED.
    #[arg(long, env = "ROLECACHE_MAX_CALLS", value_name = "COUNT", default_value_t = 10_000)]
    pub max_calls: usize,

    /// Calls a second of one caller; further ones are refused with RATE_LIMITED. 0 for no bound. Without credentials all
    /// callers are one.
    #[arg(long, env = "ROLECACHE_MAX_CALLS_PER_SECOND", value_name = "COUNT", default_value_t = 100_000)]
    pub max_calls_per_second: u32,

    /// Calls in flight of one caller, where there are credentials; further ones are refused with OVERLOADED.
    #[arg(long, env = "ROLECACHE_MAX_CALLS_PER_CALLER", value_name = "COUNT", default_value_t = 2_500)]
    pub max_calls_per_caller: usize,

    /// Watches of all callers; further ones are refused with TOO_MANY_WATCHES.
    #[arg(long, env = "ROLECACHE_MAX_WATCHES", value_name = "COUNT", default_value_t = 10_000)]
    pub max_watches: usize,

    /// Watches of one caller, where there are credentials; further ones are refused with TOO_MANY_WATCHES.
    #[arg(long, env = "ROLECACHE_MAX_WATCHES_PER_CALLER", value_name = "COUNT", default_value_t = 1_000)]
    pub max_watches_per_caller: usize,

    /// Bytes of one request (1024 to 4194304); a larger one is refused with MESSAGE_TOO_LARGE before it is read. Below
    /// 256 KiB not every request of 10,000 users fits.
    #[arg(long, env = "ROLECACHE_MAX_MESSAGE_BYTES", value_name = "BYTES", default_value_t = 256 * 1024)]
    pub max_message_bytes: usize,

    /// Bytes of one request's headers (1024 to 1048576); a call with more is answered with HTTP status 431.
    #[arg(long, env = "ROLECACHE_MAX_HEADER_BYTES", value_name = "BYTES", default_value_t = 16 * 1024)]
    pub max_header_bytes: u32,

    /// How long a call may take (1s to 10m), whatever later deadline its caller names; then it ends with DEADLINE. Of a
    /// watch, its opening.
    #[arg(long, env = "ROLECACHE_MAX_DEADLINE", value_name = "DURATION", default_value = "20s",
          value_parser = humantime::parse_duration)]
    pub max_deadline: Duration,

    /// How long a new connection has for TLS and the beginning of HTTP/2 (1s to 1m); then it is closed.
    #[arg(long, env = "ROLECACHE_HANDSHAKE_TIMEOUT", value_name = "DURATION", default_value = "10s",
          value_parser = humantime::parse_duration)]
    pub handshake_timeout: Duration,

    /// How often a client is asked whether it is still there (1s to 1h); one that does not answer in 10 s is closed.
    #[arg(long, env = "ROLECACHE_KEEPALIVE_INTERVAL", value_name = "DURATION", default_value = "30s",
          value_parser = humantime::parse_duration)]
    pub keepalive_interval: Duration,

    /// For how long nothing may go over a connection (1s to 1d); then it is closed, and its client opens another.
    #[arg(long, env = "ROLECACHE_IDLE_TIMEOUT", value_name = "DURATION", default_value = "15m",
          value_parser = humantime::parse_duration)]
    pub idle_timeout: Duration,
}

// === impl LimitArgs ===

impl LimitArgs {
    pub(super) fn validate(self) -> Result<(Limits, Allowance), ConfigError> {
        for (setting, count) in [
            ("--max-connections", self.max_connections),
            ("--max-streams", self.max_streams as usize),
            ("--max-calls", self.max_calls),
            ("--max-calls-per-caller", self.max_calls_per_caller),
            ("--max-watches", self.max_watches),
            ("--max-watches-per-caller", self.max_watches_per_caller),
        ] {
            bytes_or_count(setting, count, (1, 1_000_000))?;
        }
        bytes_or_count("--max-message-bytes", self.max_message_bytes, (1_024, 4 << 20))?;
        bytes_or_count("--max-header-bytes", self.max_header_bytes as usize, (1_024, 1 << 20))?;
        let limits = Limits {
            connections: self.max_connections,
            streams: self.max_streams,
            calls: self.max_calls,
            watches: self.max_watches,
            message_bytes: self.max_message_bytes,
            header_bytes: self.max_header_bytes,
            deadline: within("--max-deadline", self.max_deadline, (SECOND, 600 * SECOND))?,
            handshake: within("--handshake-timeout", self.handshake_timeout, (SECOND, 60 * SECOND))?,
            keepalive: within("--keepalive-interval", self.keepalive_interval, (SECOND, 3_600 * SECOND))?,
            idle: within("--idle-timeout", self.idle_timeout, (SECOND, DAY))?,
        };
        let allowance = Allowance {
            calls_per_second: NonZeroU32::new(self.max_calls_per_second),
            calls: self.max_calls_per_caller,
            watches: self.max_watches_per_caller,
        };
        Ok((limits, allowance))
    }
}

fn bytes_or_count(setting: &'static str, value: usize, (least, most): (usize, usize)) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::new(setting, format!("must be {least} to {most}, not {value}")))
}
