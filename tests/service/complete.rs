//! `--cache complete`: everything is loaded at start, while commits go on, and from then on every read is a hit.

use std::sync::Arc;

use rolecache::proto::v1::Source;

use crate::support::{
    calls::roles_in_order,
    gates::Gates,
    server::{Db, Setup, TestServer},
};

on_both! {
    every_read_is_a_hit_and_absent_users_have_the_default_role,
    users_with_the_default_role_are_not_stored,
    what_changes_between_snapshot_and_insertion_is_not_missed,
    writers_run_during_the_load_and_nothing_is_missed,
    a_role_that_cannot_be_kept_sends_reads_to_the_store_until_it_is_gone,
    a_role_that_cannot_be_kept_any_more_is_not_put_back_by_a_load,
    the_load_does_not_begin_before_the_log_is_followed,
}

/// A row, that the store be adopted with something in it.
async fn seeded(db: &Db, users: &[(i64, &str)]) {
    db.serve().await.stop().await.unwrap();
    db.put(users);
}

#[track_caller]
fn is_hit(answer: &rolecache::proto::v1::GetRoleResponse, role: &str) {
    assert_eq!((&*answer.role, answer.source(), answer.stale), (role, Source::Cache, false));
}

/// What the cache says of each user is what the table says.
async fn equals_the_table(db: &Db, server: &TestServer, users: &[i64]) {
    server.reach(db.head()).await;
    let rows = db.sql("select user_id, role from users");
    let table: std::collections::HashMap<i64, &str> =
        rows.lines().filter_map(|row| row.split_once('|')).map(|(user, role)| (user.parse().unwrap(), role)).collect();
    let answer = server.batch(users).await;
    let default = |user| match table.get(user) {
        None | Some(&"") => "user",
        Some(role) => *role,
    };
    let expected: Vec<&str> = users.iter().map(default).collect();
    assert_eq!(roles_in_order(&answer), expected);
}

async fn every_read_is_a_hit_and_absent_users_have_the_default_role(db: Db) {
    seeded(&db, &[(1, "admin"), (2, "user"), (3, "moderator")]).await;
    let server = Setup::new(&db).complete().serve().await;
    is_hit(&server.get(1).await, "admin");
    is_hit(&server.get(2).await, "user");
    is_hit(&server.get(4).await, "user");
    assert_eq!(roles_in_order(&server.batch(&[3, 9, 1]).await), ["moderator", "user", "admin"]);
    server.set(4, "admin").await;
    is_hit(&server.get(4).await, "admin");
    server.delete(1).await;
    is_hit(&server.get(1).await, "user");
    server.reach(db.put(&[(5, "moderator")])).await;
    is_hit(&server.get(5).await, "moderator");
    let stats = server.stats().await;
    assert_eq!((stats.misses, stats.store_reads), (0, 0));
}

async fn users_with_the_default_role_are_not_stored(db: Db) {
    seeded(&db, &[(1, "admin"), (2, "user"), (3, "moderator"), (4, "user")]).await;
    db.sql("insert into users (user_id, role) values (5, null), (6, '')");
    let server = Setup::new(&db).complete().serve().await;
    assert_eq!(server.stats().await.cache_size, 2);
    server.set(3, "user").await;
    assert_eq!(server.stats().await.cache_size, 1);
    server.set(5, "admin").await;
    server.set(7, "user").await;
    server.get(8).await;
    assert_eq!(server.fully_consistent(8).await.unwrap().role, "user");
    assert_eq!(server.stats().await.cache_size, 2);
    server.delete(1).await;
    assert_eq!(server.stats().await.cache_size, 1);
    equals_the_table(&db, &server, &[1, 2, 3, 4, 5, 6, 7, 8]).await;
}

async fn what_changes_between_snapshot_and_insertion_is_not_missed(db: Db) {
    seeded(&db, &[(1, "user"), (2, "admin"), (3, "admin"), (4, "admin"), (5, "moderator")]).await;
    let gates = Gates::default();
    gates.snapshot.close();
    let server = Setup::new(&db).complete().wrap(gates.guard()).start().await;
    gates.snapshot.arrived().await;
    // The snapshot is fixed, and none of it is in the cache.
    server.set(1, "admin").await;
    server.set(2, "user").await;
    server.delete(3).await;
    server.set(4, "moderator").await;
    server.set(4, "admin").await;
    server.reach(db.put(&[(5, "admin"), (6, "moderator"), (7, "user")])).await;
    // Not loaded yet: who is not known by a change is read from the store.
    assert_eq!(server.get(8).await.source(), Source::Store);
    gates.snapshot.open();
    server.until_serving().await;
    for (user, role) in
        [(1, "admin"), (2, "user"), (3, "user"), (4, "admin"), (5, "admin"), (6, "moderator"), (7, "user"), (8, "user")]
    {
        is_hit(&server.get(user).await, role);
    }
    assert_eq!(server.stats().await.cache_size, 4, "users with another role than the default");
}

