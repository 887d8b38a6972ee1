//! OR REPLACE removes rows without a DELETE trigger, also of users that the statement does not name.

use rolecache::{
    role::RoleName,
    store::{Call, Grant, Refusal, Store, WriteError},
};

use crate::{
    fixtures::{Fixture, SqliteFile},
    suite::*,
};

const UNIQUE_NAME: &str = "create table users (user_id integer primary key, role text, username text unique)";

/// Runs each statement in a shell of its own, and compares what the log says of it.
async fn check(table: &str, cases: &[(&str, &str)]) {
    for settings in ["", "pragma recursive_triggers = on; "] {
        let database = SqliteFile::fresh().await;
        database.sql(table);
        let store = database.open().await;
        for (sql, expected) in cases {
            let head = store.head().await.unwrap();
            database.sql(&format!("{settings}{sql}"));
            let said = said_from(&store, head).await;
            if settings.is_empty() {
                assert_eq!(said, *expected, "{sql}");
            }
            assert_log_leads_to_table(&database, &store).await;
        }
        store.close().await;
    }
}

/// Each change starts where the one before it ended, and the last ones are what the table holds.
pub(super) async fn assert_log_leads_to_table(database: &SqliteFile, store: &std::sync::Arc<dyn Store>) {
    assert_log_ends_at_table(database, store, true).await;
}

/// The last change of each user is what the table holds; `chained`, and each starts where the one before it ended.
pub(super) async fn assert_log_ends_at_table(database: &SqliteFile, store: &std::sync::Arc<dyn Store>, chained: bool) {
    let start = store.locate(rolecache::role::Revision(0), None).await.unwrap();
    let mut held = std::collections::BTreeMap::new();
    for commit in read_from(store, start, 1_000).await {
        for change in &commit.changes {
            let before = held.get(&change.user).cloned();
            if chained {
                assert_eq!(change.old, before, "in commit {}: {}", commit.revision, said([change]));
                assert_ne!(change.old, change.new, "in commit {}: {}", commit.revision, said([change]));
            }
            match &change.new {
                Some(role) => held.insert(change.user, role.clone()),
                None => held.remove(&change.user),
            };
        }
    }
    let listed = store.list_users(None, None, 10_000).await.unwrap().users;
    let listed: std::collections::BTreeMap<_, _> = listed.into_iter().map(|row| (row.user, row.role)).collect();
    assert_eq!(held, listed, "{}", database.sql("select * from users"));
}

#[tokio::test]
async fn a_replaced_user_is_a_changed_user() {
    let cases = [
        ("insert into users values (1, 'admin', 'eve'), (2, 'x', 'bob')", "1: - > admin, 2: - > x"),
        ("insert or replace into users values (1, 'helper', 'eve')", "1: admin > helper"),
        ("replace into users values (1, 'helper', 'new name')", ""),
        ("replace into users values (1, null, null)", "1: helper > user"),
        ("replace into users (user_id) values (1)", ""),
        ("replace into users select user_id, 'all', username from users order by user_id", "1: user > all, 2: x > all"),
    ];
    check(UNIQUE_NAME, &cases).await;
    check("create table users (user_id integer primary key, role text, username text)", &cases).await;
    check("create table users (user_id bigint primary key, role text, username text) without rowid", &cases).await;
    check("create table users (user_id bigint not null unique, role text, username text unique)", &cases).await;
}

#[tokio::test]
async fn a_user_replaced_through_another_unique_column_is_gone() {
    let cases = [
        (
            "insert into users values (1, 'admin', 'eve'), (2, 'x', 'bob'), (3, 'y', 'ann')",
            "1: - > admin, 2: - > x, 3: - > y",
        ),
        ("insert or replace into users values (4, 'z', 'eve')", "1: admin > -, 4: - > z"),
        ("insert or replace into users values (2, 'z', 'ann')", "3: y > -, 2: x > z"),
        ("insert or replace into users values (9, 'z', 'nobody')", "9: - > z"),
        ("update or replace users set username = 'eve' where user_id = 9", "4: z > -"),
        ("update or replace users set username = 'eve' where user_id = 9", ""),
        ("update or replace users set user_id = 2 where user_id = 9", "9: z > -"),
        ("insert into users values (5, 'a', 'five')", "5: - > a"),
        ("update or replace users set user_id = 5, role = 'b' where user_id = 2", "2: z > -, 5: a > b"),
        ("insert or replace into users (role, username) values ('c', 'eve')", "5: b > -, 6: - > c"),
    ];
    check(UNIQUE_NAME, &cases[..9]).await;
    check(
        "create table users (user_id bigint primary key, role text, username text, unique (username)) without rowid",
        &cases[..9],
    )
    .await;
    check("create table users (user_id bigint unique, role text, username text primary key)", &cases[..9]).await;
}

