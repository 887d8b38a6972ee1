//! From the first line of the log to the last: start, waiting for a store, audit, signals, and ends that nobody asked for.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    process::{Process, answer, rolecache, run, serve},
    support::{postgres::Postgres, server::Db},
};

on_both! {
    the_start_is_told_in_a_line_each,
    each_change_leaves_an_audit_line,
    signals_end_it_cleanly,
    migrate_brings_the_schema_up_to_date,
    a_damaged_log_ends_it_with_its_reason,
}

fn messages(server: &Process) -> Vec<String> {
    let message = |line: &String| {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}"));
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
        line["message"].as_str().expect("a message").to_owned()
    };
    server.err.all().iter().map(message).collect()
}

async fn the_start_is_told_in_a_line_each(db: Db) {
    db.sql("create table users (user_id integer primary key, role text)");
    let url = match &db {
        Db::Postgres { url } => url.replace("postgres@", "postgres:sesame@"),
        Db::Sqlite { .. } => db.url(),
    };
    // Not in the arguments, which others could read.
    let serve = |args: &[&str]| {
        let args = [&["serve", "--listen", "127.0.0.1:0"], args].concat();
        Process::spawn(rolecache(args).env("ROLECACHE_DATABASE_URL", &url))
    };
    let mut server = serve(&["--log-format", "json", "--cache-capacity", "1000"]);
    let address = server.ready();
    let told = messages(&server);
    let one = |text: &str| {
        let found: Vec<_> = told.iter().filter(|line| line.contains(text)).collect();
        assert_eq!(found.len(), 1, "{text}: {told:#?}");
        found[0].clone()
    };
    assert_eq!(one("listening"), format!("listening on {address}"));
    let store = one("store: ");
    match &db {
        Db::Postgres { .. } => assert!(store.contains("PostgreSQL ") && store.contains(", database test_"), "{store}"),
        Db::Sqlite { .. } => assert!(store.contains("SQLite 3") && store.ends_with("bot.db"), "{store}"),
    }
    let tables = one("tables: ");
    assert!(tables.contains("adopted") && tables.contains("users") && tables.contains("created mailboxes"), "{tables}");
    assert_eq!(one("cache: "), "cache: lazy, up to 1000 users");
    assert_eq!(told.iter().filter(|line| *line == "ready").count(), 1);
    assert_eq!(told.len(), 6, "{told:#?}");
    server.stop("TERM");
    assert!(!server.err.text().contains("sesame"), "a password in the log");
    assert_eq!(messages(&server).last().unwrap(), "stopped");

    let server = serve(&["--log-format", "text", "--cache", "complete"]);
    server.ready();
    let text = server.err.text();
    assert!(!text.contains("WARN"), "nothing is wrong: {text}");
    assert!(text.contains(" INFO cache: complete") && !text.contains('{') && !text.contains('\x1b'), "{text}");
    assert!(!text.contains("sesame"), "a password in the log");
}

async fn each_change_leaves_an_audit_line(db: Db) {
    let mut server = Process::serve(&db.url(), &["--roles", "user,admin,helper"]);
    let address = server.ready();
    let to = |line: &str| answer(&[line.split(' ').collect(), vec!["--address", &address]].concat());
    to("set 1 helper --username ann");
    to("set 1 admin --reason promoted");
    to("transfer 1 2 --demote --to-username bob");
    to("set 1 helper");
    to("delete 1");
    db.sql("insert into users (user_id, role, username) values (3, 'admin', 'eve')");
    server.err.until(|line| line.contains("\"eve\""));
    to("mailbox register 7 42");
    server.stop("INT");
    let audit: Vec<Value> = server
        .err
        .all()
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["target"] == "rolecache::audit")
        .collect();
    let (mailboxes, audit): (Vec<Value>, Vec<Value>) =
        audit.into_iter().partition(|line| line["message"] == "mailbox to be registered");
    let told: Vec<String> = mailboxes
        .iter()
        .map(|line| format!("{} {} {}", line["mailbox_id"], line["creator_id"], line["actor"]))
        .collect();
    assert_eq!(told, ["7 42 \"anonymous\""]);
    let told: Vec<String> = audit
        .iter()
        .map(|line| {
            let text = |field: &str| line[field].as_str().unwrap_or_else(|| panic!("no {field} in {line}")).to_owned();
            assert_eq!(line["level"], "INFO");
            [
                line["revision"].to_string(),
                text("message"),
                text("kind"),
                line["user_id"].to_string(),
                text("username"),
                text("old_role"),
                text("new_role"),
                text("origin"),
                text("reason"),
            ]
            .join("|")
        })
        .collect();
    assert_eq!(
        told,
        [
            "1|user created|user_created|1|ann||helper|rpc|",
            "2|admin added|admin_added|1|ann|helper|admin|rpc|promoted",
            "3|admin transferred|admin_transferred|2|bob||admin|rpc|",
            "3|admin removed|admin_removed|1|ann|admin|user|rpc|",
            "4|role changed|role_changed|1|ann|user|helper|rpc|",
            "5|user deleted|user_deleted|1|ann|helper||rpc|",
            "6|admin added|admin_added|3|eve||admin|sql|",
        ]
    );
    let actors: BTreeSet<&str> = audit.iter().map(|line| line["actor"].as_str().unwrap()).collect();
    let of_sql = if matches!(db, Db::Postgres { .. }) { "postgres" } else { "sqlite" };
    assert_eq!(actors, BTreeSet::from(["anonymous", of_sql]));
}

