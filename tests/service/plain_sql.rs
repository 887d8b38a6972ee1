//! What strangers change with the database's own shell reaches the cache and the watchers.

use std::time::{Duration, Instant};

use rolecache::proto::v1::Origin;

use crate::support::{
    calls::until,
    logs,
    postgres::try_psql,
    server::{Db, Setup, TestServer},
    watch::{Watching, reliable},
};

/// What a statement is to be heard as: the user, the role before and after, "" where the user is not there.
type Heard = (i64, &'static str, &'static str);

struct Step {
    what: &'static str,
    sql: &'static str,
    heard: &'static [Heard],
}

const fn step(what: &'static str, sql: &'static str, heard: &'static [Heard]) -> Step {
    Step { what, sql, heard }
}

const COMMON: &[Step] = &[
    step("INSERT", "insert into users (user_id, role) values (1, 'admin')", &[(1, "", "admin")]),
    step(
        "an INSERT of several rows",
        "insert into users (user_id, role) values (2, 'user'), (3, 'owner'), (4, null)",
        &[(2, "", "user"), (3, "", "owner"), (4, "", "user")],
    ),
    step("UPDATE", "update users set role = 'moderator' where user_id = 1", &[(1, "admin", "moderator")]),
    step("an UPDATE that leaves the role", "update users set role = role, username = 'x'", &[]),
    step("an empty role is the default", "update users set role = '' where user_id = 4", &[]),
    step(
        "upsert",
        "insert into users (user_id, role) values (1, 'admin'), (5, 'admin')
         on conflict (user_id) do update set role = excluded.role",
        &[(1, "moderator", "admin"), (5, "", "admin")],
    ),
    step(
        "a savepoint that is rolled back",
        "begin; update users set role = 'admin' where user_id = 2; savepoint s;
         update users set role = 'admin' where user_id = 3; rollback to s; commit",
        &[(2, "user", "admin")],
    ),
    step("a transaction that is rolled back", "begin; delete from users; rollback", &[]),
    step("a changed key", "update users set user_id = 50 where user_id = 5", &[(5, "admin", ""), (50, "", "admin")]),
    step(
        "one user twice",
        "begin; update users set role = 'a' where user_id = 2; update users set role = 'b' where user_id = 2; commit",
        &[(2, "admin", "a"), (2, "a", "b")],
    ),
    step("DELETE", "delete from users where user_id = 3", &[(3, "owner", "")]),
];

const POSTGRES: &[Step] = &[
    step(
        "COPY",
        "copy users (user_id, role) from stdin;\n60\tadmin\n61\towner\n\\.\n",
        &[(60, "", "admin"), (61, "", "owner")],
    ),
    step(
        "a REPEATABLE READ transaction",
        "begin isolation level repeatable read; update users set role = 'user' where user_id = 60;
         update users set role = 'user' where user_id = 61; commit",
        &[(60, "admin", "user"), (61, "owner", "user")],
    ),
    step(
        "session_replication_role = replica",
        "set session_replication_role = replica; update users set role = 'admin' where user_id = 60",
        &[(60, "user", "admin")],
    ),
    step(
        "SET CONSTRAINTS ALL IMMEDIATE",
        "begin; set constraints all immediate; update users set role = 'user' where user_id = 60; commit",
        &[(60, "admin", "user")],
    ),
    step(
        "TRUNCATE",
        "truncate users",
        &[(1, "admin", ""), (2, "b", ""), (4, "user", ""), (50, "admin", ""), (60, "user", ""), (61, "user", "")],
    ),
    step("an INSERT after it", "insert into users (user_id, role) values (1, 'owner')", &[(1, "", "owner")]),
];

const SQLITE: &[Step] = &[
    step("REPLACE", "replace into users (user_id, role) values (1, 'owner')", &[(1, "admin", "owner")]),
    step("DELETE of all", "delete from users", &[(1, "owner", ""), (2, "b", ""), (4, "user", ""), (50, "admin", "")]),
    step("an INSERT after it", "insert into users (user_id, role) values (1, 'owner')", &[(1, "", "owner")]),
];

const USERS: [i64; 9] = [1, 2, 3, 4, 5, 50, 60, 61, 99];

