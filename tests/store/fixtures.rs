//! The stores as the suite needs them: a fresh database, and another program that writes to it.

pub mod postgres;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use rolecache::{
    role::RoleName,
    store::{self, OpenError, Options, Store},
};
use tempfile::TempDir;

/// A database, empty at first.
pub trait Fixture: Sized + Send + Sync + 'static {
    fn fresh() -> impl Future<Output = Self> + Send;

    fn url(&self) -> String;

    fn open_with(&self, options: Options) -> impl Future<Output = Result<Arc<dyn Store>, OpenError>> + Send;

    /// Runs SQL in a program of its own, the database's shell, and answers what it prints or what it complains about.
    fn try_sql(&self, sql: &str) -> Result<String, String>;

    /// Adds `commits` users with ids from `first` on and the role `user`, each in a commit of its own.
    fn add_commits(&self, first: i64, commits: i64);

    /// Makes the commits of these revisions look `days` older.
    fn backdate(&self, from: i64, to: i64, days: u32);

    /// Makes every request id look `days` older.
    fn backdate_requests(&self, days: u32);

    /// Makes a trigger that drops every write to this user's row without a word.
    fn swallow_writes_of(&self, user: i64);

    /// Makes a trigger that gives the column `badge` a value without a row in `badges` where this role is set.
    fn break_badge_with_role(&self, role: &str);

    /// Makes a trigger that turns one role into another as it is written.
    fn rewrite_role(&self, from: &str, to: &str);

    /// Takes away the trigger that logs updates.
    fn drop_a_trigger(&self);

    /// Takes one change out of the log.
    fn damage_log(&self, revision: i64);

    /// Takes a commit out of the log.
    fn forget(&self, revision: i64);

    /// Something that differs when anything in the database does.
    fn fingerprint(&self) -> String;

    /// Whether a statement that changes several rows is several commits.
    const COMMIT_PER_ROW: bool;

    fn options(&self) -> Options {
        Options {
            url: self.url(),
            default_role: RoleName::held("user"),
            admin_role: RoleName::held("admin"),
            migrate: true,
        }
    }

    fn open(&self) -> impl Future<Output = Arc<dyn Store>> + Send {
        async { self.open_with(self.options()).await.expect("open the store") }
    }

    #[track_caller]
    fn sql(&self, sql: &str) -> String {
        self.try_sql(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }
}

/// SQLite in a file of its own, and the `sqlite3` shell.
pub struct SqliteFile {
    directory: TempDir,
}

impl SqliteFile {
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("bot.db")
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The names beside the database, in order.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl SqliteFile {
    /// Runs a script of which statements may fail.
    pub fn run_script(&self, script: &str) {
        let mut shell = Command::new("sqlite3")
            .args(["-batch", "-cmd", ".timeout 20000"])
            .arg(self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        shell.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        shell.wait().unwrap();
    }
}

impl Fixture for SqliteFile {
    const COMMIT_PER_ROW: bool = true;

    async fn fresh() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn url(&self) -> String {
        format!("sqlite://{}", self.path().display())
    }

    async fn open_with(&self, options: Options) -> Result<Arc<dyn Store>, OpenError> {
        store::sqlite::open(&options).await
    }

    fn try_sql(&self, sql: &str) -> Result<String, String> {
        let ran = Command::new("sqlite3")
            .args(["-batch", "-bail", "-cmd", ".timeout 20000"])
            .arg(self.path())
            .arg(sql)
            .output()
            .expect("run sqlite3");
        match ran.status.success() && ran.stderr.is_empty() {
            true => Ok(String::from_utf8_lossy(&ran.stdout).trim_end().to_owned()),
            false => Err(String::from_utf8_lossy(&ran.stderr).into_owned()),
        }
    }

    fn add_commits(&self, first: i64, commits: i64) {
        let last = first + commits;
        self.sql(&format!(
            "with recursive n(id) as (select {first} union all select id + 1 from n where id + 1 < {last})
             insert into users (user_id, role) select id, 'user' from n"
        ));
    }

    fn backdate(&self, from: i64, to: i64, days: u32) {
        let millis = i64::from(days) * 86_400_000;
        self.sql(&format!(
            "update rolecache_commits set committed_at = committed_at - {millis} where id between {from} and {to}"
        ));
    }

    fn backdate_requests(&self, days: u32) {
        let millis = i64::from(days) * 86_400_000;
        self.sql(&format!("update rolecache_requests set answered_at = answered_at - {millis}"));
    }

    fn swallow_writes_of(&self, user: i64) {
        for kind in ["insert", "update"] {
            self.sql(&format!(
                "create trigger swallow_{kind}_{user} before {kind} on users when new.user_id = {user}
                 begin select raise(ignore); end"
            ));
        }
    }

    fn break_badge_with_role(&self, role: &str) {
        self.sql(&format!(
            "create trigger break_badge after update of role on users when new.role = '{role}'
             begin update users set badge = 99 where user_id = new.user_id; end"
        ));
    }

    fn rewrite_role(&self, from: &str, to: &str) {
        for kind in ["insert", "update"] {
            self.sql(&format!(
                "create trigger rewrite_{from}_{kind} after {kind} on users when new.role = '{from}'
                 begin update users set role = '{to}' where user_id = new.user_id; end"
            ));
        }
    }

    fn drop_a_trigger(&self) {
        self.sql("drop trigger rolecache_after_update");
    }

    fn damage_log(&self, revision: i64) {
        self.sql(&format!(
            "delete from rolecache_changes where seq = (select max(seq) from rolecache_changes where commit_id = {revision})"
        ));
    }

    fn forget(&self, revision: i64) {
        self.sql(&format!(
            "delete from rolecache_changes where commit_id = {revision}; delete from rolecache_commits where id = {revision}"
        ));
    }

    fn fingerprint(&self) -> String {
        let bytes = std::fs::read(self.path()).unwrap_or_default();
        let sum = bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        format!("{} bytes, {sum:x}, beside {:?}", bytes.len(), self.files())
    }
}
