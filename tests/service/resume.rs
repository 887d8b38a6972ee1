//! Going on from where a watch ended: by token, by revision, out of the ring, on another server, or not at all.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use rolecache::proto::v1::{
    GetRoleRequest, ListUsersRequest, SetRoleRequest, WatchRoleChangesRequest, watch_role_changes_response::Event,
};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    support::{
        calls,
        gates::Gates,
        server::{Db, Setup, TestServer},
        watch::{Watching, changes, reason, reliable, resumable},
    },
    watch::{every, snapshot},
};

on_both! {
    a_watch_goes_on_from_any_token_it_was_given,
    a_bare_revision_works_and_0_is_the_beginning,
    a_token_of_another_store_is_of_another_history,
    a_token_with_another_tag_is_of_another_history,
    what_is_past_the_head_is_unknown,
    a_broken_token_is_an_invalid_field,
    at_the_trim_boundary_only_what_lies_below_is_compacted,
    a_snapshot_comes_only_where_nothing_can_be_resumed,
    what_fell_out_of_the_ring_comes_from_the_store,
    what_comes_from_the_store_is_not_ahead_of_the_cache,
    a_page_of_a_history_that_is_not_followed_yet_is_not_passed_on,
    a_token_outlives_the_server,
    nothing_of_a_history_that_is_gone_is_answered,
    a_rewritten_history_ends_every_watch,
    random_places_to_resume_from_all_work,
}

pub(crate) fn after(token: impl ToString) -> WatchRoleChangesRequest {
    WatchRoleChangesRequest { after: token.to_string(), ..Default::default() }
}

async fn refused(server: &TestServer, request: WatchRoleChangesRequest) -> Status {
    match Watching::open(server.client.clone(), request).await {
        Ok(watch) => panic!("it started: {:?}", watch.started),
        Err(status) => status,
    }
}

/// Sets roles of a few users one after another, and answers with the revisions.
async fn write(server: &TestServer, commits: usize) -> Vec<i64> {
    let mut revisions = Vec::new();
    while revisions.len() < commits {
        let n = revisions.len();
        for role in [["admin", "user", "moderator"][n / 7 % 3], "moderator", "admin"] {
            // Who has the role already gets another: each write is to be a commit.
            let written = server.set(1 + n as i64 % 7, role).await;
            if written.change.is_some() {
                revisions.push(written.revision);
                break;
            }
        }
    }
    revisions
}

async fn a_watch_goes_on_from_any_token_it_was_given(db: Db) {
    let server = db.serve().await;
    let mut watch = server.watch(Default::default()).await;
    let mut transcripts = Vec::new();
    let mut last = 0;
    for _ in 0..5 {
        last = *write(&server, 9).await.last().unwrap();
        watch.next_commit().await;
        watch.next_commit().await;
        let token = watch.resume_token();
        transcripts.push(watch.transcript);
        watch = server.watch(after(&token)).await;
        assert!(watch.started.resumed);
        assert_eq!(watch.started.resume_token, token);
    }
    watch.until(last).await;
    watch.check();
    transcripts.push(watch.transcript);
    let transcripts: Vec<&[Event]> = transcripts.iter().map(Vec::as_slice).collect();
    resumable(&transcripts, &server.log().await, 0);
}

async fn a_bare_revision_works_and_0_is_the_beginning(db: Db) {
    let server = db.serve().await;
    let mut watch = server.watch(after(0)).await;
    assert_eq!((watch.started.revision, watch.started.resumed), (0, true));
    let revisions = write(&server, 12).await;
    let log = server.log().await;
    watch.until(*revisions.last().unwrap()).await;
    reliable(&watch.transcript, &log, 0);
    for revision in [0, revisions[0], revisions[5], revisions[10]] {
        let mut watch = server.watch(after(revision)).await;
        assert_eq!((watch.started.revision, watch.started.resumed), (revision, true));
        watch.until(*revisions.last().unwrap()).await;
        watch.check();
        reliable(&watch.transcript, &log, revision);
    }
    let mut at_head = server.watch(after(revisions[11])).await;
    let next = server.set(100, "admin").await.revision;
    assert_eq!(at_head.next_commit().await.revision, next);
}

