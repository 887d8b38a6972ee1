//! What callers may do who may give and take only certain roles.

use rolecache::{
    role::{MailboxId, Origin, UserId},
    store::{Call, Grant, Refusal, WriteError},
};

use super::*;
use crate::fixtures::Fixture;

fn granted(roles: &[&str], call: Call) -> Call {
    Call { grant: Grant::Only(roles.iter().map(|name| role(name)).collect()), ..call }
}

/// May give and take `moderator`, beside the default role.
fn moderating(call: Call) -> Call {
    granted(&["moderator"], call)
}

fn not_granted(name: &str) -> Refusal {
    Refusal::NotGranted { role: role(name) }
}

const PEOPLE: &str = "insert into users values
    (1, 'user', 'ann'), (2, 'moderator', 'bob'), (3, 'admin', 'eve'), (4, null, null), (5, '', null), (6, 'Odd', null)";

pub async fn a_role_within_the_grant_is_given_and_taken<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    for (user, to, expected) in [
        (1, "moderator", "1: user > moderator"),
        (2, "user", "2: moderator > user"),
        (2, "user", ""),
        (4, "moderator", "4: user > moderator"),
        (5, "moderator", "5: user > moderator"),
        (5, "moderator", ""),
        (7, "moderator", "7: - > moderator"),
        (8, "user", "8: - > user"),
    ] {
        let written = write(&store, moderating(set(user, to))).await.unwrap();
        assert_eq!(said(&written.changes), expected);
    }
    let written = write(&store, granted(&[], set(7, "user"))).await;
    assert_eq!(refusal(written), not_granted("moderator"));
    let written = write(&store, granted(&[], set(9, "user"))).await.unwrap();
    assert_eq!(said(&written.changes), "9: - > user", "the default role is within every grant");
    let written = write(&store, granted(&["helper", "admin"], set(3, "helper"))).await.unwrap();
    assert_eq!(said(&written.changes), "3: admin > helper");
    store.close().await;
}

pub async fn a_role_outside_the_grant_is_neither_given_nor_taken<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    let head = store.head().await.unwrap();
    for (call, outside) in [
        (set(1, "admin"), "admin"),
        (set(4, "admin"), "admin"),
        (set(5, "admin"), "admin"),
        (set(7, "admin"), "admin"),
        (set(3, "user"), "admin"),
        (set(3, "moderator"), "admin"),
        (set(6, "moderator"), "Odd"),
        // Nothing would change, or only a name.
        (set(3, "admin"), "admin"),
        (set_named(3, "admin", "mallory"), "admin"),
        (set_named(3, "user", "mallory"), "admin"),
        // Not compared with what is expected, which would be another refusal, or none.
        (set_expecting(3, "user", "moderator"), "admin"),
        (set_expecting(3, "user", "admin"), "admin"),
        (set_expecting(1, "helper", "admin"), "helper"),
        (set_expecting(7, "admin", ""), "admin"),
    ] {
        assert_eq!(refusal(write(&store, moderating(call.clone())).await), not_granted(outside), "{call:?}");
    }
    let refused = refusal(write(&store, moderating(set_expecting(2, "user", "user"))).await);
    assert_eq!(refused, Refusal::RoleMismatch { current: role("moderator") }, "within the grant it is compared");
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(database.sql("select username from users where user_id = 3"), "eve");
    store.close().await;
}

pub async fn a_username_is_set_within_the_grant<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    for (user, role) in [(1, "user"), (2, "moderator"), (4, "user")] {
        let written = write(&store, moderating(set_named(user, role, "zoe"))).await.unwrap();
        assert_eq!(written.changes, []);
        assert_eq!(database.sql(&format!("select username from users where user_id = {user}")), "zoe");
    }
    store.close().await;
}

pub async fn only_those_within_the_grant_are_deleted<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    for (user, outside) in [(3, "admin"), (6, "Odd")] {
        assert_eq!(refusal(write(&store, moderating(delete(user))).await), not_granted(outside));
    }
    for (user, expected) in
        [(1, "1: user > -"), (2, "2: moderator > -"), (4, "4: user > -"), (5, "5: user > -"), (7, "")]
    {
        let written = write(&store, moderating(delete(user))).await.unwrap();
        assert_eq!(said(&written.changes), expected);
        assert_eq!(said(&write(&store, granted(&[], delete(user))).await.unwrap().changes), "", "gone");
    }
    assert_eq!(database.sql("select count(*) from users"), "2");
    store.close().await;
}

