//! Connections that break, fall silent, or lose notifications.

use std::time::{Duration, Instant};

use rolecache::store::{self, OpenError, StoreError, WriteError};

use super::{Bell, log, open, options, role_of, set, told, with_id};
use crate::support::{
    documented::documented,
    postgres::{Postgres, Session, psql},
    proxy::{Fate, Proxy, Which},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_store_is_given_up_in_time_and_used_again() {
    let database = Postgres::shared().fresh_database().await;
    let proxy = Proxy::before(&database.url).await;
    let store = open(&proxy.url).await;
    store.write(&[set(1, "a")]).await.remove(0).unwrap();
    assert_eq!(role_of(&*store, 1).await, "a");
    proxy.freeze();
    let asked = Instant::now();
    let (head, roles, written) = tokio::join!(store.head(), store.roles(&[]), async {
        store.write(&[with_id(set(1, "b"), "x")]).await.remove(0)
    });
    assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
    assert!(matches!(head, Err(StoreError::Unreachable(_))), "{head:?}");
    assert!(matches!(roles, Err(StoreError::Unreachable(_))), "{roles:?}");
    assert!(matches!(written, Err(WriteError::OutcomeUnknown(_) | WriteError::Unreachable(_))), "{written:?}");
    proxy.thaw();
    let written = store.write(&[with_id(set(1, "b"), "x")]).await.remove(0).unwrap();
    assert_eq!(written.changes.len(), 1);
    assert_eq!(told(&log(&*store).await), "1:-a\n1:a-b\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_connection_breaks_is_of_unknown_outcome() {
    let database = Postgres::shared().fresh_database().await;
    let store = open(&database.url).await;
    // A trigger that waits holds the write while its session is ended.
    psql(
        &database.url,
        "create function wait() returns trigger language plpgsql set lock_timeout = 0 as $$ begin
           perform pg_advisory_xact_lock(1); return new; end $$;
         create trigger wait before insert on users for each row execute function wait()",
    );
    let mut other = Session::open(&database.url);
    other.run("begin; select pg_advisory_xact_lock(1);");
    let writing = tokio::spawn({
        let store = store.clone();
        async move { store.write(&[with_id(set(1, "a"), "x")]).await.remove(0) }
    });
    let waiting = "select pid from pg_locks where locktype = 'advisory' and not granted";
    while psql(&database.url, waiting).is_empty() {
        tokio::task::yield_now().await;
    }
    psql(&database.url, &format!("select pg_terminate_backend(pid) from ({waiting}) w"));
    let written = writing.await.unwrap();
    assert!(matches!(written, Err(WriteError::OutcomeUnknown(_))), "{written:?}");
    other.run("rollback;");
    let written = store.write(&[with_id(set(1, "a"), "x")]).await.remove(0).unwrap();
    assert_eq!(written.changes.len(), 1);
    assert_eq!(told(&log(&*store).await), "1:-a\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_read_leaves_nothing_behind() {
    let database = Postgres::shared().fresh_database().await;
    let store = open(&database.url).await;
    psql(&database.url, "insert into users select g, 'r' || g from generate_series(1, 20000) g");
    let ids: Vec<_> = (1..=10_000).map(rolecache::role::UserId).collect();
    for pause in 0..40 {
        let read = store.roles(&ids);
        let _ = tokio::time::timeout(Duration::from_micros(pause * 500), read).await;
        assert_eq!(role_of(&*store, 7).await, "r7");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn swallowed_notifications_are_recognised() {
    let database = Postgres::shared().fresh_database().await;
    let proxy = Proxy::before(&database.url).await;
    proxy.mute();
    let store = open(&proxy.url).await;
    assert_eq!(store.poll_at_least_every(), None);
    let mut bell = Bell::of(&store);
    bell.rings().await; // LISTEN
    bell.rings().await; // and found to be of no use
    assert_eq!(store.poll_at_least_every(), Some(Duration::from_millis(50)));
}

/// A pooler may share it: what listens there would go on listening between other people's statements.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_settings_are_not_from_us_is_not_listened_in() {
    let database = Postgres::shared().fresh_database().await;
    let name = psql(&database.url, "select current_database()");
    let settings =
        documented("For each role behind a pooler").replace("role rolecache_service", &format!("database {name}"));
    psql(&database.url, &settings);
    let proxy = Proxy::before(&database.url).await;
    proxy.drop_options();
    let store = open(&proxy.url).await;
    let mut bell = Bell::of(&store);
    bell.rings().await; // and then the log is polled
    assert_eq!(store.poll_at_least_every(), Some(Duration::from_millis(50)));
    let listening = "select count(*) from pg_stat_activity where datname = current_database() and query like 'LISTEN%'";
    assert_eq!(psql(&database.url, listening), "0");
}

/// Everything else passes, and what is said over this connection is answered.
#[tokio::test(flavor = "multi_thread")]
async fn notifications_that_stop_later_are_missed_and_their_connection_is_made_anew() {
    let database = Postgres::shared().fresh_database().await;
    let proxy = Proxy::before(&database.url).await;
    let store = open(&proxy.url).await;
    let (rung, mut rings) = tokio::sync::mpsc::unbounded_channel();
    let listening = tokio::spawn({
        let store = store.clone();
        async move { store.listen(&move || rung.send(()).unwrap()).await }
    });
    rings.recv().await.unwrap(); // LISTEN
    rings.recv().await.unwrap(); // and heard
    let listener =
        "select pid from pg_stat_activity where datname = current_database() and query = 'LISTEN \"rolecache\"'";
    let first = psql(&database.url, listener);

    // One session stops listening, as where a pooler hands another one out.
    proxy.mute();
    tokio::time::timeout(Duration::from_secs(20), async {
        while store.poll_at_least_every().is_none() {
            rings.recv().await.unwrap();
        }
    })
    .await
    .expect("the silence is noticed");
    assert_eq!(store.poll_at_least_every(), Some(Duration::from_millis(50)));
    assert_ne!(psql(&database.url, listener), first);
    listening.abort();
}

/// The connection of the listener alone is gone, and nobody says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranded_listener_is_made_anew() {
    let database = Postgres::shared().fresh_database().await;
    let proxy = Proxy::before(&database.url).await;
    let store = open(&proxy.url).await;
    let (rung, mut rings) = tokio::sync::mpsc::unbounded_channel();
    let listening = tokio::spawn({
        let store = store.clone();
        async move { store.listen(&move || rung.send(()).unwrap()).await }
    });
    rings.recv().await.unwrap();
    rings.recv().await.unwrap();
    proxy.strand();
    // The server has not been told of the end of the old one.
    let listeners =
        "select count(*) from pg_stat_activity where datname = current_database() and query = 'LISTEN \"rolecache\"'";
    tokio::time::timeout(Duration::from_secs(20), async {
        while psql(&database.url, listeners) != "2" {
            rings.recv().await.unwrap();
        }
    })
    .await
    .expect("the silence is noticed");
    assert_eq!(store.poll_at_least_every(), None);
    listening.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_falls_silent_is_rebuilt() {
    let database = Postgres::shared().fresh_database().await;
    let proxy = Proxy::before(&database.url).await;
    let store = open(&proxy.url).await;
    let mut bell = Bell::of(&store);
    bell.rings().await;
    psql(&database.url, "insert into users values (1, 'a')");
    bell.rings().await;
    let server =
        "select count(*) from pg_stat_activity where datname = current_database() and query = 'LISTEN \"rolecache\"'";
    assert_eq!(psql(&database.url, server), "1");
    proxy.freeze();
    psql(&database.url, "insert into users values (2, 'a')");
    // The heartbeat gives the connection up, and the next ones get nowhere until bytes pass again.
    bell.falls_silent(Duration::from_secs(8)).await;
    proxy.thaw();
    bell.rings().await;
}

/// The other end of its connection takes every byte and gives none back.
#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_is_given_up_leaves_no_session_behind() {
    let database = Postgres::shared().fresh_database().await;
    let proxy = Proxy::before(&database.url).await;
    let store = open(&proxy.url).await;
    let mut bell = Bell::of(&store);
    bell.rings().await; // LISTEN
    bell.rings().await; // and heard
    let sessions = "select coalesce(string_agg(pid::text, ','), '') from pg_stat_activity
        where datname = current_database() and query in ('LISTEN \"rolecache\"', 'UNLISTEN *')";
    let first = psql(&database.url, sessions);
    assert_eq!(proxy.strike(Which::Listening, Fate::DeafClient), 1);
    let replaced = async {
        loop {
            let now = psql(&database.url, sessions);
            if !now.is_empty() && !now.split(',').any(|pid| pid == first) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), replaced).await.expect("its session ends, and another one listens");
}

/// It has the lock that everybody takes who migrates, and nobody is left to end it.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_is_abandoned_holds_nobody_up() {
    let database = Postgres::shared().fresh_database().await;
    psql(&database.url, "create table users (user_id bigint primary key, role text)");
    let mut holder = Session::open(&database.url);
    holder.run("begin; lock table users in row exclusive mode;");
    let proxy = Proxy::before(&database.url).await;
    let abandoned = tokio::spawn({
        let options = options(&proxy.url);
        async move { store::open(&options).await.map(|_| ()) }
    });
    let waiting = "select count(*) from pg_locks where locktype = 'relation' and not granted";
    tokio::time::timeout(Duration::from_secs(20), async {
        while psql(&database.url, waiting) == "0" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the migration waits for the table");
    proxy.strand();
    holder.run("rollback;");
    let left = "select count(*) from pg_stat_activity a join pg_locks l using (pid)
        where a.datname = current_database() and a.state = 'idle in transaction' and l.locktype = 'advisory'";
    tokio::time::timeout(Duration::from_secs(5), async {
        while psql(&database.url, left) == "0" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("it holds the lock, and nobody goes on");
    tokio::time::timeout(Duration::from_secs(20), open(&database.url)).await.expect("another server migrates");
    abandoned.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_does_not_wait_for_ever_for_an_answer() {
    let database = Postgres::shared().fresh_database().await;
    open(&database.url).await.close().await;
    let mut holder = Session::open(&database.url);
    holder.run("begin; lock table rolecache.migrations in access exclusive mode;");
    let opened = tokio::time::timeout(Duration::from_secs(20), store::open(&options(&database.url))).await;
    let refused = opened.expect("it gives up in time").err();
    assert!(matches!(refused, Some(OpenError::Unreachable(_))), "{refused:?}");
}
