//! GetRole and BatchGetRoles: hits, misses, and what an answer is true as of.

use rolecache::proto::v1::Source;

use crate::support::server::Db;

on_both! {
    a_miss_reads_the_store_and_the_next_read_is_a_hit,
    a_write_is_in_the_cache_when_it_returns,
}

async fn a_miss_reads_the_store_and_the_next_read_is_a_hit(db: Db) {
    let server = db.serve().await;
    let first = server.get(42).await;
    assert_eq!((&*first.role, first.source(), first.stale), ("user", Source::Store, false));
    let second = server.get(42).await;
    assert_eq!((&*second.role, second.source()), ("user", Source::Cache));
    let stats = server.stats().await;
    assert_eq!((stats.hits, stats.misses, stats.cache_size), (1, 1, 1));
}

async fn a_write_is_in_the_cache_when_it_returns(db: Db) {
    let server = db.serve().await;
    for (role, user) in [("admin", 7), ("user", 7), ("moderator", 8)] {
        let written = server.set(user, role).await;
        let read = server.get(user).await;
        assert_eq!((&*read.role, read.source()), (role, Source::Cache));
        assert!(read.revision >= written.revision);
    }
}
