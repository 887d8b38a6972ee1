//! GetRole and BatchGetRoles: hits, misses, and what an answer is true as of.

use rolecache::proto::v1::{BatchGetRolesRequest, GetRoleRequest, Source};
use tokio::time::timeout;
use tonic::Code;

use crate::support::{
    calls::{refused, refused_for_now, roles_in_order},
    gates::Gates,
    server::{Db, PATIENCE, Setup},
};

on_both! {
    a_miss_reads_the_store_and_the_next_read_is_a_hit,
    a_write_is_in_the_cache_when_it_returns,
    a_batch_answers_in_order_with_repeats_and_distinct_roles,
    a_batch_takes_ten_thousand_users,
    an_empty_batch_has_no_roles_and_a_revision,
    the_revision_of_answers_never_goes_back,
    min_revision_that_is_applied_is_a_hit,
    min_revision_waits_for_a_commit_that_is_not_applied_yet,
    min_revision_past_the_head_is_unknown,
    a_revision_that_never_arrives_is_waited_for_within_limits,
    a_fully_consistent_read_sees_a_commit_that_is_not_applied_yet,
    a_fully_consistent_read_is_neither_hit_nor_miss,
    a_role_outside_of_the_settings_is_passed_on,
    a_row_without_a_role_has_the_default_role,
    a_change_by_plain_sql_replaces_what_is_cached,
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

async fn a_batch_answers_in_order_with_repeats_and_distinct_roles(db: Db) {
    let server = db.serve().await;
    server.set(1, "admin").await;
    let last = server.set(2, "moderator").await;
    let answer = server.batch(&[3, 1, 2, 1, i64::MIN, 3, i64::MAX]).await;
    assert_eq!(roles_in_order(&answer), ["user", "admin", "moderator", "admin", "user", "user", "user"]);
    assert_eq!(answer.roles, ["user", "admin", "moderator"]);
    assert!(!answer.stale);
    assert_eq!(answer.revision, last.revision);
}

async fn a_batch_takes_ten_thousand_users(db: Db) {
    let server = db.serve().await;
    server.set(4_000, "admin").await;
    let users: Vec<i64> = (1..=10_000).collect();
    for round in 0..2 {
        let answer = server.batch(&users).await;
        let roles = roles_in_order(&answer);
        assert_eq!(roles.len(), users.len());
        let admins: Vec<usize> = (0..roles.len()).filter(|index| roles[*index] == "admin").collect();
        assert_eq!(admins, [3_999], "in round {round}");
    }
    let stats = server.stats().await;
    assert_eq!((stats.hits, stats.misses, stats.store_reads), (10_001, 9_999, 9_999));
}

async fn an_empty_batch_has_no_roles_and_a_revision(db: Db) {
    let server = db.serve().await;
    let written = server.set(1, "admin").await;
    let answer = server.batch(&[]).await;
    assert_eq!((answer.roles.len(), answer.role_indexes.len(), answer.revision), (0, 0, written.revision));
}

async fn the_revision_of_answers_never_goes_back(db: Db) {
    let server = db.serve().await;
    let mut last = server.get(1).await.revision;
    for turn in 0..20 {
        let answers = [
            server.set(2, ["admin", "moderator"][turn % 2]).await.revision,
            server.get(2).await.revision,
            server.get(100 + turn as i64).await.revision,
            server.fully_consistent(2).await.unwrap().revision,
            server.batch(&[2, 1_000 + turn as i64]).await.revision,
        ];
        for revision in answers {
            assert!(revision >= last, "{revision} came after {last}: {answers:?}");
            last = revision;
        }
    }
}

async fn min_revision_that_is_applied_is_a_hit(db: Db) {
    let server = db.serve().await;
    let written = server.set(7, "admin").await;
    let read = GetRoleRequest { user_id: 7, min_revision: written.revision, ..Default::default() };
    let answer = server.try_get(read).await.unwrap();
    assert_eq!((&*answer.role, answer.source(), answer.revision), ("admin", Source::Cache, written.revision));
}

async fn min_revision_waits_for_a_commit_that_is_not_applied_yet(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    server.set(7, "moderator").await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    let min_revision = db.put(&[(7, "admin")]);
    assert_eq!(server.get(7).await.role, "moderator");
    let one = server.begin_get(GetRoleRequest { user_id: 7, min_revision, ..Default::default() });
    let many = BatchGetRolesRequest { user_ids: vec![7, 8], min_revision, ..Default::default() };
    let many = server.begin_batch(many);
    // A read without a wish comes and goes meanwhile.
    assert_eq!(server.get(7).await.role, "moderator");
    assert!(!one.is_finished() && !many.is_finished());
    gates.read_log.open();
    let one = one.answer().await;
    assert_eq!(one.role, "admin");
    assert!(one.revision >= min_revision);
    let many = many.answer().await;
    assert_eq!(roles_in_order(&many), ["admin", "user"]);
    assert!(many.revision >= min_revision);
}

async fn min_revision_past_the_head_is_unknown(db: Db) {
    let server = db.serve().await;
    let head = server.set(7, "admin").await.revision;
    for min_revision in [head + 1, i64::MAX] {
        let one = server.try_get(GetRoleRequest { user_id: 7, min_revision, ..Default::default() }).await;
        let metadata = refused(one, Code::FailedPrecondition, "REVISION_UNKNOWN");
        assert_eq!(metadata["revision"], head.to_string());
        let many = BatchGetRolesRequest { user_ids: vec![7], min_revision, ..Default::default() };
        refused(server.begin_batch(many).outcome().await, Code::FailedPrecondition, "REVISION_UNKNOWN");
    }
}

async fn a_revision_that_never_arrives_is_waited_for_within_limits(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    let min_revision = db.put(&[(7, "admin")]);
    let read = GetRoleRequest { user_id: 7, min_revision, ..Default::default() };
    let mut hurried = tonic::Request::new(read);
    hurried.set_timeout(std::time::Duration::from_millis(100));
    let status = server.client.clone().get_role(hurried).await.unwrap_err();
    // Whoever notices first, this server or the client by itself.
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    // Without a deadline of the caller's own, after the server's 5 s; by then the store counts as silent.
    refused_for_now(server.try_get(read).await, Code::Unavailable, "STORE_UNREACHABLE");
    gates.read_log.open();
    server.until_live().await;
    assert_eq!(server.try_get(read).await.unwrap().role, "admin");
}

async fn a_fully_consistent_read_sees_a_commit_that_is_not_applied_yet(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    server.set(7, "moderator").await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    let revision = db.put(&[(7, "admin")]);
    gates.roles_read.close();
    let read = server.begin_get(GetRoleRequest { user_id: 7, fully_consistent: true, ..Default::default() });
    gates.roles_read.arrived().await;
    gates.roles_read.open();
    gates.read_log.open();
    let answer = read.answer().await;
    assert_eq!((&*answer.role, answer.source(), answer.stale), ("admin", Source::Store, false));
    assert!(answer.revision >= revision);
    // Who has seen it never sees the old role again.
    let next = server.get(7).await;
    assert_eq!(next.role, "admin");
    assert!(next.revision >= answer.revision);
}

async fn a_fully_consistent_read_is_neither_hit_nor_miss(db: Db) {
    let server = db.serve().await;
    server.set(7, "admin").await;
    let answer = server.fully_consistent(7).await.unwrap();
    assert_eq!((&*answer.role, answer.source()), ("admin", Source::Store));
    let batch = BatchGetRolesRequest { user_ids: vec![7, 8], fully_consistent: true, ..Default::default() };
    assert_eq!(roles_in_order(&server.begin_batch(batch).answer().await), ["admin", "user"]);
    let stats = server.stats().await;
    assert_eq!((stats.hits, stats.misses, stats.store_reads, stats.coalesced_misses), (0, 0, 3, 0));
}

async fn a_role_outside_of_the_settings_is_passed_on(db: Db) {
    let server = db.serve().await;
    let long = "é".repeat(200);
    let revision = db.put(&[(7, "Owner of it"), (8, &long)]);
    server.reach(revision).await;
    for _ in 0..2 {
        assert_eq!(server.get(7).await.role, "Owner of it");
        assert_eq!(roles_in_order(&server.batch(&[8, 7]).await), [&*long, "Owner of it"]);
    }
    // A write may not set it, and may replace it.
    assert_eq!(server.set(7, "user").await.change.unwrap().old_role, "Owner of it");
}

async fn a_row_without_a_role_has_the_default_role(db: Db) {
    let server = db.serve().await;
    db.sql("insert into users (user_id, role) values (1, null), (2, ''), (3, 'admin'), (4, 'admin')");
    assert_eq!(roles_in_order(&server.batch(&[1, 2, 3, 4]).await), ["user", "user", "admin", "admin"]);
    db.sql("update users set role = null where user_id = 3");
    db.sql("update users set role = '' where user_id = 4");
    server.reach(db.head()).await;
    assert_eq!(roles_in_order(&server.batch(&[1, 2, 3, 4]).await), ["user"; 4]);
    assert_eq!(server.fully_consistent(3).await.unwrap().role, "user");
}

async fn a_change_by_plain_sql_replaces_what_is_cached(db: Db) {
    let server = db.serve().await;
    assert_eq!(server.get(7).await.role, "user");
    server.reach(db.put(&[(7, "admin")])).await;
    let read = server.get(7).await;
    assert_eq!((&*read.role, read.source()), ("admin", Source::Cache));
    db.sql("delete from users where user_id = 7");
    server.reach(db.head()).await;
    let read = server.get(7).await;
    assert_eq!((&*read.role, read.source()), ("user", Source::Cache));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_is_newer_than_its_role() {
    let db = Db::postgres().await;
    let server = db.serve().await;
    // A commit that takes a while to be applied, and one that it comes to last.
    let last = 10_000;
    db.sql(&format!("insert into users (user_id, role) select n, 'user' from generate_series(1, {last}) n"));
    server.reach(db.head()).await;
    for role in ["admin", "moderator", "admin", "moderator"] {
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let mut client = server.client.clone();
                tokio::spawn(async move {
                    let mut answers = Vec::new();
                    while answers.last().is_none_or(|(_, told)| told != role) {
                        let request = GetRoleRequest { user_id: last, ..Default::default() };
                        let answer = client.get_role(request).await.unwrap().into_inner();
                        answers.push((answer.revision, answer.role));
                    }
                    answers
                })
            })
            .collect();
        db.shell().go(format!("update users set role = '{role}'")).await;
        let head = db.head();
        for reader in readers {
            let answers = timeout(PATIENCE, reader).await.expect("the change should arrive").unwrap();
            let older = answers.iter().find(|(revision, told)| *revision >= head && told != role);
            assert_eq!(older, None, "the role of before, at the revision of now");
        }
    }
}
