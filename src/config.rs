//! Flags and environment to what each module is built with, checked once, before any port or pool.
//!
//! The doc comment of a field is its help. What a wrong setting gets is a sentence that names the setting and what it
//! accepts.

mod arguments;
mod doors;
mod limits;

use std::{fmt, net::SocketAddr, time::Duration};

use clap::{ArgAction, Args, ValueEnum, builder::BoolishValueParser};

pub use self::{
    arguments::hold_a_password,
    doors::{ClientAuth, DoorArgs, DoorConfig},
    limits::LimitArgs,
};
use crate::{
    access::Allowance,
    cache, grpc,
    logging::{self, LogFormat, LogOptions},
    role::RoleName,
    store,
};

const HOUR: Duration = Duration::from_secs(60 * 60);
const YEAR: Duration = Duration::from_secs(31_557_600);

/// What `serve` is built with.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    pub listen: SocketAddr,
    pub store: store::Options,
    pub poll_interval: Duration,
    /// The roles that writes may set.
    pub roles: Vec<RoleName>,
    pub cache: cache::Mode,
    pub max_staleness: Duration,
    pub retain_changes: Duration,
    /// None for never.
    pub self_check: Option<Duration>,
    pub reflection: bool,
    pub doors: DoorConfig,
    pub limits: grpc::Limits,
    /// What each caller may do at most.
    pub allowance: Allowance,
    pub log: LogOptions,
}

/// What `migrate` is built with.
#[derive(Clone, Debug)]
pub struct MigrateConfig {
    pub store: store::Options,
    pub log: LogOptions,
}

/// A setting that cannot be accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError {
    setting: &'static str,
    problem: String,
}

/// The settings of `serve`.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Where to listen: an IP address and a port; port 0 takes a free one. Off the loopback addresses it needs TLS and
    /// credentials.
    #[arg(long, env = "ROLECACHE_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:50051",
          value_parser = parse_listen)]
    pub listen: SocketAddr,

    #[command(flatten)]
    pub store: StoreArgs,

    /// Only check that the store's schema is up to date; do not bring it up to date. For servers whose database role
    /// may not create tables: run `rolecache migrate` as one that may.
    #[arg(long, env = "ROLECACHE_NO_MIGRATE", action = ArgAction::SetTrue, value_parser = BoolishValueParser::new())]
    pub no_migrate: bool,

    /// How often to read the change log even if nobody says that it grew (10ms to 1s). Too small costs the store a
    /// query each time; at the larger end a lost wake-up delays a change by that much. Behind a pooler that swallows
    /// LISTEN, and on SQLite, it is 50ms at most whatever is set.
    #[arg(long, env = "ROLECACHE_POLL_INTERVAL", value_name = "DURATION", default_value = "500ms",
          value_parser = humantime::parse_duration)]
    pub poll_interval: Duration,

    /// The roles that writes may set, comma-separated. Reads pass on whatever the store holds.
    #[arg(long, env = "ROLECACHE_ROLES", value_name = "ROLE,...", default_value = "user,admin", value_delimiter = ',')]
    pub roles: Vec<String>,

    /// lazy: filled by reads that miss and by changes. complete: every user with a role other than the default is
    /// loaded at the start, and every read is a hit.
    #[arg(long, env = "ROLECACHE_CACHE", value_enum, value_name = "MODE", default_value = "lazy")]
    pub cache: CacheKind,

    /// How many users a lazy cache holds; 0 for no bound. Too small makes reads miss; no answer becomes wrong. A
    /// complete cache has no bound.
    #[arg(long, env = "ROLECACHE_CACHE_CAPACITY", value_name = "USERS", default_value_t = 0)]
    pub cache_capacity: usize,

    /// How long to answer from memory, marked stale, while the store is out of reach (2s to 1d). Too small turns a
    /// short outage of the store into errors; too large lets a role that was taken away live on through a long one.
    #[arg(long, env = "ROLECACHE_MAX_STALENESS", value_name = "DURATION", default_value = "60s",
          value_parser = humantime::parse_duration)]
    pub max_staleness: Duration,

    /// How long the change log is kept (24h to 100years). A watch that was away for longer cannot resume and starts
    /// over. The newest 10,000 commits always stay.
    #[arg(long, env = "ROLECACHE_RETAIN_CHANGES", value_name = "DURATION", default_value = "30d",
          value_parser = humantime::parse_duration)]
    pub retain_changes: Duration,

    /// How often to compare the cache with the store (1s to 1d), 0s for never: a lazy one by a sample of 1,000 users, a
    /// complete one as a whole. Each costs the store one query, or one pass over the users who do not have the default
    /// role. A difference is logged as an error, and the cache starts anew.
    #[arg(long, env = "ROLECACHE_SELF_CHECK", value_name = "DURATION", default_value = "5m",
          value_parser = humantime::parse_duration)]
    pub self_check: Duration,

    /// Serve gRPC reflection, so that grpcurl and the like need no proto file. `--reflection=false` turns it off.
    #[arg(long, env = "ROLECACHE_REFLECTION", value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true,
          default_value = "true", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub reflection: bool,

    #[command(flatten)]
    pub log: LogArgs,

    // With headings, which whatever follows would be under.
    #[command(flatten)]
    pub doors: DoorArgs,

    #[command(flatten)]
    pub limits: LimitArgs,
}

