//! Connections that break, fall silent, or lose notifications.

use std::time::{Duration, Instant};

use rolecache::store::{StoreError, WriteError};

use super::{log, open, role_of, set, told, with_id};
use crate::support::{
    postgres::{Postgres, Session, psql},
    proxy::Proxy,
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
    let (rung, mut rings) = tokio::sync::mpsc::unbounded_channel();
    let listening = tokio::spawn({
        let store = store.clone();
        async move { store.listen(&move || rung.send(()).unwrap()).await }
    });
    rings.recv().await.unwrap(); // LISTEN
    rings.recv().await.unwrap(); // and found to be of no use
    assert_eq!(store.poll_at_least_every(), Some(Duration::from_millis(50)));
    listening.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_falls_silent_is_rebuilt() {
    let database = Postgres::shared().fresh_database().await;
    let proxy = Proxy::before(&database.url).await;
    let store = open(&proxy.url).await;
    let (rung, mut rings) = tokio::sync::mpsc::unbounded_channel();
    let listening = tokio::spawn({
        let store = store.clone();
        async move { store.listen(&move || rung.send(()).unwrap()).await }
    });
    rings.recv().await.unwrap();
    psql(&database.url, "insert into users values (1, 'a')");
    rings.recv().await.unwrap();
    let server =
        "select count(*) from pg_stat_activity where datname = current_database() and query = 'LISTEN \"rolecache\"'";
    assert_eq!(psql(&database.url, server), "1");
    proxy.freeze();
    psql(&database.url, "insert into users values (2, 'a')");
    // The heartbeat gives the connection up, and the next ones get nowhere until bytes pass again.
    while tokio::time::timeout(Duration::from_secs(8), rings.recv()).await.is_ok() {}
    proxy.thaw();
    rings.recv().await.unwrap();
    listening.abort();
}
