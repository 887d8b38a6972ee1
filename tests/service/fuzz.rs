//! Bytes that nobody meant: each target takes any input without a panic, and within a second.
//!
//! Inputs are those of `tests/corpus`, then changed and joined at random, from a seed that is printed, for 2 s, or for as
//! many as ROLECACHE_FUZZ_SECONDS says (`scripts/fuzz`). One that fails is written into the corpus, to be kept.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use clap::Parser;
use fastrand::Rng;
use futures::FutureExt;
use http::HeaderValue;
use rolecache::{
    access::credentials,
    config::ServeArgs,
    proto::{
        Method,
        v1::{GetRoleRequest, ListRoleChangesRequest, ListUsersRequest, SetRoleRequest, WatchRoleChangesRequest},
    },
};
use tokio::time::timeout;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::support::{
    child::ChildServer,
    doors::{House, token},
    raw::{Raw, SERVICE, frame, frame_bytes},
    server::{Db, PATIENCE},
};

/// What one input may take: beyond it hangs, which busy processors do not excuse.
const LIMIT: Duration = Duration::from_secs(1);

/// And after which it is not waited for.
const HANGS: Duration = Duration::from_secs(20);

/// The inputs of one target.
struct Inputs {
    directory: PathBuf,
    corpus: Vec<Vec<u8>>,
    next: usize,
    random: Rng,
    until: Instant,
    tried: usize,
}

impl Inputs {
    fn of(target: &str) -> Self {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target);
        let mut files: Vec<PathBuf> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let corpus = files.iter().map(|file| fs::read(file).unwrap()).collect();
        let seed = fastrand::u64(..);
        let seconds = std::env::var("ROLECACHE_FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
        println!("{target}: seed {seed}");
        let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(2));
        Self { directory, corpus, next: 0, random: Rng::with_seed(seed), until, tried: 0 }
    }

    /// First the corpus as it is; then what becomes of it. None once the time is over.
    fn next(&mut self) -> Option<Vec<u8>> {
        if let Some(input) = self.corpus.get(self.next) {
            self.next += 1;
            return Some(input.clone());
        }
        if Instant::now() >= self.until {
            println!("{} inputs", self.tried);
            return None;
        }
        let random = &mut self.random;
        let mut input = random.choice(&self.corpus).cloned().unwrap_or_default();
        for _ in 0..random.usize(1..8) {
            let at = random.usize(..=input.len());
            match random.u8(..7) {
                0 => input.truncate(at),
                1 => input.insert(at, random.u8(..)),
                2 if at < input.len() => input[at] ^= 1 << random.u8(..8),
                3 if at < input.len() => drop(input.remove(at)),
                4 => {
                    let other = random.choice(&self.corpus).cloned().unwrap_or_default();
                    let from = random.usize(..=other.len());
                    input.truncate(at);
                    input.extend(&other[from..]);
                }
                5 => input.splice(at..at, [[0xff; 9], [0; 9], [0x80; 9]][random.usize(..3)]).for_each(drop),
                _ => input.extend(std::iter::repeat_with(|| random.u8(..)).take(at % 64).collect::<Vec<u8>>()),
            }
        }
        Some(input)
    }

    /// Within its limit and without a panic; otherwise the input is kept.
    fn judge<T>(&mut self, input: &[u8], outcome: std::thread::Result<T>, took: Duration, limit: Duration) -> T {
        self.tried += 1;
        match outcome {
            Ok(done) if took <= limit => done,
            outcome => {
                let file = keep(&self.directory, input);
                panic!("{} took {took:?} or panicked: {:?}", file.display(), outcome.err());
            }
        }
    }
}

/// Keeps an input that failed.
fn keep(directory: &Path, input: &[u8]) -> PathBuf {
    let file = directory.join(format!("failed-{:016x}", fastrand::u64(..)));
    fs::write(&file, input).unwrap();
    file
}