/// The settings of `migrate`.
#[derive(Args, Clone, Debug)]
pub struct MigrateArgs {
    #[command(flatten)]
    pub store: StoreArgs,
    #[command(flatten)]
    pub log: LogArgs,
}

/// The store, and the two roles that its tables know.
#[derive(Args, Clone, Debug)]
pub struct StoreArgs {
    /// The store: postgres://USER:PASSWORD@HOST/DATABASE, or sqlite://FILE, which is made where it is absent.
    /// DATABASE_URL is read as well. [default: sqlite://rolecache.db]
    #[arg(long, env = "ROLECACHE_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,

    /// The role of a user whom the store does not know, or whose role is NULL or empty. Kept in the store: servers on
    /// one store must agree on it.
    #[arg(long, env = "ROLECACHE_DEFAULT_ROLE", value_name = "ROLE", default_value = "user")]
    pub default_role: String,

    /// The role of admins, the one that transfers hand over. Kept in the store, and never the default role.
    #[arg(long, env = "ROLECACHE_ADMIN_ROLE", value_name = "ROLE", default_value = "admin")]
    pub admin_role: String,
}

#[derive(Args, Clone, Debug)]
pub struct LogArgs {
    /// How log lines look, on stderr. [default: text on a terminal, json elsewhere]
    #[arg(long, env = "ROLECACHE_LOG_FORMAT", value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogStyle>,

