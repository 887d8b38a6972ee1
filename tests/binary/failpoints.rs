//! What ends the process and what must not, with the failpoints of `src/failpoint.rs`.

use rolecache::proto::v1::{SetRoleRequest, WatchRoleChangesRequest};
use serde_json::Value;

use crate::{
    process::{Process, answer, run, serve},
    support::{
        doors::{House, token},
        server::{Db, client},
        watch::{Watching, reason},
    },
};

on_both! {
    a_task_that_panics_ends_the_process_with_its_reason,
    no_task_ends_without_the_process,
    a_crash_ends_the_process_at_once,
    a_handler_that_panics_is_answered_and_counted,
    a_watch_that_panics_is_answered_and_counted,
    a_corrupt_entry_is_found_by_the_self_check,
}

fn start(db: &Db, failpoints: &str, args: &[&str]) -> Process {
    Process::spawn(serve(&db.url(), args).env("FAILPOINTS", failpoints))
}

/// The lines of the log with this message, of which there are so many. They may be on their way when a call is answered.
fn told(server: &Process, message: &str, count: usize) -> Vec<Value> {
    server.err.until_many(count, |line| line.contains(message));
    let lines = server.err.all();
    let lines = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["message"].as_str().is_some_and(|told| told.contains(message))).collect()
}

/// Mismatches and panics.
fn counted(address: &str) -> (i64, i64) {
    let stats: Value = serde_json::from_str(&answer(&["stats", "--output", "json", "--address", address])).unwrap();
    let count = |name: &str| stats[name].as_str().unwrap_or("0").parse().unwrap();
    (count("cacheMismatches"), count("panics"))
}

async fn a_task_that_panics_ends_the_process_with_its_reason(db: Db) {
    for task in ["tailer", "filler", "writer"] {
        let mut server = start(&db, &format!("{task}::task=1*off->panic(no more)"), &[]);
        // The tailer comes to its point without being asked to.
        let address = if task == "tailer" { server.address() } else { server.ready() };
        for _ in 0..2 {
            run(&["get", "1", "--fresh", "--address", &address]);
            run(&["set", "1", "admin", "--address", &address]);
        }
        let status = server.ended();
        assert_eq!(status.code(), Some(1), "{}", server.err.text());
        let last = server.err.all().pop().unwrap();
        assert_eq!(last, format!("error: {}", panicked(task)));
        let told = told(&server, "a background task ended", 1);
        assert!(told.len() == 1 && told[0]["level"] == "ERROR", "{}", server.err.text());
    }
}

async fn no_task_ends_without_the_process(db: Db) {
    // All that there are.
    let spawned = include_str!("../../src/server.rs").split("upkeep.spawn(\"").skip(1);
    let tasks: Vec<&str> = spawned.map(|rest| rest.split('"').next().unwrap()).collect();
    assert!(tasks.len() >= 14, "{tasks:?}");
    let house = House::new();
    house.admit(&[token("bot", "sesame", "read")]);
    let [cert, key, credentials] = ["server.pem", "server.key", "credentials.toml"].map(|name| house.path(name));
    let doors = ["--tls-cert", &cert, "--tls-key", &key, "--credentials", &credentials];
    for task in tasks {
        for (told, reason) in [("return(it is over)", "it is over".to_owned()), ("panic(no more)", panicked(task))] {
            let args = [&["--cache", "complete"], &doors[..]].concat();
            let mut server = start(&db, &format!("task::{task}={told}"), &args);
            let status = server.ended();
            assert_eq!(status.code(), Some(1), "{}", server.err.text());
            assert_eq!(server.err.all().pop().unwrap(), format!("error: {reason}"));
        }
    }
}

fn panicked(task: &str) -> String {
    format!("the task \"{task}\" panicked: no more")
}

async fn a_crash_ends_the_process_at_once(db: Db) {
    let mut server = start(&db, "writer::after_commit=return", &[]);
    let address = server.ready();
    let (code, _, err) = run(&["set", "1", "admin", "--address", &address]);
    assert_ne!(code, 0, "{err}");
    let status = server.ended();
    assert_eq!(status.code(), None, "killed by a signal");
    assert_eq!(db.sql("select role from users where user_id = 1"), "admin");
}

async fn a_handler_that_panics_is_answered_and_counted(db: Db) {
    let mut server = start(&db, "grpc::handler=2*panic(on purpose)->off", &[]);
    let address = server.ready();
    for panics in 1..=2 {
        let (code, _, err) = run(&["get", "1", "--address", &address]);
        assert_eq!(code, 1, "{err}");
        assert!(err.contains("(BUG)") && !err.contains("on purpose"), "{err}");
        let told = told(&server, "a call panicked", panics);
        assert_eq!(told.len(), panics);
        assert_eq!((&told[panics - 1]["panics"], &told[panics - 1]["cause"]), (&panics.into(), &"on purpose".into()));
    }
    let places = told(&server, "a panic: on purpose", 2);
    assert!(places.len() == 2 && places[0]["place"].as_str().is_some_and(|place| place.contains(".rs:")), "{places:?}");
    assert_eq!(answer(&["get", "1", "--address", &address]), "user\n");
    assert_eq!(counted(&address), (0, 2));
    server.stop("TERM");
}

async fn a_watch_that_panics_is_answered_and_counted(db: Db) {
    let server = start(&db, "watch::message=1*panic(on purpose)->off", &[]);
    let mut client = client(server.ready().parse().unwrap()).await;
    let mut watch = Watching::open(client.clone(), WatchRoleChangesRequest::default()).await.unwrap();
    client.set_role(SetRoleRequest { user_id: 1, role: "admin".into(), ..Default::default() }).await.unwrap();
    assert_eq!(reason(&watch.until_end().await).1, "BUG");
    assert_eq!(told(&server, "a call panicked", 1).len(), 1);
    // Over the same connection.
    let after = WatchRoleChangesRequest { after: "0".into(), ..Default::default() };
    let mut watch = Watching::open(client, after).await.unwrap();
    assert_eq!(watch.next_commit().await.changes.len(), 1);
}

async fn a_corrupt_entry_is_found_by_the_self_check(db: Db) {
    for mode in ["lazy", "complete"] {
        let args = ["--cache", mode, "--self-check", "1s"];
        let mut server = start(&db, "cache::corrupt=1*return(7:admin)->off", &args);
        let address = server.ready();
        let mut watch =
            Watching::open(client(address.parse().unwrap()).await, WatchRoleChangesRequest::default()).await.unwrap();
        answer(&["set", "8", if mode == "lazy" { "admin" } else { "user" }, "--address", &address]);
        assert_eq!(watch.next_commit().await.changes.len(), 1);
        server.err.until(|line| line.contains("it starts anew"));
        let differs = told(&server, "another role than the store", 1);
        let [difference] = &differs[..] else { panic!("{differs:?}") };
        assert_eq!(difference["level"], "ERROR");
        assert_eq!((&difference["user_id"], &difference["mismatches"]), (&7.into(), &1.into()));
        assert_eq!((&difference["cached"], &difference["stored"]), (&"admin".into(), &"user".into()));
        assert!(difference["revision"].is_i64(), "{difference}");
        assert_eq!(answer(&["get", "7", "--address", &address]), "user\n");
        assert_eq!(counted(&address), (1, 0));
        // The watch goes on.
        answer(&["set", "9", if mode == "lazy" { "admin" } else { "user" }, "--address", &address]);
        assert_eq!(watch.next_commit().await.changes.len(), 1);
        server.stop("TERM");
    }
}
