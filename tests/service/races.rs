//! Races, each staged with gates: what must not happen is held open until everything is in place for it.

use std::time::Duration;

use rolecache::proto::v1::{
    BatchGetRolesRequest, GetRoleRequest, ListRoleChangesRequest, ListUsersRequest, SetRoleRequest, Source,
    WatchRoleChangesRequest,
};
use tonic::Code;

use crate::support::{
    calls::{InFlight, refused, refused_for_now, roles_in_order, until},
    gates::Gates,
    postgres::{Session, psql},
    proxy::Proxy,
    server::{Db, Setup, TestServer},
};

on_both! {
    a_fill_overtaken_by_a_commit_reads_again,
    a_fill_overtaken_by_a_commit_whose_entry_is_evicted_reads_again,
    a_fill_that_read_ahead_of_the_cache_waits_for_it,
    a_reader_with_min_revision_does_not_join_an_older_fill,
    a_fully_consistent_reader_does_not_join_an_older_fill,
    nobody_joins_an_overtaken_fill,
    the_error_of_a_fill_is_shared_but_not_cached,
    a_write_with_nothing_to_do_is_as_new_as_a_change_that_it_saw,
    two_writers_on_one_user_both_happen_in_order,
    a_write_whose_client_is_gone_still_completes,
    who_lists_and_then_reads_gets_no_older_role,
    a_batch_of_hits_and_misses_is_no_newer_than_its_hits,
}

async fn gated(db: &Db, setup: impl FnOnce(Setup) -> Setup) -> (TestServer, Gates) {
    let gates = Gates::default();
    let server = setup(Setup::new(db)).wrap(gates.guard()).serve().await;
    (server, gates)
}

fn of(user_id: i64) -> GetRoleRequest {
    GetRoleRequest { user_id, ..Default::default() }
}

/// From now on this replica applies nothing.
async fn hold_the_tailer(gates: &Gates) {
    gates.read_log.close();
    gates.read_log.arrived().await;
}

async fn a_fill_overtaken_by_a_commit_reads_again(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    gates.roles_read.close();
    let read = server.begin_get(of(7));
    gates.roles_read.arrived().await;
    // The fill has read "user", and now that is over.
    let written = server.set(7, "admin").await;
    gates.roles_read.open();
    let answer = read.answer().await;
    assert_eq!(answer.role, "admin");
    assert!(answer.revision >= written.revision);
    let next = server.get(7).await;
    assert_eq!((&*next.role, next.source()), ("admin", Source::Cache));
}

async fn a_fill_overtaken_by_a_commit_whose_entry_is_evicted_reads_again(db: Db) {
    let (server, gates) = gated(&db, |setup| setup.capacity(1)).await;
    gates.roles_read.close();
    let read = server.begin_get(of(7));
    gates.roles_read.arrived().await;
    server.set(7, "admin").await;
    // The cache has room for one: each of these throws out the one before it, or itself.
    for user in 100..120 {
        server.set(user, "moderator").await;
    }
    gates.roles_read.open();
    assert_eq!(read.answer().await.role, "admin");
    assert_eq!(server.get(7).await.role, "admin");
}

async fn a_fill_that_read_ahead_of_the_cache_waits_for_it(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    hold_the_tailer(&gates).await;
    let revision = db.put(&[(7, "admin"), (8, "moderator")]);
    gates.roles_read.close();
    let read = server.begin_get(of(7));
    gates.roles_read.arrived().await;
    gates.roles_read.open();
    // Another user's read goes the whole way of a fill meanwhile, and is not kept ahead of the cache either.
    let other = server.begin_get(of(9));
    server.until_stats("both have been read", |stats| stats.store_reads == 2).await;
    let stats = server.stats().await;
    assert!(stats.revision < revision);
    assert_eq!(stats.cache_size, 0, "an entry is ahead of the cache");
    assert!(!read.is_finished() && !other.is_finished(), "an answer is ahead of the cache");
    // A fill waits for a second. Who comes after its end begins another one, and finds that it left nothing behind.
    let mut late = Vec::new();
    while server.stats().await.store_reads == 2 {
        late.push(server.begin_get(of(7)));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(late.len() < 400, "the fill should end in time");
    }
    assert_eq!(server.stats().await.cache_size, 0, "an entry is ahead of the cache");

    gates.read_log.open();
    let answer = read.answer().await;
    assert_eq!((&*answer.role, answer.source()), ("admin", Source::Store));
    assert!(answer.revision >= revision);
    assert!(other.answer().await.revision >= revision);
    assert!(server.stats().await.revision >= revision);
    for read in late {
        assert_eq!(read.answer().await.role, "admin");
    }
}

