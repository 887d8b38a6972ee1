//! What cannot be served: one clear sentence, an exit code other than 0, and everything left as it was.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
};

use crate::{
    process::{BINARY, Process, answer, clean, finish, run},
    support::server::Db,
};

on_both! { a_schema_that_is_newer, other_roles_than_the_store_has, a_table_that_cannot_be_served }

/// Everything in a directory: names, contents, times.
fn contents(directory: &Path) -> BTreeMap<String, (Vec<u8>, i64, i64)> {
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        let about = entry.metadata().unwrap();
        let bytes = if about.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
        (entry.file_name().to_string_lossy().into_owned(), (bytes, about.mtime(), about.mtime_nsec()))
    };
    fs::read_dir(directory).unwrap().map(entry).collect()
}

/// The sentence with which a start is refused: the only line of stderr that is no log.
#[track_caller]
fn refused(url: &str, flags: &[&str], code: i32) -> String {
    let args = ["serve", "--database-url", url, "--listen", "127.0.0.1:0", "--log-format", "json"];
    sentence(run(&[&args[..], flags].concat()), code)
}

#[track_caller]
fn sentence((code, out, err): (i32, String, String), expected: i32) -> String {
    assert_eq!((code, &*out), (expected, ""), "{err}");
    let lines: Vec<&str> = err.lines().filter(|line| !line.starts_with('{')).collect();
    assert!(matches!(&lines[..], [line] if line.starts_with("error: ")), "not one sentence: {err}");
    for word in ["panicked", "Error(", "Some(", "SqliteError"] {
        assert!(!err.contains(word), "{err}");
    }
    lines[0].to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_server_on_one_file() {
    let db = Db::sqlite();
    let first = Process::serve(&db.url(), &[]);
    let address = first.ready();
    answer(&["set", "1", "admin", "--address", &address]);
    let said = refused(&db.url(), &[], 1);
    assert!(said.contains("another server process holds") && said.contains("bot.db"), "{said}");
    let said = sentence(run(&["migrate", "--database-url", &db.url()]), 1);
    assert!(said.contains("another server process holds"), "{said}");
    assert_eq!(answer(&["get", "1", "--address", &address]), "admin\n", "the first serves on");
    answer(&["set", "2", "admin", "--address", &address]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_no_database() {
    let directory = tempfile::tempdir().unwrap();
    let mut damaged = b"SQLite format 3\0".to_vec();
    damaged.extend([0x5a; 8_192]);
    for (name, bytes) in
        [("notes.txt", b"Buy milk.\n".to_vec()), ("short.db", b"SQLite".to_vec()), ("damaged.db", damaged)]
    {
        let file = directory.path().join(name);
        fs::write(&file, bytes).unwrap();
        let before = contents(directory.path());
        let said = refused(&format!("sqlite://{}", file.display()), &[], 1);
        assert!(said.contains(name) && said.contains("not an SQLite database"), "{said}");
        assert_eq!(contents(directory.path()), before, "{name}");
    }
    let before = contents(directory.path());
    let said = refused(&format!("sqlite://{}", directory.path().display()), &[], 1);
    assert!(said.contains("is not a file"), "{said}");
    let said = refused(&format!("sqlite://{}/nowhere/bot.db", directory.path().display()), &[], 1);
    assert!(said.contains("nowhere does not exist"), "{said}");
    assert_eq!(contents(directory.path()), before);
}

/// The binary without root's right to write where modes forbid it; for anybody else, the binary.
fn bound_by_modes() -> Command {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return Command::new(BINARY);
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", BINARY]);
    command
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_only_be_read() {
    let db = Db::sqlite();
    answer(&["migrate", "--database-url", &db.url()]);
    let directory = db.file().parent().unwrap().to_owned();
    let serve = |file: &Path| {
        let url = format!("sqlite://{}", file.display());
        let args = ["serve", "--listen", "127.0.0.1:0", "--log-format", "json", "--database-url", &url];
        sentence(finish(&mut clean(bound_by_modes(), args)), 1)
    };
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();

    mode(&db.file(), 0o444);
    let before = contents(&directory);
    let said = serve(&db.file());
    assert!(said.contains("bot.db") && said.contains("cannot be written"), "{said}");
    assert_eq!(contents(&directory), before);
    mode(&db.file(), 0o644);

    mode(&directory, 0o555);
    let before = contents(&directory);
    for file in [db.file(), directory.join("new.db")] {
        let said = serve(&file);
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        assert!(said.contains(&name) && said.contains("cannot be written: Permission denied"), "{said}");
    }
    assert_eq!(contents(&directory), before);
    mode(&directory, 0o755);
}

async fn a_schema_that_is_newer(db: Db) {
    answer(&["migrate", "--database-url", &db.url()]);
    match db {
        Db::Postgres { .. } => db.sql(
            "insert into rolecache.migrations (version, description, success, checksum, execution_time)
             values (99, 'later', true, '', 1)",
        ),
        Db::Sqlite { .. } => db.sql(
            "insert into rolecache_migrations (version, description, success, checksum, execution_time)
             values (99, 'later', true, x'00', 1)",
        ),
    };
    let before = db.contents();
    let said = refused(&db.url(), &[], 1);
    assert!(said.contains("version 99") && said.contains("newer"), "{said}");
    assert!(refused(&db.url(), &["--no-migrate"], 1).contains("version 99"));
    assert!(sentence(run(&["migrate", "--database-url", &db.url()]), 1).contains("version 99"));
    assert_eq!(db.contents(), before);
}

async fn other_roles_than_the_store_has(db: Db) {
    answer(&["migrate", "--database-url", &db.url()]);
    let said = refused(&db.url(), &["--roles", "guest,user,admin", "--default-role", "guest"], 1);
    assert!(said.contains("--default-role") && said.contains("user") && said.contains("guest"), "{said}");
    let said = refused(&db.url(), &["--roles", "user,root", "--admin-role", "root"], 1);
    assert!(said.contains("--admin-role") && said.contains("admin") && said.contains("root"), "{said}");
}

async fn a_table_that_cannot_be_served(db: Db) {
    let both = [
        ("create table users (id integer primary key, role text)", "user_id"),
        ("create table users (user_id integer primary key, name text)", "role"),
        (
            "create table people (user_id integer primary key, role text); create view users as select * from people",
            "view",
        ),
        ("create table users (user_id integer, role text)", "user_id"),
    ];
    let postgres = [
        ("create table users (user_id bigint primary key, role text) partition by range (user_id)", "partition"),
        ("create table users (user_id text primary key, role text)", "user_id"),
    ];
    let only: &[(&str, &str)] = if matches!(db, Db::Postgres { .. }) { &postgres } else { &[] };
    for (table, cause) in both.iter().chain(only) {
        db.sql(table);
        let schema = || match &db {
            Db::Postgres { .. } => db.sql(
                "select n.nspname, c.relname, c.relkind from pg_class c join pg_namespace n on n.oid = c.relnamespace
                 where n.nspname in ('public', 'rolecache') order by 1, 2",
            ),
            Db::Sqlite { .. } => db.sql("select * from sqlite_schema; pragma journal_mode"),
        };
        let before = schema();
        let said = refused(&db.url(), &[], 1);
        assert!(said.contains("users") && said.to_lowercase().contains(cause), "{table}: {said}");
        assert_eq!(schema(), before, "{table}");
        db.sql(if table.contains("create view") { "drop view users; drop table people" } else { "drop table users" });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_setting_is_named() {
    let directory = tempfile::tempdir().unwrap();
    for (flags, named) in [
        ("--listen localhost", "--listen"),
        ("--poll-interval 9ms", "--poll-interval"),
        ("--max-staleness 1s", "--max-staleness"),
        ("--retain-changes 23h", "--retain-changes"),
        ("--cache complete --cache-capacity 5", "--cache-capacity"),
        ("--cache half", "--cache"),
        ("--roles user,Admin", "--roles"),
        ("--default-role guest", "--default-role"),
        ("--admin-role guest", "--admin-role"),
        ("--log-level rolecache=loud", "--log-level"),
        ("--log-format xml", "--log-format"),
        ("--reflection=maybe", "--reflection"),
        ("--database-url mysql://u:sesame@h/d", "--database-url"),
        ("--database-url sqlite://", "--database-url"),
        ("--database-url sqlite://a.db?mode=ro", "--database-url"),
        ("--database-url postgres://u:sesame@h:port/d", "--database-url"),
        ("--colour red", "--colour"),
    ] {
        let mut command = crate::process::rolecache(["serve"]);
        if !flags.contains("--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        let (code, out, err) = finish(command.args(flags.split(' ')).current_dir(directory.path()));
        assert_eq!((code, &*out), (2, ""), "{flags}: {err}");
        assert!(err.starts_with("error: ") && err.contains(named) && !err.contains("sesame"), "{flags}: {err}");
    }
    for (variable, value) in [
        ("ROLECACHE_LISTEN", "here"),
        ("ROLECACHE_ROLES", "user,,admin"),
        ("ROLECACHE_MAX_STALENESS", "1s"),
        ("ROLECACHE_REFLECTION", "maybe"),
        ("ROLECACHE_NO_MIGRATE", "maybe"),
        ("DATABASE_URL", "mysql://u:sesame@h/d"),
    ] {
        let mut command = crate::process::rolecache(["serve"]);
        let (code, _, err) = finish(command.env(variable, value).current_dir(directory.path()));
        assert_eq!(code, 2, "{variable}: {err}");
        let flag = format!("--{}", variable.trim_start_matches("ROLECACHE_").to_lowercase().replace('_', "-"));
        assert!(err.contains(variable) || err.contains(&flag), "{variable}: {err}");
        assert!(!err.contains("sesame"), "{err}");
    }
    assert_eq!(contents(directory.path()).len(), 0, "nothing was begun");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let url = format!("sqlite://{}/bot.db", directory.path().display());
    let said = sentence(run(&["serve", "--database-url", &url, "--listen", &address, "--log-format", "json"]), 1);
    assert!(said.contains(&format!("cannot listen on {address}")), "{said}");
    let said = refused("postgres://bot:sesame@127.0.0.1/bot?sslmode=banana", &[], 1);
    assert!(said.contains("--database-url") && !said.contains("sesame"), "{said}");
    assert_eq!(contents(directory.path()).len(), 0, "the port comes first");
}
