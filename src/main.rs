//! The binary: a runtime, and the command line on it.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    rolecache::cli::main().await
}