async fn a_reader_with_min_revision_does_not_join_an_older_fill(db: Db) {
    // Without room, so that the commit's own entry does not answer.
    let (server, gates) = gated(&db, |setup| setup.capacity(1)).await;
    hold_the_tailer(&gates).await;
    gates.roles_read.close();
    let old = server.begin_get(of(7));
    gates.roles_read.arrived().await;
    let revision = db.put(&[(7, "admin")]);
    let new = server.begin_get(GetRoleRequest { min_revision: revision, ..of(7) });
    // Another call comes and goes while it waits for the revision.
    server.stats().await;
    assert!(!new.is_finished());
    gates.read_log.open();
    server.until_stats("the commit is applied", |stats| stats.revision >= revision).await;
    for user in 100..120 {
        server.set(user, "moderator").await;
    }
    gates.roles_read.open();
    let new = new.answer().await;
    assert_eq!(new.role, "admin");
    assert!(new.revision >= revision);
    let old = old.answer().await;
    assert!(old.role == "admin" || old.revision < revision, "{old:?}");
}

async fn a_fully_consistent_reader_does_not_join_an_older_fill(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    hold_the_tailer(&gates).await;
    gates.roles_read.close();
    let old = server.begin_get(of(7));
    gates.roles_read.arrived().await;
    let revision = db.put(&[(7, "admin")]);
    let users = BatchGetRolesRequest { user_ids: vec![7, 8], fully_consistent: true, ..Default::default() };
    let new = server.begin_batch(users);
    // The query for 8 is out, so the reader has met the fill of 7 before it.
    gates.roles_read.arrived().await;
    gates.roles_read.open();
    let old = old.answer().await;
    assert_eq!(old.role, "user");
    assert!(old.revision < revision);
    gates.read_log.open();
    let new = new.answer().await;
    assert_eq!(roles_in_order(&new), ["admin", "user"]);
    assert!(new.revision >= revision);
}

async fn nobody_joins_an_overtaken_fill(db: Db) {
    let (server, gates) = gated(&db, |setup| setup.capacity(1)).await;
    gates.roles_read.close();
    let old = server.begin_get(of(7));
    gates.roles_read.arrived().await;
    let written = server.set(7, "admin").await;
    for user in 100..120 {
        server.set(user, "moderator").await;
    }
    // Finds no entry, and the fill of somebody who came before the write.
    let new = server.begin_batch(BatchGetRolesRequest { user_ids: vec![7, 8], ..Default::default() });
    gates.roles_read.arrived().await;
    gates.roles_read.open();
    let new = new.answer().await;
    assert_eq!(roles_in_order(&new), ["admin", "user"]);
    assert!(new.revision >= written.revision);
    assert_eq!(old.answer().await.role, "admin");
}

async fn the_error_of_a_fill_is_shared_but_not_cached(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    gates.roles.close();
    let first = server.begin_get(of(7));
    gates.roles.arrived().await;
    let second = server.begin_get(of(7));
    server.until_stats("the second waits for the first", |stats| stats.coalesced_misses == 1).await;
    gates.fail_roles(true);
    gates.roles.open();
    refused_for_now(first.outcome().await, Code::Unavailable, "STORE_UNREACHABLE");
    refused_for_now(second.outcome().await, Code::Unavailable, "STORE_UNREACHABLE");
    assert_eq!(server.stats().await.store_reads, 1);
    gates.fail_roles(false);
    let third = server.get(7).await;
    assert_eq!((&*third.role, third.source()), ("user", Source::Store));
}

async fn a_write_with_nothing_to_do_is_as_new_as_a_change_that_it_saw(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    server.set(7, "admin").await;
    hold_the_tailer(&gates).await;
    let revision = db.put(&[(7, "moderator")]);
    gates.written.close();
    let nothing = server.begin_set(7, "moderator");
    gates.written.arrived().await;
    gates.written.open();
    // The cache still has "admin": an answer now would let its caller read that.
    assert_eq!(server.get(7).await.role, "admin");
    assert!(!nothing.is_finished(), "the answer is ahead of the cache");
    gates.read_log.open();
    let nothing = nothing.answer().await;
    assert_eq!(nothing.change, None);
    assert!(nothing.revision >= revision);
    assert_eq!(server.get(7).await.role, "moderator");
    assert_eq!(server.log_of(7).await.len(), 2);
}

async fn two_writers_on_one_user_both_happen_in_order(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    gates.write.close();
    // While this one holds the writer, the two gather behind it and are taken together.
    let before = server.begin_set(1, "moderator");
    gates.write.arrived().await;
    let pair = [server.begin_set(7, "admin"), server.begin_set(7, "moderator")];
    gates.write.open();
    before.answer().await;
    let mut told = Vec::new();
    for write in pair {
        told.push(write.answer().await.change.expect("each has its own change"));
    }
    told.sort_by_key(|change| change.revision);
    assert_eq!(server.log_of(7).await, told);
    assert!(told[0].revision < told[1].revision);
    assert_eq!(told[0].old_role, "");
    assert_eq!(told[0].new_role, told[1].old_role);
    assert_eq!(server.get(7).await.role, told[1].new_role);
}

