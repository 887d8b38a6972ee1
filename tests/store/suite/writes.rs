//! What our own calls do.

use rolecache::{
    role::{ChangeKind, MailboxId, Origin, Revision, Transfer, UserId},
    store::{Call, Op, Refusal, WriteError},
};

use super::*;
use crate::fixtures::Fixture;

pub async fn a_set_creates_and_changes<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();

    let made = write(&store, set(7, "user")).await.unwrap();
    assert_eq!(said(&made.changes), "7: - > user", "a new user is logged, with the default role too");
    let reason = Some("asked for it".into());
    let user = UserId(7);
    let op = Op::Set { user, role: role("admin"), username: Some("eve".into()), expected: None, reason };
    let written = write(&store, call(op)).await.unwrap();
    assert!(written.revision > made.revision);

    let commits = read_from(&store, start, 10).await;
    assert_eq!(commits.len(), 2);
    assert_eq!(commits[1].changes, written.changes);
    assert_eq!((commits[1].revision, commits[1].at), (written.revision, written.at));
    let change = &written.changes[0];
    assert_eq!(said([change]), "7: user > admin");
    assert_eq!((change.origin, &*change.actor, change.reason.as_deref()), (Origin::Rpc, "bot", Some("asked for it")));
    assert_eq!((change.index, change.username.as_deref(), change.transfer), (0, Some("eve"), None));
    assert_eq!(database.sql("select role from users where user_id = 7"), "admin");
    assert_eq!(store.head().await.unwrap().revision, written.revision);
    store.close().await;
}

pub async fn an_expected_role_is_checked<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "admin")).await.unwrap();
    database.sql("insert into users (user_id, role) values (3, '')");

    for (user, expected, current) in [(1, "user", "admin"), (1, "", "admin"), (2, "admin", "user"), (3, "", "user")] {
        let refused = refusal(write(&store, set_expecting(user, "helper", expected)).await);
        assert_eq!(refused, Refusal::RoleMismatch { current: role(current) }, "{user} {expected:?}");
    }
    for (user, expected, now) in [(1, "admin", "a"), (2, "user", "b"), (3, "user", "c"), (4, "", "d")] {
        write(&store, set_expecting(user, now, expected)).await.unwrap();
        assert_eq!(role_of(&store, user).await, now);
    }
    store.close().await;
}

pub async fn a_write_with_nothing_to_do_answers_the_head<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "admin")).await.unwrap();
    database.sql("insert into users (user_id, role) values (2, null)");
    let head = store.head().await.unwrap();
    for call in [set(1, "admin"), set(2, "user"), delete(3), set_expecting(1, "admin", "admin")] {
        let written = write(&store, call).await.unwrap();
        assert_eq!((written.revision, &written.changes[..]), (head.revision, &[][..]));
    }
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(said_from(&store, head).await, "");
    store.close().await;
}

pub async fn a_username_is_kept_without_a_commit<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    write(&store, set_named(1, "admin", "eve")).await.unwrap();
    let head = store.head().await.unwrap();
    let written = write(&store, set_named(1, "admin", "mallory")).await.unwrap();
    assert_eq!((written.revision, written.changes.len()), (head.revision, 0));
    assert_eq!(database.sql("select username from users"), "mallory");
    assert_eq!(store.head().await.unwrap(), head);
    let written = write(&store, set(1, "user")).await.unwrap();
    assert_eq!(written.changes[0].username.as_deref(), Some("mallory"), "None leaves the known one");
    store.close().await;
}

