//! The file under an open store is replaced, removed or another one.

use std::sync::Arc;

use rolecache::{
    role::Revision,
    store::{LogError, Store, StoreError, WriteError},
};

use super::file::until;
use crate::{
    fixtures::{Fixture, SqliteFile},
    suite::*,
};

#[tokio::test]
async fn a_replaced_file_is_noticed() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "before")).await.unwrap();
    let kept = store.head().await.unwrap();
    let backup = database.directory().join("backup.db");
    database.sql(&format!(".backup '{}'", backup.display()));
    for role in ["after", "later"] {
        write(&store, set(1, role)).await.unwrap();
    }
    let lost = store.head().await.unwrap();
    // The -wal file of the old one stands there still, with commits that the backup does not have.
    std::fs::rename(&backup, database.path()).unwrap();

    let gone = until("the new file is read", || async {
        match store.read_log(&lost.into(), 10).await {
            // No new connection is made to a file that is not ours, until the new one is opened.
            Ok(_) | Err(LogError::Store(StoreError::Unreachable(_))) => None,
            Err(error) => Some(error),
        }
    })
    .await;
    assert!(matches!(gone, LogError::HistoryChanged { at, .. } if at == lost), "{gone:?}");
    assert_eq!(store.head().await.unwrap(), kept);
    assert_eq!(role_of(&store, 1).await, "before");
    let written = write(&store, set(1, "a new history")).await.unwrap();
    assert_eq!(written.revision, Revision(kept.revision.0 + 1));
    let gone = store.read_log(&lost.into(), 10).await;
    assert!(matches!(gone, Err(LogError::HistoryChanged { .. })), "{gone:?}");
    assert_eq!(said_from(&store, kept).await, "1: before > a new history");
    assert_eq!(database.sql("pragma integrity_check; select role from users"), "ok\na new history");
    store.close().await;
}

#[tokio::test]
async fn a_write_never_goes_into_a_file_that_lost_its_name() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "before")).await.unwrap();
    let backup = database.directory().join("backup.db");
    database.sql(&format!(".backup '{}'", backup.display()));
    std::fs::rename(&backup, database.path()).unwrap();
    let written = write(&store, set(1, "after")).await.unwrap();
    assert_eq!(said(&written.changes), "1: before > after");
    store.close().await;
    assert_eq!(database.sql("select role from users"), "after");
}

#[tokio::test]
async fn a_removed_file_is_unreachable_and_another_database_is_broken() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "admin")).await.unwrap();
    let aside = database.directory().join("aside.db");
    std::fs::rename(database.path(), &aside).unwrap();
    let answer = write(&store, set(1, "x")).await;
    assert!(matches!(answer, Err(WriteError::Unreachable(_))), "{answer:?}");
    until("reads notice", || async { matches!(store.head().await, Err(StoreError::Unreachable(_))).then_some(()) })
        .await;
    assert!(!database.path().exists(), "no empty database takes its place");
    std::fs::rename(&aside, database.path()).unwrap();
    write(&store, set(1, "back")).await.unwrap();
    assert_eq!(role_of(&store, 1).await, "back");

    let other = SqliteFile::fresh().await;
    let other_store: Arc<dyn Store> = other.open().await;
    other_store.close().await;
    std::fs::rename(other.path(), database.path()).unwrap();
    let answer = write(&store, set(1, "x")).await;
    assert!(matches!(answer, Err(WriteError::Broken(_))), "{answer:?}");
    store.close().await;
}

#[tokio::test]
async fn an_unrelated_database_in_its_place_is_left_untouched() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "admin")).await.unwrap();
    let other = SqliteFile::fresh().await;
    other.sql("create table users (user_id integer primary key, role text); insert into users values (7, 'theirs')");
    let theirs = std::fs::read(other.path()).unwrap();
    std::fs::rename(other.path(), database.path()).unwrap();
    let answer = write(&store, set(1, "x")).await;
    assert!(matches!(answer, Err(WriteError::Broken(_))), "{answer:?}");
    let read = store.head().await;
    assert!(matches!(read, Err(StoreError::Broken(_))), "{read:?}");
    store.close().await;
    assert!(std::fs::read(database.path()).unwrap() == theirs, "it was written to");
    assert_eq!(database.files(), ["bot.db"]);

    // Neither made a database of, nor given up for: somebody is about to fill it.
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "admin")).await.unwrap();
    let backup = database.directory().join("backup.db");
    database.sql(&format!(".backup '{}'", backup.display()));
    let empty = database.directory().join("empty.db");
    std::fs::write(&empty, "").unwrap();
    std::fs::rename(&empty, database.path()).unwrap();
    let read = store.head().await;
    assert!(matches!(read, Err(StoreError::Unreachable(_))), "{read:?}");
    assert_eq!(std::fs::metadata(database.path()).unwrap().len(), 0);
    std::fs::rename(&backup, database.path()).unwrap();
    assert_eq!(role_of(&store, 1).await, "admin");
    store.close().await;
}

#[tokio::test]
async fn the_file_comes_back_after_another_could_not_be_opened() {
    for (has_read, is_copy) in [(true, false), (false, false), (true, true)] {
        let database = SqliteFile::fresh().await;
        let store = database.open().await;
        if has_read {
            store.head().await.unwrap();
        }
        write(&store, set(1, "before")).await.unwrap();
        let (aside, other) = (database.directory().join("aside.db"), database.directory().join("other.db"));
        if is_copy {
            let whole = std::fs::read(database.path()).unwrap();
            std::fs::write(&other, &whole[..whole.len() / 2]).unwrap();
        } else {
            std::fs::write(&other, "").unwrap();
        }
        // By links, so that the name is never without a file.
        std::fs::hard_link(database.path(), &aside).unwrap();
        std::fs::rename(&other, database.path()).unwrap();
        for _ in 0..2 {
            let answer = write(&store, set(1, "x")).await;
            assert!(matches!(answer, Err(WriteError::Unreachable(_) | WriteError::Broken(_))), "{answer:?}");
            assert!(store.head().await.is_err());
        }
        std::fs::rename(&aside, database.path()).unwrap();
        assert_eq!(role_of(&store, 1).await, "before", "what was written is still there");
        write(&store, set(1, "after")).await.unwrap();
        write(&store, set(2, "after")).await.unwrap();
        let start = store.locate(Revision(0), None).await.unwrap();
        assert_eq!(said_from(&store, start).await, "1: - > before, 1: before > after, 2: - > after");
        assert_eq!(store.list_users(None, None, 10).await.unwrap().users.len(), 2);
        assert_eq!(store.snapshot().await.unwrap().next().await.unwrap().len(), 2);
        store.close().await;
        assert_eq!(database.files(), ["bot.db"]);
        let closed = store.head().await;
        assert!(matches!(closed, Err(StoreError::Unreachable(_))), "{closed:?}");
        assert_eq!(database.files(), ["bot.db"], "a closed store opens nothing");
    }
}

#[tokio::test]
async fn the_feed_never_reads_a_file_that_lost_its_name() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "before")).await.unwrap();
    let kept = store.head().await.unwrap();
    let backup = database.directory().join("backup.db");
    database.sql(&format!(".backup '{}'", backup.display()));
    write(&store, set(1, "after")).await.unwrap();
    let lost = store.head().await.unwrap();
    std::fs::rename(&backup, database.path()).unwrap();
    // The very next read, and not one a second later.
    let gone = store.read_log(&lost.into(), 10).await;
    assert!(matches!(gone, Err(LogError::HistoryChanged { .. })), "{gone:?}");
    assert_eq!(store.head().await.unwrap(), kept);
    store.close().await;
}
