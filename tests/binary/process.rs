//! Running the binary: servers that log, commands that end, and nothing that outlives its test.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::support::server::PATIENCE;

pub const BINARY: &str = env!("CARGO_BIN_EXE_rolecache");

/// A process of ours whose output is kept. Killed when it is dropped.
pub struct Process {
    child: Child,
    pub out: Lines,
    pub err: Lines,
}

/// The lines of a stream so far.
#[derive(Clone, Default)]
pub struct Lines(Arc<(Mutex<ReadSoFar>, Condvar)>);

/// The lines so far, and whether there are no more.
type ReadSoFar = (Vec<String>, bool);

/// The binary, with nothing of this machine's settings in its environment.
pub fn rolecache<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    clean(Command::new(BINARY), args)
}

pub fn clean<A: AsRef<OsStr>>(mut command: Command, args: impl IntoIterator<Item = A>) -> Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ROLECACHE_") || name == "DATABASE_URL" {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// A command's exit code, stdout and stderr.
#[track_caller]
pub fn run(args: &[&str]) -> (i32, String, String) {
    finish(&mut rolecache(args))
}

#[track_caller]
pub fn finish(command: &mut Command) -> (i32, String, String) {
    let mut process = Process::spawn(command);
    let status = process.ended();
    let code = status.code().unwrap_or_else(|| panic!("it ended by {status}: {}", process.err.text()));
    (code, process.out.text(), process.err.text())
}

/// What a command that must succeed printed.
#[track_caller]
pub fn answer(args: &[&str]) -> String {
    let (code, out, err) = run(args);
    assert_eq!(code, 0, "{args:?}: {err}");
    out
}

impl Process {
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run the binary");
        let out = Lines::of(child.stdout.take().unwrap());
        let err = Lines::of(child.stderr.take().unwrap());
        Self { child, out, err }
    }

    /// A server on a free port; `--log-format json` unless these say otherwise.
    #[track_caller]
    pub fn serve(url: &str, args: &[&str]) -> Self {
        Self::spawn(&mut serve(url, args))
    }

    /// Where it listens, as its log says.
    #[track_caller]
    pub fn address(&self) -> String {
        let line = self.err.until(|line| line.contains("listening on "));
        let (_, address) = line.split_once("listening on ").unwrap();
        address.chars().take_while(|c| !matches!(c, '"' | ' ')).collect()
    }

    /// Waits until it says that it is ready.
    #[track_caller]
    pub fn ready(&self) -> String {
        let address = self.address();
        self.err.until(|line| line.contains("ready"));
        // Health follows a moment later.
        let until = Instant::now() + PATIENCE;
        while run(&["healthcheck", "--address", &address]).0 != 0 {
            assert!(Instant::now() < until, "not healthy: {}", self.err.text());
        }
        address
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits for the end by itself, and for the end of its output.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        self.ended_within(PATIENCE)
    }

    #[track_caller]
    pub fn ended_within(&mut self, limit: Duration) -> ExitStatus {
        assert!(self.err.ended_within(limit), "it does not end:\n{}\n{}", self.out.text(), self.err.text());
        let status = self.child.wait().unwrap();
        assert!(self.out.ended_within(PATIENCE));
        status
    }

    /// SIGTERM, and how long the end took, which must be a clean one.
    #[track_caller]
    pub fn stop(&mut self, signal: &str) -> Duration {
        let begun = Instant::now();
        self.signal(signal);
        let status = self.ended_within(Duration::from_secs(15));
        let took = begun.elapsed();
        assert_eq!(status.code(), Some(0), "{}", self.err.text());
        assert!(took < Duration::from_secs(10), "it took {took:?}: {}", self.err.text());
        took
    }
}

pub fn serve(url: &str, args: &[&str]) -> Command {
    let mut command = rolecache(["serve", "--database-url", url]);
    if !args.contains(&"--listen") {
        command.args(["--listen", "127.0.0.1:0"]);
    }
    if !args.contains(&"--log-format") {
        command.args(["--log-format", "json"]);
    }
    command.args(args);
    command
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Lines {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let lines = Self::default();
        let writer = lines.clone();
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                writer.lock(|(lines, _)| lines.push(line));
            }
            writer.lock(|(_, ended)| *ended = true);
        });
        lines
    }

    fn lock<T>(&self, change: impl FnOnce(&mut (Vec<String>, bool)) -> T) -> T {
        let done = change(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.1.notify_all();
        done
    }

    fn wait(&self, limit: Duration, until: impl Fn(&[String], bool) -> bool) -> bool {
        let held = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_held, waited) = self.0.1.wait_timeout_while(held, limit, |(lines, ended)| !until(lines, *ended)).unwrap();
        !waited.timed_out()
    }

    fn ended_within(&self, limit: Duration) -> bool {
        self.wait(limit, |_, ended| ended)
    }

    /// Waits for a line.
    #[track_caller]
    pub fn until(&self, matches: impl Fn(&str) -> bool) -> String {
        self.find(matches).unwrap_or_else(|| panic!("no such line:\n{}", self.text()))
    }

    /// Waits for a line, if it comes.
    pub fn find(&self, matches: impl Fn(&str) -> bool) -> Option<String> {
        self.wait(PATIENCE, |lines, ended| ended || lines.iter().any(|line| matches(line)));
        self.all().into_iter().find(|line| matches(line))
    }

    /// Waits for so many lines that match.
    #[cfg(feature = "failpoints")]
    pub fn until_many(&self, count: usize, matches: impl Fn(&str) -> bool) {
        let is_there = |lines: &[String]| lines.iter().filter(|line| matches(line)).count() >= count;
        let is_there = self.wait(PATIENCE, |lines, ended| ended || is_there(lines));
        assert!(is_there, "fewer than {count} such lines:\n{}", self.text());
    }

    /// Waits for so many lines.
    #[track_caller]
    pub fn until_count(&self, count: usize) -> Vec<String> {
        assert!(self.wait(PATIENCE, |lines, _| lines.len() >= count), "fewer than {count} lines:\n{}", self.text());
        self.all()
    }

    pub fn all(&self) -> Vec<String> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    pub fn text(&self) -> String {
        self.all().into_iter().map(|line| line + "\n").collect()
    }
}

/// For what is run by hand.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