on_both! {
    every_way_to_write_reaches_the_cache_and_the_watchers,
    it_is_noticed_however_seldom_the_log_is_polled,
    a_trigger_that_is_gone_is_said_aloud,
}

/// From the end of a stranger's shell to a watch, in the middle: what else runs here may hold up one.
const IN_TIME: Duration = Duration::from_secs(1);

/// Takes what a step is heard as; how long that took.
async fn hear(watch: &mut Watching, step: &Step, in_one: bool, actor: &str) -> Duration {
    let begun = Instant::now();
    let mut told = Vec::new();
    while told.len() < step.heard.len() {
        let commit = watch.next_commit().await;
        told.extend(commit.changes);
        assert!(!in_one || told.len() == step.heard.len(), "{}: not in one commit", step.what);
    }
    let arrived = begun.elapsed();
    if !step.heard.is_empty() {
        println!("{}: heard {arrived:?} after the shell ended", step.what);
    }
    let mut heard: Vec<_> = told.iter().map(|it| (it.user_id, &*it.old_role, &*it.new_role)).collect();
    if step.what == "TRUNCATE" || step.what == "DELETE of all" {
        heard.sort();
    }
    assert_eq!(heard, step.heard, "{}", step.what);
    for change in &told {
        assert_eq!((change.origin(), &*change.actor), (Origin::Sql, actor));
        watch.cache_first(change, "user").await;
    }
    arrived
}

async fn check_cache(server: &TestServer, db: &Db, what: &str) {
    for user in USERS {
        let held = db.sql(&format!("select role from users where user_id = {user}"));
        let held = if held.is_empty() { "user" } else { &*held };
        assert_eq!(server.get(user).await.role, held, "{what}: user {user}");
    }
}

async fn every_way_to_write_reaches_the_cache_and_the_watchers(db: Db) {
    for complete in [false, true] {
        let db = if db.is_postgres() { Db::postgres().await } else { Db::sqlite() };
        let setup = Setup::new(&db);
        let server = if complete { setup.complete() } else { setup }.serve().await;
        for user in USERS {
            server.get(user).await;
        }
        let mut watch = server.watch(Default::default()).await;
        let (more, actor) = if db.is_postgres() { (POSTGRES, "postgres") } else { (SQLITE, "sqlite") };
        let mut arrived = Vec::new();
        for step in COMMON.iter().chain(more) {
            db.shell().go(step.sql).await;
            arrived.push(hear(&mut watch, step, db.is_postgres(), actor).await);
            check_cache(&server, &db, step.what).await;
        }
        watch.check();
        reliable(&watch.transcript, &server.log().await, 0);
        arrived.sort();
        assert!(arrived[arrived.len() / 2] < IN_TIME, "{arrived:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncate_under_repeatable_read_is_refused_and_changes_nothing() {
    let db = Db::postgres().await;
    let server = db.serve().await;
    server.set(1, "admin").await;
    let error = try_psql(&db.url(), "begin isolation level repeatable read; truncate users; commit").unwrap_err();
    assert!(error.contains("READ COMMITTED"), "{error}");
    assert_eq!(server.get(1).await.role, "admin");
    assert_eq!(server.log().await.len(), 1);
}

async fn it_is_noticed_however_seldom_the_log_is_polled(db: Db) {
    let server = Setup { poll_interval: Duration::from_secs(3_600), ..Setup::new(&db) }.serve().await;
    let mut watch = server.watch(Default::default()).await;
    for (user, role) in [(1, "admin"), (2, "moderator"), (3, "owner")] {
        db.sql(&format!("insert into users (user_id, role) values ({user}, '{role}')"));
        assert_eq!(watch.next_commit().await.changes[0].new_role, role);
        assert_eq!(server.get(user).await.role, role);
    }
}

async fn a_trigger_that_is_gone_is_said_aloud(db: Db) {
    logs::capture();
    let _server = db.serve().await;
    let (gone, said) = if db.is_postgres() {
        ("alter table users disable trigger _rolecache_delete", "the trigger _rolecache_delete of ")
    } else {
        ("drop trigger rolecache_after_delete", "the trigger rolecache_after_delete on users is missing")
    };
    db.sql(gone);
    until("it is in the log", || !logs::lines_with(&format!("changes are not logged any more: {said}")).is_empty())
        .await;
}