/// Checks that a status says HISTORY_CHANGED, of this store and at this revision.
#[track_caller]
fn says_history_changed(status: &Status, store_id: &str, revision: i64) {
    let (code, reason, metadata) = reason(status);
    assert_eq!((code, &*reason), (Code::DataLoss, "HISTORY_CHANGED"));
    assert_eq!((&*metadata["store_id"], &*metadata["revision"]), (store_id, &*revision.to_string()));
}

async fn a_token_of_another_store_is_of_another_history(db: Db) {
    let server = db.serve().await;
    let other = if db.is_postgres() { Db::postgres().await } else { Db::sqlite() };
    let elsewhere = other.serve().await;
    let revisions = write(&server, 3).await;
    let old = elsewhere.watch(Default::default()).await.started.resume_token;
    write(&elsewhere, 3).await;
    let token = elsewhere.watch(Default::default()).await.started.resume_token;
    let status = refused(&server, after(&token)).await;
    let stats = server.stats().await;
    says_history_changed(&status, &stats.store_id, stats.revision);
    let mut watch = server.watch(WatchRoleChangesRequest { initial_snapshot: true, ..after(&token) }).await;
    assert!(!watch.started.resumed);
    watch.snapshot().await;
    // Nor is it taken for one of ours that was trimmed.
    trim(&db, *revisions.last().unwrap());
    says_history_changed(&refused(&server, after(old)).await, &stats.store_id, stats.revision);
}

async fn a_token_with_another_tag_is_of_another_history(db: Db) {
    let server = db.serve().await;
    let revisions = write(&server, 4).await;
    let mut watch = server.watch(after(0)).await;
    let token = watch.next_commit().await.resume_token;
    let tag = if db.is_postgres() {
        format!("update rolecache.commits set tag = gen_random_uuid() where revision = {}", revisions[0])
    } else {
        format!("update rolecache_commits set tag = randomblob(16) where id = {}", revisions[0])
    };
    db.sql(&tag);
    let status = refused(&server, after(&token)).await;
    says_history_changed(&status, &server.stats().await.store_id, revisions[3]);
    // The other tags are as they were.
    let token = watch.next_commit().await.resume_token;
    assert!(server.watch(after(&token)).await.started.resumed);
}

async fn what_is_past_the_head_is_unknown(db: Db) {
    let server = db.serve().await;
    let head = *write(&server, 2).await.last().unwrap();
    for revision in [head + 1, i64::MAX] {
        for initial_snapshot in [false, true] {
            let status = refused(&server, WatchRoleChangesRequest { initial_snapshot, ..after(revision) }).await;
            let (code, reason, metadata) = reason(&status);
            assert_eq!((code, &*reason), (Code::FailedPrecondition, "REVISION_UNKNOWN"));
            assert_eq!(metadata["revision"], head.to_string());
        }
    }
}

async fn a_broken_token_is_an_invalid_field(db: Db) {
    let server = db.serve().await;
    let token = server.watch(Default::default()).await.started.resume_token;
    let cut = &token[..token.len() - 2];
    let broken = ["x", "-1", "1.5", " 1", "99999999999999999999", "é", cut, &format!("{token}A"), &token[1..]];
    for broken in broken {
        let (code, reason, _) = reason(&refused(&server, after(broken)).await);
        assert_eq!((code, &*reason), (Code::InvalidArgument, "INVALID_FIELD"), "{broken:?}");
    }
}

/// Removes the log up to `revision`, as the trimmer does it.
fn trim(db: &Db, revision: i64) {
    db.sql(&if db.is_postgres() {
        format!(
            "begin;
             update rolecache.feed set trimmed_revision = revision, trimmed_tag = tag
             from rolecache.commits where revision = {revision};
             delete from rolecache.changes where commit_id in (select id from rolecache.commits where revision <= {revision});
             delete from rolecache.commits where revision <= {revision};
             commit"
        )
    } else {
        format!(
            "begin immediate;
             update rolecache_feed set trimmed_revision = {revision},
               trimmed_tag = (select tag from rolecache_commits where id = {revision});
             delete from rolecache_changes where commit_id <= {revision};
             delete from rolecache_commits where id <= {revision};
             commit"
        )
    });
}

