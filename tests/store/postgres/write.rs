//! Writes next to other people's transactions, constraints and triggers.

use rolecache::{
    role::{MailboxId, Origin, UserId},
    store::{Call, Grant, Op, Refusal, WriteError},
};

use super::{call, fresh, log, role_of, set, told, with_id};
use crate::{
    suite::{answer, delete},
    support::postgres::{Session, psql},
};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_one_commit_that_says_who_and_why() {
    let (database, store) = fresh().await;
    psql(&database.url, "insert into users values (1, 'admin', 'ann'), (2, null, null)");
    let mut first = set(1, "helper");
    let Op::Set { reason, .. } = &mut first.op else { unreachable!() };
    *reason = Some("because".into());
    let answers = store.write(&[first, set(2, "user"), set(3, "admin")]).await;
    let written: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
    assert_eq!(written[0].revision, written[2].revision);
    let change = &written[0].changes[0];
    assert_eq!((change.origin, &*change.actor, change.reason.as_deref()), (Origin::Rpc, "tester", Some("because")));
    assert_eq!(written[1].changes, [], "NULL is the default role already");
    assert!(written[1].revision < written[0].revision);
    assert_eq!(told(&log(&*store).await[1..]), "3:-admin 1:admin-helper\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_held_by_somebody_is_busy_and_nobody_elses_matter() {
    let (database, store) = fresh().await;
    psql(&database.url, "insert into users values (1, 'user'), (2, 'user'), (3, 'user')");
    let mut other = Session::open(&database.url);
    other.run("begin; update users set username = 'x' where user_id = 2;");
    let delete = call(Op::Delete { user: UserId(3), reason: None });
    let answers = store.write(&[set(1, "admin"), set(2, "admin"), delete]).await;
    assert!(answers[0].is_ok() && answers[2].is_ok(), "{answers:?}");
    assert!(matches!(answers[1], Err(WriteError::Busy)), "{answers:?}");
    other.run("rollback;");
    assert!(store.write(&[set(2, "admin")]).await[0].is_ok());
    assert_eq!(told(&log(&*store).await[1..]), "1:user-admin 3:user-\n2:user-admin\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_whom_somebody_is_inserting_is_busy_and_nobody_elses_matter() {
    let (database, store) = fresh().await;
    let mut other = Session::open(&database.url);
    other.run("begin; insert into users values (2, 'x');");
    let calls: Vec<_> = (1..=64).map(|user| set(user, "admin")).collect();
    let answers = store.write(&calls).await;
    let busy: Vec<_> = answers.iter().enumerate().filter(|(_, answer)| answer.is_err()).collect();
    assert!(matches!(busy[..], [(1, Err(WriteError::Busy))]), "{busy:?}");
    other.run("commit;");
    assert_eq!(store.write(&[set(2, "admin")]).await[0].as_ref().unwrap().changes.len(), 1);
}

/// A statement of ours can set triggers off and then have nothing to do: what they did is not to stay beside a refusal, nor go
/// past a grant, nor pass for somebody else's change.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_refused_write_sets_off_does_not_stay() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "insert into users values (1, 'admin'), (2, 'user'), (3, 'user'), (5, 'user'); insert into mailboxes values (9, 1);
         create function promote() returns trigger language plpgsql as
           $$ begin update public.users set role = 'admin' where user_id = 2; return new; end $$;
         create trigger promote before insert on mailboxes for each row execute function promote();
         create trigger promote after update of role on users for each row when (new.user_id = 5) execute function promote()",
    );
    let head = store.head().await.unwrap();
    let register = call(Op::Register { mailbox: MailboxId(9), creator: UserId(7) });
    let answers = store.write(std::slice::from_ref(&register)).await;
    assert!(matches!(answers[0], Err(WriteError::Refused(Refusal::Rejected { .. }))), "{answers:?}");
    assert_eq!(store.head().await.unwrap(), head);
    // Who is promoted by one call hands the rights on by another: not in one go.
    let demoting = Op::Transfer {
        from: UserId(2),
        to: UserId(3),
        mailbox: None,
        demote_from: true,
        to_username: None,
        reason: None,
    };
    let moderator = rolecache::role::RoleName::to_write("moderator").unwrap();
    let set = Call { grant: Grant::Only([moderator].into()), ..set(5, "moderator") };
    let answers = store.write(&[set, call(demoting)]).await;
    assert!(matches!(answers[0], Err(WriteError::Refused(Refusal::NotGranted { .. }))), "{answers:?}");
    assert!(matches!(answers[1], Err(WriteError::Refused(Refusal::NotAnAdmin { .. }))), "{answers:?}");
    assert_eq!(store.head().await.unwrap(), head);
}