#[tokio::test]
async fn a_row_without_a_user_replaces_too() {
    check(
        "create table users (username text primary key, role text, user_id bigint unique)",
        &[
            ("insert into users values ('eve', 'admin', 1), ('bob', 'x', 2)", "1: - > admin, 2: - > x"),
            ("insert or replace into users (username, role) values ('eve', 'user')", "1: admin > -"),
            ("update users set role = 'y' where username = 'eve'", ""),
            ("insert or ignore into users (username, role) values ('bob', 'z')", ""),
            ("replace into users values ('eve', 'helper', 2)", "2: x > helper"),
            ("insert into users (username, role) values ('ann', 'z')", ""),
            ("update or replace users set username = 'eve' where username = 'ann'", "2: helper > -"),
            ("update users set user_id = 3 where username = 'eve'", "3: - > z"),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_row_that_gets_its_key_by_itself_replaces_too() {
    check(
        UNIQUE_NAME,
        &[
            ("insert into users values (5, 'b', 'eve'), (-1, 'minus', 'one')", "5: - > b, -1: - > minus"),
            ("insert or replace into users (role, username) values ('c', 'eve')", "5: b > -, 6: - > c"),
            ("insert or ignore into users (role, username) values ('c', 'eve')", ""),
            ("delete from users where user_id = 6", "6: c > -"),
            ("insert into users values (7, 'd', 'dan')", "7: - > d"),
        ],
    )
    .await;
}

#[tokio::test]
async fn every_kind_of_unique_index_is_covered() {
    check(
        "create table users (user_id integer primary key, role text, username text collate nocase, chat int, slot int);
         create unique index by_name on users (username);
         create unique index by_slot on users (chat, slot) where slot > 0",
        &[
            ("insert into users values (1, 'a', 'Eve', 1, 1), (2, 'b', 'bob', 1, 2)", "1: - > a, 2: - > b"),
            ("replace into users values (3, 'c', 'EVE', 2, 1)", "1: a > -, 3: - > c"),
            ("replace into users values (4, 'd', 'dan', 1, 2)", "2: b > -, 4: - > d"),
            ("replace into users values (5, 'e', null, 1, 3)", "5: - > e"),
            ("replace into users values (6, 'f', null, 1, -3)", "6: - > f"),
            ("update or replace users set slot = 2 where user_id = 5", "4: d > -"),
            ("update or replace users set username = 'x' where user_id in (3, 5)", "3: c > -"),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_conflict_clause_of_the_table_itself_is_covered() {
    check(
        "create table users (user_id integer primary key on conflict replace, role text,
           username text unique on conflict replace)",
        &[
            ("insert into users values (1, 'a', 'eve'), (2, 'b', 'bob')", "1: - > a, 2: - > b"),
            ("insert into users values (1, 'c', 'bob')", "2: b > -, 1: a > c"),
            ("insert into users values (3, 'c', 'bob')", "1: c > -, 3: - > c"),
        ],
    )
    .await;
    check(
        "create table users (user_id integer primary key on conflict ignore, role text, username text)",
        &[("insert into users values (1, 'a', 'eve'), (1, 'b', 'bob')", "1: - > a")],
    )
    .await;
}

#[tokio::test]
async fn a_statement_that_is_ignored_leaves_no_trace() {
    check(
        UNIQUE_NAME,
        &[
            ("insert into users values (1, 'a', 'eve'), (2, 'b', 'bob')", "1: - > a, 2: - > b"),
            ("insert or ignore into users values (3, 'c', 'eve'), (1, 'd', 'new')", ""),
            ("update users set role = 'z' where user_id = 1", "1: a > z"),
            ("delete from users where user_id = 1", "1: z > -"),
            ("insert into users values (3, 'c', 'eve')", "3: - > c"),
            ("update or ignore users set username = 'bob' where user_id = 3", ""),
            ("insert into users values (4, 'd', 'bob') on conflict (username) do update set role = 'up'", "2: b > up"),
            ("delete from users where user_id = 2", "2: up > -"),
            ("insert into users values (4, 'd', 'bob')", "4: - > d"),
        ],
    )
    .await;
}

#[tokio::test]
async fn our_own_writes_meet_a_table_that_replaces() {
    let database = SqliteFile::fresh().await;
    database
        .sql("create table users (user_id integer primary key, role text, username text unique on conflict replace)");
    let store = database.open().await;
    let start = store.head().await.unwrap();
    write(&store, set_named(1, "admin", "eve")).await.unwrap();
    let written = write(&store, set_named(2, "admin", "eve")).await.unwrap();
    assert_eq!(said(&written.changes), "2: - > admin");
    assert_eq!(written.changes[0].index, 1, "behind the other, which is the caller's doing too");
    let commit = &read_from(&store, start, 10).await[1];
    assert_eq!(said(&commit.changes), "1: admin > -, 2: - > admin");
    assert!(commit.changes.iter().all(|change| &*change.actor == "bot"));
    // In one batch the second call must know that the first one's side effect took user 2 away.
    let answers = store.write(&[set_named(3, "x", "eve"), set_expecting(2, "helper", "")]).await;
    assert_eq!(said(&answers[0].as_ref().unwrap().changes), "3: - > x");
    assert_eq!(said(&answers[1].as_ref().unwrap().changes), "2: - > helper");
    assert_eq!(answers[1].as_ref().unwrap().changes[0].index, 2);
    assert_log_leads_to_table(&database, &store).await;
    store.close().await;
}

#[tokio::test]
async fn nobody_replaces_an_admin_who_may_not_take_that_role() {
    let database = SqliteFile::fresh().await;
    database
        .sql("create table users (user_id integer primary key, role text, username text unique on conflict replace)");
    let store = database.open().await;
    write(&store, set_named(1, "admin", "eve")).await.unwrap();
    write(&store, set(2, "user")).await.unwrap();
    let head = store.head().await.unwrap();
    for user in [2, 3] {
        let call = Call { grant: Grant::Only([].into()), ..set_named(user, "user", "eve") };
        let refused = write(&store, call).await.unwrap_err();
        let admin = RoleName::held("admin");
        assert!(matches!(refused, WriteError::Refused(Refusal::NotGranted { role }) if role == admin));
    }
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(database.sql("select user_id, role, username from users"), "1|admin|eve\n2|user|");
    store.close().await;
}
