//! SetRole, TransferAdmin, DeleteUser, RegisterMailbox: what they change, refuse and repeat.

use std::collections::HashSet;

use rolecache::{
    proto::v1::{
        ChangeKind, DeleteUserRequest, GetMailboxRequest, Origin, RegisterMailboxRequest, RegisterMailboxResponse,
        SetRoleRequest, Transfer, TransferAdminRequest,
    },
    store::{Call, Op},
};
use tonic::{Code, Status};

use crate::support::{
    calls::{InFlight, refused, refused_for_now, until},
    gates::Gates,
    postgres::Session,
    proxy::Proxy,
    server::{Db, Setup, TestServer},
};

on_both! {
    a_set_role_tells_its_change_and_logs_it,
    a_write_with_nothing_to_do_logs_nothing,
    an_unnamed_username_is_kept,
    expected_role_lets_only_the_expected_pass,
    a_repeated_request_has_the_first_answer_and_one_effect,
    a_request_id_that_comes_with_another_request_is_refused,
    a_refused_request_may_be_repeated_and_then_succeed,
    a_transfer_gives_and_with_demote_takes,
    a_transfer_from_one_who_is_no_admin_is_refused,
    a_mailbox_goes_with_its_transfer,
    a_deleted_user_has_the_default_role,
    a_mailbox_is_registered_once,
    many_writes_at_once_share_commits,
    one_bad_write_fails_alone,
    a_write_behind_one_without_an_answer_is_refused_in_time,
}

fn set(user_id: i64, role: &str) -> SetRoleRequest {
    SetRoleRequest { user_id, role: role.into(), ..Default::default() }
}

fn expecting(user_id: i64, role: &str, expected: &str) -> SetRoleRequest {
    SetRoleRequest { expected_role: Some(expected.into()), ..set(user_id, role) }
}

fn transfer(from_user_id: i64, to_user_id: i64) -> TransferAdminRequest {
    TransferAdminRequest { from_user_id, to_user_id, ..Default::default() }
}

async fn register(server: &TestServer, mailbox_id: i64, creator_id: i64) -> Result<RegisterMailboxResponse, Status> {
    let request = RegisterMailboxRequest { mailbox_id, creator_id };
    Ok(server.client.clone().register_mailbox(request).await?.into_inner())
}

async fn creator(server: &TestServer, mailbox_id: i64) -> Result<i64, Status> {
    Ok(server.client.clone().get_mailbox(GetMailboxRequest { mailbox_id }).await?.into_inner().creator_id)
}

async fn a_set_role_tells_its_change_and_logs_it(db: Db) {
    let server = db.serve().await;
    let request = SetRoleRequest { username: "ann".into(), reason: "she asked".into(), ..set(7, "admin") };
    let answer = server.try_set(request).await.unwrap();
    let change = answer.change.unwrap();
    assert_eq!((change.user_id, &*change.old_role, &*change.new_role), (7, "", "admin"));
    assert_eq!((change.kind(), change.origin()), (ChangeKind::AdminAdded, Origin::Rpc));
    assert_eq!((&*change.actor, &*change.reason, &*change.username), ("anonymous", "she asked", "ann"));
    assert_eq!((change.revision, change.index, change.transfer), (answer.revision, 0, None));
    assert!(change.changed_at.is_some());
    assert_eq!(server.log().await, [change]);

    let kinds = [("moderator", ChangeKind::AdminRemoved), ("user", ChangeKind::RoleChanged)];
    let mut last = answer.revision;
    for (role, kind) in kinds {
        let answer = server.set(7, role).await;
        assert_eq!(answer.change.unwrap().kind(), kind);
        assert!(answer.revision > last);
        last = answer.revision;
    }
    assert_eq!(server.set(8, "user").await.change.unwrap().kind(), ChangeKind::UserCreated);
}

async fn a_write_with_nothing_to_do_logs_nothing(db: Db) {
    let server = db.serve().await;
    server.set(7, "admin").await;
    let head = server.set(8, "moderator").await.revision;
    let again = server.set(7, "admin").await;
    assert_eq!((again.change, again.revision), (None, head));
    assert_eq!(server.delete(9).await, (None, head));
    assert_eq!(server.log().await.len(), 2);
    // A new user with the default role is something.
    assert!(server.set(9, "user").await.change.is_some());
}

