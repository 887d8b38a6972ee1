//! The store lost, slow, and back: what reads, writes, watches and health say meanwhile.

use std::time::{Duration, Instant};

use rolecache::proto::v1::{
    FeedState, GetMailboxRequest, GetRoleRequest, RoleChange, SetRoleRequest, Source, WatchRoleChangesRequest,
};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    calls::{refused_for_now, roles_in_order, until},
    gates::Gates,
    postgres::{Postgres, Session},
    proxy::Proxy,
    server::{Db, PATIENCE, Setup, TestServer},
    watch::{reason, reliable},
};

on_both! {
    reads_while_catching_up_come_from_the_store_within_a_bound,
    a_proof_counts_from_when_its_read_was_sent,
    no_proof_makes_the_cache_answer_with_less_than_was_told,
}

/// A server that reaches its PostgreSQL through a proxy only, while the test goes straight to it.
async fn behind_a_proxy(setup: impl FnOnce(Setup) -> Setup) -> (Db, Proxy, TestServer) {
    let db = Db::postgres().await;
    let proxy = Proxy::before(&db.url()).await;
    let server = setup(Setup { url: proxy.url.clone(), ..Setup::new(&db) }).serve().await;
    (db, proxy, server)
}

/// Asks until the answer is one, or an error, that `is_it`.
async fn get_until(
    server: &TestServer,
    user_id: i64,
    is_it: impl Fn(&Result<rolecache::proto::v1::GetRoleResponse, Status>) -> bool,
) -> Result<rolecache::proto::v1::GetRoleResponse, Status> {
    let asked = timeout(PATIENCE, async {
        loop {
            let outcome = server.try_get(GetRoleRequest { user_id, ..Default::default() }).await;
            if is_it(&outcome) {
                return outcome;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    asked.await.expect("the answer should come in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_store_leaves_stale_hits_and_refuses_the_rest() {
    let (db, proxy, server) = behind_a_proxy(|setup| setup).await;
    let before = server.set(7, "admin").await;
    server.set(8, "moderator").await;
    let mut watch = server.watch_feed().await;
    proxy.freeze();
    watch.until_feed(FeedState::Disconnected).await;

    let hit = server.get(7).await;
    assert_eq!((&*hit.role, hit.source(), hit.stale), ("admin", Source::Cache, true));
    assert!(hit.revision >= before.revision);
    let batch = server.batch(&[8, 7]).await;
    assert_eq!((roles_in_order(&batch), batch.stale), (vec!["moderator", "admin"], true));
    let miss = server.try_get(GetRoleRequest { user_id: 9, ..Default::default() }).await;
    refused_for_now(miss, Code::Unavailable, "STORE_UNREACHABLE");
    refused_for_now(server.fully_consistent(7).await, Code::Unavailable, "STORE_UNREACHABLE");
    let asked = Instant::now();
    let ahead = GetRoleRequest { user_id: 7, min_revision: hit.revision + 100, ..Default::default() };
    refused_for_now(server.try_get(ahead).await, Code::Unavailable, "STORE_UNREACHABLE");
    assert!(asked.elapsed() < Duration::from_secs(4), "what is known at once was waited for");
    let stats = server.stats().await;
    assert_eq!((stats.stale_answers, stats.feed_state()), (2, FeedState::Disconnected));
    assert_eq!((stats.hits, stats.misses), (3, 1));
    let write = server.try_set(SetRoleRequest { user_id: 9, role: "admin".into(), ..Default::default() }).await;
    refused_for_now(write, Code::Unavailable, "STORE_UNREACHABLE");

    // Others go on writing.
    db.put(&[(7, "moderator"), (10, "admin")]);
    db.sql("delete from users where user_id = 8");
    let head = db.put(&[(7, "user")]);
    assert_eq!(server.get(7).await.role, "admin");
    proxy.thaw();
    watch.until_feed(FeedState::Live).await;
    server.reach(head).await;
    let answer = server.get(7).await;
    assert_eq!((&*answer.role, answer.stale), ("user", false));
    assert_eq!(roles_in_order(&server.batch(&[7, 8, 9, 10]).await), ["user", "user", "user", "admin"]);
    watch.until(head).await;
    watch.check();
    reliable(&watch.transcript, &server.log().await, watch.started.revision);
    server.set(9, "admin").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn past_max_staleness_reads_are_refused_and_health_says_so() {
    let limit = Duration::from_secs(4);
    let (_db, proxy, server) = behind_a_proxy(|setup| Setup { max_staleness: limit, ..setup }).await;
    server.set(7, "admin").await;
    proxy.freeze();
    let refusal = get_until(&server, 7, Result::is_err).await;
    let (code, why, metadata) = reason(refusal.as_ref().unwrap_err());
    assert_eq!((code, &*why), (Code::Unavailable, "TOO_STALE"));
    assert!(metadata["age_ms"].parse::<u128>().unwrap() >= limit.as_millis(), "{metadata:?}");
    refused_for_now(refusal, Code::Unavailable, "TOO_STALE");
    server.until_health(ServingStatus::NotServing).await;
    assert!(server.stats().await.stale_answers > 0, "before that it answered, marked stale");

    proxy.thaw();
    server.until_health(ServingStatus::Serving).await;
    let answer = get_until(&server, 7, |outcome| outcome.as_ref().is_ok_and(|answer| !answer.stale)).await.unwrap();
    assert_eq!(answer.role, "admin");
    assert_eq!(server.stats().await.feed_state(), FeedState::Live);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_broke_together_cost_no_answer() {
    let (db, proxy, server) = behind_a_proxy(|setup| setup).await;
    // Four queries at once, on a connection each.
    let mut stranger = Session::open(&db.url());
    stranger.run("begin; lock table users in access exclusive mode;");
    let mut reads = Vec::new();
    for user in 1..=4 {
        reads.push(server.begin_get(GetRoleRequest { user_id: user, ..Default::default() }));
        server.until_stats("another query", |stats| stats.store_reads == user).await;
    }
    stranger.run("commit;");
    for read in reads {
        read.answer().await;
    }
    let sessions = "select coalesce(string_agg(pid::text, ','), '0') from pg_stat_activity
        where datname = current_database() and application_name = 'rolecache'";
    let open = db.sql(sessions);
    proxy.cut();
    until("the end of them all", || db.sql(&format!("{sessions} and pid in ({open})")) == "0").await;
    for user in 5..=8 {
        assert!(!server.get(user).await.stale);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_down_at_start_is_waited_for() {
    let postgres = Postgres::start_own();
    let db = Db::Postgres { url: postgres.fresh_database().await.url.clone() };
    postgres.stop();
    let server = Setup::new(&db).start().await;
    server.until_health(ServingStatus::NotServing).await;
    let read = server.try_get(GetRoleRequest { user_id: 7, ..Default::default() }).await;
    refused_for_now(read, Code::Unavailable, "STORE_UNREACHABLE");
    let write = server.try_set(SetRoleRequest { user_id: 7, role: "admin".into(), ..Default::default() }).await;
    refused_for_now(write, Code::Unavailable, "STORE_UNREACHABLE");
    let watch = server.client.clone().watch_role_changes(WatchRoleChangesRequest::default()).await;
    refused_for_now(watch.map(drop), Code::Unavailable, "STORE_UNREACHABLE");
    postgres.start();
    server.until_serving().await;
    server.set(7, "admin").await;

    // And a crash later nothing is lost, and nothing told twice.
    let mut watch = server.watch_feed().await;
    postgres.kill();
    watch.until_feed(FeedState::Disconnected).await;
    let hit = get_until(&server, 7, |outcome| outcome.as_ref().is_ok_and(|answer| answer.stale)).await.unwrap();
    assert_eq!(hit.role, "admin");
    postgres.start();
    db.put(&[(7, "moderator")]);
    watch.until_feed(FeedState::Live).await;
    server.reach(db.head()).await;
    assert_eq!(server.get(7).await.role, "moderator");
    server.set(8, "admin").await;
    watch.until(db.head()).await;
    watch.check();
    let told: Vec<RoleChange> = watch.changes();
    assert_eq!(told.iter().map(|change| change.user_id).collect::<Vec<_>>(), [7, 8]);
}

/// A failover: the primary that was serves on as a standby, cut off from what the new one commits. What it says is of long ago.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_has_become_a_standby_vouches_for_nothing() {
    let postgres = Postgres::start_own();
    let db = Db::Postgres { url: postgres.fresh_database().await.url.clone() };
    let server = db.serve().await;
    server.set(7, "admin").await;
    let mut watch = server.watch_feed().await;
    postgres.stop();
    postgres.start_as_standby();
    assert_eq!(db.sql("select pg_is_in_recovery()"), "t");
    watch.until_feed(FeedState::Disconnected).await;
    let hit = get_until(&server, 7, |outcome| outcome.as_ref().is_ok_and(|answer| answer.stale)).await.unwrap();
    assert_eq!(hit.role, "admin");
    for (user_id, fully_consistent) in [(7, true), (8, false)] {
        let request = GetRoleRequest { user_id, fully_consistent, ..Default::default() };
        refused_for_now(server.try_get(request).await, Code::Unavailable, "STORE_UNREACHABLE");
    }
    let mailbox = server.client.clone().get_mailbox(GetMailboxRequest { mailbox_id: 1 }).await;
    refused_for_now(mailbox.map(drop), Code::Unavailable, "STORE_UNREACHABLE");
    let write = server.try_set(SetRoleRequest { user_id: 7, role: "user".into(), ..Default::default() }).await;
    refused_for_now(write, Code::Unavailable, "STORE_UNREACHABLE");
    // For longer than a proof holds it is read from, and proves nothing.
    assert!(get_until(&server, 7, |_| true).await.unwrap().stale);

    db.sql("select pg_promote()");
    watch.until_feed(FeedState::Live).await;
    assert!(!server.get(7).await.stale);
    server.set(7, "moderator").await;
}

async fn reads_while_catching_up_come_from_the_store_within_a_bound(db: Db) {
    let gates = Gates::default();
    let server = Setup { fallback_reads: 1, ..Setup::new(&db).wrap(gates.guard()) }.serve().await;
    let mut watch = server.watch_feed().await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    watch.until_feed(FeedState::Disconnected).await;
    // More than one page of the log.
    for (first, role) in [(1, "admin"), (6_001, "moderator"), (1, "user")] {
        db.sql(&format!(
            "with recursive n(i) as (select {first} union all select i + 1 from n where i < {first} + 5999)
             insert into users (user_id, role) select i, '{role}' from n where true
             on conflict (user_id) do update set role = excluded.role"
        ));
    }
    let head = db.head();
    gates.read_log.let_one_pass();
    gates.read_log.arrived().await;
    // The first page is applied, and the second is to come.
    gates.roles.close();
    let in_turn = server.begin_get(GetRoleRequest { user_id: 7, ..Default::default() });
    gates.roles.arrived().await;
    let out_of_turn = server.try_get(GetRoleRequest { user_id: 8, ..Default::default() }).await;
    refused_for_now(out_of_turn, Code::ResourceExhausted, "OVERLOADED");
    // The store's answer does not wait for this replica to get there; the revision with it is the one it has.
    gates.roles.open();
    let answer = in_turn.answer().await;
    assert_eq!((&*answer.role, answer.source(), answer.stale), ("user", Source::Store, false));
    assert!(answer.revision < head);
    gates.read_log.open();
    watch.until_feed(FeedState::Live).await;
    let hit = server.get(7).await;
    assert_eq!((&*hit.role, hit.source(), hit.stale), ("user", Source::Cache, false));
    assert_eq!(server.get(12_000).await.role, "moderator");
}

async fn a_proof_counts_from_when_its_read_was_sent(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    server.set(7, "admin").await;
    let mut watch = server.watch_feed().await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    // It has been on its way for as long as a proof holds.
    watch.until_feed(FeedState::Disconnected).await;
    gates.read_log.let_one_pass();
    watch.until_feed(FeedState::Live).await;
    let read = server.get(7).await;
    assert_eq!((&*read.role, read.source(), read.stale), ("admin", Source::Cache, true));
    gates.read_log.open();
    let fresh = get_until(&server, 7, |outcome| outcome.as_ref().is_ok_and(|answer| !answer.stale)).await.unwrap();
    assert_eq!(fresh.role, "admin");
}

async fn no_proof_makes_the_cache_answer_with_less_than_was_told(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let mut watch = server.watch_feed().await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    watch.until_feed(FeedState::Disconnected).await;
    for first in [1, 6_001] {
        db.sql(&format!(
            "with recursive n(i) as (select {first} union all select i + 1 from n where i < {first} + 5999)
             insert into users (user_id, role) select i, 'admin' from n"
        ));
    }
    gates.read_log.let_one_pass();
    gates.read_log.arrived().await;
    // The first page is applied. The second and last one is read, and on its way, when somebody writes.
    gates.log_read.close();
    gates.read_log.let_one_pass();
    gates.log_read.arrived().await;
    gates.written.close();
    let write = server.begin_set(7, "moderator");
    gates.written.arrived().await;
    gates.written.open();
    let told = server.get(7).await;
    assert_eq!((&*told.role, told.source(), told.stale), ("moderator", Source::Store, false));
    // It proves that nothing followed when it was sent, which was before.
    gates.log_read.open();
    watch.until_feed(FeedState::Live).await;
    gates.read_log.arrived().await;
    let next = server.begin_get(GetRoleRequest { user_id: 7, ..Default::default() });
    for _ in 0..20 {
        server.stats().await;
    }
    assert!(!next.is_finished(), "the cache does not have it yet");
    gates.read_log.open();
    assert_eq!(next.answer().await.role, "moderator");
    write.answer().await;
}