pub async fn a_transfer_needs_every_role_that_comes_or_goes<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    database.sql("insert into mailboxes values (70, 6), (71, 2), (72, 3)");
    let head = store.head().await.unwrap();
    for (roles, call, outside) in [
        (&["moderator"][..], transfer(3, 1, None, false), "admin"),
        (&[], transfer(2, 1, Some(71), false), "admin"),
        (&["moderator"], transfer(3, 1, Some(99), true), "admin"),
        (&["admin"], transfer(3, 2, None, true), "moderator"),
        (&["admin"], transfer(3, 2, Some(72), false), "moderator"),
        (&["admin", "moderator"], transfer(3, 6, None, true), "Odd"),
        (&["admin"], transfer(6, 1, Some(70), true), "Odd"),
        (&["admin"], transfer(2, 9, Some(71), true), "moderator"),
        (&["admin"], transfer(2, 6, Some(71), true), "Odd"),
    ] {
        assert_eq!(refusal(write(&store, granted(roles, call.clone())).await), not_granted(outside), "{call:?}");
    }
    assert_eq!(
        refusal(write(&store, granted(&["admin"], transfer(1, 4, None, true))).await),
        Refusal::NotAnAdmin { current: role("user") }
    );
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(store.mailbox(MailboxId(71)).await.unwrap(), Some(UserId(2)));
    for (roles, call, expected) in [
        (&["admin"][..], transfer(3, 4, None, true), "4: user > admin, 3: admin > user"),
        (&["admin"], transfer(4, 9, None, false), "9: - > admin"),
        (&["admin"], transfer(6, 1, Some(70), false), "1: user > admin"),
        (&["admin", "moderator"], transfer(8, 2, None, true), ""),
        (&["admin", "moderator"], transfer(4, 2, None, true), "2: moderator > admin, 4: admin > user"),
    ] {
        match write(&store, granted(roles, call)).await {
            Ok(written) => assert_eq!(said(&written.changes), expected),
            Err(error) => assert!(expected.is_empty(), "{error}"),
        }
    }
    store.close().await;
}

pub async fn mailboxes_are_no_matter_of_grants<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    write(&store, granted(&[], register(5, 3))).await.unwrap();
    assert_eq!(store.mailbox(MailboxId(5)).await.unwrap(), Some(UserId(3)));
    store.close().await;
}

pub async fn a_call_outside_its_grant_fails_alone<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    database.sql("insert into users values (20, 'admin', null), (21, 'user', null)");
    let head = store.head().await.unwrap();
    let calls = [
        set(1, "admin"),
        moderating(set(3, "user")),
        moderating(set(2, "user")),
        moderating(set(7, "admin")),
        granted(&["admin"], set(8, "admin")),
        moderating(delete(20)),
        delete(6),
        moderating(with_request(transfer(4, 21, None, true), "r", 1)),
    ];
    let answers = store.write(&calls).await;
    for (place, expected) in
        [(0, "1: user > admin"), (2, "2: moderator > user"), (4, "8: - > admin"), (6, "6: Odd > -")]
    {
        assert_eq!(said(&answers[place].as_ref().unwrap().changes), expected);
    }
    for place in [1, 3, 5, 7] {
        assert_eq!(refusal(answers[place].clone()), not_granted("admin"));
    }
    let commits = read_from(&store, head, 100).await;
    assert_eq!((commits.len(), commits[0].size), (1, 4));
    store.close().await;
}

pub async fn the_role_that_counts_is_the_one_at_the_write<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    // The caller looks, and somebody else is faster.
    assert_eq!(role_of(&store, 2).await, "moderator");
    database.sql("update users set role = 'admin' where user_id = 2");
    for call in [set(2, "user"), set_expecting(2, "user", "moderator"), delete(2)] {
        assert_eq!(refusal(write(&store, moderating(call)).await), not_granted("admin"));
    }
    database.sql("update users set role = 'moderator' where user_id = 2");
    write(&store, moderating(set(2, "user"))).await.unwrap();
    store.close().await;
}

pub async fn no_order_of_writes_takes_what_is_not_granted<F: Fixture>() {
    let database = std::sync::Arc::new(F::fresh().await);
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let promote =
        "insert into users (user_id, role) values (2, 'admin') on conflict (user_id) do update set role = 'admin';
                   update users set role = 'moderator' where user_id = 2;";
    let somebody = database.clone();
    let somebody = tokio::task::spawn_blocking(move || somebody.sql(&promote.repeat(150)));
    let mut done = 0;
    while !somebody.is_finished() || done < 10 {
        for call in [set(2, "user"), delete(2), set(2, "moderator")] {
            match write(&store, moderating(call)).await {
                Ok(written) => done += written.changes.len(),
                Err(WriteError::Busy | WriteError::AllHeld) => {}
                other => assert_eq!(refusal(other), not_granted("admin")),
            }
        }
    }
    somebody.await.unwrap();
    for change in read_from(&store, start, 1_000).await.iter().flat_map(|commit| &commit.changes) {
        let took = change.old.as_ref().is_some_and(|old| old.as_str() == "admin");
        assert!(!took || change.origin == Origin::Sql, "{change:?}");
    }
    store.close().await;
}

