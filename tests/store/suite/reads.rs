//! Roles, users, snapshots.

use super::*;
use crate::fixtures::Fixture;

pub async fn roles_are_answered_in_order_with_the_head<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    store.write(&[set(5, "admin"), set(3, "x")]).await;
    let head = store.head().await.unwrap();
    let asked = [3, 9, 5, 3].map(UserId);
    let roles = store.roles(&asked).await.unwrap();
    assert_eq!(roles.head, head);
    assert_eq!(roles.roles, ["x", "user", "admin", "x"].map(role));
    let none = store.roles(&[]).await.unwrap();
    assert_eq!((none.head, none.roles.len()), (head, 0));
    let many: Vec<UserId> = (0..10_000).map(UserId).collect();
    let roles = store.roles(&many).await.unwrap().roles;
    assert_eq!(roles.len(), many.len());
    assert_eq!(roles.iter().filter(|one| **one != role("user")).count(), 2);
    store.close().await;
}

pub async fn extremes_are_kept<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let long = "r".repeat(64);
    let names = ["👩‍👩‍👧‍👦 Zoë", "'; drop table users; --", "\u{202e}x", "n"];
    for (user, name) in [i64::MIN, i64::MAX, -1, 1].into_iter().zip(names) {
        let written = write(&store, set_named(user, &long, name)).await.unwrap();
        assert_eq!(written.changes[0].username.as_deref(), Some(name));
        assert_eq!(role_of(&store, user).await, long);
    }
    let ids = [i64::MIN, -1, 1, i64::MAX].map(UserId);
    let listed = store.list_users(None, None, 10).await.unwrap().users;
    assert_eq!(listed.iter().map(|row| row.user).collect::<Vec<_>>(), ids);
    assert_eq!(listed[0].username.as_deref(), Some(names[0]));
    assert_eq!(store.list_users(None, Some(UserId(i64::MAX)), 10).await.unwrap().users.len(), 0);
    assert_eq!(store.list_users(None, Some(UserId(i64::MIN)), 10).await.unwrap().users.len(), 3);
    assert_eq!(store.roles(&ids).await.unwrap().roles, vec![role(&long); 4]);
    assert_eq!(read_from(&store, start, 10).await.len(), 4);
    let mut snapshot = store.snapshot().await.unwrap();
    assert_eq!(snapshot.next().await.unwrap(), listed);
    write(&store, transfer(1, i64::MIN, None, true)).await.expect_err("no admin");
    write(&store, delete(i64::MIN)).await.unwrap();
    assert_eq!(role_of(&store, i64::MIN).await, "user");
    store.close().await;
}

pub async fn users_are_listed_in_pages<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.add_commits(1, 25);
    database.sql("update users set role = 'admin' where user_id > 20");
    database.sql("update users set role = null where user_id = 3");
    let head = store.head().await.unwrap();
    for (wanted, count) in [(None, 25), (Some("user"), 20), (Some("admin"), 5), (Some("Admin"), 0), (Some(""), 0)] {
        for limit in [1, 7, 25, 100] {
            let mut after = None;
            let mut found = Vec::new();
            loop {
                let page = store.list_users(wanted, after, limit).await.unwrap();
                assert_eq!(page.head, head);
                let Some(last) = page.users.last() else { break };
                after = Some(last.user);
                found.extend(page.users);
            }
            assert_eq!(found.len(), count, "{wanted:?} by {limit}");
            assert!(found.is_sorted_by(|a, b| a.user < b.user));
            assert!(wanted.is_none_or(|wanted| found.iter().all(|row| row.role.as_str() == wanted)));
        }
    }
    store.close().await;
}

pub async fn roles_outside_the_list_are_passed_on<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    database.sql("insert into users (user_id, role) values (1, 'Ober-Admin 👑'), (2, ' ')");
    assert_eq!(role_of(&store, 1).await, "Ober-Admin 👑");
    assert_eq!(role_of(&store, 2).await, " ");
    assert_eq!(said_from(&store, start).await, "1: - > Ober-Admin 👑, 2: -  >  ".replace("-  >  ", "- >  "));
    let written = write(&store, set_expecting(1, "user", "Ober-Admin 👑")).await.unwrap();
    assert_eq!(said(&written.changes), "1: Ober-Admin 👑 > user");
    store.close().await;
}

pub async fn a_snapshot_has_everybody_but_the_default<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.add_commits(1, 3_500);
    database.sql("update users set role = 'helper' where user_id > 1000");
    database.sql("update users set role = null where user_id > 3400");
    let head = store.head().await.unwrap();
    let mut snapshot = store.snapshot().await.unwrap();
    assert_eq!(snapshot.anchor(), head);
    let mut chunks = Vec::new();
    let mut users = Vec::new();
    loop {
        let chunk = snapshot.next().await.unwrap();
        if chunk.is_empty() {
            break;
        }
        chunks.push(chunk.len());
        users.extend(chunk.into_iter().map(|row| (row.user.0, row.role.to_string())));
    }
    assert_eq!(users, (1_001..=3_400).map(|user| (user, "helper".to_owned())).collect::<Vec<_>>());
    assert_eq!(chunks, [1_000, 1_000, 400]);
    assert!(snapshot.next().await.unwrap().is_empty());
    store.close().await;
}
