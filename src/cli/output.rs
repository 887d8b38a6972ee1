//! What goes to stdout.

use std::{
    fmt,
    io::{self, Write},
};

use super::{Exit, Failure};

/// Writes one line to stdout; a reader who left ends the command quietly.
pub(super) fn line(text: fmt::Arguments<'_>) -> Result<(), Failure> {
    writeln!(io::stdout().lock(), "{text}").map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::quiet(),
        _ => Failure::new(Exit::Refused, format!("cannot write to stdout: {error}")),
    })
}
