//! The command line: what there is, what each command is called, and how each ends.

mod bench;
mod client;
mod door;
mod health;
mod migrate;
mod output;
mod progress;
mod reads;
mod serve;
mod token;
mod watch;
mod writes;

use std::{process::ExitCode, time::Duration};

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tokio::runtime::Runtime;

use crate::config::{MigrateArgs, ServeArgs, hold_a_password};

/// Answers which role each user of a bot has, over gRPC and from memory.
#[derive(Parser, Debug)]
#[command(name = "rolecache", version, about, after_help = OVERVIEW, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the server
    #[command(after_help = SERVE)]
    Serve(Box<ServeArgs>),
    /// Bring the schema of a store up to date, say what was found there, and end
    Migrate(MigrateArgs),
    /// Show the role of a user, or of several
    #[command(after_help = GET)]
    Get(reads::GetArgs),
    /// Give a user a role
    #[command(after_help = SET)]
    Set(writes::SetArgs),
    /// Hand an admin's rights, and a mailbox, from one user to another
    #[command(after_help = TRANSFER)]
    Transfer(writes::TransferArgs),
    /// Forget a user
    Delete(writes::DeleteArgs),
    /// Register a mailbox, or show who it belongs to
    #[command(subcommand)]
    Mailbox(writes::Mailbox),
    /// List the users of the store, in order of id
    #[command(after_help = USERS)]
    Users(reads::UsersArgs),
    /// List the change log, or one user's part of it, oldest first
    #[command(after_help = HISTORY)]
    History(reads::HistoryArgs),
    /// Show what the server's cache has done since it started
    Stats(reads::StatsArgs),
    /// Show every change as it commits, through lost connections and restarts of the server
    #[command(after_help = WATCH)]
    Watch(watch::WatchArgs),
    /// Put a load on a server, and say what it makes of it
    #[command(after_help = BENCH)]
    Bench(bench::BenchArgs),
    /// Keep the callers of a server: tokens, certificates, and what each may do
    #[command(subcommand)]
    Token(token::Token),
    /// Ask whether the server serves: exit 0 if so, otherwise 3
    Healthcheck(health::HealthArgs),
    /// Write a completion script for a shell
    #[command(after_help = COMPLETIONS)]
    Completions { shell: Shell },
}

const OVERVIEW: &str = "\
Examples:
  rolecache serve                     # on 127.0.0.1:50051, with an SQLite file in this directory
  rolecache set 42 admin              # make the first admin
  rolecache get 42
  rolecache watch                     # in a second terminal

Answers go to stdout, talk to stderr.
Exit codes: 0 done, 1 refused, 2 wrong usage or setting, 3 unavailable and worth another try.";

const SERVE: &str = "\
Examples:
  rolecache serve
  DATABASE_URL=postgres://bot:secret@localhost/bot rolecache serve --cache complete
  ROLECACHE_ROLES=user,helper,admin rolecache serve

SIGTERM and SIGINT end it within 10 seconds, with exit code 0.";

const BENCH: &str = "\
Examples:
  rolecache bench get
  rolecache bench get --rate 5000 --duration 1m --skew 1      # an open loop: no call waits for another
  rolecache bench watch --watchers 1000 --output json

It shares the machine with the server, if that is here: compare what one run says, and no run with another machine's.
set, mixed and watch write the roles of users with very high ids.";

const GET: &str = "\
Examples:
  rolecache get 42
  rolecache get 42 -100200300 7       # one line each: the user, a tab, the role
  rolecache get 42 --fresh --output json";

const SET: &str = "\
Examples:
  rolecache set 42 admin --username @bob --reason 'new on call'
  rolecache set 42 user --expect admin     # only if nobody was faster";

const TRANSFER: &str = "\
Examples:
  rolecache transfer 42 43 --demote
  rolecache transfer 42 43 --mailbox 7 --to-username @eve";

