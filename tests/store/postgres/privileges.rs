//! Who may do what in the database: exactly what `docs/postgresql.md` says, taken from it.

use std::time::Duration;

use rolecache::{
    role::{MailboxId, Origin, Revision, UserId},
    store::{ListPosition, Op, Options, Refusal, StoreError, Trimmed, WriteError, postgres},
};

use super::{Bell, call, fresh, log, options, refusal, role_of, set, told, with_id};
use crate::support::{
    documented::documented,
    logs,
    postgres::{Postgres, fingerprint, psql, try_psql},
};

/// A bot's database of a server of its own, because roles are the server's and have the names of the page.
struct Documented {
    _server: Postgres,
    superuser: String,
}

impl Documented {
    /// As the page says, around tables that the bot has already.
    async fn set_up() -> Self {
        let server = tokio::task::spawn_blocking(Postgres::start_own).await.unwrap();
        let maintenance = server.fresh_database().await.url;
        psql(&maintenance, "create role bot login; create role stranger login; create database bot");
        let superuser = format!("{}/bot", maintenance.rsplit_once('/').unwrap().0);
        psql(
            &superuser,
            "create table users (user_id bigint primary key, role text, username text, since date);
             create table mailboxes (id bigint primary key, creator_id bigint not null);
             alter table users owner to bot; alter table mailboxes owner to bot;
             insert into users values (1, 'admin', 'ann', now()), (2, null, 'bob', now())",
        );
        let set_up = Self { _server: server, superuser };
        psql(&set_up.superuser, documented("As a superuser"));
        postgres::open(&options(&set_up.url("rolecache_owner"))).await.unwrap().close().await;
        psql(&set_up.url("rolecache_owner"), documented("As rolecache_owner"));
        set_up
    }

    fn url(&self, role: &str) -> String {
        self.superuser.replace("postgres@", &format!("{role}@"))
    }

