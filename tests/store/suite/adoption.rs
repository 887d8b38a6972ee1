//! Opening: what is made, what is taken as it is, what is refused.

use std::time::Duration;

use rolecache::{
    role::Revision,
    store::{Inside, ListPosition, LogError, OpenError, Options},
};

use super::*;
use crate::fixtures::Fixture;

pub async fn a_fresh_database_gets_its_tables<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    assert_eq!(store.facts().adopted, "created users and mailboxes");
    assert_eq!((&store.facts().default_role, &store.facts().admin_role), (&role("user"), &role("admin")));
    assert!(!store.facts().about.is_empty());
    database.sql("insert into users (user_id, role, username) values (1, 'admin', 'eve')");
    database.sql("insert into mailboxes (id, creator_id) values (1, 2)");
    assert_eq!(role_of(&store, 1).await, "admin");
    assert_eq!(store.mailbox(MailboxId(1)).await.unwrap(), Some(UserId(2)));
    assert!(store.check_triggers().await.unwrap().is_empty());
    store.close().await;
}

pub async fn existing_tables_are_adopted<F: Fixture>() {
    for users in [
        "create table users (user_id bigint primary key, role text, username text)",
        "create table users (user_id int primary key, role varchar(64) default 'user', username varchar(64) unique)",
        "create table users (user_id smallint not null unique, role text not null, username text, at timestamp default current_timestamp)",
        "create table users (serial bigint primary key, user_id integer not null unique, role text, username text)",
        "create table users (username text, note text default 'x' not null, role text, user_id bigint primary key)",
    ] {
        let database = F::fresh().await;
        database.sql(users);
        let has_serial = users.contains("serial");
        let key = if has_serial { "serial, " } else { "" };
        let value = if has_serial { "1, " } else { "" };
        database.sql(&format!("insert into users ({key}user_id, role, username) values ({value}7, 'admin', 'eve')"));
        let store = database.open().await;
        let adopted = &store.facts().adopted;
        assert!(adopted.starts_with("adopted users"), "{adopted}");
        assert_eq!(role_of(&store, 7).await, "admin");
        let head = store.head().await.unwrap();
        database.sql("update users set role = 'helper'");
        write(&store, set(7, "x")).await.unwrap();
        let mut expected = "7: admin > helper, 7: helper > x".to_owned();
        if !has_serial {
            write(&store, set_named(8, "admin", "bob")).await.unwrap();
            expected += ", 8: - > admin";
        }
        assert_eq!(said_from(&store, head).await, expected, "{users}");
        store.close().await;
    }
}

pub async fn a_table_without_username_is_adopted<F: Fixture>() {
    let database = F::fresh().await;
    database.sql("create table users (user_id bigint primary key, role text)");
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let written = write(&store, set_named(1, "admin", "eve")).await.unwrap();
    assert_eq!(written.changes[0].username.as_deref(), Some("eve"), "it lives in the log");
    assert_eq!(read_from(&store, start, 10).await[0].changes, written.changes);
    assert_eq!(store.list_users(None, None, 10).await.unwrap().users[0].username, None);
    let head = store.head().await.unwrap();
    let written = write(&store, set_named(1, "admin", "eve2")).await.unwrap();
    assert_eq!((written.changes.len(), store.head().await.unwrap()), (0, head));
    store.close().await;
}

pub async fn tables_that_cannot_be_served_are_refused_untouched<F: Fixture>() {
    for (sql, about) in [
        ("create table users (id bigint primary key, role text)", "user_id"),
        ("create table users (user_id bigint primary key, roles text)", "role"),
        ("create table users (user_id bigint, role text)", "user_id"),
        ("create table users (user_id bigint, chat bigint, role text, primary key (user_id, chat))", "user_id"),
        ("create table users (user_id text primary key, role text)", "user_id"),
        ("create table users (user_id bigint primary key, role integer)", "role"),
        (
            "create table people (user_id bigint primary key, role text); create view users as select * from people",
            "view",
        ),
        ("create table mailboxes (id bigint, creator_id bigint)", "mailboxes"),
        ("create table mailboxes (id bigint primary key)", "creator_id"),
    ] {
        let database = F::fresh().await;
        database.sql(sql);
        let before = database.fingerprint();
        match database.open_with(database.options()).await.err() {
            Some(OpenError::Refused(sentence)) => assert!(sentence.contains(about), "{sql}: {sentence}"),
            other => panic!("{sql}: {other:?}"),
        }
        assert_eq!(database.fingerprint(), before, "{sql}");
    }
}