pub async fn one_bad_call_fails_alone<F: Fixture>() {
    let database = F::fresh().await;
    database.sql("create table users (user_id bigint primary key, role text check (role <> 'evil'), username text)");
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let calls = [set(1, "admin"), set(2, "evil"), set_expecting(3, "x", "admin"), set(4, "helper")];
    let answers = store.write(&calls).await;

    assert!(matches!(&answers[1], Err(WriteError::Refused(Refusal::Rejected { .. }))), "{:?}", answers[1]);
    assert!(matches!(&answers[2], Err(WriteError::Refused(Refusal::RoleMismatch { .. }))), "{:?}", answers[2]);
    let (first, last) = (answers[0].as_ref().unwrap(), answers[3].as_ref().unwrap());
    assert_eq!(said(first.changes.iter().chain(&last.changes)), "1: - > admin, 4: - > helper");
    assert_eq!(said_from(&store, start).await, "1: - > admin, 4: - > helper");
    store.close().await;
}

pub async fn a_batch_shares_one_revision<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let calls: Vec<Call> = (1..=50).map(|user| set(user, "helper")).collect();
    let answers = store.write(&calls).await;
    let commits = read_from(&store, start, 1_000).await;
    assert_eq!(commits.len(), 1);
    for (answer, user) in answers.iter().zip(1..) {
        let written = answer.as_ref().unwrap();
        assert_eq!((written.revision, written.at), (commits[0].revision, commits[0].at));
        assert_eq!(said(&written.changes), format!("{user}: - > helper"));
        let index = written.changes[0].index as usize;
        assert_eq!(written.changes[0], commits[0].changes[index], "each answer names its place in the commit");
    }
    store.close().await;
}

pub async fn a_request_id_gets_its_first_answer<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let calls = [set(9, "x"), with_request(transfer_ready(), "r1", 1), with_request(set(1, "user"), "r2", 2)];
    write(&store, set(2, "admin")).await.unwrap();
    write(&store, set(1, "user")).await.unwrap();
    let first = store.write(&calls).await;
    database.sql("update users set role = 'helper' where user_id = 3");
    let head = store.head().await.unwrap();

    for (index, call) in calls.iter().enumerate().skip(1) {
        let again = write(&store, call.clone()).await.unwrap();
        assert_eq!(answer(again), answer(first[index].clone().unwrap()));
    }
    assert_eq!(first[1].as_ref().unwrap().changes.len(), 2);
    assert_eq!(first[2].as_ref().unwrap().changes.len(), 0, "nothing to do is remembered too");
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(role_of(&store, 3).await, "helper", "no second effect");
    let mut other = with_request(transfer_ready(), "r1", 1);
    other.actor = "somebody else".into();
    assert_eq!(refusal(write(&store, other).await), Refusal::NotAnAdmin { current: role("user") });
    store.close().await;
}

fn transfer_ready() -> Call {
    transfer(2, 3, None, true)
}

pub async fn a_reused_request_id_is_refused<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    write(&store, with_request(set(1, "admin"), "r", 1)).await.unwrap();
    let refused = refusal(write(&store, with_request(set(2, "admin"), "r", 2)).await);
    assert_eq!(refused, Refusal::RequestIdReused);
    assert_eq!(role_of(&store, 2).await, "user");
    store.close().await;
}

pub async fn only_successes_are_remembered<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let call = with_request(set_expecting(1, "helper", "admin"), "r", 1);
    refusal(write(&store, call.clone()).await);
    write(&store, set(1, "admin")).await.unwrap();
    let written = write(&store, call).await.unwrap();
    assert_eq!(said(&written.changes), "1: admin > helper");
    store.close().await;
}

