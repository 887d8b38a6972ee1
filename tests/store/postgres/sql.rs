//! Plain SQL of every kind, through the real psql: each change is logged once, as the row became.

use std::time::Duration;

use rolecache::role::{Origin, Revision, RoleName, UserId};
use tokio::{
    task::{block_in_place, spawn_blocking},
    time::{sleep, timeout},
};

use super::{fresh, log, logged, open, role_of, told};
use crate::support::{
    postgres::{Postgres, Session, psql, try_psql},
    server::PATIENCE,
};

#[tokio::test(flavor = "multi_thread")]
async fn single_statements_are_logged() {
    assert_eq!(logged("insert into users values (4, 'helper', 'eve')").await, "4:-helper\n");
    assert_eq!(logged("insert into users (user_id) values (4)").await, "4:-user\n");
    assert_eq!(logged("update users set role = 'admin' where user_id = 1").await, "1:user-admin\n");
    assert_eq!(logged("delete from users where user_id = 2").await, "2:admin-\n");
    assert_eq!(
        logged("insert into users values (1, 'admin'), (4, 'admin') on conflict (user_id) do update set role = excluded.role")
            .await,
        "1:user-admin 4:-admin\n"
    );
    assert_eq!(logged("update users set role = 'x'").await, "1:user-x 2:admin-x 3:user-x\n");
    assert_eq!(logged("copy users from stdin;\n7\tadmin\tann\n8\t\\N\t\\N\n\\.\n").await, "7:-admin 8:-user\n");
}

/// Whatever the bot's own triggers make of other rows, of the same row, and of its key, before ours or after them: the last
/// word in the log on each user is what the table holds.
#[tokio::test(flavor = "multi_thread")]
async fn triggers_may_change_rows_again() {
    for (name, deferred) in [("Before", false), ("later", false), ("Before", true), ("later", true)] {
        let (database, store) = fresh().await;
        psql(
            &database.url,
            &format!(
                "create function again() returns trigger language plpgsql as $$ begin
                   if tg_op = 'DELETE' then
                     if old.role = 'lasting' then insert into users values (old.user_id, 'admin'); end if;
                   elsif new.role = 'short' then
                     delete from users where user_id = new.user_id;
                   elsif new.role = 'moving' then
                     update users set user_id = user_id + 100, role = 'moved' where user_id = new.user_id;
                   elsif new.role = 'first' then
                     update users set role = 'second', username = 'again' where role = 'first';
                   elsif new.role = 'back' then
                     update users set role = old.role where user_id = new.user_id;
                   elsif new.role = 'swap' then
                     update users set role = 'x' where role = 'swap' and user_id <> new.user_id;
                   elsif new.role = 'none' then
                     update users set role = null where user_id = new.user_id;
                   end if;
                   return null;
                 end $$;
                 create trigger \"{name}\" after insert or update or delete on users for each row execute function again()"
            ),
        );
        for sql in [
            "insert into users values (1, 'short'), (2, 'moving'), (3, 'first'), (4, 'first'), (5, 'x'), (6, 'none')",
            "insert into users values (7, 'lasting'), (8, 'y'), (9, 'lasting'), (20, 'x'), (21, 'x'), (22, 'x')",
            "update users set role = 'back' where user_id = 5",
            "update users set role = 'swap' where user_id in (20, 21, 22)",
            "update users set role = 'first' where user_id in (3, 5, 8)",
            "delete from users where user_id in (7, 8)",
            "update users set user_id = 10, role = 'short' where user_id = 3",
            "update users set user_id = 11, role = 'moving' where user_id = 4",
            "insert into users values (5, 'short') on conflict (user_id) do update set role = excluded.role",
            "update users set user_id = 12 where user_id = 9",
            "truncate users",
        ] {
            let immediate = if deferred { "" } else { "set constraints all immediate;" };
            psql(&database.url, &format!("begin; {immediate} {sql}; commit"));
            let mut said = std::collections::BTreeMap::new();
            for commit in log(&*store).await {
                said.extend(commit.changes.into_iter().map(|change| (change.user.0, (change.new, change.username))));
            }
            let line = |(user, (role, username)): (i64, (Option<RoleName>, Option<Box<str>>))| {
                Some(format!("{user}|{}|{}\n", role?, username.unwrap_or_default()))
            };
            let said: String = said.into_iter().filter_map(line).collect();
            let held = psql(
                &database.url,
                "select user_id, coalesce(nullif(role, ''), 'user'), username from users order by 1",
            );
            assert_eq!(said.trim_end(), held, "{name}: after {sql}");
        }
        store.close().await;
    }
}

