//! A PostgreSQL of our own: one private server per test binary, one fresh database per test.
//!
//! `ROLECACHE_TEST_DATABASE_URL` names another server to make the databases on; `ROLECACHE_TEST_POSTGRES_BIN` says where
//! `initdb` and `postgres` are. A server ends with this process however that ends: a small shell waits for its end of
//! a pipe, and nothing else holds the other end.

use std::{
    fs,
    io::Write,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// A server to make databases on.
pub struct Postgres {
    /// Without a database.
    base: String,
    own: Option<Own>,
}

/// A database of its own, gone with its server.
pub struct Database {
    pub url: String,
}

struct Own {
    dir: TempDir,
    bin: PathBuf,
    port: u16,
    server: std::sync::Mutex<Option<Child>>,
}

impl Postgres {
    /// The server that all tests of this binary share.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(|| match std::env::var("ROLECACHE_TEST_DATABASE_URL") {
            Ok(url) => {
                let (base, _) = url.rsplit_once('/').expect("ROLECACHE_TEST_DATABASE_URL has a database");
                Postgres { base: base.to_owned(), own: None }
            }
            // A static is never dropped: its directory is left to the watchdog.
            Err(_) => Self::start_own(),
        })
    }

    /// Another server, to be stopped, killed or restored into.
    pub fn start_own() -> Self {
        Self::start_in(&std::env::temp_dir())
    }

    /// The same, with its data on a disk of the caller's choice.
    pub fn start_in(disk: &Path) -> Self {
        Self::start_with(disk, &[])
    }

    /// One that talks over TLS alone, with this certificate and its key.
    pub fn start_with_tls(certificate: &str, key: &str) -> Self {
        let files = [
            ("server.crt", certificate),
            ("server.key", key),
            ("postgresql.auto.conf", "ssl = on\n"),
            ("pg_hba.conf", "hostssl all all 127.0.0.1/32 trust\n"),
        ];
        Self::start_with(&std::env::temp_dir(), &files)
    }

    /// With these files among its data.
    fn start_with(disk: &Path, files: &[(&str, &str)]) -> Self {
        let bin = bin();
        let dir = tempfile::Builder::new().prefix("rolecache-pg-").tempdir_in(disk).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let data = dir.path().join("data");
        let made = unprivileged(&bin.join("initdb"))
            .args(["--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "--locale=C", "-D"])
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb failed: {}", String::from_utf8_lossy(&made.stderr));
        for (name, text) in files {
            write_unprivileged(&data.join(name), text);
        }
        // Free at this moment, and nobody else is told of it.
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let own = Own { dir, bin, port, server: std::sync::Mutex::new(None) };
        own.start();
        Self { base: format!("postgres://postgres@127.0.0.1:{port}"), own: Some(own) }
    }

    pub async fn fresh_database(&self) -> Database {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let maintenance = format!("{}/postgres", self.base);
        let sql = format!("create database {name}");
        tokio::task::spawn_blocking(move || psql(&maintenance, &sql)).await.unwrap();
        Database { url: format!("{}/{name}", self.base) }
    }

    /// As `systemctl stop` does it.
    pub fn stop(&self) {
        self.own().signal("INT");
    }

    /// As a crash does it: nothing is said to anybody.
    pub fn kill(&self) {
        self.own().signal("QUIT");
    }

    /// As the kernel does it when memory is short: the server and every session, at once.
    pub fn kill_hard(&self) {
        let own = self.own();
        let pids = own.processes();
        fs::write(own.dir.path().join("stopped"), "").unwrap();
        for pid in &pids {
            // A session may have ended by itself.
            let _ = Command::new("kill").args(["-KILL", pid]).stderr(Stdio::null()).status().unwrap();
        }
        own.wait_for_the_end_of(&pids);
    }

    /// Stops every process of the server, as a frozen host would.
    pub fn freeze(&self) {
        self.own().signal_all("STOP");
    }

    pub fn thaw(&self) {
        self.own().signal_all("CONT");
    }

    /// Where its data is.
    pub fn data(&self) -> PathBuf {
        self.own().dir.path().join("data")
    }

    pub fn start(&self) {
        self.own().start();
    }

    /// As a supervisor does it, where it has ended by itself.
    pub fn start_again(&self) {
        let own = self.own();
        if !own.answers() {
            own.forget();
            own.start();
        }
    }

    /// As a standby without a primary.
    pub fn start_as_standby(&self) {
        fs::write(self.own().dir.path().join("data/standby.signal"), "").unwrap();
        self.own().start();
    }

    fn own(&self) -> &Own {
        self.own.as_ref().expect("only a server of our own can be stopped")
    }
}

impl Own {
    fn start(&self) {
        let data = self.dir.path().join("data");
        // The shell waits for the end of its input, which comes when this process is gone, and then ends the server.
        const WATCHDOG: &str = r#"
            dir=$1; shift
            "$@" >"$dir/log" 2>&1 </dev/null &
            server=$!
            ( cat >/dev/null
              while kill -QUIT $server 2>/dev/null; do sleep 0.05; done
              [ -e "$dir/stopped" ] || rm -rf "$dir" ) <&3 &
            exec 3<&-
            wait
        "#;
        let _ = fs::remove_file(self.dir.path().join("stopped"));
        let postgres = unprivileged(&self.bin.join("postgres"));
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", &format!("exec 3<&0; {WATCHDOG}"), "sh"])
            .arg(self.dir.path())
            .arg(postgres.get_program())
            .args(postgres.get_args())
            .arg("-D")
            .arg(&data)
            .args(["-p", &self.port.to_string(), "-k"])
            .arg(self.dir.path());
        for setting in [
            "listen_addresses=127.0.0.1",
            "max_connections=400",
            "fsync=off",
            "full_page_writes=off",
            "max_wal_size=4GB",
            "shared_buffers=128MB",
            "autovacuum_naptime=10",
            "deadlock_timeout=200ms",
        ] {
            command.args(["-c", setting]);
        }
        let server = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        *self.server.lock().unwrap() = Some(server);
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            if self.answers() {
                return;
            }
            assert!(Instant::now() < until, "the server does not start; its log: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn answers(&self) -> bool {
        let mut asked = Command::new(self.bin.join("pg_isready"));
        asked.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]).status().unwrap().success()
    }

    fn signal(&self, name: &str) {
        // Stopped on purpose: the watchdog is to leave the data alone.
        fs::write(self.dir.path().join("stopped"), "").unwrap();
        let pid = self.postmaster();
        let sent = Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap();
        assert!(sent.success());
        self.wait_for_the_end_of(&[pid]);
    }

    fn signal_all(&self, name: &str) {
        let signal = |pid: &str| {
            let _ = Command::new("kill").args([&format!("-{name}"), pid]).stderr(Stdio::null()).status().unwrap();
        };
        // The server first: from then on it makes no more of them.
        signal(&self.postmaster());
        self.processes().iter().skip(1).for_each(|pid| signal(pid));
    }

    fn postmaster(&self) -> String {
        let pid = fs::read_to_string(self.dir.path().join("data/postmaster.pid")).unwrap();
        pid.lines().next().unwrap().trim().to_owned()
    }

    /// The server first, then its sessions and helpers.
    fn processes(&self) -> Vec<String> {
        let server = self.postmaster();
        let children = fs::read_to_string(format!("/proc/{server}/task/{server}/children")).unwrap_or_default();
        std::iter::once(server).chain(children.split_whitespace().map(str::to_owned)).collect()
    }

    fn wait_for_the_end_of(&self, pids: &[String]) {
        // One whose parent is gone may stay as a zombie for ever.
        let runs = |pid: &String| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
        };
        let until = Instant::now() + Duration::from_secs(30);
        while pids.iter().any(runs) {
            assert!(Instant::now() < until, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        // Its shell ends with its input, and the watchdog in it, which leaves the data alone.
        self.server.lock().unwrap().take().expect("the server runs").wait().unwrap();
    }

    /// What is left of one that has ended by itself.
    fn forget(&self) {
        fs::write(self.dir.path().join("stopped"), "").unwrap();
        if let Some(mut server) = self.server.lock().unwrap().take() {
            drop(server.stdin.take());
            server.wait().unwrap();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // Closing its input ends it.
        if let Some(mut server) = self.server.lock().unwrap().take() {
            drop(server.stdin.take());
            let _ = server.wait();
        }
    }
}

/// Runs SQL with the real psql, as anybody would, and answers what it printed: rows as `a|b`.
pub fn psql(url: &str, sql: &str) -> String {
    match try_psql(url, sql) {
        Ok(printed) => printed,
        Err(error) => panic!("psql failed: {error}\n{sql}"),
    }
}

/// The same, where an error is what one expects.
pub fn try_psql(url: &str, sql: &str) -> Result<String, String> {
    let mut psql = Command::new(bin().join("psql"))
        .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-", url])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    psql.stdin.take().unwrap().write_all(sql.as_bytes()).unwrap();
    let done = psql.wait_with_output().unwrap();
    if done.status.success() {
        Ok(String::from_utf8(done.stdout).unwrap().trim_end().to_owned())
    } else {
        Err(String::from_utf8_lossy(&done.stderr).into_owned())
    }
}

/// A shell of a database that stays, for transactions that stay open.
pub struct Session {
    shell: Child,
    printed: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
    /// Its command that prints a line.
    print: &'static str,
}

impl Session {
    /// A psql.
    pub fn open(url: &str) -> Self {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"exec "$0" -X -q -A -t "$1" 2>&1"#]).arg(bin().join("psql")).arg(url);
        Self::of(command, "\\echo")
    }

    /// An sqlite3 shell.
    pub fn of_file(file: &Path) -> Self {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"exec sqlite3 -batch "$0" 2>&1"#]).arg(file);
        Self::of(command, ".print")
    }

    fn of(mut command: Command, print: &'static str) -> Self {
        let mut shell = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let printed = std::io::BufRead::lines(std::io::BufReader::new(shell.stdout.take().unwrap()));
        Self { shell, printed, print }
    }

    /// What it printed, errors included, when all of it is done.
    pub fn run(&mut self, sql: &str) -> String {
        const DONE: &str = "== done ==";
        assert!(sql.is_empty() || sql.trim_end().ends_with([';', '.']), "it would wait for the rest of {sql}");
        self.send(&format!("{sql}\n{} {DONE}\n", self.print));
        let lines: Vec<String> = self.printed.by_ref().map(Result::unwrap).take_while(|line| line != DONE).collect();
        lines.join("\n")
    }

    /// Without waiting for it.
    pub fn send(&mut self, sql: &str) {
        self.shell.stdin.as_mut().unwrap().write_all(sql.as_bytes()).unwrap();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

/// What `pg_dump` says of a database, without the key that newer versions put into each dump. None where the server is
/// newer than our pg_dump, which it refuses then.
pub fn dump(url: &str, args: &[&str]) -> Option<String> {
    let version = Command::new(bin().join("pg_dump")).arg("--version").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let major = version.split_whitespace().find_map(|word| word.split('.').next()?.parse::<u32>().ok()).unwrap();
    let server: u32 = psql(url, "select current_setting('server_version_num')::int / 10000").parse().unwrap();
    if major < server {
        println!("pg_dump {major} cannot dump PostgreSQL {server}: its data goes by COPY instead");
        return None;
    }
    let done = Command::new(bin().join("pg_dump")).args(args).arg(url).output().unwrap();
    assert!(done.status.success(), "pg_dump failed: {}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"));
    Some(lines.fold(String::new(), |text, line| text + line + "\n"))
}

/// A script that puts the rows and sequences of a database into another with the same tables, as a dump would: while no
/// trigger is there. What it leaves of the triggers is for the caller to say.
pub fn copy_script(url: &str) -> String {
    let list = |kind: &str| {
        let names = psql(
            url,
            &format!(
                "select c.oid::regclass from pg_class c join pg_namespace n on n.oid = c.relnamespace
                 where c.relkind = '{kind}' and n.nspname in ('public', 'rolecache') order by 1"
            ),
        );
        names.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let (tables, sequences) = (list("r"), list("S"));
    let mut script = format!("begin; set local search_path = public; truncate {};\n", tables.join(", "));
    for table in &tables {
        script += &format!("alter table {table} disable trigger user;\n");
        let rows = psql(url, &format!("copy {table} to stdout"));
        let rows = if rows.is_empty() { rows } else { rows + "\n" };
        script += &format!("copy {table} from stdin;\n{rows}\\.\n");
    }
    for sequence in &sequences {
        let state = psql(url, &format!("select last_value || ', ' || is_called from {sequence}"));
        script += &format!("select setval('{sequence}', {state});\n");
    }
    script + "commit;\n"
}

/// Something that differs when anything in the database does: what there is, and every row.
pub fn fingerprint(url: &str) -> String {
    psql(
        url,
        r"select c.oid::regclass, c.relkind, c.relacl, c.reloptions, a.attname, a.atttypid::regtype, a.attnotnull
          from pg_class c left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
          where c.relnamespace::regnamespace::text !~ '^pg_|^information_schema' order by 1, a.attnum;
          select n.nspname, n.nspacl from pg_namespace n where n.nspname !~ '^pg_' order by 1;
          select tgrelid::regclass, tgenabled, pg_get_triggerdef(oid) from pg_trigger where not tgisinternal order by 1, 3;
          select conrelid::regclass, pg_get_constraintdef(oid) from pg_constraint where conrelid <> 0 order by 1, 2;
          select p.oid::regprocedure, md5(pg_get_functiondef(p.oid)), p.proacl from pg_proc p
          where p.pronamespace::regnamespace::text !~ '^pg_|^information_schema' order by 1;
          select format(
            case c.relkind when 'r' then 'select * from %s t order by t::text' else 'select last_value, is_called from %s' end,
            c.oid::regclass) from pg_class c
          where c.relkind in ('r', 'S') and c.relnamespace::regnamespace::text !~ '^pg_|^information_schema' order by 1
          \gexec",
    )
}

/// Where the server's programs are.
fn bin() -> PathBuf {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| {
        if let Some(given) = std::env::var_os("ROLECACHE_TEST_POSTGRES_BIN") {
            return given.into();
        }
        let on_path =
            std::env::var_os("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
        let mut packaged: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
            .collect();
        packaged.sort();
        packaged.reverse();
        // Through links: the other programs may not be linked.
        let home = |dir: PathBuf| Some(fs::canonicalize(dir.join("initdb")).ok()?.parent()?.to_owned());
        on_path
            .chain(packaged)
            .filter_map(home)
            .find(|dir| dir.join("postgres").exists() && dir.join("psql").exists())
            .expect(
                "these tests need PostgreSQL: install its server, set ROLECACHE_TEST_POSTGRES_BIN to where initdb and \
             postgres are, or ROLECACHE_TEST_DATABASE_URL to a server to make databases on",
            )
    })
    .clone()
}

/// A file that PostgreSQL owns, and nobody else may read: it refuses any other key.
fn write_unprivileged(file: &Path, text: &str) {
    let mut shell = unprivileged(Path::new("/bin/sh"))
        .args(["-c", r#"umask 077; cat >"$0""#])
        .arg(file)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    shell.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(shell.wait().unwrap().success());
}

/// PostgreSQL refuses to run as root.
pub fn unprivileged(program: &Path) -> Command {
    let is_root = fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0);
    if !is_root {
        return Command::new(program);
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let user = if passwd.lines().any(|line| line.starts_with("postgres:")) { "postgres" } else { "nobody" };
    let mut ids = passwd.lines().find(|line| line.starts_with(&format!("{user}:"))).unwrap().split(':').skip(2);
    let (uid, gid) = (ids.next().unwrap(), ids.next().unwrap());
    let mut command = Command::new("setpriv");
    command.args(["--reuid", uid, "--regid", gid, "--clear-groups"]).arg(program);
    command
}