async fn an_unnamed_username_is_kept(db: Db) {
    let server = db.serve().await;
    server.try_set(SetRoleRequest { username: "ann".into(), ..set(7, "admin") }).await.unwrap();
    assert_eq!(server.set(7, "user").await.change.unwrap().username, "ann");
    let renamed = SetRoleRequest { username: "anna".into(), ..set(7, "moderator") };
    assert_eq!(server.try_set(renamed).await.unwrap().change.unwrap().username, "anna");
    assert_eq!(db.sql("select username from users where user_id = 7").trim(), "anna");
    let taken_up = TransferAdminRequest { to_username: "bob".into(), ..transfer(8, 9) };
    server.set(8, "admin").await;
    assert_eq!(server.transfer(taken_up).await.unwrap().changes[0].username, "bob");
}

async fn expected_role_lets_only_the_expected_pass(db: Db) {
    let server = db.serve().await;
    let current = |metadata: std::collections::HashMap<String, String>| metadata["current_role"].clone();
    let mismatch = |outcome| current(refused(outcome, Code::FailedPrecondition, "ROLE_MISMATCH"));
    // The default role also matches a user that does not exist.
    server.try_set(expecting(7, "admin", "user")).await.unwrap();
    assert_eq!(mismatch(server.try_set(expecting(7, "user", "user")).await), "admin");
    assert_eq!(mismatch(server.try_set(expecting(7, "user", "")).await), "admin");
    // Even where there would be nothing to do.
    assert_eq!(mismatch(server.try_set(expecting(7, "admin", "user")).await), "admin");
    server.try_set(expecting(7, "user", "admin")).await.unwrap();
    // "" only matches one that does not exist.
    server.try_set(expecting(8, "user", "")).await.unwrap();
    assert_eq!(mismatch(server.try_set(expecting(8, "admin", "")).await), "user");
    server.reach(db.put(&[(9, "Owner")])).await;
    assert_eq!(mismatch(server.try_set(expecting(9, "admin", "owner")).await), "Owner");
    server.try_set(expecting(9, "admin", "Owner")).await.unwrap();
}

async fn a_repeated_request_has_the_first_answer_and_one_effect(db: Db) {
    let server = db.serve().await;
    let request = SetRoleRequest { request_id: "a".into(), ..set(7, "admin") };
    let first = server.try_set(request.clone()).await.unwrap();
    server.set(7, "user").await;
    assert_eq!(server.try_set(request.clone()).await.unwrap(), first);
    assert_eq!(server.get(7).await.role, "user");

    let nothing = SetRoleRequest { request_id: "b".into(), ..set(7, "user") };
    let first_nothing = server.try_set(nothing.clone()).await.unwrap();
    assert_eq!(first_nothing.change, None);
    server.set(7, "moderator").await;
    assert_eq!(server.try_set(nothing).await.unwrap(), first_nothing);
    assert_eq!(server.get(7).await.role, "moderator");

    server.set(8, "admin").await;
    let hand_over = TransferAdminRequest { demote_from: true, request_id: "c".into(), ..transfer(8, 9) };
    let first_transfer = server.transfer(hand_over.clone()).await.unwrap();
    assert_eq!(server.transfer(hand_over).await.unwrap(), first_transfer);

    let goodbye = DeleteUserRequest { user_id: 9, request_id: "d".into(), ..Default::default() };
    let mut client = server.client.clone();
    let first_delete = client.delete_user(goodbye.clone()).await.unwrap().into_inner();
    server.set(9, "moderator").await;
    assert_eq!(client.delete_user(goodbye).await.unwrap().into_inner(), first_delete);
    assert_eq!(server.get(9).await.role, "moderator");
    assert_eq!(server.log().await.len(), 8);

    // Twice at the same time, and after a restart.
    let twin = SetRoleRequest { request_id: "e".into(), ..set(10, "admin") };
    let twins = [server.begin_request(twin.clone()), server.begin_request(twin)];
    let [one, two] = twins.map(|twin| async { twin.answer().await });
    assert_eq!(one.await, two.await);
    server.stop().await.unwrap();
    let server = db.serve().await;
    assert_eq!(server.try_set(request).await.unwrap(), first);
    assert_eq!(server.log().await.len(), 9);
}