/// It finds its own tables in a search path that is not the writer's: nobody's bug but the trigger's.
#[tokio::test(flavor = "multi_thread")]
async fn a_trigger_that_finds_no_table_rejects_the_write() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "create table notes (what text);
         create function note() returns trigger language plpgsql as
           $$ begin insert into notes values (new.role); return null; end $$;
         create trigger note after insert on users for each row when (new.role = 'admin') execute function note()",
    );
    let answers = store.write(&[set(1, "helper"), set(2, "admin")]).await;
    assert!(answers[0].is_ok(), "{answers:?}");
    let Err(WriteError::Refused(Refusal::Rejected { cause })) = &answers[1] else { panic!("{answers:?}") };
    assert!(cause.contains("notes"), "{cause}");
}

/// Somebody's row is there when ours is to be inserted, and gone when it is looked for: no trigger of the table is to blame.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_comes_and_goes_beside_a_write_is_written() {
    let (database, store) = fresh().await;
    // Of our sessions each waits before a row goes in, and after the statement, for its gate.
    psql(
        &database.url,
        "create table gates (gate int);
         create function pass() returns trigger language plpgsql as $$ begin
           if current_setting('application_name') = 'rolecache' then
             perform pg_advisory_xact_lock_shared(4711, tg_argv[0]::int);
             while not exists (select from public.gates where gate = tg_argv[0]::int) loop perform pg_sleep(0.001); end loop;
           end if;
           return new;
         end $$;
         create trigger before_row before insert on users for each row execute function pass(1);
         create trigger after_all after insert on users for each statement execute function pass(2)",
    );
    let arrived = |gate: i32| {
        let waits =
            format!("select count(*) from pg_locks where locktype = 'advisory' and classid = 4711 and objid = {gate}");
        let until = Instant::now() + Duration::from_secs(10);
        while psql(&database.url, &waits) == "0" {
            assert!(Instant::now() < until, "the write does not come to gate {gate}");
        }
    };
    let writing = tokio::spawn({
        let store = store.clone();
        async move { store.write(&[set(1, "admin")]).await.remove(0) }
    });
    tokio::task::block_in_place(|| {
        arrived(1);
        psql(&database.url, "insert into users values (1, 'x'); insert into gates values (1)");
        arrived(2);
        psql(&database.url, "delete from users where user_id = 1; insert into gates values (2)");
    });
    let written = writing.await.unwrap().expect("it is written");
    assert_eq!(written.changes.len(), 1);
    assert_eq!(role_of(&*store, 1).await, "admin");
}