async fn signals_end_it_cleanly(db: Db) {
    for signal in ["TERM", "INT"] {
        let mut server = Process::serve(&db.url(), &[]);
        server.ready();
        let took = server.stop(signal);
        assert!(took < Duration::from_secs(3), "nothing was in flight, and it took {took:?}");
        let told = messages(&server);
        assert!(told.iter().any(|line| *line == format!("SIG{signal} received")), "{told:#?}");
    }
    // Before it has said that it is ready.
    let mut server = Process::serve(&db.url(), &[]);
    server.address();
    server.stop("TERM");
}

async fn migrate_brings_the_schema_up_to_date(db: Db) {
    let url = db.url();
    let (code, _, err) = run(&["serve", "--database-url", &url, "--no-migrate", "--listen", "127.0.0.1:0"]);
    assert_eq!(code, 1);
    assert!(err.contains("migrate"), "{err}");
    let out = answer(&["migrate", "--database-url", &url]);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines.len(), lines[1]), (2, "created users and mailboxes"), "{out}");
    let again = answer(&["migrate", "--database-url", &url]);
    assert!(again.lines().nth(1).unwrap().contains("users"), "{again}");
    let mut server = Process::serve(&url, &["--no-migrate"]);
    server.ready();
    server.stop("TERM");
}

/// A commit that says that it has a change, and has none: there is no truth to follow any more.
async fn a_damaged_log_ends_it_with_its_reason(db: Db) {
    let mut server = Process::serve(&db.url(), &[]);
    let address = server.ready();
    answer(&["set", "1", "admin", "--address", &address]);
    match db {
        Db::Postgres { .. } => db.sql(
            "begin; insert into users values (2, 'admin'); set constraints all immediate;
             delete from rolecache.changes where user_id = 2; commit",
        ),
        Db::Sqlite { .. } => db.sql(
            "begin; insert into users values (2, 'admin', null); delete from rolecache_changes where user_id = 2; commit",
        ),
    };
    let status = server.ended();
    assert_eq!(status.code(), Some(1), "{}", server.err.text());
    let last = server.err.all().pop().unwrap();
    assert!(last.starts_with("error: the change log cannot be followed: "), "{}", server.err.text());
}

/// What is answered and logged by its default role and told by its name is not what the process began with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_database_in_the_place_of_the_first_ends_the_server() {
    for change in ["store_id = gen_random_uuid()", "default_role = 'guest'", "admin_role = 'boss'"] {
        let db = Db::postgres().await;
        let mut server = Process::serve(&db.url(), &[]);
        server.ready();
        db.sql(&format!("update rolecache.feed set {change}"));
        let status = server.ended();
        assert_eq!(status.code(), Some(1), "{}", server.err.text());
        let last = server.err.all().pop().unwrap();
        assert!(last.contains("it is another database now"), "{}", server.err.text());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_down_at_start_is_waited_for() {
    let postgres = Postgres::start_own();
    let url = postgres.fresh_database().await.url;
    postgres.stop();
    let mut impatient = Process::serve(&url, &[]);
    let server = Process::serve(&url, &[]);
    let address = server.address();
    let line = server.err.until(|line| line.contains("the store cannot be reached"));
    let line: Value = serde_json::from_str(&line).unwrap();
    assert!(line["level"] == "WARN" && line["retry_ms"].as_u64().unwrap() > 0, "{line}");
    assert!(line["cause"].as_str().unwrap().contains("refused"), "{line}");
    let (code, out, _) = run(&["healthcheck", "--address", &address]);
    assert_eq!((code, &*out), (3, "NOT_SERVING\n"));
    for args in [&["get", "1", "--address", &address][..], &["set", "1", "admin", "--address", &address]] {
        let (code, _, err) = run(args);
        assert_eq!(code, 3, "{err}");
        assert!(err.contains("(STORE_UNREACHABLE)") && err.contains("worth another try in 1s"), "{err}");
    }
    let (code, _, err) = run(&["migrate", "--database-url", &url]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("error: the store cannot be reached: "), "{err}");
    impatient.address();
    impatient.err.until(|line| line.contains("the store cannot be reached"));
    let took = impatient.stop("TERM");
    assert!(took < Duration::from_secs(3), "{took:?}");

    // The pauses grow.
    let waits = |server: &Process| -> Vec<u64> {
        let wait = |line: &String| serde_json::from_str::<Value>(line).unwrap()["retry_ms"].as_u64();
        server.err.all().iter().filter_map(wait).collect()
    };
    server.err.until_count(4);
    let pauses = waits(&server);
    assert!(pauses.windows(2).all(|pair| pair[1] > pair[0]) && pauses[0] < 1_000, "{pauses:?}");
    postgres.start();
    server.ready();
    assert_eq!(answer(&["get", "1", "--address", &address]), "user\n");
}

/// In a network that swallows everything, a connection is never made and never refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_ends_a_start_that_hangs() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://bot@{}/bot", silent.local_addr().unwrap());
    for signal in ["TERM", "INT"] {
        let mut server = Process::serve(&url, &[]);
        server.address();
        let took = server.stop(signal);
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
}

/// Whoever read the log has gone: the server serves on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_is_no_reason_to_end() {
    let db = Db::sqlite();
    let mut child = serve(&db.url(), &[]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    let address: String = line.split_once("listening on ").unwrap().1.chars().take_while(|c| *c != '"').collect();
    drop(log);
    let until = Instant::now() + Duration::from_secs(20);
    while run(&["healthcheck", "--address", &address]).0 != 0 {
        assert!(Instant::now() < until);
    }
    for user in ["1", "2", "3"] {
        answer(&["set", user, "admin", "--address", &address]);
    }
    assert_eq!(answer(&["get", "3", "--address", &address]), "admin\n");
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait().unwrap()));
    let status = end.recv_timeout(Duration::from_secs(10)).expect("it ends in time");
    assert_eq!(status.code(), Some(0));
}