pub async fn transfers_hand_over<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    for call in [set(1, "admin"), set(4, "user"), register(5, 8)] {
        write(&store, call).await.unwrap();
    }
    for (call, expected, mailbox) in [
        (transfer(1, 2, None, false), "2: - > admin", None),
        (transfer(1, 4, None, true), "4: user > admin, 1: admin > user", None),
        (transfer(8, 9, Some(5), true), "9: - > admin", Some(5)),
        (transfer(9, 1, Some(5), true), "1: user > admin, 9: admin > user", Some(5)),
    ] {
        let written = write(&store, call.clone()).await.unwrap();
        assert_eq!(said(&written.changes), expected);
        let users: Vec<UserId> = call.users().collect();
        let transfer = Transfer { from: users[0], to: users[1], mailbox: mailbox.map(MailboxId) };
        for (index, change) in (0..).zip(&written.changes) {
            assert_eq!(change.transfer, Some(transfer));
            assert_eq!((change.index, change.reason.as_deref()), (index, Some("hand-over")));
        }
        assert_eq!(written.changes[0].kind(&role("admin")), ChangeKind::AdminTransferred);
    }
    assert_eq!(store.mailbox(MailboxId(5)).await.unwrap(), Some(UserId(1)));
    store.close().await;
}

pub async fn transfers_are_refused<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    for call in [set(1, "helper"), register(5, 8)] {
        write(&store, call).await.unwrap();
    }
    let head = store.head().await.unwrap();
    for (call, expected) in [
        (transfer(1, 2, None, true), Refusal::NotAnAdmin { current: role("helper") }),
        (transfer(3, 2, None, true), Refusal::NotAnAdmin { current: role("user") }),
        (transfer(1, 2, Some(5), true), Refusal::NotTheCreator { creator: UserId(8) }),
        (transfer(1, 2, Some(6), true), Refusal::MailboxNotFound),
    ] {
        assert_eq!(refusal(write(&store, call).await), expected);
    }
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(store.mailbox(MailboxId(5)).await.unwrap(), Some(UserId(8)));
    store.close().await;
}

pub async fn a_transfer_to_an_admin_is_logged<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    store.write(&[set(1, "admin"), set_named(2, "admin", "eve")]).await;
    let head = store.head().await.unwrap();
    let written = write(&store, transfer(1, 2, None, false)).await.unwrap();
    assert_eq!(said(&written.changes), "2: admin > admin");
    assert_eq!(written.changes[0].kind(&role("admin")), ChangeKind::AdminTransferred);
    assert_eq!(written.changes[0].username.as_deref(), Some("eve"));
    assert_eq!(read_from(&store, head, 10).await[0].changes, written.changes);
    store.close().await;
}

pub async fn deletes_delete<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "admin")).await.unwrap();
    let reason = Some("left".into());
    let written = write(&store, call(Op::Delete { user: UserId(1), reason })).await.unwrap();
    assert_eq!(said(&written.changes), "1: admin > -");
    assert_eq!((&*written.changes[0].actor, written.changes[0].reason.as_deref()), ("bot", Some("left")));
    assert_eq!(database.sql("select count(*) from users"), "0");
    assert_eq!(role_of(&store, 1).await, "user");
    store.close().await;
}

pub async fn mailboxes_are_registered_once<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let head = store.head().await.unwrap();
    for _ in 0..2 {
        let written = write(&store, register(i64::MIN, i64::MAX)).await.unwrap();
        assert_eq!((written.revision, written.changes.len()), (head.revision, 0));
    }
    let refused = refusal(write(&store, register(i64::MIN, 3)).await);
    assert_eq!(refused, Refusal::MailboxExists { creator: UserId(i64::MAX) });
    assert_eq!(store.mailbox(MailboxId(i64::MIN)).await.unwrap(), Some(UserId(i64::MAX)));
    assert_eq!(store.mailbox(MailboxId(1)).await.unwrap(), None);
    assert_eq!(store.head().await.unwrap().revision, Revision(head.revision.0));
    store.close().await;
}

