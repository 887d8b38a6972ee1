//! The trimmer: what is old goes from the start of the log, while writers, watches and resumes go on.

use std::time::{Duration, Instant};

use rolecache::proto::v1::{SetRoleRequest, WatchRoleChangesRequest};
use tonic::Code;

use crate::{
    resume::{Random, after},
    support::{
        server::{Db, PATIENCE, Setup, TestServer},
        watch::{Watching, reason, reliable},
    },
};

on_both! {
    a_hundred_thousand_expired_commits_shrink_to_ten_thousand_while_writers_run,
    request_ids_older_than_a_day_go,
    what_has_gathered_goes_at_once,
}

const EXPIRED: i64 = 100_000;
const KEPT: i64 = 10_000;

/// Gives the log so many commits of 40 days ago, one change each, and the table what they lead to. Before any server
/// runs on it.
fn age(db: &Db, expired: i64) {
    db.sql(&if db.is_postgres() {
        format!(
            "begin;
             alter table users disable trigger user;
             insert into users (user_id, role) select n, 'admin' from generate_series(1, {expired}) n;
             alter table users enable always trigger _rolecache_insert, enable always trigger _rolecache_update,
               enable always trigger _rolecache_delete, enable always trigger _rolecache_truncate;
             insert into rolecache.commits (id, xid, revision, size, committed_at)
             select n, '3', n, 1, clock_timestamp() - interval '40 days' from generate_series(1, {expired}) n;
             insert into rolecache.changes (commit_id, user_id, new_role) select n, n, 'admin' from generate_series(1, {expired}) n;
             select setval('rolecache.revision', {expired}), setval('rolecache.commits_id_seq', {expired});
             commit;
             analyze"
        )
    } else {
        format!(
            "with recursive n(id) as (select 1 union all select id + 1 from n where id < {expired})
             insert into users (user_id, role) select id, 'admin' from n;
             update rolecache_commits set committed_at = committed_at - 40 * 86400000;"
        )
    });
}

/// How many commits are there, the first and the last of them, and up to where the log says that it was trimmed.
fn look(db: &Db) -> [i64; 4] {
    let printed = db.sql(if db.is_postgres() {
        "select count(*), min(revision), max(revision), (select trimmed_revision from rolecache.feed)
         from rolecache.commits where revision is not null"
    } else {
        "select count(*), min(id), max(id), (select trimmed_revision from rolecache_feed) from rolecache_commits"
    });
    let figures: Vec<i64> = printed.split('|').map(|figure| figure.parse().unwrap()).collect();
    figures.try_into().unwrap()
}

async fn set(server: &TestServer, user_id: i64, role: &str) -> i64 {
    loop {
        let request = SetRoleRequest { user_id, role: role.into(), ..Default::default() };
        match server.try_set(request).await {
            Ok(written) => return written.revision,
            Err(status) => assert_eq!(status.code(), Code::Aborted, "{status:?}"),
        }
    }
}

async fn a_hundred_thousand_expired_commits_shrink_to_ten_thousand_while_writers_run(db: Db) {
    db.serve().await.stop().await.unwrap();
    age(&db, EXPIRED);
    let mut random = Random::new("trim");
    let begun = Instant::now();
    // A year: nothing goes before the watches are open.
    let patient = Setup { retain_changes: Duration::from_secs(365 * 86_400), ..Setup::new(&db) }.serve().await;
    assert_eq!(look(&db)[..3], [EXPIRED, 1, EXPIRED]);
    patient.stop().await.unwrap();
    let server = db.serve().await;
    let mut live = server.watch(WatchRoleChangesRequest::default()).await;
    let from = live.started.revision;
    assert_eq!(from, EXPIRED);
    let (mut resumed, mut compacted, mut looks) = (0, 0, 0);
    let mut written = 0;
    loop {
        let [count, first, last, trimmed] = look(&db);
        looks += 1;
        // Always a prefix: what is left has no hole.
        assert_eq!((count, trimmed), (last - first + 1, first - 1), "{first} to {last}");
        assert!(count >= KEPT);
        if count == KEPT && written > 200 {
            break;
        }
        assert!(begun.elapsed() < 3 * PATIENCE, "{count} commits are left");
        written += 1;
        set(&server, 1 + written % 50, if written / 50 % 2 == 0 { "user" } else { "moderator" }).await;

        let place = 1 + random.below(last as u64 - 1) as i64;
        match Watching::open(server.client.clone(), after(place)).await {
            Ok(mut watch) => {
                resumed += 1;
                // It goes on without a hole, or says that it cannot.
                for next in place + 1..(place + 5).min(last) {
                    match watch.try_next().await {
                        Ok(rolecache::proto::v1::watch_role_changes_response::Event::Commit(commit)) => {
                            assert_eq!(commit.revision, next);
                        }
                        Ok(_) => break,
                        Err(status) => {
                            assert_eq!(reason(&status).1, "REVISION_COMPACTED");
                            break;
                        }
                    }
                }
            }
            Err(status) => {
                compacted += 1;
                let (code, name, metadata) = reason(&status);
                assert_eq!((code, &*name), (Code::OutOfRange, "REVISION_COMPACTED"));
                assert!(metadata["oldest"].parse::<i64>().unwrap() > place);
            }
        }
    }
    let end = set(&server, 1_000_000, "admin").await;
    live.until(end).await;
    live.check();
    let log = server.log().await;
    reliable(&live.transcript, &log, from);
    println!(
        "trimmed in {:?}: {written} commits made, {looks} looks, {resumed} watches resumed, {compacted} compacted",
        begun.elapsed()
    );
    assert!(compacted > 0);
}

async fn what_has_gathered_goes_at_once(db: Db) {
    db.serve().await.stop().await.unwrap();
    let expired = 15_000;
    age(&db, expired);
    // More than one batch, and no second look for an hour.
    let _server = Setup { upkeep_interval: Duration::from_secs(3_600), ..Setup::new(&db) }.serve().await;
    let begun = Instant::now();
    while look(&db)[0] > KEPT {
        assert!(begun.elapsed() < PATIENCE, "{:?} are left", look(&db));
    }
    assert_eq!(look(&db), [KEPT, expired - KEPT + 1, expired, expired - KEPT]);
}

async fn request_ids_older_than_a_day_go(db: Db) {
    let server = db.serve().await;
    for user in 1..=20 {
        let request = SetRoleRequest {
            user_id: user,
            role: "admin".into(),
            request_id: format!("r{user}"),
            ..Default::default()
        };
        server.try_set(request).await.unwrap();
    }
    let (table, made_older) = if db.is_postgres() {
        ("rolecache.requests", "at = at - interval '25 hours'")
    } else {
        ("rolecache_requests", "answered_at = answered_at - 25 * 3600000")
    };
    let ids = "'r1','r2','r3','r4','r5'";
    db.sql(&format!("update {table} set {made_older} where request_id in ({ids})"));
    let begun = Instant::now();
    while db.sql(&format!("select count(*) from {table}")) != "15" {
        assert!(begun.elapsed() < PATIENCE, "they are still there");
        tokio::task::yield_now().await;
    }
    assert_eq!(db.sql(&format!("select count(*) from {table} where request_id in ({ids})")), "0");
    // A younger one still answers for the first attempt.
    let again = SetRoleRequest { user_id: 20, role: "admin".into(), request_id: "r20".into(), ..Default::default() };
    assert!(server.try_set(again).await.unwrap().change.is_some());
    assert_eq!(server.log().await.len(), 20);
}
