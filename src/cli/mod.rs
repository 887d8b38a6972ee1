//! The command line: what there is, what each command is called, and how each ends.

mod migrate;
mod output;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{MigrateArgs, ServeArgs};

/// Answers which role each user of a bot has, over gRPC and from memory.
#[derive(Parser, Debug)]
#[command(name = "rolecache", version, about, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the server
    Serve(Box<ServeArgs>),
    /// Bring the schema of a store up to date, and end
    Migrate(MigrateArgs),
}

const EXAMPLES: &str = "\
Exit codes: 0 done, 1 refused, 2 wrong usage or setting, 3 unavailable (worth another try).";

/// How a command ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
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

// === impl Cli ===

impl Cli {
    /// Runs the command to its end.
    pub async fn run(self) -> Exit {
        let result = match self.command {
            Command::Serve(args) => serve::run(*args).await,
            Command::Migrate(args) => migrate::run(args).await,
        };
        match result {
            Ok(()) => Exit::Done,
            Err(failure) => {
                if !failure.message.is_empty() {
                    eprintln!("error: {}", failure.message);
                }
                failure.exit
            }
        }
    }
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
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