/// By another replica, say, or by one that was killed and whose session goes on.
/// No lock keeps others from adding a user who is not there: what a deletion of nobody answers is true at its revision.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_comes_beside_a_deletion_of_nobody_comes_after_it() {
    let (database, store) = fresh().await;
    // Between the two deletions of one batch.
    psql(
        &database.url,
        "insert into users values (2, 'user');
         create function wait() returns trigger language plpgsql as $$ begin
           while not exists (select from public.users where user_id = 1) loop perform pg_sleep(0.001); end loop;
           return old;
         end $$;
         create trigger wait before delete on users for each row execute function wait()",
    );
    let writing = tokio::spawn({
        let store = store.clone();
        async move { store.write(&[delete(1), delete(2)]).await }
    });
    let waits = "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and application_name = 'rolecache'";
    let until = Instant::now() + Duration::from_secs(10);
    while psql(&database.url, waits) == "0" {
        assert!(Instant::now() < until, "the second deletion does not begin");
    }
    psql(&database.url, "insert into users values (1, 'admin')");
    let answers = writing.await.unwrap();
    let [Ok(nobody), Ok(deleted)] = &answers[..] else { panic!("{answers:?}") };
    assert_eq!(nobody.changes, []);
    let log = log(&*store).await;
    assert_eq!(told(&log), "2:-user\n1:-admin\n2:user-\n");
    assert_eq!([nobody.revision, deleted.revision], [log[0].revision, log[2].revision]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_beside_one_with_the_same_request_id_does_not_say_that_nothing_happened() {
    let (database, store) = fresh().await;
    let mut first = Session::open(&database.url);
    let begun = first
        .run("begin; insert into rolecache.requests (actor, request_id, hash, at) values ('tester', 'a', 'x', now());");
    assert_eq!(begun, "");
    let answers = store.write(&[with_id(set(1, "admin"), "a"), set(2, "admin")]).await;
    assert!(matches!(answers[..], [Err(WriteError::Underway), Ok(_)]), "{answers:?}");
    first.run("rollback;");
    assert!(store.write(&[with_id(set(1, "admin"), "a")]).await[0].is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_refused_call_leaves_63_others_alone() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "alter table users add constraint no_7 check (user_id <> 7 or role = 'user');
         create unique index on users (username);
         insert into users values (7, 'user', 'seven'), (20, 'user', 'twenty'), (30, 'user', null);
         create function no_20() returns trigger language plpgsql as $$ begin
           if new.user_id = 20 then raise exception 'not 20'; end if;
           if new.user_id in (30, 40) then return null; end if;
           return new;
         end $$;
         create trigger no_20 before insert or update on users for each row execute function no_20()",
    );
    for (guilty, username) in [(7, None), (20, None), (30, None), (40, None), (50, Some("seven"))] {
        let calls: Vec<_> = (1..=64)
            .filter(|user| *user == guilty || ![7, 20, 30, 40].contains(user))
            .map(|user| {
                let mut call = with_id(set(user, &format!("r{guilty}")), &format!("{guilty}-{user}"));
                if let Op::Set { username: name, .. } = &mut call.op
                    && user == guilty
                {
                    *name = username.map(Into::into);
                }
                call
            })
            .collect();
        let answers = store.write(&calls).await;
        for (call, answer) in calls.iter().zip(answers) {
            if call.users().next() == Some(UserId(guilty)) {
                assert!(matches!(answer, Err(WriteError::Refused(Refusal::Rejected { .. }))), "{guilty}: {answer:?}");
            } else {
                assert_eq!(answer.unwrap().changes.len(), 1);
            }
        }
        let left = psql(
            &database.url,
            &format!("select count(*) from rolecache.requests where request_id = '{guilty}-{guilty}'"),
        );
        assert_eq!(left, "0", "only successes are remembered");
    }
}

/// One call that the table refuses takes a batch apart; whoever holds the feed lock meanwhile holds up the rest once, not one part
/// after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_taken_apart_waits_for_the_feed_lock_once() {
    let (database, store) = fresh().await;
    psql(&database.url, "alter table users add check (user_id <> 64)");
    let mut other = Session::open(&database.url);
    other.run("begin; set constraints all immediate; insert into users values (1000, 'admin');");
    let calls: Vec<_> = (1..=64).map(|user| set(user, "admin")).collect();
    let answers = store.write(&calls).await;
    assert!(answers.iter().all(|answer| matches!(answer, Err(WriteError::AllHeld))), "{answers:?}");
    other.run("rollback;");
    let answers = store.write(&calls).await;
    assert!(answers[..63].iter().all(Result::is_ok), "{answers:?}");
    assert!(matches!(answers[63], Err(WriteError::Refused(Refusal::Rejected { .. }))), "{answers:?}");
}

