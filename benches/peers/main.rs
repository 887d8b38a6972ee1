//! What `scripts/bench` measures with: one kind of load on rolecache and on what one would use instead of it, and a server
//! whose RPC is empty.

mod cpu;
mod empty;
mod etcd;
mod fanout;
mod fill;
mod grpc;
mod http2;
mod latencies;
mod load;
mod postgres;
mod protocol;
mod redis;
mod rolecache;
mod users;

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::Value;

use self::{
    cpu::Servers,
    fanout::Fanout,
    grpc::{Streams, Unary},
    load::Load,
    protocol::{Broken, Protocol, Subscription},
    users::{Users, Writes},
};

#[derive(Parser)]
struct Cli {
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serves the empty RPC
    Empty {
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// Calls, as fast as the answers come
    Load(LoadArgs),
    /// Changes, and who is told of them
    Fanout(FanoutArgs),
    /// Asks for each user once
    Fill {
        #[command(flatten)]
        target: Target,
        #[arg(long, default_value_t = 1_000)]
        batch: usize,
    },
}

#[derive(Args)]
struct Target {
    #[arg(long)]
    address: SocketAddr,
    #[arg(long, default_value_t = 1)]
    first: i64,
    #[arg(long, default_value_t = 100_000)]
    users: u64,
    #[arg(long = "server-pid")]
    servers: Vec<u32>,
}

#[derive(Args)]
struct LoadArgs {
    #[arg(value_enum)]
    work: Work,
    #[command(flatten)]
    target: Target,
    #[arg(long, default_value_t = 4)]
    connections: u64,
    #[arg(long, default_value_t = 16)]
    in_flight: usize,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    #[arg(long, default_value_t = 1_000)]
    batch: usize,
    /// Of PostgreSQL
    #[arg(long, default_value = "postgres")]
    database: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Work {
    /// GetRole, of rolecache and of the empty server
    Get,
    Batch,
    Set,
    RedisGet,
    RedisMget,
    RedisSet,
    PostgresSelect,
    PostgresUpdate,
    EtcdRange,
    EtcdPut,
}

#[derive(Args)]
struct FanoutArgs {
    #[arg(value_enum)]
    feed: Feed,
    #[command(flatten)]
    target: Target,
    #[arg(long, default_value_t = 10_000)]
    subscribers: usize,
    /// Another server, through which the changes come
    #[arg(long)]
    publish_at: Option<SocketAddr>,
    /// Over which they are spread; of Redis each has its own
    #[arg(long, default_value_t = 100)]
    connections: usize,
    /// Of the subscribers, on connections of their own
    #[arg(long, default_value_t = 0)]
    stuck: usize,
    #[arg(long, default_value_t = 10)]
    times: usize,
    #[arg(long, default_value_t = 1)]
    burst: usize,
    /// The changes of one time are not asked for at once, but each when the one before is answered
    #[arg(long)]
    in_a_row: bool,
    /// Milliseconds
    #[arg(long, default_value_t = 0)]
    interval: u64,
    /// Changes nothing, and keeps the subscribers until standard input ends
    #[arg(long)]
    hold: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Feed {
    Rolecache,
    Redis,
    Etcd,
}

fn main() -> ExitCode {
    let Some(command) = Cli::parse().command else {
        println!("peers are measured by scripts/bench");
        return ExitCode::SUCCESS;
    };
    let done = match command {
        Command::Empty { listen } => empty::serve(listen).map(|()| Value::Null),
        Command::Load(args) => args.run(),
        Command::Fanout(args) => args.run(),
        Command::Fill { target, batch } => fill::run(target.address, target.first, target.users, batch),
    };
    match done {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(broken) => {
            eprintln!("error: {broken}");
            ExitCode::FAILURE
        }
    }
}

impl LoadArgs {
    fn run(self) -> Result<Value, Broken> {
        let connections = (0..self.connections).map(|number| self.connection(number)).collect();
        let load = Load {
            address: self.target.address,
            in_flight: self.in_flight,
            warm_up: Duration::from_secs_f64(self.warm_up),
            duration: Duration::from_secs_f64(self.seconds),
            servers: Servers(self.target.servers),
        };
        load.run(connections)
    }