/// Of a user whom one statement takes and gives each change goes on from the one before.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_change_hands_in_one_statement_are_told_in_a_chain() {
    let (database, store) = fresh().await;
    psql(&database.url, "insert into users values (1, 'user', 'ann'), (2, 'admin', 'bob'), (3, 'x', 'cid')");
    psql(&database.url, "update users set user_id = user_id - 1");
    psql(
        &database.url,
        "with gone as (delete from users where user_id = 0 returning *) insert into users select user_id, 'y' from gone",
    );
    let commits = log(&*store).await;
    let said = "1:user- 0:-user 2:admin- 1:-admin 3:x- 2:-x\n0:user- 0:-y\n";
    assert_eq!(told(&commits[1..]), said);
    let names: Vec<_> = commits[1].changes.iter().map(|change| change.username.as_deref().unwrap()).collect();
    assert_eq!(names, ["ann", "ann", "bob", "bob", "cid", "cid"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn merge_is_logged() {
    let (database, store) = fresh().await;
    if psql(&database.url, "select current_setting('server_version_num')::int >= 150000") != "t" {
        return;
    }
    psql(&database.url, "insert into users values (1, 'user'), (2, 'admin')");
    psql(
        &database.url,
        "merge into users u using (values (1, 'admin'), (5, 'user'), (2, 'gone')) v (id, r) on u.user_id = v.id
         when matched and v.r = 'gone' then delete
         when matched then update set role = v.r
         when not matched then insert (user_id, role) values (v.id, v.r)",
    );
    let mut changes: Vec<String> = told(&log(&*store).await[1..]).split_whitespace().map(str::to_owned).collect();
    changes.sort();
    assert_eq!(changes, ["1:user-admin", "2:admin-", "5:-user"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_reads_the_same_is_no_change() {
    assert_eq!(logged("update users set role = role").await, "");
    assert_eq!(logged("update users set username = 'x'").await, "");
    assert_eq!(logged("update users set role = null where user_id = 1").await, "");
    assert_eq!(logged("update users set role = '' where user_id = 3").await, "");
    assert_eq!(logged("update users set role = 'user' where user_id = 3").await, "");
    assert_eq!(logged("update users set role = null where user_id = 2").await, "2:admin-user\n");
    assert_eq!(logged("delete from users where user_id = 9").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_key_is_one_user_gone_and_another_come() {
    assert_eq!(logged("update users set user_id = 22 where user_id = 2").await, "2:admin- 22:-admin\n");
    assert_eq!(logged("update users set user_id = 33, role = 'x' where user_id = 3").await, "3:user- 33:-x\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_one_commit_without_what_was_rolled_back() {
    let two =
        "begin; update users set role = 'a' where user_id = 1; update users set role = 'b' where user_id = 1; commit";
    assert_eq!(logged(two).await, "1:user-a 1:a-b\n");
    let kept = "begin; update users set role = 'a' where user_id = 1; savepoint s;
                update users set role = 'b' where user_id = 2; rollback to s; insert into users values (5, 'c'); commit";
    assert_eq!(logged(kept).await, "1:user-a 5:-c\n");
    let first_gone = "begin; savepoint s; update users set role = 'a' where user_id = 1; rollback to s;
                      update users set role = 'b' where user_id = 2; commit";
    assert_eq!(logged(first_gone).await, "2:admin-b\n");
    assert_eq!(logged("begin; update users set role = 'a'; rollback").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn isolation_levels_and_replication_are_logged() {
    let strict = "begin isolation level repeatable read; update users set role = 'a' where user_id = 1; commit;
                  begin isolation level serializable; update users set role = 'b' where user_id = 1; commit";
    assert_eq!(logged(strict).await, "1:user-a\n1:a-b\n");
    let replica = "set session_replication_role = replica; update users set role = 'a' where user_id = 1;
                   insert into users values (5, 'b')";
    assert_eq!(logged(replica).await, "1:user-a\n5:-b\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn immediate_constraints_number_at_once() {
    let before = "begin; set constraints all immediate; update users set role = 'a' where user_id in (1, 2); commit";
    assert_eq!(logged(before).await, "1:user-a\n2:admin-a\n");
    let between = "begin; update users set role = 'a' where user_id = 1; set constraints all immediate;
                   update users set role = 'b' where user_id = 2; set constraints all deferred;
                   insert into users values (5, 'c'), (6, 'd'); commit";
    assert_eq!(logged(between).await, "1:user-a\n2:admin-b\n5:-c 6:-d\n");
    let taken_back = "begin; update users set role = 'a' where user_id = 1; savepoint s; set constraints all immediate;
                      update users set role = 'b' where user_id = 2; rollback to s;
                      insert into users values (5, 'c'); commit";
    assert_eq!(logged(taken_back).await, "1:user-a 5:-c\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn truncate_deletes_everybody() {
    assert_eq!(logged("truncate users").await, "1:user- 2:admin- 3:user-\n");
    let (database, store) = fresh().await;
    psql(&database.url, "truncate users");
    assert_eq!(told(&log(&*store).await), "", "an empty table has nothing to log");
    psql(&database.url, "insert into users values (1, 'admin')");
    let error = try_psql(&database.url, "begin isolation level repeatable read; truncate users; commit").unwrap_err();
    assert!(error.contains("READ COMMITTED"), "{error}");
    assert_eq!(role_of(&*store, 1).await, "admin");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_by_sql_says_who_and_has_the_username() {
    let (database, store) = fresh().await;
    psql(
        &database.url,
        "create role bot; grant select, insert, update, delete on users to bot;
                         insert into users values (1, 'admin', 'ann')",
    );
    psql(
        &database.url,
        "set session authorization bot; update users set role = 'x', username = 'eve'; delete from users",
    );
    psql(&database.url, "drop owned by bot; drop role bot");
    let commits = log(&*store).await;
    let told: Vec<_> = commits
        .iter()
        .flat_map(|commit| &commit.changes)
        .map(|change| (change.user, change.origin, change.actor.to_string(), change.username.as_deref().unwrap()))
        .collect();
    assert_eq!(
        told,
        [
            (UserId(1), Origin::Sql, "postgres".to_owned(), "ann"),
            (UserId(1), Origin::Sql, "bot".to_owned(), "eve"),
            (UserId(1), Origin::Sql, "bot".to_owned(), "eve"),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_comes_or_goes_breaks_nothing() {
    let (database, store) = fresh().await;
    let mut bot = Session::open(&database.url);
    assert_eq!(bot.run("insert into users values (1, 'a', 'ann');"), "");
    psql(&database.url, "alter table users drop column username");
    assert_eq!(bot.run("update users set role = 'b'; insert into users values (2, 'x'); truncate users;"), "");
    assert_eq!(store.list_users(None, None, 9).await.unwrap().users, []);
    psql(&database.url, "alter table users add column username text");
    assert_eq!(bot.run("insert into users values (1, 'a', 'ann');"), "");
    let commits = log(&*store).await;
    assert_eq!(told(&commits), "1:-a\n1:a-b\n2:-x\n1:b- 2:x-\n1:-a\n");
    assert_eq!(commits[4].changes[0].username.as_deref(), Some("ann"));
    assert_eq!(store.list_users(None, None, 9).await.unwrap().users[0].username.as_deref(), Some("ann"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_whose_type_changes_breaks_no_open_session() {
    let (database, store) = fresh().await;
    let mut bot = Session::open(&database.url);
    assert_eq!(bot.run("insert into users values (1, 'a', 'ann'); update users set role = 'b'; "), "");
    psql(&database.url, "alter table users alter column username type varchar(40)");
    let error = try_psql(&database.url, "alter table users alter column role type varchar(20)").unwrap_err();
    assert!(error.contains("used in a trigger definition"), "what the log is made of stays as it is: {error}");
    assert_eq!(
        bot.run("insert into users values (2, 'c', 'eve'); update users set role = 'd'; delete from users;"),
        ""
    );
    let commits = log(&*store).await;
    assert_eq!(told(&commits), "1:-a\n1:a-b\n2:-c\n1:b-d 2:c-d\n1:d- 2:d-\n");
    assert_eq!(commits[4].changes[1].username.as_deref(), Some("eve"));
}

#[tokio::test(flavor = "multi_thread")]
async fn replicated_rows_are_logged() {
    let server = spawn_blocking(Postgres::start_own).await.unwrap();
    let [source, target] = [server.fresh_database().await, server.fresh_database().await];
    psql(&source.url, "alter system set wal_level = logical");
    block_in_place(|| {
        server.stop();
        server.start();
    });
    psql(
        &source.url,
        "create table users (user_id bigint primary key, role text, username text);
         create publication roles for table users",
    );
    let store = open(&target.url).await;
    // To a database of the same server, making the slot along with the subscription would wait for itself.
    psql(&source.url, "select pg_create_logical_replication_slot('roles', 'pgoutput')");
    psql(
        &target.url,
        &format!(
            "create subscription roles connection '{}' publication roles
               with (create_slot = false, slot_name = roles, copy_data = false)",
            source.url
        ),
    );
    psql(&source.url, "insert into users values (1, 'admin', 'eve'), (2, 'x', 'bob')");
    psql(&source.url, "update users set role = 'y' where user_id = 2; delete from users where user_id = 1");
    let arrived = async {
        while store.head().await.unwrap().revision < Revision(3) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, arrived).await.expect("the rows arrive");
    assert_eq!(told(&log(&*store).await), "1:-admin 2:-x\n2:x-y\n1:admin-\n");
    store.close().await;
    psql(
        &target.url,
        "alter subscription roles disable; alter subscription roles set (slot_name = none); drop subscription roles",
    );
}