/// Runs a target that is a function.
fn function(target: &str, run: impl Fn(&[u8])) {
    let mut inputs = Inputs::of(target);
    let (begins, begun) = mpsc::channel::<Vec<u8>>();
    let (ends, ended) = mpsc::channel();
    let directory = inputs.directory.clone();
    // One that never ends would never be judged.
    let watching = thread::spawn(move || {
        for input in begun {
            if ended.recv_timeout(HANGS).is_err() {
                eprintln!("{} does not end", keep(&directory, &input).display());
                std::process::exit(1);
            }
        }
    });
    while let Some(input) = inputs.next() {
        begins.send(input.clone()).unwrap();
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&input)));
        ends.send(()).unwrap();
        inputs.judge(&input, outcome, begun.elapsed(), LIMIT);
    }
    drop(begins);
    watching.join().unwrap();
}

#[test]
fn credentials_files() {
    function("credentials", |input| {
        let Ok(known) = credentials::parse(&String::from_utf8_lossy(input)) else { return };
        let written: Vec<String> = known.iter().map(|caller| credentials::block(caller).unwrap()).collect();
        assert_eq!(credentials::parse(&written.join("\n")).unwrap(), known, "what is read is written as it was");
    });
}

#[test]
fn settings() {
    #[derive(Parser)]
    struct Serve {
        #[command(flatten)]
        args: ServeArgs,
    }
    function("settings", |input| {
        let line = String::from_utf8_lossy(input);
        if let Ok(parsed) = Serve::try_parse_from(["serve"].into_iter().chain(line.split_whitespace())) {
            let _ = parsed.args.validate().map_err(|error| error.to_string());
        }
    });
}

/// One of the contract's: a reason, and not that of a bug.
#[track_caller]
fn is_of_the_contract(status: &Status) {
    let reason = status.get_details_error_info().map(|info| info.reason);
    assert!(status.code() == Code::Ok || reason.as_deref().is_some_and(|reason| reason != "BUG"), "{status:?}");
}

/// Answers each request by `ask` within time, and is there at the end.
async fn service(target: &str, args: &[&str], ask: impl AsyncFn(&mut Raw, &[u8]) -> Vec<Status>) {
    let db = Db::sqlite();
    let server = ChildServer::serve(&db.url(), &[&["--roles", "user,admin,moderator"], args].concat()).await;
    let mut raw = Raw::connect(server.address).await;
    let mut inputs = Inputs::of(target);
    while let Some(input) = inputs.next() {
        let begun = Instant::now();
        let asked = async { ask(&mut raw, &input).await.iter().for_each(is_of_the_contract) };
        let outcome = AssertUnwindSafe(asked).catch_unwind().await;
        inputs.judge(&input, outcome, begun.elapsed(), LIMIT);
    }
    assert!(!server.logged("panicked"), "{:#?}", server.log());
    let answer = raw.send("GetRole", frame(&GetRoleRequest { user_id: 1, ..Default::default() })).await;
    let code = answer.status.expect("it serves on").code();
    assert!(matches!(code, Code::Ok | Code::Unauthenticated), "{code:?}");
}

/// The first byte says which method, and whether what follows is a message or the whole body.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests() {
    let ask = async |raw: &mut Raw, input: &[u8]| {
        let (first, rest) = input.split_first().unwrap_or((&0, &[]));
        let body = if *first < 0x80 { frame_bytes(rest) } else { Bytes::copy_from_slice(rest) };
        let method = Method::ALL[usize::from(first & 0x7f) % Method::ALL.len()];
        let path = format!("/{SERVICE}/{}", method.as_str());
        // A watch that is let in would go on.
        let headers: &[_] = if method == Method::WatchRoleChanges { &[("grpc-timeout", "20m")] } else { &[] };
        vec![raw.send_to(&path, headers, body).await.status.expect("an answer of gRPC")]
    };
    service("requests", &[], ask).await;
}

/// A line each: what a caller shows, and its deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers() {
    let house = House::new();
    house.admit(&[token("bot", "sesame", "read")]);
    let ask = async |raw: &mut Raw, input: &[u8]| {
        let text = String::from_utf8_lossy(input);
        let (shown, deadline) = text.split_once('\n').unwrap_or((&text, ""));
        let headers = [("authorization", shown), ("grpc-timeout", deadline)];
        // The others are no HTTP.
        let headers: Vec<_> = headers.into_iter().filter(|(_, value)| HeaderValue::from_str(value).is_ok()).collect();
        let get = frame(&GetRoleRequest { user_id: 1, ..Default::default() });
        let answer = raw.send_to(&format!("/{SERVICE}/GetRole"), &headers, get).await;
        let status = answer.status.expect("an answer of gRPC");
        assert!(status.code() != Code::Ok || shown.trim().to_lowercase() == "bearer sesame", "{shown:?} was let in");
        vec![status]
    };
    service("headers", &["--credentials", &house.path("credentials.toml")], ask).await;
}