    fn connection(&self, number: u64) -> Box<dyn Protocol> {
        let Target { address, first, users: count, .. } = self.target;
        let authority = address.to_string();
        let users = Users { first, count, random: fastrand::Rng::with_seed(number) };
        let writes = Writes { first, count, connection: number, connections: self.connections, done: 0 };
        let batch = self.batch;
        let postgres = |statement| Box::new(postgres::Postgres::new("postgres", &self.database, statement));
        match self.work {
            Work::Get => Box::new(Unary::new(authority, rolecache::GetRole(users))),
            Work::Batch => Box::new(Unary::new(authority, rolecache::BatchGetRoles { users, batch })),
            Work::Set => Box::new(Unary::new(authority, rolecache::SetRole(writes))),
            Work::RedisGet => Box::new(redis::Redis::new(redis::Command::Get(users))),
            Work::RedisMget => Box::new(redis::Redis::new(redis::Command::Mget(users, batch))),
            Work::RedisSet => Box::new(redis::Redis::new(redis::Command::Set(writes))),
            Work::PostgresSelect => postgres(postgres::Statement::Select(users)),
            Work::PostgresUpdate => postgres(postgres::Statement::Update(writes)),
            Work::EtcdRange => Box::new(Unary::new(authority, etcd::Range(users))),
            Work::EtcdPut => Box::new(Unary::new(authority, etcd::Put::Roles(writes))),
        }
    }
}

impl FanoutArgs {
    fn run(self) -> Result<Value, Broken> {
        let Target { address, first, .. } = self.target;
        let subscriptions = self.subscriptions();
        let publish_at = self.publish_at.unwrap_or(address);
        let fanout = Fanout {
            address,
            publish_at,
            subscribers: self.subscribers,
            stuck: self.stuck,
            times: if self.hold { 0 } else { self.times },
            burst: self.burst,
            in_a_row: self.in_a_row,
            interval: Duration::from_millis(self.interval),
            servers: Servers(self.target.servers),
        };
        if self.hold {
            return fanout.hold(subscriptions);
        }
        let count = (self.times * self.burst) as u64;
        let writes = Writes { first, count, connection: 0, connections: 1, done: 0 };
        let (feed, authority) = (self.feed, publish_at.to_string());
        fanout.run(subscriptions, move || match feed {
            Feed::Rolecache => Box::new(Unary::new(authority, rolecache::SetRole(writes))),
            Feed::Redis => Box::new(redis::Redis::new(redis::Command::Publish(writes))),
            Feed::Etcd => Box::new(Unary::new(authority, etcd::Put::Watched(writes))),
        })
    }

    fn subscriptions(&self) -> Vec<Box<dyn Subscription>> {
        let Target { address, first, .. } = self.target;
        let connection = |count: usize, stuck: bool| -> Box<dyn Subscription> {
            let authority = address.to_string();
            match self.feed {
                Feed::Rolecache => Box::new(Streams::new(authority, rolecache::Watch { first }, count, stuck)),
                Feed::Redis => Box::new(redis::Subscriber::default()),
                Feed::Etcd => Box::new(Streams::new(authority, etcd::Watch, count, stuck)),
            }
        };
        let connections = if self.feed == Feed::Redis { self.subscribers } else { self.connections };
        let each = self.subscribers.div_ceil(connections.max(1));
        let spread = |all: usize| (0..all).step_by(each.max(1)).map(move |done| each.min(all - done));
        let reading = spread(self.subscribers - self.stuck).map(|count| connection(count, false));
        reading.chain(spread(self.stuck).map(|count| connection(count, true))).collect()
    }
}
