//! The binary: a runtime, and the command line on it.

use std::{process::ExitCode, time::Duration};

use tokio::runtime::Runtime;

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no threads could be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(rolecache::cli::main());
    // Dropped, it would wait for whatever blocks a thread: a look-up of a name, a disk that does not answer.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}