async fn at_the_trim_boundary_only_what_lies_below_is_compacted(db: Db) {
    let server = db.serve().await;
    let revisions = write(&server, 10).await;
    let mut watch = server.watch(after(0)).await;
    let mut tokens = Vec::new();
    for _ in 0..10 {
        tokens.push(watch.next_commit().await.resume_token);
    }
    trim(&db, revisions[4]);
    let (store_id, log) = (server.stats().await.store_id, server.log().await);
    assert_eq!(log.len(), 5);
    for below in [revisions[3].to_string(), tokens[3].clone(), "0".into(), tokens[0].clone()] {
        let (code, reason, metadata) = reason(&refused(&server, after(&below)).await);
        assert_eq!((code, &*reason), (Code::OutOfRange, "REVISION_COMPACTED"), "{below}");
        assert_eq!(metadata["oldest"], revisions[4].to_string());
        assert_eq!(metadata["revision"], revisions[9].to_string());
        assert_eq!(metadata["store_id"], store_id);
        let requested = tokens.iter().position(|token| *token == below).map(|at| revisions[at]);
        assert_eq!(metadata["requested"], requested.map_or(below, |revision| revision.to_string()));
    }
    for at in [4, 5] {
        for place in [revisions[at].to_string(), tokens[at].clone()] {
            let mut watch = server.watch(after(&place)).await;
            assert_eq!((watch.started.revision, watch.started.resumed), (revisions[at], true));
            watch.until(revisions[9]).await;
            watch.check();
            reliable(&watch.transcript, &log, revisions[at]);
        }
    }
    // The whole log is gone, and its end can still be resumed from.
    trim(&db, revisions[9]);
    let mut watch = server.watch(after(&tokens[9])).await;
    assert!(watch.started.resumed);
    let next = server.set(50, "admin").await.revision;
    assert_eq!(watch.next_commit().await.revision, next);
}

async fn a_snapshot_comes_only_where_nothing_can_be_resumed(db: Db) {
    let server = db.serve().await;
    let revisions = write(&server, 6).await;
    let with_snapshot = |token: String| WatchRoleChangesRequest { initial_snapshot: true, ..after(token) };
    let mut resumed = server.watch(with_snapshot(revisions[2].to_string())).await;
    assert!(resumed.started.resumed);
    let token = resumed.next_commit().await.resume_token;
    resumed.until(revisions[5]).await;
    assert!(!resumed.transcript.iter().any(|event| matches!(event, Event::Snapshot(_))));
    trim(&db, revisions[4]);
    for lost in [revisions[2].to_string(), token] {
        let mut watch = server.watch(with_snapshot(lost)).await;
        assert_eq!((watch.started.revision, watch.started.resumed), (revisions[5], false));
        let mut users: Vec<_> = watch.snapshot().await.into_iter().map(|user| (user.user_id, user.role)).collect();
        users.sort();
        let expected: Vec<_> = (1..=6).map(|user| (user, "admin".to_owned())).collect();
        assert_eq!(users, expected);
        watch.check();
    }
}

async fn what_fell_out_of_the_ring_comes_from_the_store(db: Db) {
    let server = Setup { ring_bytes: 2_000, ..Setup::new(&db) }.serve().await;
    let mut early = server.watch(Default::default()).await;
    let last = *write(&server, 400).await.last().unwrap();
    let log = server.log().await;
    early.until(last).await;
    early.check();
    reliable(&early.transcript, &log, 0);
    for place in [0, 1, last / 2, last - 1] {
        let mut watch = server.watch(after(place)).await;
        // Writes go on while it pages.
        let newest = server.set(77, if place % 2 == 0 { "admin" } else { "user" }).await.revision;
        watch.until(newest).await;
        watch.check();
        reliable(&watch.transcript, &server.log().await, place);
    }
}

async fn what_comes_from_the_store_is_not_ahead_of_the_cache(db: Db) {
    let gates = Gates::default();
    let server = Setup { ring_bytes: 1, ..Setup::new(&db) }.wrap(gates.guard()).serve().await;
    let applied = *write(&server, 5).await.last().unwrap();
    gates.read_log.close();
    gates.read_log.arrived().await;
    let mut watch = server.watch(after(0)).await;
    gates.read_log.arrived().await;
    // The tailer came first, finds nothing new, and comes back behind the watch.
    gates.read_log.let_one_pass();
    gates.read_log.arrived().await;
    let ahead = db.put(&[(50, "moderator")]);
    gates.read_log.let_one_pass();
    // The page has it, and all that was applied before.
    let next = tokio::spawn(async move { while watch.next_commit().await.revision < ahead {} });
    for _ in 0..20 {
        server.stats().await;
    }
    assert!(!next.is_finished(), "who hears of it and reads now gets the old role");
    assert_eq!(server.stats().await.revision, applied);
    gates.read_log.open();
    next.await.unwrap();
    assert_eq!(server.get(50).await.role, "moderator");
}

