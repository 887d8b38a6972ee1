//! What anybody's SQL does is logged, once and truthfully.

use rolecache::role::Origin;

use super::*;
use crate::fixtures::Fixture;

pub async fn every_kind_of_statement_is_logged<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    for (sql, expected) in [
        ("insert into users values (1, 'admin', 'eve')", "1: - > admin"),
        ("insert into users (user_id, role) values (2, 'user'), (3, 'x')", "2: - > user, 3: - > x"),
        ("update users set role = 'helper' where user_id = 1", "1: admin > helper"),
        ("update users set role = 'y' where user_id in (2, 3)", "2: user > y, 3: x > y"),
        (
            "insert into users values (2, 'up', 'u'), (4, 'new', 'n')
             on conflict (user_id) do update set role = excluded.role",
            "2: y > up, 4: - > new",
        ),
        ("insert into users values (2, 'no', 'u') on conflict (user_id) do nothing", ""),
        ("delete from users where user_id = 3", "3: y > -"),
        (
            "begin; savepoint a; update users set role = 'lost' where user_id = 4; rollback to a;
          update users set role = 'kept' where user_id = 4; commit",
            "4: new > kept",
        ),
        ("delete from users", "1: helper > -, 2: up > -, 4: kept > -"),
    ] {
        let head = store.head().await.unwrap();
        database.sql(sql);
        let commits = read_from(&store, head, 100).await;
        let changes: Vec<_> = commits.iter().flat_map(|commit| &commit.changes).collect();
        assert_eq!(said(changes.iter().copied()), expected, "{sql}");
        assert!(changes.iter().all(|change| change.origin == Origin::Sql && change.transfer.is_none()));
        assert_eq!(commits.len(), if F::COMMIT_PER_ROW { changes.len() } else { changes.len().min(1) }, "{sql}");
    }
    store.close().await;
}

pub async fn unlogged_statements_make_no_commit<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql("insert into users values (1, 'admin', 'eve'), (2, null, 'bob')");
    let head = store.head().await.unwrap();
    for sql in [
        "update users set username = 'mallory'",
        "update users set role = 'admin' where user_id = 1",
        "update users set user_id = 1 where user_id = 1",
        "update users set role = '' where user_id = 2",
        "update users set role = 'user' where user_id = 2",
        "delete from users where user_id = 3",
        "insert into mailboxes values (1, 1)",
    ] {
        database.sql(sql);
        assert_eq!(store.head().await.unwrap(), head, "{sql}");
    }
    store.close().await;
}

pub async fn a_role_of_null_or_nothing_is_the_default<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    database.sql("insert into users (user_id, role) values (1, null), (2, ''), (3, 'admin')");
    database.sql("update users set role = null where user_id = 3");
    database.sql("update users set role = 'admin' where user_id = 1");
    database.sql("delete from users where user_id = 2");
    assert_eq!(
        said_from(&store, start).await,
        "1: - > user, 2: - > user, 3: - > admin, 3: admin > user, 1: user > admin, 2: user > -"
    );
    let users = store.list_users(Some("user"), None, 10).await.unwrap().users;
    assert_eq!(users.iter().map(|row| row.user.0).collect::<Vec<_>>(), [3]);
    let roles = store.roles(&[UserId(1), UserId(2), UserId(3)]).await.unwrap().roles;
    assert_eq!(roles, [role("admin"), role("user"), role("user")]);
    store.close().await;
}

pub async fn a_rolled_back_statement_leaves_nothing<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let head = store.head().await.unwrap();
    database.sql("begin; insert into users (user_id, role) values (1, 'admin'); rollback");
    assert!(database.try_sql("insert into users (user_id, role) values (2, 'x'), (2, 'y')").is_err());
    assert_eq!(store.head().await.unwrap(), head);
    database.sql("insert into users (user_id, role) values (1, 'admin')");
    assert_eq!(said_from(&store, head).await, "1: - > admin");
    store.close().await;
}

pub async fn a_changed_key_is_a_deletion_and_an_insertion<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql("insert into users values (1, 'admin', 'eve')");
    let head = store.head().await.unwrap();
    database.sql("update users set user_id = 2, role = 'x'");
    let commits = read_from(&store, head, 10).await;
    assert_eq!(commits.len(), 1);
    assert_eq!(said(&commits[0].changes), "1: admin > -, 2: - > x");
    assert!(commits[0].changes.iter().all(|change| change.username.as_deref() == Some("eve")));
    store.close().await;
}

pub async fn the_bots_own_triggers_have_the_last_word<F: Fixture>() {
    let database = F::fresh().await;
    database.sql("create table users (user_id bigint primary key, role text, username text)");
    // One made before ours and one after, one whose name is before ours and one after.
    database.rewrite_role("boss", "admin");
    let store = database.open().await;
    database.rewrite_role("tsar", "admin");
    let start = store.head().await.unwrap();
    database.sql("insert into users (user_id, role) values (1, 'boss'), (2, 'x'), (3, 'tsar'), (4, 'x')");
    database.sql("update users set role = 'boss' where user_id = 2");
    database.sql("update users set role = 'tsar' where user_id = 4");
    for user in [1, 2, 3, 4] {
        assert_eq!(role_of(&store, user).await, "admin");
    }
    let mut last = std::collections::HashMap::new();
    for commit in read_from(&store, start, 100).await {
        last.extend(commit.changes.into_iter().map(|change| (change.user, change.new)));
    }
    for user in [1, 2, 3, 4] {
        assert_eq!(last[&UserId(user)], Some(role("admin")), "{user}");
    }

    for role in ["boss", "tsar"] {
        let refused = write(&store, set(2, role)).await;
        let is_rejected = matches!(refused, Err(WriteError::Refused(Refusal::Rejected { .. })));
        assert!(is_rejected, "what was written is not what the row became: {refused:?}");
        assert_eq!(role_of(&store, 2).await, "admin");
    }
    store.close().await;
}

pub async fn columns_of_any_name_are_not_taken_for_ours<F: Fixture>() {
    let database = F::fresh().await;
    database.sql(
        "create table users (id integer primary key, user_id bigint not null unique, role text, username text,
           ids int, held int, admin_role text default 'a', default_role text default 'd', cid int, last text, k int, u int,
           upd_ids int, upd_roles int, upd_names int, inserted int, i int, s int)",
    );
    let store = database.open().await;
    // Whose id is somebody else's user_id, and whose is their own.
    database.sql(
        "insert into users (id, user_id, role) values (1, 1, 'first'), (2, 777, 'second'), (777, 3, 'third'), (4, 4, 'user')",
    );
    let start = store.head().await.unwrap();
    database.sql(
        "begin; update users set role = 'a' where user_id = 777; update users set role = 'b' where user_id = 777;
         delete from users where user_id = 3; insert into users (id, user_id, role) values (5, 3, 'c');
         update users set role = 'd' where user_id = 3; commit",
    );
    let mut last = std::collections::HashMap::new();
    for commit in read_from(&store, start, 100).await {
        last.extend(commit.changes.into_iter().map(|change| (change.user, change.new)));
    }
    assert_eq!(last, [(UserId(777), Some(role("b"))), (UserId(3), Some(role("d")))].into());
    for call in [set(1, "admin"), transfer(1, 4, None, true), set(777, "x")] {
        write(&store, call).await.unwrap();
    }
    for (user, due) in [(1, "user"), (3, "d"), (4, "admin"), (777, "x")] {
        assert_eq!(role_of(&store, user).await, due, "{user}");
    }
    store.close().await;
}