async fn a_request_id_that_comes_with_another_request_is_refused(db: Db) {
    let server = db.serve().await;
    let request = SetRoleRequest { request_id: "a".into(), ..set(7, "admin") };
    server.try_set(request.clone()).await.unwrap();
    for other in [
        SetRoleRequest { user_id: 8, ..request.clone() },
        SetRoleRequest { role: "user".into(), ..request.clone() },
        SetRoleRequest { reason: "other".into(), ..request },
    ] {
        refused(server.try_set(other).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    }
    // To the byte what the first one was, and another call.
    let twin = DeleteUserRequest { user_id: 7, reason: "admin".into(), request_id: "a".into() };
    let outcome = server.client.clone().delete_user(twin).await;
    refused(outcome, Code::InvalidArgument, "REQUEST_ID_REUSED");
    let other = TransferAdminRequest { request_id: "a".into(), ..transfer(7, 8) };
    refused(server.transfer(other).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(server.log().await.len(), 1);
}

async fn a_refused_request_may_be_repeated_and_then_succeed(db: Db) {
    let server = db.serve().await;
    let request = SetRoleRequest { request_id: "a".into(), ..expecting(7, "admin", "moderator") };
    refused(server.try_set(request.clone()).await, Code::FailedPrecondition, "ROLE_MISMATCH");
    server.set(7, "moderator").await;
    assert!(server.try_set(request).await.unwrap().change.is_some());
}

async fn a_transfer_gives_and_with_demote_takes(db: Db) {
    let server = db.serve().await;
    server.set(1, "admin").await;
    let given = server.transfer(transfer(1, 2)).await.unwrap();
    let by = Some(Transfer { from_user_id: 1, to_user_id: 2, mailbox_id: None });
    assert_eq!(given.changes.len(), 1);
    let change = &given.changes[0];
    assert_eq!((change.user_id, &*change.old_role, &*change.new_role), (2, "", "admin"));
    assert_eq!((change.kind(), &change.transfer), (ChangeKind::AdminTransferred, &by));
    assert_eq!(server.get(1).await.role, "admin");

    // Logged even where the receiver is an admin already; and with demote both are told, the receiver first.
    let taken = server.transfer(TransferAdminRequest { demote_from: true, ..transfer(1, 2) }).await.unwrap();
    let told: Vec<_> = taken
        .changes
        .iter()
        .map(|change| (change.user_id, &*change.old_role, &*change.new_role, change.kind()))
        .collect();
    assert_eq!(
        told,
        [(2, "admin", "admin", ChangeKind::AdminTransferred), (1, "admin", "user", ChangeKind::AdminRemoved)]
    );
    assert!(taken.changes.iter().all(|change| change.transfer == by && change.revision == taken.revision));
    assert_eq!((&*server.get(1).await.role, &*server.get(2).await.role), ("user", "admin"));
    assert_eq!(server.log().await.len(), 4);
}

async fn a_transfer_from_one_who_is_no_admin_is_refused(db: Db) {
    let server = db.serve().await;
    server.set(1, "moderator").await;
    for (from, role) in [(1, "moderator"), (3, "user")] {
        let metadata = refused(server.transfer(transfer(from, 2)).await, Code::FailedPrecondition, "NOT_AN_ADMIN");
        assert_eq!(metadata["current_role"], role);
    }
    assert_eq!(server.get(2).await.role, "user");
    assert_eq!(server.log().await.len(), 1);
}

async fn a_mailbox_goes_with_its_transfer(db: Db) {
    let server = db.serve().await;
    let of_mailbox = |from, to| TransferAdminRequest { mailbox_id: Some(77), ..transfer(from, to) };
    let unknown = refused(server.transfer(of_mailbox(1, 2)).await, Code::NotFound, "MAILBOX_NOT_FOUND");
    assert_eq!(unknown["mailbox_id"], "77");
    register(&server, 77, 1).await.unwrap();
    let other = refused(server.transfer(of_mailbox(2, 3)).await, Code::FailedPrecondition, "NOT_THE_CREATOR");
    assert_eq!(other["creator_id"], "1");
    // Its creator hands it over, admin or not.
    let given = server.transfer(of_mailbox(1, 2)).await.unwrap();
    assert_eq!(given.changes[0].transfer.unwrap().mailbox_id, Some(77));
    assert_eq!(creator(&server, 77).await.unwrap(), 2);
    assert_eq!(server.get(2).await.role, "admin");
    refused(server.transfer(of_mailbox(1, 3)).await, Code::FailedPrecondition, "NOT_THE_CREATOR");
}

async fn a_deleted_user_has_the_default_role(db: Db) {
    let server = db.serve().await;
    server.set(7, "admin").await;
    let (change, revision) = server.delete(7).await;
    let change = change.unwrap();
    assert_eq!((change.kind(), &*change.old_role, &*change.new_role), (ChangeKind::UserDeleted, "admin", ""));
    assert_eq!(change.revision, revision);
    assert_eq!(server.get(7).await.role, "user");
    assert_eq!(server.delete(7).await, (None, revision));
}

async fn a_mailbox_is_registered_once(db: Db) {
    let server = db.serve().await;
    refused(creator(&server, 5).await, Code::NotFound, "MAILBOX_NOT_FOUND");
    register(&server, 5, 1).await.unwrap();
    register(&server, 5, 1).await.unwrap();
    let exists = refused(register(&server, 5, 2).await, Code::AlreadyExists, "MAILBOX_EXISTS");
    assert_eq!(exists["creator_id"], "1");
    assert_eq!(creator(&server, 5).await.unwrap(), 1);
    assert_eq!(server.log().await.len(), 0);
}

/// Sets the role of many users at once, behind a write that holds the writer until all are on their way.
async fn crowd(server: &TestServer, gates: &Gates, users: std::ops::Range<i64>) -> Vec<Result<i64, Status>> {
    gates.write.close();
    let before = server.begin_set(1, "moderator");
    gates.write.arrived().await;
    let mut client = server.client.clone();
    let calls: Vec<_> = users
        .map(|user| {
            let mut client = client.clone();
            tokio::spawn(async move { Ok(client.set_role(set(user, "admin")).await?.into_inner().revision) })
        })
        .collect();
    // On the same connection as they, and so behind most of them.
    client.stats(rolecache::proto::v1::StatsRequest {}).await.unwrap();
    gates.write.open();
    before.answer().await;
    let mut outcomes = Vec::new();
    for call in calls {
        outcomes.push(call.await.unwrap());
    }
    outcomes
}

async fn many_writes_at_once_share_commits(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let outcomes = crowd(&server, &gates, 100..200).await;
    let revisions: HashSet<i64> = outcomes.into_iter().map(Result::unwrap).collect();
    assert!(revisions.len() < 50, "100 writes took {} commits", revisions.len());
    let log = server.log().await;
    assert_eq!(log.len(), 101);
    for user in 100..200 {
        assert_eq!(server.get(user).await.role, "admin");
    }
}

async fn one_bad_write_fails_alone(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    db.sql(match db {
        Db::Postgres { .. } => "alter table users add constraint no_bad_luck check (user_id <> 113)",
        Db::Sqlite { .. } => {
            "create trigger no_bad_luck before insert on users when new.user_id = 113
             begin select raise(abort, 'bad luck'); end"
        }
    });
    let mut outcomes = crowd(&server, &gates, 100..120).await;
    refused(outcomes.remove(13), Code::FailedPrecondition, "STORE_REJECTED");
    for outcome in outcomes {
        outcome.unwrap();
    }
    assert_eq!(server.log().await.len(), 20);
    assert_eq!(server.get(113).await.role, "user");
}

async fn a_write_behind_one_without_an_answer_is_refused_in_time(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    gates.write.close();
    let first = server.begin_set(1, "admin");
    gates.write.arrived().await;
    let began = std::time::Instant::now();
    let behind = server.begin_set(2, "admin");
    refused_for_now(behind.outcome().await, Code::Unavailable, "STORE_UNREACHABLE");
    let took = began.elapsed();
    assert!(took < std::time::Duration::from_secs(4), "after {took:?}");
    assert!(!first.is_finished(), "its outcome is not known");
    gates.write.open();
    first.answer().await;
    server.set(3, "admin").await;
    assert_eq!(server.get(2).await.role, "user", "nothing was changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_row_delays_only_its_own_callers() {
    let db = Db::postgres().await;
    let server = db.serve().await;
    server.set(7, "moderator").await;
    let mut holder = Session::open(&db.url());
    holder.run("begin; update users set username = 'held' where user_id = 7;");
    let waits = server.begin_set(7, "admin");
    let waits_too = server.begin_set(7, "user");
    // All at once: what has to wait is given up after 2 s.
    let others: Vec<_> = (100..110).map(|user| server.begin_set(user, "admin")).collect();
    for other in others {
        other.answer().await;
    }
    assert_eq!(server.get(7).await.role, "moderator");
    assert!(!waits.is_finished());
    holder.run("commit;");
    // Both happen, in the order in which they came here, which is not that of their callers.
    let mut changes = [waits.answer().await.change.unwrap(), waits_too.answer().await.change.unwrap()];
    changes.sort_by_key(|change| change.revision);
    let mut new_roles = [&*changes[0].new_role, &*changes[1].new_role];
    let last = new_roles[1].to_owned();
    assert_eq!(changes[1].old_role, new_roles[0]);
    new_roles.sort_unstable();
    assert_eq!(new_roles, ["admin", "user"]);

    holder.run("begin; update users set username = 'held again' where user_id = 7;");
    let began = std::time::Instant::now();
    let busy = server.begin_set(7, if last == "admin" { "user" } else { "admin" });
    refused_for_now(busy.outcome().await, Code::Aborted, "USER_BUSY");
    assert!(began.elapsed() >= std::time::Duration::from_millis(1_900), "gave up too soon");
    holder.run("rollback;");
    assert_eq!(server.get(7).await.role, last);
    assert_eq!(server.log_of(7).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_queues_up_behind_a_lost_store_is_told_with_the_first() {
    let db = Db::postgres().await;
    let (proxy, gates) = (Proxy::before(&db.url()).await, Gates::default());
    let server = Setup { url: proxy.url.clone(), ..Setup::new(&db) }.wrap(gates.guard()).serve().await;
    gates.write.close();
    let first = server.begin_set(7, "admin");
    gates.write.arrived().await;
    // All on one user: each would be a group of its own, and find for itself that the store is silent.
    let mut client = server.client.clone();
    let behind: Vec<_> = (0..16)
        .map(|_| {
            let mut client = client.clone();
            InFlight::begin(async move { Ok(client.set_role(set(7, "moderator")).await?.into_inner()) })
        })
        .collect();
    client.stats(rolecache::proto::v1::StatsRequest {}).await.unwrap();
    proxy.freeze();
    gates.write.open();
    first.outcome().await.unwrap_err();
    for call in behind {
        refused_for_now(call.outcome().await, Code::Unavailable, "STORE_UNREACHABLE");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_behind_one_whose_row_is_held_is_not_tried_before_it() {
    let (db, gates) = (Db::postgres().await, Gates::default());
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    server.set(7, "moderator").await;
    let mut holder = Session::open(&db.url());
    holder.run("begin; update users set username = 'held' where user_id = 7;");
    let waiting = [server.begin_set(7, "admin"), server.begin_set(7, "user")];
    let tried = |role: &str| {
        let is_it = |call: &&Call| matches!(&call.op, Op::Set { role: to, .. } if to.as_str() == role);
        gates.sent().iter().filter(is_it).count()
    };
    until("one is tried again and again", || tried("admin").max(tried("user")) >= 6).await;
    // Once, when it came.
    assert!(tried("admin").min(tried("user")) <= 1);
    holder.run("rollback;");
    for call in waiting {
        call.answer().await;
    }
}