async fn a_write_whose_client_is_gone_still_completes(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    let mut watch = server.watch(WatchRoleChangesRequest::default()).await;
    gates.write.close();
    let write = server.begin_set(7, "admin");
    gates.write.arrived().await;
    write.hang_up();
    gates.write.open();
    let commit = watch.next_commit().await;
    assert_eq!((commit.changes[0].user_id, &*commit.changes[0].new_role), (7, "admin"));
    assert_eq!(server.get(7).await.role, "admin");
    // And the writer is as well as before.
    server.set(8, "moderator").await;
}

async fn a_batch_of_hits_and_misses_is_no_newer_than_its_hits(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    server.set(7, "admin").await;
    gates.roles.close();
    let batch = server.begin_batch(BatchGetRolesRequest { user_ids: vec![7, 8], ..Default::default() });
    gates.roles.arrived().await;
    let written = server.set(7, "moderator").await;
    gates.roles.open();
    let answer = batch.answer().await;
    match roles_in_order(&answer)[0] {
        "admin" => assert!(answer.revision < written.revision, "{answer:?}"),
        role => assert_eq!(role, "moderator"),
    }
}

async fn who_lists_and_then_reads_gets_no_older_role(db: Db) {
    let (server, gates) = gated(&db, |setup| setup).await;
    server.set(7, "admin").await;
    hold_the_tailer(&gates).await;
    db.put(&[(7, "moderator")]);
    gates.listed.close();
    let mut client = server.client.clone();
    let users = InFlight::begin({
        let mut client = client.clone();
        async move { Ok(client.list_users(ListUsersRequest::default()).await?.into_inner().users) }
    });
    gates.listed.arrived().await;
    let changes = InFlight::begin(async move {
        Ok(client.list_role_changes(ListRoleChangesRequest::default()).await?.into_inner().changes)
    });
    gates.listed.arrived().await;
    gates.listed.open();
    for _ in 0..20 {
        assert_eq!(server.get(7).await.role, "admin");
    }
    assert!(!users.is_finished() && !changes.is_finished(), "a list is ahead of the cache");
    gates.read_log.open();
    assert_eq!(users.answer().await[0].role, "moderator");
    assert_eq!(changes.answer().await[1].new_role, "moderator");
    assert_eq!(server.get(7).await.role, "moderator");
}

/// A server whose write of "admin" for user 7 is committed, and whose connections are gone before it hears of that.
struct Unconfirmed {
    db: Db,
    server: TestServer,
    proxy: Proxy,
    write: InFlight<rolecache::proto::v1::SetRoleResponse>,
}

impl Unconfirmed {
    async fn stage(request_id: &str, lose: impl Fn(&Proxy)) -> Self {
        let db = Db::postgres().await;
        let proxy = Proxy::before(&db.url()).await;
        let server = Setup { url: proxy.url.clone(), ..Setup::new(&db) }.serve().await;
        // The lock that every commit takes when it gets its revision.
        let mut holder = Session::open(&db.url());
        holder.run("begin; select pg_advisory_xact_lock(7237966, 1);");
        let write = server.begin_request(SetRoleRequest {
            user_id: 7,
            role: "admin".into(),
            request_id: request_id.into(),
            ..Default::default()
        });
        let url = db.url();
        until("the write waits inside its COMMIT", || {
            let waiting = "select count(*) from pg_locks l join pg_database d on d.oid = l.database
                where d.datname = current_database() and locktype = 'advisory' and objid = 1 and not granted";
            psql(&url, waiting) == "1"
        })
        .await;
        proxy.freeze();
        holder.run("commit;");
        until("the write is committed", || psql(&url, "select role from users where user_id = 7") == "admin").await;
        lose(&proxy);
        proxy.thaw();
        Self { db, server, proxy, write }
    }

    async fn found_out(self) {
        let answer = self.write.answer().await;
        let change = answer.change.expect("the first attempt's change");
        assert_eq!((&*change.old_role, &*change.new_role), ("", "admin"));
        assert_eq!(self.server.log().await, [change]);
        assert_eq!(self.server.get(7).await.role, "admin");
        drop((self.db, self.proxy));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_confirmation_found_out_by_the_request_id() {
    Unconfirmed::stage("once", Proxy::cut).await.found_out().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_confirmation_lost_in_silence_found_out_by_the_request_id() {
    Unconfirmed::stage("once", Proxy::strand).await.found_out().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_confirmation_without_a_request_id_is_an_unknown_outcome() {
    let staged = Unconfirmed::stage("", Proxy::cut).await;
    refused(staged.write.outcome().await, Code::Unknown, "OUTCOME_UNKNOWN");
    // It did happen, once.
    let head = staged.db.head();
    staged.server.until_stats("the commit arrives", |stats| stats.revision >= head).await;
    assert_eq!(staged.server.get(7).await.role, "admin");
    assert_eq!(staged.server.log().await.len(), 1);
}