pub async fn a_mailbox_of_nobody_is_nobodys<F: Fixture>() {
    let database = F::fresh().await;
    database.sql("create table mailboxes (id bigint primary key, creator_id bigint)");
    let store = database.open().await;
    database.sql("insert into mailboxes (id, creator_id) values (1, null), (2, 0)");
    write(&store, set(5, "admin")).await.unwrap();
    assert_eq!(store.mailbox(MailboxId(1)).await.unwrap(), None);
    assert_eq!(refusal(write(&store, transfer(5, 6, Some(1), true)).await), Refusal::MailboxNotFound);
    assert_eq!(refusal(write(&store, register(2, 5)).await), Refusal::MailboxExists { creator: UserId(0) });
    write(&store, register(1, 5)).await.unwrap();
    assert_eq!(store.mailbox(MailboxId(1)).await.unwrap(), Some(UserId(5)));
    write(&store, transfer(5, 6, Some(1), true)).await.unwrap();
    assert_eq!(store.mailbox(MailboxId(1)).await.unwrap(), Some(UserId(6)));
    store.close().await;
}

pub async fn a_repeat_whose_commit_is_gone_is_in_doubt<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let call = with_request(set(1, "admin"), "r", 1);
    let written = write(&store, call.clone()).await.unwrap();
    write(&store, set(2, "x")).await.unwrap();
    database.forget(written.revision.0);
    let again = write(&store, call).await;
    assert!(matches!(again, Err(WriteError::Forgotten)), "nothing changed? {again:?}");
    store.close().await;
}

pub async fn a_swallowed_write_is_rejected<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    write(&store, set(1, "helper")).await.unwrap();
    database.swallow_writes_of(1);
    database.swallow_writes_of(2);
    let head = store.head().await.unwrap();
    for call in [set(1, "admin"), set(2, "admin")] {
        let refused = refusal(write(&store, call).await);
        assert!(matches!(refused, Refusal::Rejected { .. }), "{refused:?}");
    }
    assert_eq!(said_from(&store, head).await, "");
    let answers = store.write(&[set(1, "admin"), set(3, "admin")]).await;
    assert!(answers[0].is_err() && answers[1].is_ok());
    store.close().await;
}

pub async fn a_half_done_call_is_undone<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    store.write(&[set(1, "admin"), register(5, 1)]).await;
    database.swallow_writes_of(1);
    let head = store.head().await.unwrap();
    // By the time that the giver cannot be demoted, the receiver and the mailbox are done.
    let answers = store.write(&[transfer(1, 2, Some(5), true), set(3, "x")]).await;
    assert!(matches!(&answers[0], Err(WriteError::Refused(Refusal::Rejected { .. }))), "{:?}", answers[0]);
    assert_eq!(said(&answers[1].as_ref().unwrap().changes), "3: - > x");
    assert_eq!(said_from(&store, head).await, "3: - > x");
    assert_eq!(role_of(&store, 2).await, "user");
    assert_eq!(store.mailbox(MailboxId(5)).await.unwrap(), Some(UserId(1)));
    store.close().await;
}

pub async fn a_call_that_breaks_the_whole_transaction_fails_alone<F: Fixture>() {
    let database = F::fresh().await;
    // Checked at COMMIT, after every call has had its answer.
    database.sql(
        "create table badges (id bigint primary key);
         insert into badges values (1);
         create table users (user_id bigint primary key, role text, username text,
           badge bigint default 1 references badges (id) deferrable initially deferred)",
    );
    let store = database.open().await;
    database.sql("insert into users (user_id, role) values (5, 'user')");
    database.break_badge_with_role("evil");
    let start = store.head().await.unwrap();
    let calls: Vec<Call> = (1..=9).map(|user| set(user, if user == 5 { "evil" } else { "helper" })).collect();
    let answers = store.write(&calls).await;
    for (answer, user) in answers.iter().zip(1..) {
        match user {
            5 => assert!(matches!(answer, Err(WriteError::Refused(Refusal::Rejected { .. }))), "{answer:?}"),
            _ => assert_eq!(said(&answer.as_ref().unwrap().changes), format!("{user}: - > helper")),
        }
    }
    let commits = read_from(&store, start, 100).await;
    assert_eq!(commits.iter().map(|commit| commit.size).sum::<u64>(), 8);
    assert_eq!(role_of(&store, 5).await, "user");
    store.close().await;
}