pub async fn settings_that_differ_are_refused<F: Fixture>() {
    let database = F::fresh().await;
    let same = Options { admin_role: role("user"), ..database.options() };
    assert!(matches!(database.open_with(same).await.err(), Some(OpenError::Refused(_))));
    database.open().await.close().await;
    let before = database.fingerprint();
    for options in [
        Options { default_role: role("guest"), ..database.options() },
        Options { admin_role: role("owner"), ..database.options() },
    ] {
        match database.open_with(options).await.err() {
            Some(OpenError::Refused(sentence)) => {
                let names_both = (sentence.contains("user") && sentence.contains("guest"))
                    || (sentence.contains("admin") && sentence.contains("owner"));
                assert!(names_both, "{sentence}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(database.fingerprint(), before);
    database.open().await.close().await;
}

pub async fn no_migrate_only_checks<F: Fixture>() {
    let database = F::fresh().await;
    let check = Options { migrate: false, ..database.options() };
    let before = database.fingerprint();
    match database.open_with(check.clone()).await.err() {
        Some(OpenError::Refused(sentence)) => assert!(sentence.contains("migrate"), "{sentence}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(database.fingerprint(), before);
    database.open().await.close().await;
    let store = database.open_with(check).await.unwrap();
    write(&store, set(1, "admin")).await.unwrap();
    store.close().await;
}

pub async fn a_restart_keeps_the_store_and_its_revisions<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let store_id = store.facts().store_id;
    write(&store, with_request(set(1, "admin"), "r", 1)).await.unwrap();
    let head = store.head().await.unwrap();
    store.close().await;
    database.sql("update users set role = 'while nobody served'");

    let store = database.open().await;
    assert_eq!(store.facts().store_id, store_id);
    assert!(store.facts().adopted.contains("users"), "{}", store.facts().adopted);
    let written = write(&store, set(1, "x")).await.unwrap();
    assert!(written.revision > head.revision);
    assert_eq!(
        said_from(&store, start).await,
        "1: - > admin, 1: admin > while nobody served, 1: while nobody served > x"
    );
    let again = write(&store, with_request(set(1, "admin"), "r", 1)).await.unwrap();
    assert_eq!(again.revision, head.revision);
    store.close().await;
    let other = F::fresh().await;
    let other_store = other.open().await;
    assert_ne!(other_store.facts().store_id, store_id);
    other_store.close().await;
}

pub async fn a_missing_trigger_is_reported<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    assert!(store.check_triggers().await.unwrap().is_empty());
    database.drop_a_trigger();
    assert_eq!(store.check_triggers().await.unwrap().len(), 1);
    store.close().await;
    let before = database.fingerprint();
    match database.open_with(Options { migrate: false, ..database.options() }).await.err() {
        Some(OpenError::Refused(sentence)) => {
            assert!(sentence.contains("rolecache_") && sentence.contains("--no-migrate"), "{sentence}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(database.fingerprint(), before);
    let store = database.open().await;
    assert!(store.check_triggers().await.unwrap().is_empty());
    let head = store.head().await.unwrap();
    database.sql("insert into users (user_id, role) values (1, 'x')");
    database.sql("update users set role = 'y'");
    assert_eq!(said_from(&store, head).await, "1: - > x, 1: x > y");
    store.close().await;
}

pub async fn what_was_missed_without_a_trigger_is_not_passed_over<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    database.sql("insert into users (user_id, role) values (1, 'user')");
    write(&store, set(2, "user")).await.unwrap();
    write(&store, with_request(set(1, "admin"), "r", 1)).await.unwrap();
    let head = store.head().await.unwrap();
    let all: Vec<Anchor> = read_from(&store, start, 10).await.iter().map(Commit::anchor).collect();
    assert_eq!(all.len(), 3);
    database.drop_a_trigger();
    database.sql("update users set role = 'missed' where user_id = 1");
    assert!(store.read_log(&head.into(), 10).await.unwrap().reaches_head(), "nobody can know");
    store.close().await;

    let store = database.open().await;
    let now = store.head().await.unwrap();
    assert!(now.revision > head.revision, "{now:?} is a mark after all that was logged");
    for anchor in all.iter().chain([&start]) {
        for error in [
            store.read_log(&(*anchor).into(), 10).await.map(|_| ()).unwrap_err(),
            store.locate(anchor.revision, Some(anchor.tag)).await.map(|_| ()).unwrap_err(),
        ] {
            let is_told = match error {
                LogError::HistoryChanged { at, .. } => at == *anchor,
                // The start of a log is no commit that could be found.
                LogError::Compacted { .. } => *anchor == start,
                _ => false,
            };
            assert!(is_told, "{anchor:?}: {error:?}");
        }
    }
    let inside = Inside { commit: all[2], index: 0, row: 0 };
    let inside = store.read_log(&Position { anchor: all[1], inside: Some(inside) }, 10).await;
    assert!(matches!(inside, Err(LogError::HistoryChanged { .. })), "{inside:?}");
    for seen in [all[1].revision, head.revision] {
        let without_tag = store.locate(seen, None).await;
        assert!(matches!(without_tag, Err(LogError::Compacted { .. })), "{without_tag:?}");
    }
    assert_eq!(store.locate(now.revision, None).await.unwrap(), now);
    assert_eq!(store.snapshot().await.unwrap().anchor(), now);
    assert_eq!(role_of(&store, 1).await, "missed");

    // Who starts over goes on as ever, what was logged can still be looked at, and request ids are kept.
    write(&store, set(1, "x")).await.unwrap();
    assert_eq!(said_from(&store, now).await, "1: missed > x");
    let kept = ListPosition { revision: Revision(0), inside: None, kept_only: true };
    assert_eq!(store.list_changes(None, kept, 10).await.unwrap().changes.len(), 4);
    let whole = store.list_changes(None, ListPosition { kept_only: false, ..kept }, 10).await;
    assert!(matches!(whole, Err(LogError::Compacted { .. })), "{whole:?}");
    let again = write(&store, with_request(set(1, "admin"), "r", 1)).await.unwrap();
    assert_eq!(again.revision, head.revision);
    let head = store.head().await.unwrap();
    store.close().await;

    let store = database.open().await;
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(said_from(&store, now).await, "1: missed > x", "a start that mends nothing ends no history");
    store.close().await;
}

pub async fn what_was_missed_is_not_passed_over_after_a_trim<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.add_commits(1, 10_020);
    let start = store.locate(Revision(0), None).await.unwrap();
    let all: Vec<Anchor> = read_from(&store, start, 20_000).await.iter().map(Commit::anchor).collect();
    store.close().await;
    database.drop_a_trigger();
    let store = database.open().await;
    let now = store.head().await.unwrap();
    database.backdate(all[0].revision.0, all[19].revision.0, 31);
    let mut gone = 0;
    loop {
        let trimmed = store.trim(Duration::from_secs(30 * 24 * 60 * 60)).await.unwrap();
        gone += trimmed.commits;
        if trimmed.commits == 0 {
            break;
        }
    }
    assert_eq!(gone, 20);
    assert!(store.read_log(&now.into(), 10).await.unwrap().reaches_head(), "the trim point does not go back");
    let trimmed = store.read_log(&all[5].into(), 10).await;
    assert!(matches!(trimmed, Err(LogError::Compacted { oldest, .. }) if oldest == now.revision), "{trimmed:?}");
    let kept = store.read_log(&all[25].into(), 10).await;
    assert!(matches!(kept, Err(LogError::HistoryChanged { .. })), "{kept:?}");
    store.close().await;
}