async fn a_token_outlives_the_server(db: Db) {
    let server = db.serve().await;
    let mut watch = server.watch(Default::default()).await;
    write(&server, 8).await;
    for _ in 0..3 {
        watch.next_commit().await;
    }
    let token = watch.resume_token();
    let first = watch.transcript.clone();
    server.stop().await.unwrap();
    db.sql("insert into users (user_id, role) values (900, 'admin')");
    let server = db.serve().await;
    let mut watch = server.watch(after(&token)).await;
    assert!(watch.started.resumed);
    let last = server.set(901, "admin").await.revision;
    watch.until(last).await;
    resumable(&[&first, &watch.transcript], &server.log().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_goes_on_at_another_server_of_the_same_store() {
    let db = Db::postgres().await;
    let (one, two) = (db.serve().await, db.serve().await);
    let mut watch = one.watch(Default::default()).await;
    write(&one, 8).await;
    write(&two, 9).await;
    for _ in 0..4 {
        watch.next_commit().await;
    }
    let mut other = two.watch(after(watch.resume_token())).await;
    assert!(other.started.resumed);
    let last = one.set(300, "admin").await.revision;
    other.until(last).await;
    other.check();
    resumable(&[&watch.transcript, &other.transcript], &two.log().await, 0);
    for change in changes(&other.transcript) {
        other.cache_first(&change, "user").await;
    }
}

/// Takes the newest commits away and puts others in their place, as a restored backup and its new writers would. Users
/// 1 to 7 end up as moderators.
fn rewrite(db: &Db, keep: i64) {
    if db.is_postgres() {
        db.sql(&format!(
            "begin;
             set local session_replication_role = replica;
             alter table users disable trigger user;
             update users set role = 'user';
             alter table users enable always trigger _rolecache_insert, enable always trigger _rolecache_update,
               enable always trigger _rolecache_delete, enable always trigger _rolecache_truncate;
             delete from rolecache.changes where commit_id in (select id from rolecache.commits where revision > {keep});
             delete from rolecache.commits where revision > {keep};
             commit;
             select setval('rolecache.revision', {keep});"
        ));
        db.sql(
            "insert into users (user_id, role) select n, 'moderator' from generate_series(1, 7) n
                on conflict (user_id) do update set role = 'moderator'",
        );
    }
}

/// A copy of the database file, where it is one.
fn back_up(db: &Db) -> Option<PathBuf> {
    let Db::Sqlite { .. } = db else { return None };
    let file = db.file().with_extension("backup");
    db.sql(&format!(".backup '{}'", file.display()));
    Some(file)
}

/// Puts the copy in the place of the file, and writes into it; or rewrites the log from `keep` on.
fn restore(db: &Db, backup: Option<&Path>, keep: i64) {
    let Some(backup) = backup else { return rewrite(db, keep) };
    std::fs::remove_file(db.file()).unwrap();
    for beside in ["-wal", "-shm"] {
        let mut name = db.file().into_os_string();
        name.push(beside);
        let _ = std::fs::remove_file(name);
    }
    std::fs::copy(backup, db.file()).unwrap();
    db.sql("insert into users (user_id, role) values (1, 'moderator') on conflict (user_id) do update set role = 'moderator'");
    for user in 2..=7 {
        db.sql(&format!("update users set role = 'moderator' where user_id = {user}"));
    }
}

async fn a_page_of_a_history_that_is_not_followed_yet_is_not_passed_on(db: Db) {
    let gates = Gates::default();
    let server = Setup { ring_bytes: 1, ..Setup::new(&db) }.wrap(gates.guard()).serve().await;
    let kept = *write(&server, 3).await.last().unwrap();
    let backup = back_up(&db);
    write(&server, 10).await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    let mut watch = server.watch(after(kept)).await;
    gates.read_log.arrived().await;
    // The tailer came first, finds nothing new, and comes back behind the watch.
    gates.read_log.let_one_pass();
    gates.read_log.arrived().await;
    restore(&db, backup.as_deref(), kept);
    gates.log_read.close();
    gates.read_log.let_one_pass();
    gates.log_read.arrived().await;
    gates.log_read.open();
    // Its page, up to what is applied here, is in the server's hands.
    for _ in 0..20 {
        server.stats().await;
    }
    gates.read_log.open();
    let status = watch.until_end().await;
    assert_eq!(reason(&status).1, "HISTORY_CHANGED");
    assert_eq!(watch.changes(), [], "who hears of it and reads now gets the role of the other history");
}

async fn nothing_of_a_history_that_is_gone_is_answered(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).complete().wrap(gates.guard()).serve().await;
    let revisions = write(&server, 10).await;
    let backup = back_up(&db);
    let gone = server.set(1, "admin").await;
    gates.head.close();
    restore(&db, backup.as_deref(), revisions[9]);
    // It has found out, and asks where the new history is.
    gates.head.arrived().await;
    let mut client = server.client.clone();
    let read = client.get_role(GetRoleRequest { user_id: 1, ..Default::default() });
    tokio::pin!(read);
    // Calls that are sent after it, over the same connection.
    for _ in 0..5 {
        tokio::select! {
            biased;
            answer = &mut read => panic!("it did not wait for the new history: {answer:?}"),
            stats = server.stats() => assert!(stats.revision >= gone.revision, "nothing else is followed yet"),
        }
    }
    // Whoever asks for health now is sent elsewhere.
    server.until_health(ServingStatus::NotServing).await;
    gates.head.open();
    let answer = read.await.expect("it waits for the new history").into_inner();
    assert_eq!(answer.role, "moderator");
}

async fn a_rewritten_history_ends_every_watch(db: Db) {
    let server = Setup::new(&db).complete().serve().await;
    let revisions = write(&server, 10).await;
    let backup = back_up(&db);
    let mut watch = server.watch(Default::default()).await;
    let lost = write(&server, 10).await;
    for _ in 0..10 {
        watch.next_commit().await;
    }
    let token = watch.resume_token();
    restore(&db, backup.as_deref(), revisions[9]);
    let status = watch.until_end().await;
    let stats = server.stats().await;
    let (code, name, metadata) = reason(&status);
    assert_eq!((code, &*name), (Code::DataLoss, "HISTORY_CHANGED"));
    assert_eq!(metadata["store_id"], stats.store_id);
    assert!(metadata["revision"].parse::<i64>().unwrap() < lost[9], "{metadata:?}");
    watch.check();

    says_history_changed(&refused(&server, after(&token)).await, &stats.store_id, db.head());
    // The client starts over, with what is true now.
    let mut again = server.watch(WatchRoleChangesRequest { after: token, ..snapshot() }).await;
    assert!(!again.started.resumed);
    let mut mirror: std::collections::BTreeMap<_, _> =
        again.snapshot().await.into_iter().map(|user| (user.user_id, user.role)).collect();
    let end = server.set(8, "admin").await.revision;
    again.until(end).await;
    for change in again.changes() {
        mirror.insert(change.user_id, change.new_role);
    }
    for user in 1..=7 {
        assert_eq!(mirror[&user], "moderator");
        let read = server.get(user).await;
        assert_eq!((&*read.role, read.stale), ("moderator", false));
    }
    again.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_into_a_history_that_is_not_followed_yet_is_not_confirmed() {
    let db = Db::postgres().await;
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let revisions = write(&server, 20).await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    rewrite(&db, revisions[9]);
    // Its revision is one that this replica has applied, of the history before.
    gates.written.close();
    let write = server.begin_set(1, "user");
    gates.written.arrived().await;
    gates.written.open();
    gates.listed.close();
    let mut client = server.client.clone();
    let list =
        calls::InFlight::begin(async move { Ok(client.list_users(ListUsersRequest::default()).await?.into_inner()) });
    gates.listed.arrived().await;
    gates.listed.open();
    for _ in 0..20 {
        server.stats().await;
    }
    assert!(!write.is_finished() && !list.is_finished(), "who reads now gets a role of the history before");
    gates.read_log.open();
    calls::refused(write.outcome().await, Code::Unknown, "OUTCOME_UNKNOWN");
    calls::refused_for_now(list.outcome().await, Code::Unavailable, "STORE_UNREACHABLE");
    server.reach(db.head()).await;
    assert_eq!(server.get(1).await.role, "user");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_number_in_another_history_proves_nothing() {
    let db = Db::postgres().await;
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let revisions = write(&server, 20).await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    // One commit is taken away, and one put in its place.
    rewrite(&db, revisions[18]);
    assert_eq!(db.head(), revisions[19]);
    let nothing_to_do = server.begin_set(1, "moderator");
    let mut client = server.client.clone();
    let request = GetRoleRequest { user_id: 9, ..Default::default() };
    let miss = calls::InFlight::begin(async move { Ok(client.get_role(request).await?.into_inner()) });
    for _ in 0..20 {
        server.stats().await;
    }
    assert!(!nothing_to_do.is_finished(), "who reads now gets a role of the history before");
    assert!(!miss.is_finished(), "who reads others now gets their roles of the history before");
    gates.read_log.open();
    calls::refused(nothing_to_do.outcome().await, Code::Unknown, "OUTCOME_UNKNOWN");
    miss.outcome().await.expect("it is answered from the new history");
    assert_eq!(server.get(1).await.role, "moderator");
}

/// As where a standby that lacks the commit takes over before it was read, and others commit there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_write_whose_number_another_commit_has_is_not_confirmed() {
    let db = Db::postgres().await;
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let revisions = write(&server, 20).await;
    server.reach(db.head()).await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    gates.written.close();
    let lost = server.begin_set(1, "admin");
    gates.written.arrived().await;
    assert_eq!(db.head(), revisions[19] + 1);
    // What is applied stays, and its anchor with it.
    rewrite(&db, revisions[19]);
    assert_eq!(db.head(), revisions[19] + 1);
    gates.written.open();
    gates.read_log.open();
    calls::refused(lost.outcome().await, Code::Unknown, "OUTCOME_UNKNOWN");
    server.reach(db.head()).await;
    assert_eq!(server.get(1).await.role, "moderator");
}

/// A small generator, so that a failure can be had again from the seed that it printed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(test: &str) -> Self {
        let seed = match std::env::var("ROLECACHE_TEST_SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        };
        println!("{test}: ROLECACHE_TEST_SEED={seed}");
        Self::from_seed(seed)
    }

    pub(crate) fn from_seed(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

async fn random_places_to_resume_from_all_work(db: Db) {
    let mut random = Random::new("random places to resume from");
    let server = Setup { ring_bytes: 20_000, ..Setup::new(&db) }.serve().await;
    let writing = tokio::spawn({
        let mut client = server.client.clone();
        async move {
            for n in 0..600 {
                let role = ["admin", "user", "moderator"][n / 20 % 3];
                let request = SetRoleRequest { user_id: 1 + n as i64 % 20, role: role.into(), ..Default::default() };
                client.set_role(request).await.unwrap();
            }
        }
    });
    let mut transcripts = Vec::new();
    let mut token = "0".to_owned();
    let mut rounds = 0;
    while !writing.is_finished() || rounds < 60 {
        rounds += 1;
        let mut watch =
            server.watch(WatchRoleChangesRequest { after: token, ..every(Duration::from_millis(100)) }).await;
        assert!(watch.started.resumed);
        for _ in 0..random.below(30) {
            // A heartbeat means that it has caught up.
            if matches!(watch.next().await, Event::Heartbeat(_)) {
                break;
            }
        }
        watch.check();
        token = watch.resume_token();
        transcripts.push(watch.transcript);
    }
    writing.await.unwrap();
    let last = server.set(999, "admin").await.revision;
    let mut watch = server.watch(after(&token)).await;
    watch.until(last).await;
    transcripts.push(watch.transcript);
    let log = server.log().await;
    let joined: Vec<&[Event]> = transcripts.iter().map(Vec::as_slice).collect();
    resumable(&joined, &log, 0);
    println!("{rounds} resumed watches, {} changes", log.len());
    for _ in 0..40 {
        let place = random.below(last as u64) as i64;
        let mut watch = server.watch(after(place)).await;
        watch.until(last).await;
        watch.check();
        reliable(&watch.transcript, &log, place);
    }
}
