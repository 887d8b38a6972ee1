//! `watch` over ends and starts of its server: every commit once, in order, none missing.

use serde_json::Value;

use crate::{
    process::{Process, answer, rolecache},
    support::server::Db,
};

on_both! { a_watch_goes_on_over_restarts }

fn revisions(watch: &Process) -> Vec<i64> {
    let revision = |line: &String| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["commit"]["revision"].as_str().map(|text| text.parse().unwrap())
    };
    watch.out.all().iter().filter_map(revision).collect()
}

async fn a_watch_goes_on_over_restarts(db: Db) {
    let mut server = Process::serve(&db.url(), &[]);
    let address = server.ready();
    let set = |user: i64, role: &str| {
        let out = answer(&["set", &user.to_string(), role, "--output", "json", "--address", &address]);
        serde_json::from_str::<Value>(&out).unwrap()["revision"].as_str().unwrap().parse::<i64>().unwrap()
    };
    let mut expected = vec![set(1, "admin")];
    let start =
        |args: &[&str]| Process::spawn(rolecache(["watch", "--output", "json", "--address", &address]).args(args));
    let mut all = start(&["--after", "0"]);
    let mut filtered = start(&["--user", "2", "--heartbeat", "200ms"]);
    filtered.err.until(|line| line.contains("watching after revision"));
    for round in 0..3 {
        expected.push(set(10 + round, "admin"));
        let newest = format!("\"revision\":\"{}\"", expected[expected.len() - 1]);
        all.out.until(|line| line.contains(&newest));
        // Killed, asked to end, killed again.
        if round == 1 {
            server.stop("TERM");
        } else {
            server.signal("KILL");
            server.ended();
        }
        let lost = format!("resuming from revision {}", expected[expected.len() - 1]);
        all.err.until(|line| line.contains(&lost));
        // Nobody watches now.
        db.sql(&format!("insert into users (user_id, role) values ({}, 'admin')", 20 + round));
        server = Process::serve(&db.url(), &["--listen", &address]);
        server.ready();
        expected.push(expected[expected.len() - 1] + 1);
        expected.push(set(2, if round % 2 == 0 { "admin" } else { "user" }));
    }
    let newest = format!("\"revision\":\"{}\"", expected[expected.len() - 1]);
    all.out.until(|line| line.contains("\"commit\"") && line.contains(&newest));
    if filtered.out.find(|line| line.contains("\"commit\"") && line.contains(&newest)).is_none() {
        panic!("not told of {newest}: {}{}", filtered.out.text(), filtered.err.text());
    }
    all.signal("INT");
    assert_eq!(all.ended().code(), Some(0));
    let last = all.err.all().pop().unwrap();
    let token = last.strip_prefix("to go on from here: --after ").expect("where to go on").to_owned();
    assert_eq!(revisions(&all), expected, "each commit once, in order");
    filtered.signal("TERM");
    assert_eq!(filtered.ended().code(), Some(0));
    assert_eq!(revisions(&filtered).len(), 3);

    let next = set(3, "admin");
    let out = answer(&["watch", "--after", &token, "--count", "1", "--output", "json", "--address", &address]);
    assert!(out.lines().nth(1).unwrap().contains(&format!("\"revision\":\"{next}\"")), "{out}");
}