async fn writers_run_during_the_load_and_nothing_is_missed(db: Db) {
    let users: Vec<i64> = (1..=3_000).collect();
    let seed: Vec<(i64, &str)> =
        users.iter().map(|user| (*user, ["admin", "user", "moderator"][*user as usize % 3])).collect();
    seeded(&db, &seed).await;
    let gates = Gates::default();
    gates.snapshot.close();
    let server = Arc::new(Setup::new(&db).complete().wrap(gates.guard()).start().await);
    gates.snapshot.arrived().await;
    let writers = [0, 1].map(|writer| {
        let (server, gates) = (server.clone(), gates.clone());
        tokio::spawn(async move {
            for turn in 0..120_i64 {
                // Chunk by chunk, so that writes fall before, between and after them.
                if turn % 10 == 5 {
                    gates.snapshot.let_one_pass();
                }
                let user = 1 + (turn * 25 + writer) % 3_000;
                match turn % 3 {
                    0 => drop(server.delete(user).await),
                    1 => drop(server.set(user, "admin").await),
                    _ => drop(server.set(user, "user").await),
                }
            }
        })
    });
    for writer in writers {
        writer.await.unwrap();
    }
    gates.snapshot.open();
    server.until_serving().await;
    equals_the_table(&db, &server, &users).await;
    let others = db.sql("select count(*) from users where role <> 'user'").trim().parse::<i64>().unwrap();
    let stats = server.stats().await;
    assert_eq!((stats.cache_size, stats.misses), (others, 0));
}

async fn a_role_that_cannot_be_kept_sends_reads_to_the_store_until_it_is_gone(db: Db) {
    seeded(&db, &[(1, "admin"), (2, "moderator")]).await;
    let server = Setup::new(&db).complete().serve().await;
    is_hit(&server.get(9).await, "user");
    let long = "x".repeat(257);
    server.reach(db.put(&[(1, &long)])).await;
    for _ in 0..2 {
        let read = server.get(1).await;
        assert_eq!((&*read.role, read.source()), (&*long, Source::Store));
    }
    is_hit(&server.get(2).await, "moderator");
    // Absence says nothing any more.
    let read = server.get(10).await;
    assert_eq!((&*read.role, read.source()), ("user", Source::Store));
    assert_eq!(roles_in_order(&server.batch(&[1, 2, 11]).await), [&*long, "moderator", "user"]);

    server.set(1, "admin").await;
    // The load is tried again, with growing pauses, and each try asks about a user whom nobody has asked about.
    let mut user = 1_000;
    let loaded = async {
        loop {
            user += 1;
            if server.get(user).await.source() == Source::Cache {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(crate::support::server::PATIENCE, loaded).await.expect("complete again in time");
    equals_the_table(&db, &server, &[1, 2, 9, 10, 11, user]).await;
    assert_eq!(server.stats().await.cache_size, 2);
}

async fn a_role_that_cannot_be_kept_any_more_is_not_put_back_by_a_load(db: Db) {
    seeded(&db, &[(1, "admin"), (2, "moderator")]).await;
    let gates = Gates::default();
    gates.snapshot.close();
    let server = Setup::new(&db).complete().wrap(gates.guard()).start().await;
    gates.snapshot.arrived().await;
    // The snapshot has an admin who is none any more, and who has no entry either.
    let long = "x".repeat(257);
    let revision = db.put(&[(1, &long)]);
    server.until_stats("the commit is applied", |stats| stats.revision >= revision).await;
    gates.snapshot.let_one_pass();
    // That load is over when the next one comes.
    gates.snapshot.arrived().await;
    let read = server.get(1).await;
    assert_eq!((&*read.role, read.source()), (&*long, Source::Store));
    server.set(1, "user").await;
    gates.snapshot.open();
    server.until_serving().await;
    is_hit(&server.get(1).await, "user");
}

async fn the_load_does_not_begin_before_the_log_is_followed(db: Db) {
    seeded(&db, &[(1, "admin")]).await;
    let gates = Gates::default();
    gates.head.close();
    gates.snapshot.close();
    let server = Setup::new(&db).complete().wrap(gates.guard()).start().await;
    gates.head.arrived().await;
    assert_eq!(gates.snapshot.waiting(), 0, "a snapshot of no history was begun");
    gates.head.open();
    gates.snapshot.arrived().await;
    gates.snapshot.open();
    server.until_serving().await;
    is_hit(&server.get(1).await, "admin");
    assert_eq!(gates.snapshots_begun(), 1, "the first load counts");
}