    /// Which log lines: error, warn, info, debug, trace, or directives such as info,rolecache::feed=debug. Above info
    /// role changes go unlogged.
    #[arg(long, env = "ROLECACHE_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum LogStyle {
    /// For people
    Text,
    /// For machines: one object a line
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum CacheKind {
    Lazy,
    Complete,
}

// === impl ConfigError ===

impl ConfigError {
    fn new(setting: &'static str, problem: impl Into<String>) -> Self {
        Self { setting, problem: problem.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let variable = self.setting.trim_start_matches("--").replace('-', "_").to_uppercase();
        if self.setting.starts_with("--") {
            write!(f, "{} (ROLECACHE_{variable}) {}", self.setting, self.problem)
        } else {
            write!(f, "{} {}", self.setting, self.problem)
        }
    }
}

impl std::error::Error for ConfigError {}

// === impl ServeArgs ===

impl ServeArgs {
    pub fn validate(self) -> Result<ServeConfig, ConfigError> {
        let log = self.log.validate()?;
        let store = self.store.validate(!self.no_migrate)?;
        let roles = parse_roles(&self.roles)?;
        for (setting, role) in [("--default-role", &store.default_role), ("--admin-role", &store.admin_role)] {
            if !roles.contains(role) {
                let known = self.roles.join(",");
                return Err(ConfigError::new(setting, format!("must be one of --roles, and {role} is not in {known}")));
            }
        }
        let cache = match (self.cache, self.cache_capacity) {
            (CacheKind::Lazy, 0) => cache::Mode::Lazy { capacity: None },
            (CacheKind::Lazy, capacity) => cache::Mode::Lazy { capacity: Some(capacity) },
            (CacheKind::Complete, 0) => cache::Mode::Complete,
            (CacheKind::Complete, _) => {
                let problem = "bounds a lazy cache and must be 0 with --cache complete, which holds every user";
                return Err(ConfigError::new("--cache-capacity", problem));
            }
        };
        let (limits, allowance) = self.limits.validate()?;
        let poll_range = (Duration::from_millis(10), Duration::from_secs(1));
        Ok(ServeConfig {
            listen: self.listen,
            store,
            poll_interval: within("--poll-interval", self.poll_interval, poll_range)?,
            roles,
            cache,
            max_staleness: within("--max-staleness", self.max_staleness, (Duration::from_secs(2), 24 * HOUR))?,
            retain_changes: within("--retain-changes", self.retain_changes, (24 * HOUR, 100 * YEAR))?,
            self_check: match self.self_check {
                Duration::ZERO => None,
                every => Some(within("--self-check", every, (Duration::from_secs(1), 24 * HOUR))?),
            },
            reflection: self.reflection,
            doors: self.doors.validate(self.listen)?,
            limits,
            allowance,
            log,
        })
    }
}

// === impl MigrateArgs ===

impl MigrateArgs {
    pub fn validate(self) -> Result<MigrateConfig, ConfigError> {
        Ok(MigrateConfig { log: self.log.validate()?, store: self.store.validate(true)? })
    }
}

// === impl StoreArgs ===

impl StoreArgs {
    fn validate(self, migrate: bool) -> Result<store::Options, ConfigError> {
        // Set and empty, as a compose file leaves a variable, is not set.
        let is_set = |(_, url): &(&str, String)| !url.trim().is_empty();
        let given = self.database_url.map(|url| ("--database-url", url)).filter(is_set);
        let environment = || std::env::var("DATABASE_URL").ok().map(|url| ("DATABASE_URL", url)).filter(is_set);
        let url = match given.or_else(environment) {
            Some((setting, url)) => check_url(setting, url.trim())?,
            None => "sqlite://rolecache.db".to_owned(),
        };
        let role = |setting, text: &str| {
            RoleName::to_write(text).map_err(|error| ConfigError::new(setting, format!("is no role: {error}")))
        };
        let default_role = role("--default-role", &self.default_role)?;
        let admin_role = role("--admin-role", &self.admin_role)?;
        if default_role == admin_role {
            let problem =
                format!("must differ from --admin-role: with {admin_role} for both everybody would be an admin");
            return Err(ConfigError::new("--default-role", problem));
        }
        Ok(store::Options { url, default_role, admin_role, migrate })
    }
}

// === impl LogArgs ===

impl LogArgs {
    fn validate(self) -> Result<LogOptions, ConfigError> {
        logging::parse_filter(&self.log_level).map_err(|problem| ConfigError::new("--log-level", problem))?;
        let format = match self.log_format {
            Some(LogStyle::Text) => LogFormat::Text,
            Some(LogStyle::Json) => LogFormat::Json,
            None => LogFormat::of_stderr(),
        };
        Ok(LogOptions { format, filter: self.log_level })
    }
}

fn parse_listen(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(|_| "give an IP address and a port, such as 127.0.0.1:50051 or [::1]:50051")
}

fn parse_roles(texts: &[String]) -> Result<Vec<RoleName>, ConfigError> {
    let mut roles = Vec::with_capacity(texts.len());
    for text in texts.iter().map(|text| text.trim()) {
        let role = RoleName::to_write(text).map_err(|error| {
            ConfigError::new("--roles", format!("is a comma-separated list, and in it {text:?} is no role: {error}"))
        })?;
        if roles.contains(&role) {
            return Err(ConfigError::new("--roles", format!("must name each role once, and names {role} twice")));
        }
        roles.push(role);
    }
    Ok(roles)
}

/// Never repeats the URL: it may hold a password.
fn check_url(setting: &'static str, url: &str) -> Result<String, ConfigError> {
    const ACCEPTED: &str = "must begin with postgres:// or sqlite://";
    let scheme = url.split(':').next().filter(|scheme| scheme.len() < url.len());
    let problem = match scheme {
        Some("postgres" | "postgresql") if url.contains("://") => match url::Url::parse(url) {
            Ok(_) => return Ok(url.to_owned()),
            Err(error) => format!("is no URL: {error}; write postgres://USER:PASSWORD@HOST/DATABASE"),
        },
        Some("sqlite") if url.contains(":memory:") || url.contains("mode=memory") => {
            "must name a file: a database in memory would lose what it answered OK to".to_owned()
        }
        Some("sqlite") if url.contains('?') => {
            "must name a file alone, as in sqlite://rolecache.db, without parameters".to_owned()
        }
        Some("sqlite") if url.contains("://") && url.len() > "sqlite://".len() => return Ok(url.to_owned()),
        Some("sqlite") => "must name a file, as in sqlite://rolecache.db".to_owned(),
        Some(scheme) => match scheme.split_once('+') {
            Some((base @ ("postgres" | "postgresql" | "sqlite"), _)) if is_scheme(scheme) => {
                format!("{ACCEPTED}; {scheme}:// names a Python driver too: write {base}://")
            }
            _ if is_scheme(scheme) => format!("{ACCEPTED}, not with {scheme}:"),
            // As of libpq, whose words may be secrets.
            _ => ACCEPTED.to_owned(),
        },
        None => ACCEPTED.to_owned(),
    };
    Err(ConfigError::new(setting, problem))
}

fn is_scheme(text: &str) -> bool {
    text.chars().all(|char| char.is_ascii_alphanumeric() || "+-.".contains(char))
}

fn within(
    setting: &'static str,
    value: Duration,
    (least, most): (Duration, Duration),
) -> Result<Duration, ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    let [least, most, value] = [least, most, value].map(humantime::format_duration);
    Err(ConfigError::new(setting, format!("must be {least} to {most}, not {value}")))
}

#[cfg(test)]
mod tests;
