//! What only an embedded store has: a file, a lock beside it, and SQLite's own ways to write.

mod file;
mod kill;
mod moved;
mod random;
mod replace;
mod shapes;
mod slow;

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
};

use crate::fixtures::SqliteFile;

/// A `sqlite3` shell that stays, with its transactions.
struct Shell {
    child: Child,
}

impl Shell {
    /// Runs `sql` and comes back when it is done.
    fn holding(database: &SqliteFile, sql: &str) -> Self {
        let mut child = Command::new("sqlite3")
            .args(["-batch", "-bail", "-cmd", ".timeout 20000"])
            .arg(database.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.as_mut().unwrap();
        writeln!(stdin, "{sql};\nselect 'done';").unwrap();
        stdin.flush().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let done = lines.map(Result::unwrap).find(|line| line == "done");
        assert!(done.is_some(), "{sql} failed");
        Self { child }
    }

    /// Runs `sql` and ends.
    fn end(mut self, sql: &str) {
        writeln!(self.child.stdin.take().unwrap(), "{sql};").unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}
