//! Stats, true to the digit.

use rolecache::proto::v1::{
    BatchGetRolesRequest, FeedState, GetRoleRequest, StatsResponse, TransferAdminRequest, WatchRoleChangesRequest,
};

use crate::support::{
    gates::Gates,
    server::{Db, Setup},
};

on_both! {
    a_day_of_calls_is_counted_to_the_digit,
    misses_that_wait_for_another_are_counted,
    a_user_asked_twice_in_a_batch_is_read_once,
    a_miss_that_has_to_read_again_is_counted_once,
    open_watches_are_counted,
}

/// hits, misses, users, changes applied, reads of the store, coalesced misses, stale answers
fn counts(stats: &StatsResponse) -> [i64; 7] {
    [
        stats.hits,
        stats.misses,
        stats.cache_size,
        stats.events_processed,
        stats.store_reads,
        stats.coalesced_misses,
        stats.stale_answers,
    ]
}

async fn a_day_of_calls_is_counted_to_the_digit(db: Db) {
    let server = db.serve().await;
    let fresh = server.stats().await;
    assert_eq!(counts(&fresh), [0; 7]);
    assert_eq!((fresh.hit_rate_percent, fresh.revision, fresh.event_handlers), (0.0, 0, 0));
    assert_eq!(fresh.feed_state(), FeedState::Live);
    let kind = if matches!(db, Db::Postgres { .. }) { "postgres" } else { "sqlite" };
    assert_eq!((&*fresh.store_kind, &*fresh.version), (kind, env!("CARGO_PKG_VERSION")));
    assert_eq!(fresh.store_id.len(), 36);

    server.get(1).await;
    assert_eq!(counts(&server.stats().await), [0, 1, 1, 0, 1, 0, 0]);
    server.get(1).await;
    assert_eq!(counts(&server.stats().await), [1, 1, 1, 0, 1, 0, 0]);
    // A change of a user who was never read is in the cache.
    server.set(2, "admin").await;
    assert_eq!(counts(&server.stats().await), [1, 1, 2, 1, 1, 0, 0]);
    // Nothing to do, so nothing changes.
    server.set(2, "admin").await;
    assert_eq!(counts(&server.stats().await), [1, 1, 2, 1, 1, 0, 0]);
    // Two hits and one miss, then three hits, one of them a repeat.
    server.batch(&[1, 2, 3]).await;
    assert_eq!(counts(&server.stats().await), [3, 2, 3, 1, 2, 0, 0]);
    server.batch(&[1, 3, 1]).await;
    assert_eq!(counts(&server.stats().await), [6, 2, 3, 1, 2, 0, 0]);
    server.fully_consistent(1).await.unwrap();
    assert_eq!(counts(&server.stats().await), [6, 2, 3, 1, 3, 0, 0]);
    let hand_over = TransferAdminRequest { from_user_id: 2, to_user_id: 4, demote_from: true, ..Default::default() };
    assert_eq!(server.transfer(hand_over).await.unwrap().changes.len(), 2);
    assert_eq!(counts(&server.stats().await), [6, 2, 4, 3, 3, 0, 0]);
    server.delete(4).await;
    assert_eq!(counts(&server.stats().await), [6, 2, 4, 4, 3, 0, 0]);
    server.reach(db.put(&[(5, "admin"), (6, "moderator")])).await;
    // The wait itself is a miss of one more user.
    let last = server.stats().await;
    assert_eq!(counts(&last), [6, 3, 7, 6, 4, 0, 0]);
    assert_eq!(last.hit_rate_percent, 6.0 / 9.0 * 100.0);
    assert_eq!((last.revision, last.store_revision), (db.head(), db.head()));
    assert!(last.cache_bytes > 0);
    let uptime = last.uptime.unwrap();
    assert!((uptime.seconds, uptime.nanos) > (0, 0));
}

async fn misses_that_wait_for_another_are_counted(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    gates.roles.close();
    let read = || server.begin_get(GetRoleRequest { user_id: 7, ..Default::default() });
    let first = read();
    gates.roles.arrived().await;
    let others = [read(), read(), read()];
    let batch = server.begin_batch(BatchGetRolesRequest { user_ids: vec![7, 7], ..Default::default() });
    server.until_stats("five wait for the first", |stats| stats.coalesced_misses == 5).await;
    gates.roles.open();
    first.answer().await;
    for other in others {
        other.answer().await;
    }
    batch.answer().await;
    assert_eq!(counts(&server.stats().await), [0, 6, 1, 0, 1, 5, 0]);
}

async fn a_user_asked_twice_in_a_batch_is_read_once(db: Db) {
    let server = db.serve().await;
    // Far apart, so that the first read may be over before the last user is looked at.
    let mut users: Vec<i64> = (1..=9_999).collect();
    users.push(1);
    server.batch(&users).await;
    assert_eq!(counts(&server.stats().await), [0, 10_000, 9_999, 0, 9_999, 1, 0]);
}

async fn a_miss_that_has_to_read_again_is_counted_once(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).capacity(1).wrap(gates.guard()).serve().await;
    gates.roles_read.close();
    let first = server.begin_get(GetRoleRequest { user_id: 7, ..Default::default() });
    gates.roles_read.arrived().await;
    let second = server.begin_get(GetRoleRequest { user_id: 7, ..Default::default() });
    server.until_stats("the second waits for the first", |stats| stats.coalesced_misses == 1).await;
    server.set(7, "admin").await;
    gates.roles_read.open();
    assert_eq!(first.answer().await.role, "admin");
    assert_eq!(second.answer().await.role, "admin");
    let stats = server.stats().await;
    assert_eq!((stats.misses, stats.store_reads, stats.coalesced_misses), (2, 2, 1));
}

async fn open_watches_are_counted(db: Db) {
    let server = db.serve().await;
    let first = server.watch(WatchRoleChangesRequest::default()).await;
    let second = server.watch(WatchRoleChangesRequest::default()).await;
    assert_eq!(server.stats().await.event_handlers, 2);
    drop(first);
    server.until_stats("one watch is open", |stats| stats.event_handlers == 1).await;
    drop(second);
    server.until_stats("no watch is open", |stats| stats.event_handlers == 0).await;
}