/// As a text, and as what such a text is made of, wherever one is taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens() {
    let ask = async |raw: &mut Raw, input: &[u8]| {
        let mut told = Vec::new();
        for token in [String::from_utf8_lossy(input).into_owned(), BASE64_URL_SAFE_NO_PAD.encode(input)] {
            let page_token = token.clone();
            let users = ListUsersRequest { page_token: page_token.clone(), ..Default::default() };
            told.extend(raw.send("ListUsers", frame(&users)).await.status);
            let changes = ListRoleChangesRequest { page_token, ..Default::default() };
            told.extend(raw.send("ListRoleChanges", frame(&changes)).await.status);
            let watch = WatchRoleChangesRequest { after: token, ..Default::default() };
            told.push(raw.within(Duration::from_millis(20), "WatchRoleChanges", &watch).await);
        }
        told
    };
    service("tokens", &[], ask).await;
}

/// The row of a request that is asked again, with numbers of the input's in it: whatever stands there, no other role is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_in_sqlite() {
    let numbers = &["first_seq", "first_index", "size"];
    outcomes(Db::sqlite(), "rolecache_requests", numbers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_in_postgres() {
    outcomes(Db::postgres().await, "rolecache.requests", &["commit_id"]).await;
}

async fn outcomes(db: Db, table: &str, others: &[&str]) {
    let server = ChildServer::serve(&db.url(), &[]).await;
    let request = SetRoleRequest { user_id: 1, role: "admin".into(), request_id: "r".into(), ..Default::default() };
    let set = async || server.client.clone().set_role(request.clone()).await;
    // Beside the other targets a first connection to the store may take longer than a write waits for one.
    let done = async {
        loop {
            match set().await {
                Err(status) if status.code() == Code::Unavailable => {}
                told => return told.unwrap().into_inner(),
            }
        }
    };
    let change = timeout(PATIENCE, done).await.expect("a write in time").change.unwrap();
    server.client.clone().set_role(SetRoleRequest { user_id: 2, ..request.clone() }).await.unwrap_err();
    let columns = [&["revision"], others].concat();
    let right = db.sql(&format!("select {} from {table}", columns.join(", ")));
    let right: Vec<&str> = right.split('|').map(|value| if value.is_empty() { "null" } else { value }).collect();
    let newest = change.revision;
    let mut inputs = Inputs::of("outcomes");
    while let Some(input) = inputs.next() {
        // A revision that never comes is waited for, for 5 s: those of the corpus are enough.
        let is_kept = inputs.tried < inputs.corpus.len();
        let (latest, limit) = if is_kept { (i64::MAX, 6 * LIMIT) } else { (newest, LIMIT) };
        let mut sql = format!("update {table} set actor = actor");
        for (n, column) in columns.iter().enumerate() {
            let bytes = input.get(8 * n..8 * n + 8).and_then(|bytes| bytes.try_into().ok()).map(i64::from_le_bytes);
            let bytes = bytes.map(|value| if *column == "revision" { value.min(latest) } else { value });
            // 0 for what was there.
            let value =
                bytes.filter(|value| *value != 0).map_or_else(|| right[n].to_owned(), |value| value.to_string());
            sql += &format!(", {column} = {value}");
        }
        db.sql(&sql);
        let begun = Instant::now();
        let answered = async {
            match timeout(10 * LIMIT, set()).await.expect("an answer") {
                Ok(answer) => assert!(answer.into_inner().change.is_none_or(|told| told.new_role == change.new_role)),
                Err(status) => assert!(status.get_details_error_info().is_some(), "{status:?}"),
            }
        };
        let outcome = AssertUnwindSafe(answered).catch_unwind().await;
        inputs.judge(&input, outcome, begun.elapsed(), limit);
    }
    assert!(!server.logged("panicked"), "{:#?}", server.log());
}
