//! Behind a real PgBouncer in transaction mode, set up as `docs/postgresql.md` says. `scripts/test-pooler` runs it.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

#[path = "../support/mod.rs"]
mod support;

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    process::{Child, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rolecache::{
    role::{RoleName, UserId},
    store::{Call, Grant, Op, Options, RequestId, Store, postgres},
};
use support::{
    documented::documented,
    logs,
    postgres::{Postgres, psql, try_psql, unprivileged},
};
use tokio::{task::JoinSet, time::timeout};

const SESSIONS: usize = 3;
const WRITERS: i64 = 8;
const WRITES: i64 = 200;
/// A store looks once a minute whether notifications arrive by now: twice in this time.
const TWO_LOOKS: Duration = Duration::from_secs(121);
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends with the test.
struct Bouncer {
    process: Child,
    /// The bot's database, through it.
    url: String,
    _dir: tempfile::TempDir,
}

impl Bouncer {
    fn before(database: &str) -> Self {
        let program = std::env::var("ROLECACHE_TEST_PGBOUNCER").expect("scripts/test-pooler says where PgBouncer is");
        // Free at this moment, and nobody else is told of it.
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let behind = url::Url::parse(database).unwrap().port().unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (config, users) = (dir.path().join("pgbouncer.ini"), dir.path().join("users.txt"));
        fs::write(&users, "\"rolecache_service\" \"\"\n").unwrap();
        let text = format!(
            "[databases]
             bot = host=127.0.0.1 port={behind} dbname=bot
             [pgbouncer]
             listen_addr = 127.0.0.1
             listen_port = {port}
             unix_socket_dir =
             auth_type = trust
             auth_file = {}
             pool_mode = transaction
             default_pool_size = {SESSIONS}
             max_prepared_statements = 100
             ignore_startup_parameters = options
",
            users.display()
        );
        let text: String = text.lines().flat_map(|line| [line.trim_start(), "\n"]).collect();
        fs::write(&config, text).unwrap();
        let mut command = unprivileged(program.as_ref());
        let process = command.arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let bouncer = Self { process, url: format!("postgres://rolecache_service@127.0.0.1:{port}/bot"), _dir: dir };
        let begun = Instant::now();
        while let Err(error) = try_psql(&bouncer.url, "select 1") {
            assert!(begun.elapsed() < PATIENCE, "PgBouncer does not answer: {error}");
        }
        bouncer
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = (self.process.kill(), self.process.wait());
    }
}

fn options(url: &str, migrate: bool) -> Options {
    let (default_role, admin_role) = (RoleName::held("user"), RoleName::held("admin"));
    Options { url: url.to_owned(), default_role, admin_role, migrate }
}

/// A bot's database as the page says; its superuser's address.
async fn set_up(server: &Postgres) -> String {
    let maintenance = server.fresh_database().await.url;
    psql(&maintenance, "create role bot login; create database bot");
    let superuser = format!("{}/bot", maintenance.rsplit_once('/').unwrap().0);
    psql(
        &superuser,
        "create table users (user_id bigint primary key, role text);
         create table mailboxes (id bigint primary key, creator_id bigint not null);
         alter table users owner to bot; alter table mailboxes owner to bot",
    );
    psql(&superuser, documented("As a superuser"));
    let owner = superuser.replace("postgres@", "rolecache_owner@");
    postgres::open(&options(&owner, true)).await.unwrap().close().await;
    psql(&owner, documented("As rolecache_owner"));
    psql(&superuser, documented("For each role behind a pooler"));
    superuser
}

async fn write_and_read(store: Arc<dyn Store>, user: UserId) {
    for number in 0..WRITES {
        let role = RoleName::held(&format!("role{number}"));
        let op = Op::Set { user, role: role.clone(), username: None, expected: None, reason: None };
        let request = Some(RequestId { id: format!("{}-{number}", user.0).into(), hash: [7; 32] });
        let call = Call { actor: "tester".into(), grant: Grant::Any, request, op };
        store.write(&[call]).await.remove(0).unwrap();
        assert_eq!(store.roles(&[user]).await.unwrap().roles, [role]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_listens_in_a_session_that_others_have_too() {
    logs::capture();
    let server = tokio::task::spawn_blocking(Postgres::start_own).await.unwrap();
    let superuser = set_up(&server).await;
    let bouncer = Bouncer::before(&superuser);
    let store = postgres::open(&options(&bouncer.url, false)).await.unwrap();
    let listening = tokio::spawn({
        let store = store.clone();
        async move { store.listen(&|| {}).await }
    });

    let mut writers = JoinSet::new();
    for user in 1..=WRITERS {
        writers.spawn(write_and_read(store.clone(), UserId(user)));
    }
    timeout(PATIENCE, writers.join_all()).await.expect("writes and reads should end in time");
    assert_eq!(store.poll_at_least_every(), Some(Duration::from_millis(50)));

    // What goes on while nothing happens is what is tested.
    assert!(timeout(TWO_LOOKS, listening).await.is_err(), "it listens for ever");
    assert_eq!(store.poll_at_least_every(), Some(Duration::from_millis(50)));
    assert_eq!(logs::lines_with("notifications cannot be relied on").len(), 1);
    let log = "select count(*) from rolecache.changes";
    assert_eq!(psql(&superuser, log), (WRITERS * WRITES).to_string());
}
