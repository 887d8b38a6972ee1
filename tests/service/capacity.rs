//! `--cache-capacity`: the bound holds, and eviction never makes an answer wrong.

use std::sync::Arc;

use crate::support::{
    calls::roles_in_order,
    server::{Db, Setup},
};

on_both! {
    the_bound_holds_and_every_answer_stays_right,
    readers_and_writers_beyond_the_bound_see_the_table,
}

fn role(user: i64) -> &'static str {
    ["user", "admin", "moderator"][user as usize % 3]
}

async fn the_bound_holds_and_every_answer_stays_right(db: Db) {
    let server = Setup::new(&db).capacity(10).serve().await;
    let rows: Vec<(i64, &str)> = (1..=300).map(|user| (user, role(user))).collect();
    server.reach(db.put(&rows)).await;
    assert!(server.stats().await.cache_size <= 10);
    let users: Vec<i64> = (1..=300).collect();
    let expected: Vec<&str> = users.iter().map(|user| role(*user)).collect();
    for _ in 0..3 {
        assert_eq!(roles_in_order(&server.batch(&users).await), expected);
        assert!(server.stats().await.cache_size <= 10);
    }
    for user in 1..=50 {
        assert_eq!(server.get(user).await.role, role(user));
    }
    let stats = server.stats().await;
    assert!((1..=10).contains(&stats.cache_size), "{}", stats.cache_size);
    assert_eq!(stats.hits + stats.misses, 951);
    assert_eq!(stats.misses, stats.store_reads);
}

async fn readers_and_writers_beyond_the_bound_see_the_table(db: Db) {
    let server = Arc::new(Setup::new(&db).capacity(3).serve().await);
    let writers = (0..4_i64).map(|writer| {
        let server = server.clone();
        tokio::spawn(async move {
            for turn in 0..25 {
                // Each writer has its own users, and knows what they are.
                let user = 1 + writer + 4 * (turn % 5);
                let written = role(turn + writer);
                let revision = server.set(user, written).await.revision;
                let read = server.get(user).await;
                assert_eq!(read.role, written);
                assert!(read.revision >= revision);
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert!(server.stats().await.cache_size <= 3);
}