/// A pooler may give us a session that does not know our statements: nothing was run, and the next one is asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_has_forgotten_our_statements_is_given_up() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "create function forget() returns trigger language plpgsql as $$ begin deallocate all; return new; end $$;
         create trigger forget before insert on users for each row when (new.user_id < 3) execute function forget()",
    );
    for user in 1..=3 {
        let mut refused = 0;
        while let Err(error) = &store.write(&[set(user, "admin")]).await[0] {
            assert!(matches!(error, WriteError::Unreachable(_)), "{error:?}");
            refused += 1;
            assert!(refused < 10, "it is asked again and again");
        }
    }
    assert_eq!(told(&log(&*store).await), "1:-admin\n2:-admin\n3:-admin\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_has_one_effect() {
    let (database, store) = fresh().await;
    let first = store.write(&[with_id(set(1, "admin"), "a")]).await.remove(0).unwrap();
    psql(&database.url, "update users set role = 'x'");
    let again = store.write(&[with_id(set(1, "admin"), "a"), set(2, "admin")]).await;
    assert_eq!(answer(again[0].clone().unwrap()), answer(first));
    assert_eq!(role_of(&*store, 1).await, "x");
    let mut other = with_id(set(1, "user"), "a");
    other.request.as_mut().unwrap().hash = [8; 32];
    let reused = store.write(&[other]).await.remove(0);
    assert!(matches!(reused, Err(WriteError::Refused(Refusal::RequestIdReused))), "{reused:?}");
    let nothing = store.write(&[with_id(set(1, "x"), "b")]).await.remove(0).unwrap();
    store.write(&[set(1, "y")]).await.remove(0).unwrap();
    let again = store.write(&[with_id(set(1, "x"), "b")]).await.remove(0).unwrap();
    assert_eq!(answer(again), answer(nothing));
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_at_once_have_one_effect() {
    let (database, store) = fresh().await;
    let replica = super::open(&database.url).await;
    for round in 0..20 {
        let one = [with_id(set(1, &format!("r{round}")), &format!("{round}"))];
        let (a, b, c) = tokio::join!(store.write(&one), replica.write(&one), store.write(&one));
        let mut done: Vec<_> =
            [a, b, c].into_iter().flatten().filter(|it| !matches!(it, Err(WriteError::Underway))).collect();
        let first = done.pop().unwrap().unwrap();
        assert!(done.into_iter().all(|other| other.unwrap() == first));
    }
    assert_eq!(log(&*store).await.len(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_hands_over_everything_or_nothing() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "insert into users values (1, 'admin', 'ann'), (2, 'user', 'bob'), (3, 'admin', 'eve');
                         insert into mailboxes values (9, 1)",
    );
    let transfer = |from, to, mailbox: Option<i64>, demote_from| {
        call(Op::Transfer {
            from: UserId(from),
            to: UserId(to),
            mailbox: mailbox.map(MailboxId),
            demote_from,
            to_username: None,
            reason: None,
        })
    };
    let written = store.write(&[transfer(1, 2, Some(9), true)]).await.remove(0).unwrap();
    assert_eq!(written.changes.iter().map(|change| change.user).collect::<Vec<_>>(), [UserId(2), UserId(1)]);
    assert!(written.changes.iter().all(|change| change.transfer.is_some_and(|it| it.mailbox == Some(MailboxId(9)))));
    assert_eq!(store.mailbox(MailboxId(9)).await.unwrap(), Some(UserId(2)));
    let again = store.write(&[transfer(2, 3, None, false)]).await.remove(0).unwrap();
    assert_eq!(again.changes.len(), 1, "logged though it was an admin already");
    assert_eq!(again.changes[0].username.as_deref(), Some("eve"));
    for (call, refusal) in [
        (transfer(1, 2, None, true), Refusal::NotAnAdmin { current: rolecache::role::RoleName::held("user") }),
        (transfer(1, 2, Some(9), true), Refusal::NotTheCreator { creator: UserId(2) }),
        (transfer(1, 2, Some(8), true), Refusal::MailboxNotFound),
    ] {
        let answer = store.write(&[call]).await.remove(0);
        assert!(matches!(&answer, Err(WriteError::Refused(it)) if *it == refusal), "{answer:?}");
    }
    assert_eq!(told(&log(&*store).await[1..]), "2:user-admin 1:admin-user\n3:admin-admin\n");
    let mut other = Session::open(&database.url);
    other.run("begin; select from mailboxes for update;");
    let answer = store.write(&[transfer(2, 5, Some(9), true)]).await.remove(0);
    assert!(matches!(answer, Err(WriteError::Busy)), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_keeps_the_feed_lock_makes_writes_busy() {
    let (database, store) = fresh().await;
    let mut other = Session::open(&database.url);
    other.run("begin; set constraints all immediate; insert into users values (1, 'x');");
    let asked = Instant::now();
    let answers = store.write(&[set(2, "a"), set(3, "a"), set(4, "a")]).await;
    assert!(answers.iter().all(|answer| matches!(answer, Err(WriteError::AllHeld))), "{answers:?}");
    // One wait for all of them: none can be found guilty by halves.
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    other.run("rollback;");
    assert_eq!(told(&log(&*store).await), "");
    assert!(store.write(&[set(2, "a")]).await[0].is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_durable_where_the_database_would_rather_not() {
    let (database, store) = fresh().await;
    let name = database.url.rsplit('/').next().unwrap();
    psql(
        &database.url,
        &format!(
            "alter database {name} set synchronous_commit = off;
             create function must_be_durable() returns trigger language plpgsql as $$ begin
               if current_setting('synchronous_commit') = 'off' then raise exception 'not durable'; end if;
               return null; end $$;
             create constraint trigger must_be_durable after insert on users initially deferred
               for each row execute function must_be_durable()"
        ),
    );
    store.close().await;
    let store = super::open(&database.url).await;
    store.write(&[set(1, "a")]).await.remove(0).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn mailboxes_are_registered_once() {
    let (database, store) = fresh().await;
    let register = |creator| call(Op::Register { mailbox: MailboxId(5), creator: UserId(creator) });
    for _ in 0..2 {
        assert_eq!(store.write(&[register(1)]).await.remove(0).unwrap().changes, []);
    }
    let other = store.write(&[register(2)]).await.remove(0);
    assert!(matches!(other, Err(WriteError::Refused(Refusal::MailboxExists { creator: UserId(1) }))), "{other:?}");
    assert_eq!(store.mailbox(MailboxId(5)).await.unwrap(), Some(UserId(1)));
    let mut bot = Session::open(&database.url);
    bot.run("begin; insert into mailboxes values (6, 1);");
    let busy = call(Op::Register { mailbox: MailboxId(6), creator: UserId(1) });
    let answers = store.write(&[busy, set(1, "a")]).await;
    assert!(matches!(answers[..], [Err(WriteError::Busy), Ok(_)]), "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expected_role_is_compared_with_what_is_there() {
    let (database, store) = fresh().await;
    psql(&database.url, "insert into users values (1, 'admin'), (2, null), (3, '')");
    for (user, expected, is_met) in [
        (1, "user", false),
        (1, "", false),
        (1, "admin", true),
        (2, "user", true),
        (3, "user", true),
        (4, "user", true),
        (5, "", true),
        (6, "admin", false),
        (2, "", false),
    ] {
        let mut call = with_id(set(user, "x"), &format!("{user}{expected}"));
        let Op::Set { expected: wanted, .. } = &mut call.op else { unreachable!() };
        *wanted = Some(expected.into());
        let answer = store.write(&[call]).await.remove(0);
        match answer {
            Ok(written) => assert!(is_met && written.changes.len() == 1, "{user} {expected}"),
            Err(WriteError::Refused(Refusal::RoleMismatch { .. })) => assert!(!is_met, "{user} {expected}"),
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(psql(&database.url, "select count(*) from rolecache.requests"), "5");
}