const USERS: &str = "\
Examples:
  rolecache users --role admin
  rolecache users --all --output json | jq -r '.users[].userId'";

const HISTORY: &str = "\
Examples:
  rolecache history 42
  rolecache history --after 1200 --all";

const WATCH: &str = "\
Examples:
  rolecache watch --role admin
  rolecache watch --snapshot --output json | jq -c '.commit.changes[]?'
  rolecache watch --after 0 --count 10     # the first ten commits that the log still has

It ends on Ctrl-C and says how to go on from there.";

const COMPLETIONS: &str = "\
Examples:
  rolecache completions bash > ~/.local/share/bash-completion/completions/rolecache
  rolecache completions zsh > ~/.zfunc/_rolecache";

/// How a command ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Exit {
    Done = 0,
    /// The server, or the store, said no.
    Refused = 1,
    /// The command line or a setting is wrong.
    Usage = 2,
    /// Nobody answered, or not now: worth another try.
    Unavailable = 3,
}

/// Why a command ends otherwise than with [`Exit::Done`], in a sentence for stderr.
#[derive(PartialEq, Eq, Debug)]
struct Failure {
    exit: Exit,
    message: String,
}

/// Parses the command line and runs the command to its end.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::talk(format_args!("error: no threads could be started: {error}"));
            return Exit::Refused.into();
        }
    };
    let exit = runtime.block_on(cli.run());
    // Dropped, it would wait for whatever blocks a thread: a look-up of a name, a disk that does not answer.
    runtime.shutdown_timeout(Duration::from_millis(100));
    exit.into()
}

// === impl Cli ===

impl Cli {
    async fn run(self) -> Exit {
        let result = match self.command {
            Command::Serve(args) => serve::run(*args).await,
            Command::Migrate(args) => migrate::run(args).await,
            Command::Get(args) => reads::get(args).await,
            Command::Set(args) => writes::set(args).await,
            Command::Transfer(args) => writes::transfer(args).await,
            Command::Delete(args) => writes::delete(args).await,
            Command::Mailbox(command) => writes::mailbox(command).await,
            Command::Users(args) => reads::users(args).await,
            Command::History(args) => reads::history(args).await,
            Command::Stats(args) => reads::stats(args).await,
            Command::Watch(args) => watch::run(args).await,
            Command::Bench(args) => bench::run(args).await,
            Command::Token(command) => token::run(command),
            Command::Healthcheck(args) => health::run(args).await,
            Command::Completions { shell } => completions(shell),
        };
        match result {
            Ok(()) => Exit::Done,
            Err(failure) => {
                if !failure.message.is_empty() {
                    output::talk(format_args!("error: {}", failure.message));
                }
                failure.exit
            }
        }
    }
}

/// At each start: the one who started it can still change that.
fn warn_of_arguments() {
    if hold_a_password(std::env::args_os().map(|argument| argument.to_string_lossy().into_owned())) {
        tracing::warn!(
            "every user of this machine can read the database's password in the arguments: give the URL in \
             ROLECACHE_DATABASE_URL"
        );
    }
}

fn completions(shell: Shell) -> Result<(), Failure> {
    // Into memory first: the generator panics where a pipe breaks.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "rolecache", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}

// === impl Exit ===

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

// === impl Failure ===

impl Failure {
    fn new(exit: Exit, message: impl ToString) -> Self {
        Self { exit, message: message.to_string() }
    }

    /// Whoever read our output wants no more of it: a quiet end.
    fn quiet() -> Self {
        Self::new(Exit::Done, "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn negative_ids_are_ids() {
        for line in [
            "get -1 -100200300",
            "set -1 admin --reason -x",
            "transfer -1 -2 --mailbox -3",
            "delete -1",
            "mailbox register -1 -2",
            "mailbox get -1",
            "history -1",
            "watch --user -1 --user -2 --after -abc",
        ] {
            let words = ["rolecache"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }
}
