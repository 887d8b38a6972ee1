//! The binary: all of it is in the library, where it is compiled once for this and for the tests.

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    rolecache::cli::main()
}
