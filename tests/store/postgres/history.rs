//! The log as a whole: its order, its size, what dumps, failovers and trimming do to it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rolecache::{
    role::{Revision, UserId},
    store::{ListPosition, LogError, Position, Store, StoreError, Trimmed},
};

use super::{Bell, fresh, log, log_in_pages, open, role_of, set, told, with_id};
use crate::support::postgres::{Postgres, Session, copy_script, dump, psql, try_psql};

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_follows_misses_nothing_and_sees_nothing_twice() {
    let (database, store) = fresh().await;
    psql(&database.url, "insert into users select g, 'user' from generate_series(1, 400) g");
    let from = Position::from(store.head().await.unwrap());
    let writers = (0..8).map(|writer| {
        let url = database.url.clone();
        tokio::task::spawn_blocking(move || {
            let mut psql = Session::open(&url);
            for round in 0..60 {
                let user = 1 + writer * 50 + round % 50;
                let pause = if round % 3 == 0 { "select pg_sleep(0.003);" } else { "" };
                let end = if round % 5 == 0 { "rollback" } else { "commit" };
                let printed = psql.run(&format!(
                    "begin; update users set role = 'r{round}' where user_id in ({user}, {}); {pause} {end};",
                    1 + writer * 50 + (round + 1) % 50
                ));
                assert_eq!(printed, "");
            }
        })
    });
    let mut writers: Vec<_> = writers.collect();
    let mut own = Vec::new();
    let mut seen = Vec::new();
    let mut at = from;
    let mut is_last = false;
    while !is_last {
        is_last = writers.iter().all(|writer| writer.is_finished());
        own.push(store.write(&[set(1_000 + own.len() as i64, "admin")]).await.remove(0).unwrap().revision);
        loop {
            let page = store.read_log(&at, 3).await.unwrap();
            at = page.next;
            let is_end = page.reaches_head();
            for commit in page.commits {
                seen.extend(commit.changes.into_iter().map(|change| (commit.revision, change.index)));
            }
            if is_end {
                break;
            }
        }
    }
    for writer in writers.drain(..) {
        writer.await.unwrap();
    }
    let all = log(&*store).await;
    let all: Vec<_> = all
        .iter()
        .filter(|commit| commit.revision > from.anchor.revision)
        .flat_map(|commit| commit.changes.iter().map(|change| (commit.revision, change.index)))
        .collect();
    assert_eq!(seen, all);
    assert!(own.iter().all(|revision| all.iter().any(|(it, _)| it == revision)));
    assert_eq!(all.len() - own.len(), 8 * 48 * 2, "each commit of the writers, and no rollback");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_of_a_million_changes_is_read_in_pages() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "alter table users disable trigger all; insert into users select g, 'user' from generate_series(1, 1000000) g;
         alter table users enable always trigger _rolecache_insert, enable always trigger _rolecache_update,
           enable always trigger _rolecache_delete, enable always trigger _rolecache_truncate",
    );
    let started = Instant::now();
    psql(&database.url, "update users set role = 'admin'");
    println!("update of a million users: {:?}", started.elapsed());
    assert_eq!(store.check_triggers().await.unwrap(), [""; 0]);

    let mut at = Position::from(store.locate(Revision(0), None).await.unwrap());
    let (mut read, mut slowest) = (0, Duration::ZERO);
    loop {
        let asked = Instant::now();
        let page = store.read_log(&at, 10_000).await.unwrap();
        slowest = slowest.max(asked.elapsed());
        for change in page.commits.iter().flat_map(|commit| &commit.changes) {
            assert_eq!(change.index, read);
            read += 1;
        }
        assert!(page.commits.iter().all(|commit| commit.changes.len() <= 10_000 && commit.size == 1_000_000));
        at = page.next;
        if page.reaches_head() {
            break;
        }
    }
    assert_eq!(read, 1_000_000);
    println!("slowest page of 10,000: {slowest:?}");

    // Of one user only, and from the middle of the commit.
    let from = ListPosition { revision: Revision(0), inside: None, kept_only: false };
    let one = store.list_changes(Some(UserId(900_000)), from, 10).await.unwrap().changes;
    assert_eq!((one.len(), one[0].change.index), (1, 899_999));
    let inside = ListPosition { revision: one[0].revision, inside: Some((899_999, one[0].row)), kept_only: false };
    let rest = store.list_changes(None, inside, 7).await.unwrap().changes;
    assert_eq!(rest.iter().map(|it| it.change.index).collect::<Vec<_>>(), (899_999..900_006).collect::<Vec<_>>());

    let asked = Instant::now();
    let mut snapshot = store.snapshot().await.unwrap();
    let mut users = 0;
    loop {
        let chunk = snapshot.next().await.unwrap();
        users += chunk.len();
        if chunk.is_empty() {
            break;
        }
    }
    println!("snapshot of a million users: {:?}", asked.elapsed());
    assert_eq!(users, 1_000_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_restored_elsewhere_is_the_same_store() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "insert into users values (1, 'admin', 'ann'), (2, null, null); delete from users where user_id = 2",
    );
    store.write(&[with_id(set(5, "helper"), "a")]).await.remove(0).unwrap();
    let before = log(&*store).await;
    let users = psql(&database.url, "select * from users order by 1");
    // A cluster of its own: its transaction ids start low again, and meet those in the log.
    let other = tokio::task::spawn_blocking(Postgres::start_own).await.unwrap();
    for args in [&[][..], &["--clean", "--if-exists"], &["--inserts"]] {
        let copy = other.fresh_database().await;
        match dump(&database.url, args) {
            Some(script) => drop(psql(&copy.url, &script)),
            None => {
                open(&copy.url).await.close().await;
                psql(&copy.url, &(copy_script(&database.url) + "select rolecache.install_triggers();"));
            }
        }
        let restored = open(&copy.url).await;
        assert_eq!(restored.facts().store_id, store.facts().store_id);
        assert_eq!(log(&*restored).await, before, "{args:?}");
        assert_eq!(psql(&copy.url, "select * from users order by 1"), users);
        assert_eq!(restored.check_triggers().await.unwrap(), [""; 0]);
        // More transactions than the log has, so that each xid in it comes up again.
        for round in 0..40 {
            psql(&copy.url, &format!("update users set role = 'r{round}'"));
        }
        let again = restored.write(&[with_id(set(5, "helper"), "a")]).await.remove(0).unwrap();
        assert_eq!(again.revision, before.last().unwrap().revision);
        let after = log(&*restored).await;
        assert_eq!(after[..before.len()], before);
        assert_eq!(after.len(), before.len() + 40);
    }
    // Data only, into a schema that is there: nothing is logged or numbered anew. Its triggers are, and mark that.
    let copy = other.fresh_database().await;
    drop(open(&copy.url).await);
    psql(&copy.url, "truncate rolecache.feed, rolecache.migrations");
    let data = dump(&database.url, &["--data-only", "--disable-triggers"]);
    psql(&copy.url, &data.unwrap_or_else(|| copy_script(&database.url)));
    let restored = open(&copy.url).await;
    assert_eq!(restored.check_triggers().await.unwrap(), [""; 0], "pg_dump leaves them as they do not always fire");
    let kept = ListPosition { revision: Revision(0), inside: None, kept_only: true };
    let changes = restored.list_changes(None, kept, 100).await.unwrap().changes;
    assert_eq!(changes.len(), before.iter().map(|commit| commit.changes.len()).sum::<usize>());
    assert_eq!(restored.head().await.unwrap().revision.0, before.last().unwrap().revision.0 + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_left_behind_stops_changes_until_the_next_start() {
    let (database, store) = fresh().await;
    for user in 1..5 {
        store.write(&[set(user, "admin")]).await.remove(0).unwrap();
    }
    psql(&database.url, "select setval('rolecache.revision', 2), setval('rolecache.commits_id_seq', 100)");
    let error = try_psql(&database.url, "update users set role = 'x'").unwrap_err();
    assert!(error.contains("left behind"), "{error}");
    assert!(matches!(store.write(&[set(9, "x")]).await[0], Err(rolecache::store::WriteError::Broken(_))));
    psql(&database.url, "select setval('rolecache.commits_id_seq', 1)");
    let store = open(&database.url).await;
    psql(&database.url, "update users set role = 'x'");
    store.write(&[set(9, "x")]).await.remove(0).unwrap();
    let revisions: Vec<_> = log(&*store).await.iter().map(|commit| commit.revision.0).collect();
    assert_eq!(revisions, [1, 2, 3, 4, 5, 6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewritten_history_is_noticed() {
    let (database, store) = fresh().await;
    for user in 1..5 {
        store.write(&[set(user, "admin")]).await.remove(0).unwrap();
    }
    let commits = log(&*store).await;
    psql(
        &database.url,
        "delete from rolecache.changes; delete from rolecache.commits where revision > 2;
                         select setval('rolecache.revision', 2); insert into users values (9, 'x')",
    );
    for lost in &commits[2..] {
        let read = store.read_log(&lost.anchor().into(), 10).await;
        assert!(matches!(read, Err(LogError::HistoryChanged { at, .. }) if at == lost.anchor()), "{read:?}");
        let located = store.locate(lost.revision, Some(lost.tag)).await;
        assert!(matches!(located, Err(LogError::HistoryChanged { .. })), "{located:?}");
    }
    assert_eq!(store.read_log(&commits[1].anchor().into(), 10).await.unwrap().commits.len(), 1);
    // Changes that are missing from a commit are not read as if there had been none.
    let start = store.locate(Revision(0), None).await.unwrap();
    let read = store.read_log(&start.into(), 10).await;
    assert!(matches!(read, Err(LogError::Store(StoreError::Broken(_)))), "{read:?}");
    let unknown = store.locate(Revision(99), None).await;
    assert!(matches!(unknown, Err(LogError::Unknown { head: Revision(3), .. })), "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_trimmed_from_its_start_while_writers_run() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "begin;
         set constraints all immediate;
         insert into users select g, 'user' from generate_series(1, 13000) g;
         commit;
         update rolecache.commits set committed_at = now() - interval '40 days' where revision <> 2500",
    );
    store.write(&[with_id(set(1, "x"), "old")]).await.remove(0).unwrap();
    psql(&database.url, "update rolecache.requests set at = now() - interval '2 days'");
    let month = Duration::from_secs(30 * 24 * 60 * 60);
    let start = store.locate(Revision(0), None).await.unwrap();
    let old = store.locate(Revision(1_000), None).await.unwrap();
    let edge = store.locate(Revision(2_499), None).await.unwrap();
    let is_done = Arc::new(AtomicU32::new(0));
    let writer = tokio::spawn({
        let (store, is_done) = (store.clone(), is_done.clone());
        async move {
            let mut round = 0;
            while is_done.load(Ordering::Relaxed) == 0 {
                store.write(&[set(2, &format!("r{round}"))]).await.remove(0).unwrap();
                round += 1;
            }
        }
    });
    let mut gone = Trimmed::default();
    loop {
        let (one, other) = tokio::join!(store.trim(month), store.trim(month));
        let (one, other) = (one.unwrap(), other.unwrap());
        assert!(one.commits <= 1_000 && other.commits <= 1_000);
        gone.commits += one.commits + other.commits;
        gone.requests += one.requests + other.requests;
        if one == Trimmed::default() && other == one {
            break;
        }
    }
    is_done.store(1, Ordering::Relaxed);
    writer.await.unwrap();
    // A young commit keeps all that follow it, however old they say they are.
    assert_eq!(gone, Trimmed { commits: 2_499, requests: 1 });
    for anchor in [start, old] {
        let read = store.read_log(&anchor.into(), 10).await;
        assert!(matches!(read, Err(LogError::Compacted { oldest: Revision(2_499), .. })), "{read:?}");
    }
    let commits = log_from(&*store, edge).await;
    assert_eq!(commits.first().unwrap().revision, Revision(2_500));
    assert_eq!(
        psql(
            &database.url,
            "select count(*) from rolecache.changes where commit_id not in (select id from rolecache.commits)"
        ),
        "0"
    );
    let kept = ListPosition { revision: Revision(0), inside: None, kept_only: true };
    assert_eq!(store.list_changes(None, kept, 5).await.unwrap().changes[0].revision, Revision(2_500));
    let all = store.list_changes(None, ListPosition { kept_only: false, ..kept }, 5).await;
    assert!(matches!(all, Err(LogError::Compacted { .. })), "{all:?}");
    // The newest 10,000 stay, old or not.
    psql(&database.url, "update rolecache.commits set committed_at = now() - interval '40 days'");
    while store.trim(month).await.unwrap().commits > 0 {}
    assert_eq!(psql(&database.url, "select count(*) from rolecache.commits"), "10000");
}

async fn log_from(store: &dyn Store, anchor: rolecache::role::Anchor) -> Vec<rolecache::role::Commit> {
    store.read_log(&anchor.into(), 1_000).await.unwrap().commits
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_is_off_is_reported() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "alter table users disable trigger _rolecache_update; drop trigger _rolecache_truncate on users;
                         alter table rolecache.commits enable trigger number_commit",
    );
    let mut sentences = store.check_triggers().await.unwrap();
    sentences.sort();
    assert_eq!(sentences.len(), 3, "{sentences:?}");
    assert!(
        sentences[0].contains("_rolecache_truncate of public.users is missing")
            && sentences[2].contains("number_commit")
    );
    let store = open(&database.url).await;
    assert_eq!(store.check_triggers().await.unwrap(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_that_were_never_numbered_are_kept() {
    let (database, store) = fresh().await;
    let start = store.head().await.unwrap();
    psql(
        &database.url,
        "alter table rolecache.commits disable trigger number_commit; insert into users values (1, 'a');
         insert into users values (2, 'b'), (3, 'c')",
    );
    assert_eq!(store.head().await.unwrap(), start);
    let other = open(&database.url).await;
    let read = store.read_log(&start.into(), 10).await;
    assert!(matches!(read, Err(LogError::Compacted { .. })), "{read:?}");
    let kept = ListPosition { revision: Revision(0), inside: None, kept_only: true };
    let changes = other.list_changes(None, kept, 10).await.unwrap().changes;
    let told: Vec<_> = changes.iter().map(|it| (it.revision.0, it.change.user.0)).collect();
    assert_eq!(told, [(1, 1), (2, 2), (2, 3)]);
    let head = other.head().await.unwrap();
    store.write(&[set(4, "d")]).await.remove(0).unwrap();
    assert_eq!(told_from(&*other, head).await, "4:-d\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_are_made_anew_once_writers_are_done() {
    let (database, store) = fresh().await;
    psql(&database.url, "insert into users values (1, 'a'); drop trigger _rolecache_update on users");
    let head = store.head().await.unwrap();
    let mut bot = Session::open(&database.url);
    bot.run("begin; update users set role = 'b';");
    let opening = tokio::spawn({
        let url = database.url.clone();
        async move { open(&url).await }
    });
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(!opening.is_finished());
    bot.run("commit;");
    let reopened = opening.await.unwrap();
    let read = store.read_log(&head.into(), 10).await;
    assert!(matches!(read, Err(LogError::HistoryChanged { .. })), "{read:?}");
    let head = reopened.head().await.unwrap();
    psql(&database.url, "update users set role = 'c'");
    assert_eq!(told_from(&*reopened, head).await, "1:b-c\n");
}

async fn told_from(store: &dyn Store, anchor: rolecache::role::Anchor) -> String {
    told(&log_from(store, anchor).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_is_listened_to_again() {
    let server = tokio::task::spawn_blocking(Postgres::start_own).await.unwrap();
    let database = server.fresh_database().await;
    let store = open(&database.url).await;
    let mut bell = Bell::of(&store);
    bell.rings().await;
    psql(&database.url, "insert into users values (1, 'a')");
    bell.rings().await;
    let before = log(&*store).await;
    for stop in [Postgres::kill, Postgres::stop] {
        tokio::task::block_in_place(|| stop(&server));
        let outage = Instant::now();
        assert!(matches!(store.head().await, Err(StoreError::Unreachable(_))));
        let lost = store.write(&[set(7, "x")]).await.remove(0);
        assert!(matches!(lost, Err(rolecache::store::WriteError::Unreachable(_))), "{lost:?}");
        assert!(outage.elapsed() < Duration::from_secs(8), "{:?}", outage.elapsed());
        // Before the start: the listener may be back before we are told that the server is.
        bell.forget();
        tokio::task::block_in_place(|| server.start());
        bell.rings().await;
        assert_eq!(log_in_pages(&*store, 10).await.unwrap()[..before.len()], before);
    }
    store.write(&[set(7, "x")]).await.remove(0).unwrap();
    assert_eq!(role_of(&*store, 7).await, "x");
    assert_eq!(store.poll_at_least_every(), None);
    assert_eq!(told(&log(&*store).await[before.len()..]), "7:-x\n");
    store.close().await;
}