pub async fn a_repeat_gets_its_first_answer_whatever_is_granted_now<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    database.sql(PEOPLE);
    let calls = [with_request(set(3, "user"), "r1", 1), with_request(delete(2), "r2", 2)];
    let first: Vec<_> = store.write(&calls).await.into_iter().map(Result::unwrap).collect();
    database.sql("update users set role = 'admin' where user_id = 3");
    let head = store.head().await.unwrap();
    for (call, first) in calls.into_iter().zip(first) {
        assert_eq!(answer(write(&store, moderating(call)).await.unwrap()), answer(first));
    }
    assert_eq!(store.head().await.unwrap(), head);

    // A refusal is not remembered: once the role is granted, the same request goes through.
    let call = with_request(set(3, "user"), "r3", 3);
    assert_eq!(refusal(write(&store, moderating(call.clone())).await), not_granted("admin"));
    assert_eq!(said(&write(&store, granted(&["admin"], call)).await.unwrap().changes), "3: admin > user");
    store.close().await;
}

pub async fn what_the_table_does_to_others_is_the_callers_doing<F: Fixture>() {
    let database = F::fresh().await;
    database.sql(
        "create table users (user_id bigint primary key, role text, username text,
           invited_by bigint references users (user_id) on delete cascade)",
    );
    let store = database.open().await;
    database.sql(
        "insert into users values (1, 'moderator', null, null), (2, 'admin', null, 1), (3, 'moderator', null, null),
           (4, 'moderator', null, 3), (5, 'moderator', null, null)",
    );
    let head = store.head().await.unwrap();
    assert_eq!(refusal(write(&store, moderating(delete(1))).await), not_granted("admin"));
    assert_eq!(store.head().await.unwrap(), head);
    // Whoever else names the one it is done to: in vain, or for nothing.
    for beside in [moderating(set(2, "user")), set(2, "admin")] {
        let is_for_nothing = beside.grant == Grant::Any;
        for calls in [[moderating(delete(1)), beside.clone()], [beside.clone(), moderating(delete(1))]] {
            let cascades = usize::from(calls[0] == beside);
            let answers = store.write(&calls).await;
            assert_eq!(refusal(answers[cascades].clone()), not_granted("admin"));
            assert_eq!(answers[1 - cascades].is_ok(), is_for_nothing, "{answers:?}");
            assert_eq!((store.head().await.unwrap(), &*role_of(&store, 2).await), (head, "admin"));
        }
    }
    // Neither its neighbours, nor who may take an admin away.
    let answers = store.write(&[moderating(set(5, "user")), moderating(delete(1)), moderating(delete(3))]).await;
    let [five, one, three] = <[_; 3]>::try_from(answers).unwrap();
    assert_eq!(said(&five.unwrap().changes), "5: moderator > user");
    assert_eq!(refusal(one), not_granted("admin"));
    assert_eq!(said(&three.unwrap().changes), "3: moderator > -", "who is asked for, and nobody else");
    assert_eq!((&*role_of(&store, 1).await, &*role_of(&store, 2).await), ("moderator", "admin"));
    let calls = [with_request(delete(1), "r", 1), moderating(set(5, "moderator"))];
    for turn in ["first", "repeated"] {
        let answers = store.write(&calls[..if turn == "first" { 2 } else { 1 }]).await;
        let changes = &answers[0].as_ref().unwrap().changes;
        assert_eq!(said(changes), "1: moderator > -", "{turn}");
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        assert_eq!(role_of(&store, 2).await, "user");
    }
    let log = read_from(&store, head, 100).await;
    let gone = log.iter().flat_map(|commit| &commit.changes).filter(|change| change.new.is_none());
    let signed: Vec<_> = gone.map(|it| (it.user.0, it.origin, &*it.actor)).collect();
    // In the caller's name, as what it asked for.
    let mut due = [3, 4, 1, 2].map(|user| (user, Origin::Rpc, "bot"));
    let mut told = signed.clone();
    due.sort_by_key(|it| it.0);
    told.sort_by_key(|it| it.0);
    assert_eq!(told, due);
    store.close().await;
}
