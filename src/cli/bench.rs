//! `bench`: a load on a running server, and what the server makes of it.

mod load;
mod report;
mod watchers;

use std::{ops::RangeInclusive, time::Duration};

use clap::{Args, ValueEnum};

use self::{
    load::Calls,
    report::{Report, server_time},
};
use super::{Exit, Failure, client::ClientArgs};

/// From here on nobody has users of their own.
const FIRST_USER: i64 = 1_000_000_000_000_000;

#[derive(Args, Clone, Debug)]
pub(super) struct BenchArgs {
    /// What is asked for
    #[arg(value_enum, value_name = "MODE")]
    mode: Mode,
    /// Connections to the server
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    connections: u16,
    /// Calls at once on each connection
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=250))]
    in_flight: u16,
    /// Calls a second, whether or not the server keeps up: latency counts from when a call was due. 0 for as many as get
    /// their answers
    #[arg(long, value_name = "CALLS", default_value_t = 0)]
    rate: u32,
    /// How long it is measured, after a warm-up of a tenth of that
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// How many users there are
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    users: u32,
    /// The id of the first of them. `set`, `mixed` and `watch` write roles of these users
    #[arg(long, value_name = "USER", default_value_t = FIRST_USER)]
    first_user: i64,
    /// How much more often some users are asked for: the exponent of a Zipf distribution, 0 for all alike
    #[arg(long, value_name = "EXPONENT", default_value_t = 0.0)]
    skew: f64,
    /// Users in one call of `batch`
    #[arg(long, value_name = "COUNT", default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    batch: u16,
    /// Open watches of `watch`, spread over the connections; --rate is that of the changes, 100 a second unless it is said
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    watchers: u16,
    /// The process of a server on this machine, to tell how long processors work for a call
    #[arg(long, value_name = "PID")]
    server_pid: Option<u32>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Mode {
    /// GetRole
    Get,
    /// BatchGetRoles
    Batch,
    /// SetRole, each to another role than before
    Set,
    /// SetRole by one caller, told to many watches
    Watch,
    /// Nineteen of GetRole to one of SetRole
    Mixed,
}

/// What a load is made of.
struct Plan {
    args: BenchArgs,
    clients: Vec<super::client::Client>,
}

pub(super) async fn run(args: BenchArgs) -> Result<(), Failure> {
    if !(0.0..=10.0).contains(&args.skew) {
        return Err(Failure::new(Exit::Usage, "--skew must be 0 to 10"));
    }
    if args.first_user <= 0 || args.first_user.checked_add(i64::from(args.users)).is_none() {
        return Err(Failure::new(Exit::Usage, "--first-user must be positive, and leave room for --users"));
    }
    let mut clients = Vec::new();
    for _ in 0..args.connections {
        clients.push(args.client.connect().await?);
    }
    let plan = Plan { args, clients };
    let before = plan.args.server_pid.map(server_time).transpose()?;
    let done = match plan.args.mode {
        Mode::Watch => watchers::run(&plan).await?,
        Mode::Get | Mode::Batch | Mode::Set | Mode::Mixed => Calls::new(&plan)?.run().await?,
    };
    let worked = match (before, plan.args.server_pid) {
        (Some(before), Some(pid)) => Some(server_time(pid)?.saturating_sub(before)),
        _ => None,
    };
    Report::new(&plan.args, &done, worked).print(plan.args.client.output)
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    const RANGE: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(24 * 60 * 60);
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if RANGE.contains(&duration) { Ok(duration) } else { Err("must be 100ms to 1day".to_owned()) }
}
