//! Tables that were there before: adopted as they are, or refused without a trace.

use rolecache::{
    role::UserId,
    store::{Op, OpenError, Options, postgres},
};

use super::{call, log, open, options, refusal, role_of, set, told};
use crate::support::postgres::{Postgres, Session, fingerprint, psql, try_psql};

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_many_shapes_are_adopted() {
    for (table, adopted) in [
        (
            "create table users (id serial, user_id integer primary key, role varchar(20), a int, b json, c text)",
            "adopted users (integer user_id, varchar role, no username; 4 of its columns are not ours); created mailboxes",
        ),
        (
            "create table users (username varchar unique, role text check (role <> 'bad'), user_id smallint not null unique)",
            "adopted users (smallint user_id, text role, varchar username); created mailboxes",
        ),
        (
            "create table users (user_id bigint generated always as identity primary key, role text not null default 'user');
             create table mailboxes (id int primary key, creator_id bigint, name text)",
            "adopted users (bigint user_id, text role, no username) and mailboxes (integer id, bigint creator_id; one of \
             its columns is not ours)",
        ),
    ] {
        let database = Postgres::shared().fresh_database().await;
        psql(&database.url, table);
        psql(&database.url, "insert into users (user_id, role) overriding system value values (1, 'admin'), (2, '')");
        let store = open(&database.url).await;
        assert_eq!(store.facts().adopted, adopted);
        assert_eq!((role_of(&*store, 1).await, role_of(&*store, 2).await), ("admin".into(), "user".into()), "{table}");
        let mut named = set(3, "admin");
        let Op::Set { username, .. } = &mut named.op else { unreachable!() };
        *username = Some("eve".into());
        for answer in store.write(&[set(1, "x"), set(2, "user"), named]).await {
            answer.unwrap();
        }
        psql(&database.url, "update users set role = 'y' where user_id = 2");
        let register = call(Op::Register { mailbox: rolecache::role::MailboxId(5), creator: UserId(1) });
        let demote = call(Op::Transfer {
            from: UserId(3),
            to: UserId(2),
            mailbox: None,
            demote_from: true,
            to_username: Some("zoe".into()),
            reason: None,
        });
        for answer in store.write(&[register, demote]).await {
            answer.unwrap();
        }
        assert_eq!(told(&log(&*store).await), "3:-admin 1:admin-x\n2:user-y\n2:y-admin 3:admin-user\n", "{table}");
        let commits = log(&*store).await;
        assert_eq!(store.list_users(None, None, 10).await.unwrap().users.len(), 3);
        let mut snapshot = store.snapshot().await.unwrap();
        assert_eq!(snapshot.next().await.unwrap().len(), 2);
        assert_eq!(snapshot.next().await.unwrap().len(), 0);
        assert_eq!(store.check_triggers().await.unwrap(), [""; 0]);
        drop(store);
        // A second start finds what the first one left.
        assert_eq!(log(&*open(&database.url).await).await, commits);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_refused_without_a_trace() {
    for (tables, cause) in [
        ("create table users (id int primary key, role text)", "it has no column user_id"),
        ("create table users (user_id int primary key)", "it has no column role"),
        ("create table users (user_id text primary key, role text)", "its column user_id is text"),
        ("create table users (user_id uuid primary key, role text)", "its column user_id is uuid"),
        ("create table users (user_id int primary key, role int)", "its column role is integer"),
        (
            "create type r as enum ('user'); create table users (user_id int primary key, role r)",
            "its column role is public.r",
        ),
        ("create table users (user_id int, role text)", "its column user_id is no key"),
        ("create table users (user_id int unique, role text)", "its column user_id is no key"),
        ("create table users (user_id int, role text, primary key (user_id, role))", "its column user_id is no key"),
        (
            "create table users (user_id int not null, role text); create unique index on users (user_id) where role = 'x'",
            "its column user_id is no key",
        ),
        ("create table users (user_id int primary key deferrable, role text)", "its column user_id is no key"),
        ("create view users as select 1 as user_id, 'x' as role", "it is a view"),
        ("create materialized view users as select 1 as user_id, 'x' as role", "it is a materialized view"),
        ("create table users (user_id int primary key, role text) partition by range (user_id)", "it is partitioned"),
        ("create table users (user_id int primary key, role text); create table more () inherits (users)", "inherit"),
        (
            "create table base (user_id int, role text); create table users (primary key (user_id)) inherits (base)",
            "it inherits",
        ),
        ("create unlogged table users (user_id int primary key, role text)", "it is unlogged"),
        ("create table mailboxes (id int primary key)", "mailboxes cannot be adopted: it has no column creator_id"),
        ("create table mailboxes (id int, creator_id int)", "its column id is no key"),
        (
            "create table users (user_id int primary key, role text generated always as ('x') stored)",
            "its column role is generated",
        ),
    ] {
        let database = Postgres::shared().fresh_database().await;
        psql(&database.url, tables);
        is_refused_untouched(&database.url, cause).await;
    }
}

async fn is_refused_untouched(url: &str, cause: &str) {
    let before = fingerprint(url);
    let sentence = refusal(&options(url)).await;
    assert!(sentence.contains(cause), "{sentence:?} instead of {cause}");
    assert_eq!(fingerprint(url), before, "{cause}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_equals_others_is_refused_untouched() {
    let database = Postgres::shared().fresh_database().await;
    let loose = "create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";
    match try_psql(&database.url, loose) {
        Ok(_) => {
            psql(&database.url, "create table users (user_id int primary key, role text collate loose)");
            is_refused_untouched(&database.url, "its column role takes different texts for equal").await;
        }
        // A server without ICU has no such column to adopt.
        Err(why) => assert!(why.contains("ICU is not supported in this build"), "{why}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn row_security_that_binds_us_is_refused() {
    let database = Postgres::shared().fresh_database().await;
    let name = database.url.rsplit('/').next().unwrap();
    psql(
        &database.url,
        &format!(
            "create role owner_{name} login; create role guest_{name} login;
             create table users (user_id int primary key, role text); alter table users owner to owner_{name};
             alter table users enable row level security; alter table users force row level security"
        ),
    );
    let url = database.url.replace("postgres@", &format!("owner_{name}@"));
    let before = fingerprint(&database.url);
    assert!(refusal(&options(&url)).await.contains("row level security"));
    assert_eq!(fingerprint(&database.url), before);
    psql(&database.url, "alter table users no force row level security");
    let url = database.url.replace("postgres@", &format!("guest_{name}@"));
    assert!(refusal(&options(&url)).await.contains("row level security"));
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_differ_are_refused() {
    let database = Postgres::shared().fresh_database().await;
    open(&database.url).await;
    let other = Options { admin_role: rolecache::role::RoleName::held("boss"), ..options(&database.url) };
    let sentence = refusal(&other).await;
    for word in ["--default-role user", "--admin-role admin", "--admin-role boss"] {
        assert!(sentence.contains(word), "{sentence}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_another_version_is_refused() {
    let database = Postgres::shared().fresh_database().await;
    let only_check = Options { migrate: false, ..options(&database.url) };
    let before = fingerprint(&database.url);
    assert!(refusal(&only_check).await.contains("at version 0"));
    assert_eq!(fingerprint(&database.url), before);
    open(&database.url).await;
    postgres::open(&only_check).await.unwrap();
    psql(&database.url, "insert into rolecache.migrations values (99, 'later', now(), true, '', 0)");
    let before = fingerprint(&database.url);
    assert!(refusal(&options(&database.url)).await.contains("newer than"));
    assert_eq!(fingerprint(&database.url), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_at_once_migrate_once() {
    let database = Postgres::shared().fresh_database().await;
    let url = database.url.as_str();
    let stores = futures::future::join_all((0..4).map(|_| open(url))).await;
    assert!(stores.iter().all(|store| store.facts().store_id == stores[0].facts().store_id));
    assert_eq!(psql(url, "select count(*) from rolecache.migrations"), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_written_during_the_migration_are_not_missed() {
    let database = Postgres::shared().fresh_database().await;
    psql(
        &database.url,
        "create table users (user_id bigint primary key, role text); insert into users values (1, 'a')",
    );
    let mut long = Session::open(&database.url);
    long.run("begin; update users set role = 'b' where user_id = 1;");
    let url = database.url.clone();
    let opening = tokio::spawn(async move { open(&url).await });
    // The migration waits for the long transaction, and others go on meanwhile.
    while psql(&database.url, "select count(*) from pg_locks where locktype = 'relation' and not granted") == "0" {
        tokio::task::yield_now().await;
    }
    psql(&database.url, "insert into users values (2, 'c')");
    long.run("commit;");
    let store = opening.await.unwrap();
    psql(&database.url, "update users set role = 'd'");
    assert_eq!(told(&log(&*store).await), "1:b-d 2:c-d\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_refused() {
    let server = tokio::task::spawn_blocking(Postgres::start_own).await.unwrap();
    let database = server.fresh_database().await;
    tokio::task::block_in_place(|| {
        server.stop();
        server.start_as_standby();
    });
    assert!(refusal(&options(&database.url)).await.contains("is a standby"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_rights_is_told_what_it_needs() {
    let database = Postgres::shared().fresh_database().await;
    let name = format!("poor_{}", database.url.rsplit('/').next().unwrap());
    psql(&database.url, &format!("create role {name} login; create table users (user_id int primary key, role text)"));
    let before = fingerprint(&database.url);
    let sentence = refusal(&options(&database.url.replace("postgres@", &format!("{name}@")))).await;
    assert!(sentence.contains("the database role has to own the tables"), "{sentence}");
    assert_eq!(fingerprint(&database.url), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_person_has_to_put_right_is_refused_and_an_outage_is_not() {
    let database = Postgres::shared().fresh_database().await;
    let nowhere = format!("{}_gone", database.url);
    assert!(refusal(&options(&nowhere)).await.contains("does not exist"));
    let nobody = database.url.replace("postgres@", "nobody_at_all@");
    assert!(refusal(&options(&nobody)).await.contains("refuses the user"));
    assert!(refusal(&options("postgres://[broken")).await.contains("database-url"));
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("postgres://postgres@{}/x?sslmode=disable", silent.local_addr().unwrap());
    let outage = postgres::open(&options(&silent)).await;
    assert!(matches!(outage, Err(OpenError::Unreachable(_))));
    open(&database.url).await;
    psql(&database.url, "alter table users rename to people");
    assert!(refusal(&options(&database.url)).await.contains("users is gone"));
}