    fn service(&self) -> Options {
        Options { migrate: false, ..options(&self.url("rolecache_service")) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_documented_is_enough_to_serve() {
    let database = Documented::set_up().await;
    let store = postgres::open(&database.service()).await.unwrap();
    let mut bell = Bell::of(&store);
    let (register, delete) = (
        call(Op::Register { mailbox: MailboxId(7), creator: UserId(1) }),
        call(Op::Delete { user: UserId(2), reason: None }),
    );
    let transfer = call(Op::Transfer {
        from: UserId(1),
        to: UserId(4),
        mailbox: Some(MailboxId(7)),
        demote_from: true,
        to_username: Some("eve".into()),
        reason: None,
    });
    for call in [with_id(set(3, "helper"), "a"), with_id(set(3, "helper"), "a"), register, transfer, delete] {
        store.write(&[call]).await.remove(0).unwrap();
    }
    bell.rings().await;
    bell.falls_silent(Duration::from_millis(100)).await;

    // The bot's own SQL is logged, by its own name, and wakes the service.
    psql(
        &database.url("bot"),
        "insert into users values (5, 'x', 'zoe', now()); update users set role = 'y' where user_id = 5;
         delete from users where user_id = 3; insert into mailboxes values (8, 5)",
    );
    bell.rings().await;
    let commits = log(&*store).await;
    assert_eq!(told(&commits), "3:-helper\n4:-admin 1:admin-user\n2:user-\n5:-x\n5:x-y\n3:helper-\n");
    for (place, change) in commits.iter().flat_map(|commit| &commit.changes).enumerate() {
        let (origin, actor) = if place < 4 { (Origin::Rpc, "tester") } else { (Origin::Sql, "bot") };
        assert_eq!((change.origin, &*change.actor), (origin, actor), "{change:?}");
    }

    assert_eq!((role_of(&*store, 4).await, role_of(&*store, 9).await), ("admin".into(), "user".into()));
    assert_eq!(store.mailbox(MailboxId(8)).await.unwrap(), Some(UserId(5)));
    assert_eq!(store.list_users(None, None, 10).await.unwrap().users.len(), 3);
    let from = ListPosition { revision: Revision(0), inside: None, kept_only: false };
    for (user, changes) in [(None, 7), (Some(UserId(5)), 2)] {
        assert_eq!(store.list_changes(user, from, 10).await.unwrap().changes.len(), changes);
    }
    let mut snapshot = store.snapshot().await.unwrap();
    assert_eq!(snapshot.next().await.unwrap().len(), 2);
    assert_eq!(store.check_triggers().await.unwrap(), [""; 0]);
    psql(&database.superuser, "update rolecache.requests set at = at - interval '2 days'");
    assert_eq!(store.trim(Duration::from_secs(86_400)).await.unwrap(), Trimmed { commits: 0, requests: 1 });

    psql(&database.superuser, "select setval('rolecache.revision', 1)");
    let again = postgres::open(&database.service()).await.unwrap();
    again.write(&[set(6, "x")]).await.remove(0).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_documented_right_is_needed() {
    let database = Documented::set_up().await;
    let rights = psql(
        &database.superuser,
        "select format('%s on %s', a.privilege_type, w.what) from (
           select 'schema ' || nspname as what, nspacl as acl from pg_namespace
           union all select 'table ' || oid::regclass::text, relacl from pg_class
           union all select 'function ' || oid::regproc::text, proacl from pg_proc
         ) w cross join lateral aclexplode(w.acl) a
         where a.grantee = 'rolecache_service'::regrole order by 1",
    );
    let rights: Vec<&str> = rights.lines().collect();
    assert_eq!(rights.len(), 10, "{rights:#?}");
    for right in rights {
        psql(&database.superuser, &format!("revoke {right} from rolecache_service"));
        let sentence = refusal(&database.service()).await;
        let (privilege, what) = right.split_once(" on ").unwrap();
        let what = what.trim_start_matches("table ").trim_start_matches("function ").replace('"', "");
        let what = if what == "users" || what == "mailboxes" { format!("public.{what}") } else { what };
        assert!(
            sentence.contains("rolecache_service lacks")
                && sentence.contains(&privilege.to_lowercase())
                && sentence.contains(&what),
            "{sentence:?} without {right}"
        );
        psql(&database.superuser, &format!("grant {right} to rolecache_service"));
    }
    postgres::open(&database.service()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_the_owner_can_touch_the_log() {
    const FORBIDDEN: &[&str] = &[
        "insert into rolecache.commits default values",
        "insert into rolecache.changes (commit_id, user_id, new_role) values (1, 1, 'admin')",
        "insert into rolecache.requests values ('a', 'b', 'c', 1, 1, now())",
        "update rolecache.commits set committed_at = now()",
        "update rolecache.changes set actor = 'somebody else'",
        "update rolecache.feed set trimmed_revision = 0",
        "update rolecache.migrations set checksum = ''",
        "delete from rolecache.commits",
        "delete from rolecache.changes",
        "delete from rolecache.requests",
        "truncate rolecache.changes",
        "truncate users",
        "drop table rolecache.changes",
        "drop schema rolecache cascade",
        "select * from rolecache.requests",
        "select nextval('rolecache.revision')",
        "select setval('rolecache.revision', 1)",
        "select setval('rolecache.commits_id_seq', 1)",
        "alter table users disable trigger _rolecache_update",
        "alter table rolecache.commits disable trigger number_commit",
        "drop trigger _rolecache_update on users",
        "create trigger mine after insert on users for each row execute function suppress_redundant_updates_trigger()",
        "create rule mine as on update to users do instead nothing",
        "alter table users add column mine int",
        "create or replace function rolecache.role_of(role text) returns text language sql as $$ select 'x' $$",
        "create function rolecache.mine() returns int language sql as $$ select 1 $$",
        "alter function rolecache.write(jsonb, uuid) security invoker",
        "drop function rolecache.log_truncate()",
        "select rolecache.log_change(1, null, 'admin', null)",
        "select rolecache.insert_users(array[1], array['admin'], array['x'], true)",
        "select rolecache.install_triggers()",
        "select rolecache.end_history()",
        "set session_replication_role = replica",
        "set role rolecache_owner",
    ];
    const ONLY_SERVED: &[&str] = &[
        "select * from rolecache.changes",
        "select * from rolecache.write('[]', gen_random_uuid())",
        "select * from rolecache.trim('1 day', 1, '1 day', 1)",
        "select rolecache.repair_sequences()",
    ];
    const ONLY_BY_BOTS: &[&str] = &[
        "insert into users values (9, 'admin')",
        "update users set role = 'admin'",
        "delete from users",
        "insert into mailboxes values (9, 9)",
        "update mailboxes set creator_id = 9",
        "delete from mailboxes",
        "select from users for update",
    ];
    let database = Documented::set_up().await;
    psql(&database.url("bot"), "update users set role = 'user' where user_id = 1; insert into mailboxes values (7, 1)");
    let before = fingerprint(&database.superuser);
    let all: Vec<&str> = [FORBIDDEN, ONLY_SERVED, ONLY_BY_BOTS].concat();
    for (role, statements) in [
        ("bot", &[FORBIDDEN, ONLY_SERVED].concat()),
        ("rolecache_service", &[FORBIDDEN, ONLY_BY_BOTS].concat()),
        ("stranger", &all),
    ] {
        for statement in statements {
            let error = try_psql(&database.url(role), statement).expect_err(&format!("{role}: {statement}"));
            let is_a_matter_of_rights = error.contains("permission denied") || error.contains("must be owner");
            assert!(is_a_matter_of_rights, "{role}: {statement}: {error}");
        }
    }
    assert_eq!(fingerprint(&database.superuser), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_asked_for_the_last_day_and_the_newest_10000_commits_stay() {
    let database = Documented::set_up().await;
    psql(
        &database.superuser,
        "begin; set constraints all immediate; insert into users select g, 'x' from generate_series(10, 10109) g; commit;
         insert into rolecache.requests values ('a', 'b', 'c', 1, null, now())",
    );
    let wipe = |what: &str| {
        psql(&database.url("rolecache_service"), &format!("select * from rolecache.trim({what}, 1000000)"))
    };
    for what in ["'0', 0, '0'", "'-1 year', -1, '-1 year'", "null, null, null"] {
        assert_eq!(wipe(what), "0|0");
    }
    psql(&database.superuser, "update rolecache.commits set committed_at = now() - interval '25 hours'");
    assert_eq!(wipe("'0', 0, '0'"), "100|0");
    assert_eq!(psql(&database.superuser, "select count(*) from rolecache.commits"), "10000");
    psql(&database.superuser, "update rolecache.requests set at = now() - interval '25 hours'");
    assert_eq!(wipe("'0', 0, '0'"), "0|1");
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_trust_no_search_path_and_nobody_else() {
    let (database, _store) = fresh().await;
    psql(&database.url, "create role anybody_at_all");
    let functions = psql(
        &database.url,
        "select p.proname, p.prorettype = 'trigger'::regtype, p.prosecdef,
           'search_path=pg_catalog, pg_temp' = any(p.proconfig), has_function_privilege('anybody_at_all', p.oid, 'execute')
         from pg_proc p where p.pronamespace = 'rolecache'::regnamespace order by 1",
    );
    psql(&database.url, "drop role anybody_at_all");
    let mut as_their_owner = Vec::new();
    for line in functions.lines() {
        let [name, is_trigger, is_definer, is_pinned, is_public] = line.split('|').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        assert_eq!((is_pinned, is_public), ("t", "f"), "{name}");
        assert!(is_trigger == "f" || is_definer == "t", "{name}");
        if is_definer == "t" {
            as_their_owner.push(name);
        }
    }
    let expected = "log_change log_row log_truncate number_commit repair_sequences role_of standing trim write";
    assert_eq!(as_their_owner.join(" "), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_hidden_by_a_policy_is_not_taken_for_one_without_a_role() {
    let database = Documented::set_up().await;
    let store = postgres::open(&database.service()).await.unwrap();
    let owner = database.url("rolecache_owner");
    psql(&owner, "alter table users enable row level security");
    let read = store.roles(&[UserId(1)]).await;
    assert!(matches!(read, Err(StoreError::Broken(_))), "{read:?}");
    assert!(store.snapshot().await.is_err());
    assert!(refusal(&database.service()).await.contains("row level security"));

    psql(&owner, "alter table users force row level security");
    let written = store.write(&[set(1, "user")]).await.remove(0);
    assert!(matches!(written, Err(WriteError::Refused(Refusal::Rejected { .. }))), "{written:?}");
    psql(&owner, "alter table users disable row level security");
    assert_eq!(role_of(&*store, 1).await, "admin");
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_of_the_bots_own_run_as_the_owner() {
    let database = Documented::set_up().await;
    psql(
        &database.url("rolecache_owner"),
        "create table public.notes (who text, asked_by text);
         create function note() returns trigger language plpgsql as $$ begin
           insert into public.notes values (current_user, session_user); return new; end $$;
         create trigger note before update on users for each row execute function note()",
    );
    let store = postgres::open(&database.service()).await.unwrap();
    store.write(&[set(1, "user")]).await.remove(0).unwrap();
    assert_eq!(psql(&database.superuser, "select * from notes"), "rolecache_owner|rolecache_service");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_else_may_write_the_log_is_warned_of() {
    logs::capture();
    let database = Documented::set_up().await;
    let warnings = || logs::lines_with("which is the log's");
    postgres::open(&database.service()).await.unwrap();
    assert_eq!(warnings(), [""; 0]);
    psql(&database.url("rolecache_owner"), "grant all on rolecache.commits, rolecache.changes to bot");
    postgres::open(&database.service()).await.unwrap();
    let warnings = warnings();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("bot may write rolecache.changes"), "{warnings:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_else_may_make_triggers_is_warned_of() {
    logs::capture();
    let database = Documented::set_up().await;
    let warnings = || logs::lines_with("may make triggers on public.users");
    postgres::open(&database.service()).await.unwrap();
    assert_eq!(warnings(), [""; 0]);
    psql(&database.url("rolecache_owner"), "grant all on users to bot; grant trigger on users to public");
    postgres::open(&database.service()).await.unwrap();
    let warnings = warnings();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("bot may make") && warnings[1].contains("everybody may make"), "{warnings:?}");
}
