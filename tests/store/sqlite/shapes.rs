//! Tables as only SQLite has them: any value in any column, tables of other kinds.

use rolecache::{role::Revision, store::OpenError};

use super::replace::assert_log_leads_to_table;
use crate::{
    fixtures::{Fixture, SqliteFile},
    suite::*,
};

#[tokio::test]
async fn odd_values_are_read_safely() {
    let database = SqliteFile::fresh().await;
    database.sql("create table users (user_id bigint primary key, role text, username text)");
    let store = database.open().await;
    database.sql(
        "insert into users values (1, 5, 7), (2, x'61ff62', x'ff'), (3, x'', 'c'), (4, cast(x'c3' as text), 'd'), (5.0, 'e', 'e'),
           ('6', 'f', 'f'), ('seven', 'g', 'g'), (8.5, 'h', 'h'), (null, 'i', 'i'), (x'09', 'j', 'j')",
    );
    let expected = [(1, "5"), (2, "a\u{fffd}b"), (3, "user"), (4, "\u{fffd}"), (5, "e"), (6, "f")];
    let listed = store.list_users(None, None, 100).await.unwrap().users;
    let listed: Vec<_> = listed.iter().map(|row| (row.user.0, row.role.as_str())).collect();
    assert_eq!(listed, expected, "who has no whole number is nobody");
    for (user, role) in expected {
        assert_eq!(role_of(&store, user).await, role);
    }
    assert_log_leads_to_table(&database, &store).await;
    database.sql("update users set role = 'z'");
    database.sql("update users set user_id = 7 where user_id = 'seven'");
    database.sql("update users set user_id = 'one' where user_id = 1");
    assert_log_leads_to_table(&database, &store).await;
    assert_eq!((role_of(&store, 7).await, role_of(&store, 1).await), ("z".to_owned(), "user".to_owned()));
    database.sql("delete from users");
    assert_log_leads_to_table(&database, &store).await;
    let mut snapshot = store.snapshot().await.unwrap();
    assert!(snapshot.next().await.unwrap().is_empty());
    store.close().await;
}

#[tokio::test]
async fn tables_of_sqlites_own_kinds_are_adopted() {
    for (table, adopted) in [
        ("create table users (user_id integer primary key, role text) without rowid", "no username"),
        ("create table users (user_id integer primary key autoincrement, role text, username any) strict", "username"),
        ("create table Users (User_ID BIGINT PRIMARY KEY, Role VARCHAR(9), UserName NVARCHAR(3))", "username"),
        ("create table users (user_id unsigned big int unique, role clob)", "no username"),
        (
            "pragma encoding = 'UTF-16le'; create table users (user_id integer primary key, role text, username text)",
            "username",
        ),
    ] {
        let database = SqliteFile::fresh().await;
        database.sql(table);
        database.sql("insert into users (user_id, role) values (1, 'Zoë')");
        let store = database.open().await;
        assert!(store.facts().adopted.contains(adopted), "{}", store.facts().adopted);
        assert_eq!(role_of(&store, 1).await, "Zoë");
        let head = store.head().await.unwrap();
        database.sql("update users set role = '👑'");
        write(&store, set_named(1, "admin", "👩‍🚀")).await.unwrap();
        assert_eq!(said_from(&store, head).await, "1: Zoë > 👑, 1: 👑 > admin");
        assert!(store.check_triggers().await.unwrap().is_empty());
        store.close().await;
    }
}

#[tokio::test]
async fn what_cannot_be_covered_is_refused_untouched() {
    for (sql, about) in [
        ("create virtual table users using fts5 (user_id, role)", "virtual"),
        (
            "create table users (user_id integer primary key, role text, username text);
          create unique index by_name on users (lower(username))",
            "expression",
        ),
        ("create table users (user_id integer primary key, role text as ('x'))", "generated"),
        (
            "create table users (user_id integer, role text);
          create unique index some on users (user_id) where user_id > 0",
            "user_id",
        ),
        ("create table users (user_id integer primary key, role)", "role"),
        ("create view mailboxes as select 1 as id, 2 as creator_id", "mailboxes"),
    ] {
        let database = SqliteFile::fresh().await;
        database.sql(sql);
        let before = database.fingerprint();
        match database.open_with(database.options()).await.err() {
            Some(OpenError::Refused(sentence)) => assert!(sentence.contains(about), "{sentence}"),
            other => panic!("{sql}: {other:?}"),
        }
        assert_eq!(database.fingerprint(), before, "{sql}");
    }
}

#[tokio::test]
async fn a_unique_index_that_comes_later_is_reported() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    database.sql("create unique index by_name on users (username)");
    let sentences = store.check_triggers().await.unwrap();
    assert!(sentences.iter().any(|sentence| sentence.contains("rolecache_before_insert")), "{sentences:?}");
    store.close().await;

    let no_migrate = rolecache::store::Options { migrate: false, ..database.options() };
    assert!(matches!(database.open_with(no_migrate).await.err(), Some(OpenError::Refused(_))));
    let store = database.open().await;
    assert!(store.check_triggers().await.unwrap().is_empty());
    database.sql("insert into users values (1, 'a', 'eve')");
    let head = store.head().await.unwrap();
    database.sql("replace into users values (2, 'b', 'eve')");
    assert_eq!(said_from(&store, head).await, "1: a > -, 2: - > b");
    database.sql("drop table users");
    assert_eq!(store.check_triggers().await.unwrap(), ["the table users is gone"]);
    store.close().await;
}

#[tokio::test]
async fn a_trigger_that_rolls_everything_back_takes_no_neighbour_along() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    for (how, user) in [("rollback", 3), ("abort", 5), ("fail", 6)] {
        database.sql(&format!(
            "create trigger no_{how} before insert on users when new.user_id = {user} begin select raise({how}, 'no'); end"
        ));
    }
    let start = store.head().await.unwrap();
    let calls: Vec<_> = (1..=8).map(|user| with_request(set(user, "x"), &format!("r{user}"), 1)).collect();
    for _ in 0..2 {
        let answers = store.write(&calls).await;
        for (answer, user) in answers.into_iter().zip(1..) {
            match user {
                3 | 5 | 6 => {
                    let refused = refusal(answer);
                    assert!(matches!(refused, rolecache::store::Refusal::Rejected { .. }), "{refused:?}");
                }
                _ => assert_eq!(said(&answer.unwrap().changes), format!("{user}: - > x")),
            }
        }
        let commits = read_from(&store, start, 100).await;
        assert_eq!(commits.iter().map(|commit| commit.size).sum::<u64>(), 5);
    }
    assert_eq!(database.sql("select count(*) from rolecache_feed where open_commit is not null"), "0");
    store.close().await;
}

#[tokio::test]
async fn a_bots_other_table_can_write_users_too() {
    let database = SqliteFile::fresh().await;
    database.sql(
        "create table chats (id integer primary key);
         create table users (user_id integer primary key, role text, chat int references chats (id) on delete cascade);
         create table events (user_id int, role text);
         create trigger from_events after insert on events begin
           update users set role = new.role where user_id = new.user_id; end;
         insert into chats values (1); insert into users values (1, 'a', 1), (2, 'b', 1), (3, 'c', null)",
    );
    let store = database.open().await;
    let head = store.head().await.unwrap();
    database.sql("insert into events values (3, 'admin')");
    database.sql("pragma foreign_keys = on; delete from chats");
    assert_eq!(said_from(&store, head).await, "3: c > admin, 1: a > -, 2: b > -");
    assert!(store.head().await.unwrap().revision > Revision(0));
    store.close().await;
}
