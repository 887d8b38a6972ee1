//! Reads that take too long: nobody else waits for them, and they end when their caller does.

use std::time::{Duration, Instant};

use rolecache::{
    role::UserId,
    store::{StoreError, WriteError},
};

use crate::{
    fixtures::{Fixture, SqliteFile},
    suite::*,
};

/// Makes every list take far longer than any limit: the column is worked out anew for each row that is read. It comes last,
/// for it would be worked out for each row that is inserted, too.
const SLOW: &str = "
    create table users (user_id integer primary key, role text);
    with recursive n(id) as (select 1 union all select id + 1 from n where id < 9999)
    insert into users (user_id, role) select id, 'slow' from n;
    alter table users add column username text as (substr(hex(zeroblob(2000000 + user_id)), 1, 3))";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_lists_keep_neither_the_feed_nor_misses_nor_their_places() {
    let database = SqliteFile::fresh().await;
    database.sql(SLOW);
    let store = database.open().await;
    let head = store.head().await.unwrap();
    let lists: Vec<_> = (0..12)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.list_users(None, None, 9_999).await })
        })
        .collect();
    let mut snapshots = Vec::new();
    for _ in 0..6 {
        snapshots.push(store.snapshot().await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..10 {
        let asked = Instant::now();
        let page = store.read_log(&head.into(), 10).await.unwrap();
        assert_eq!((page.head, store.head().await.unwrap()), (head, head));
        let (roles, more) = tokio::join!(store.roles(&[UserId(1)]), store.roles(&[UserId(2)]));
        assert_eq!((roles.unwrap().roles[0].as_str(), more.unwrap().roles[0].as_str()), ("slow", "slow"));
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    }
    drop(snapshots);
    // Four find no place, eight run out of time or lose their caller.
    let mut without = 0;
    for (index, list) in lists.into_iter().enumerate() {
        if index % 2 == 0 {
            list.abort();
        }
        match list.await {
            Ok(answer) => {
                assert!(matches!(answer, Err(StoreError::Unreachable(_))), "{answer:?}");
                without += 1;
            }
            Err(gone) => assert!(gone.is_cancelled()),
        }
    }
    assert!(without > 0);
    // Their places are free again, and what is read next is its own answer and no other's rest.
    let started = Instant::now();
    loop {
        match store.list_users(None, None, 2).await {
            Ok(page) => {
                assert_eq!(page.users.iter().map(|row| row.user.0).collect::<Vec<_>>(), [1, 2]);
                break;
            }
            Err(error) => assert!(started.elapsed() < Duration::from_secs(10), "{error}"),
        }
    }
    store.close().await;
    assert_eq!(database.files(), ["bot.db"], "no connection is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_never_ends_does_not_keep_the_store_from_closing() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "before")).await.unwrap();
    database.sql(
        "create trigger endless before update on users begin
           select (with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n);
         end",
    );
    let writing = tokio::spawn({
        let store = store.clone();
        async move { write(&store, set(1, "after")).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!writing.is_finished());
    let asked = Instant::now();
    store.close().await;
    assert!(asked.elapsed() < Duration::from_millis(900), "{:?}", asked.elapsed());
    assert_eq!(database.files(), ["bot.db"], "no connection is left");
    let answer = writing.await.unwrap();
    assert!(matches!(answer, Err(WriteError::Unreachable(_))), "{answer:?}");
    assert_eq!(database.sql("select role from users"), "before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_closed_while_it_is_read_leaves_no_connection() {
    for round in 0..10 {
        let database = SqliteFile::fresh().await;
        let store = database.open().await;
        write(&store, set(1, "admin")).await.unwrap();
        let readers: Vec<_> = (0..6)
            .map(|_| {
                let store = store.clone();
                tokio::spawn(async move { while store.roles(&[UserId(1)]).await.is_ok() {} })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(5 * round)).await;
        store.close().await;
        assert_eq!(database.files(), ["bot.db"], "no connection is left");
        for reader in readers {
            reader.await.unwrap();
        }
    }
}
