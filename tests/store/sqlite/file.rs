//! The file: who may hold it, what it may be, and what happens when it is not there any more.

use std::{
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rolecache::store::{self, OpenError, Options, WriteError};

use super::Shell;
use crate::{
    fixtures::{Fixture, SqliteFile},
    suite::*,
};

async fn refused(options: Options) -> String {
    match store::sqlite::open(&options).await.err() {
        Some(OpenError::Refused(sentence)) => sentence,
        other => panic!("{}: {other:?}", options.url),
    }
}

/// Looks until `look` finds something: what it waits for happens within about a second.
pub(super) async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(20) {
        if let Some(found) = look().await {
            return found;
        }
        tokio::task::yield_now().await;
    }
    panic!("waited in vain until {what}");
}

#[tokio::test]
async fn a_second_server_is_refused() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    let sentence = refused(database.options()).await;
    assert!(sentence.contains("bot.db") && sentence.contains("another"), "{sentence}");
    write(&store, set(1, "admin")).await.unwrap();
    store.close().await;
    assert_eq!(database.files(), ["bot.db"], "nothing is left behind");

    // Held by another process, as the kernel sees it.
    let mut holder = Command::new("flock")
        .arg(database.directory().join("bot.db.lock"))
        .args(["-c", "echo held; cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    let sentence = refused(database.options()).await;
    assert!(sentence.contains("bot.db"), "{sentence}");
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let store = database.open().await;
    assert_eq!(role_of(&store, 1).await, "admin");
    store.close().await;
}

#[tokio::test]
async fn what_is_no_database_is_refused_untouched() {
    for contents in [&b"not a database, but a long enough text to look like a header of one"[..], b"x", &[0; 4096]] {
        let database = SqliteFile::fresh().await;
        std::fs::write(database.path(), contents).unwrap();
        let before = database.fingerprint();
        let sentence = refused(database.options()).await;
        assert!(sentence.contains("is not an SQLite database"), "{sentence}");
        assert_eq!(database.fingerprint(), before);
    }
    // The head of one, and then something else.
    let database = SqliteFile::fresh().await;
    let mut contents = b"SQLite format 3\0".to_vec();
    contents.resize(8192, 0xa5);
    std::fs::write(database.path(), contents).unwrap();
    let before = database.fingerprint();
    let sentence = refused(database.options()).await;
    assert!(sentence.contains("SQLite"), "{sentence}");
    assert_eq!(database.fingerprint(), before);
}

#[tokio::test]
async fn a_place_that_cannot_hold_a_database_is_refused() {
    let database = SqliteFile::fresh().await;
    let inside = |path: &str| format!("sqlite://{}/{path}", database.directory().display());
    let with = |url: String| Options { url, ..database.options() };
    let sentence = refused(with(inside("no/such/bot.db"))).await;
    assert!(sentence.contains("does not exist"), "{sentence}");
    std::fs::create_dir(database.directory().join("a-directory")).unwrap();
    let sentence = refused(with(inside("a-directory"))).await;
    assert!(sentence.contains("not a file"), "{sentence}");
    for url in ["sqlite://", "sqlite::memory:", "sqlite://bot.db?mode=memory", "sqlite://file:bot.db"] {
        let sentence = refused(with(url.to_owned())).await;
        assert!(sentence.contains("names no file"), "{sentence}");
    }
    assert_eq!(database.files(), ["a-directory"]);
}

#[tokio::test]
async fn a_directory_that_cannot_be_written_is_refused() {
    let database = SqliteFile::fresh().await;
    database.sql("create table users (user_id integer primary key, role text)");
    let before = database.fingerprint();
    std::fs::set_permissions(database.directory(), std::fs::Permissions::from_mode(0o555)).unwrap();
    let is_root = std::fs::write(database.directory().join("probe"), "").is_ok();
    if is_root {
        // Permissions do not bind root; the kernel's own file system does.
        std::fs::remove_file(database.directory().join("probe")).unwrap();
        let options = Options { url: "sqlite:///proc/bot.db".to_owned(), ..database.options() };
        let sentence = refused(options).await;
        assert!(sentence.contains("cannot be written"), "{sentence}");
    } else {
        let sentence = refused(database.options()).await;
        assert!(sentence.contains("cannot be written"), "{sentence}");
    }
    std::fs::set_permissions(database.directory(), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(database.fingerprint(), before);
}

#[tokio::test]
async fn a_newer_schema_is_refused_untouched() {
    let database = SqliteFile::fresh().await;
    database.open().await.close().await;
    database.sql("insert into rolecache_migrations values (99, 'later', current_timestamp, true, x'00', 0)");
    let before = database.fingerprint();
    let sentence = refused(database.options()).await;
    assert!(sentence.contains("version 99"), "{sentence}");
    database.sql("delete from rolecache_migrations where version = 99");
    assert_ne!(database.fingerprint(), before);
    database.sql("update rolecache_migrations set checksum = x'00'");
    let before = database.fingerprint();
    let sentence = refused(database.options()).await;
    assert!(sentence.contains("version 1"), "{sentence}");
    assert_eq!(database.fingerprint(), before);
}

#[tokio::test]
async fn a_foreign_lock_is_busy_and_not_waited_for() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    write(&store, set(1, "admin")).await.unwrap();
    let shell = Shell::holding(&database, "begin immediate; update users set role = 'theirs' where user_id = 1");
    let mut quickest = Duration::MAX;
    for _ in 0..5 {
        let asked = Instant::now();
        let answers = store.write(&[set(1, "ours"), set(2, "ours")]).await;
        quickest = quickest.min(asked.elapsed());
        assert!(answers.iter().all(|answer| matches!(answer, Err(WriteError::AllHeld))), "{answers:?}");
    }
    assert!(quickest < Duration::from_millis(100), "{quickest:?}");
    assert_eq!(role_of(&store, 1).await, "admin", "reads go on, and see what is committed");
    assert_eq!(store.trim(Duration::from_secs(86_400)).await.unwrap().commits, 0);
    shell.end("commit");
    let answers = store.write(&[set(1, "ours"), set(2, "ours")]).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(said_from(&store, start).await, "1: - > admin, 1: admin > theirs, 1: theirs > ours, 2: - > ours");
    store.close().await;
}

#[tokio::test]
async fn a_dropped_write_leaves_no_open_transaction() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    let calls: Vec<_> = (0..200).map(|user| set(user, "x")).collect();
    for micros in (0..40).map(|step| step * 500) {
        let _ = tokio::time::timeout(Duration::from_micros(micros), store.write(&calls)).await;
    }
    // The one that was dropped last may still be rolling back.
    until("the lock is free", || async { write(&store, set(1_000, "free")).await.ok() }).await;
    assert_eq!(database.sql("select count(*) from rolecache_feed where open_commit is not null"), "0");
    super::replace::assert_log_leads_to_table(&database, &store).await;
    store.close().await;
}

#[tokio::test]
async fn a_frozen_reader_does_not_hold_writes_up() {
    let database = SqliteFile::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "a")).await.unwrap();
    let shell = Shell::holding(&database, "begin; select count(*) from users");
    for round in 0..20 {
        write(&store, set(1, &format!("r{round}"))).await.unwrap();
    }
    shell.end("commit");
    store.close().await;
}
