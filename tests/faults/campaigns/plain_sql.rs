//! Every kind of plain SQL from eight connections at once. Each keeps a model of its own users, so that what every
//! transaction has to be heard as is known without looking at the log.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use futures::FutureExt;
use tokio_util::sync::CancellationToken;

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan, postgres},
    log::{DEFAULT, Log},
    support::{postgres::Session, server::Shell},
    traffic::{Load, Traffic},
    watcher::Watcher,
};

const SESSIONS: i64 = 8;

/// Users of each session, from here on.
const FIRST: i64 = 1_000;
const USERS: i64 = 24;

/// Transactions of a session between two looks, after each of which everything may be truncated.
const BATCH: usize = 4;

const SHORT: u64 = 200;

/// Those that a long run has to have, whichever it draws; MERGE is there from PostgreSQL 15 on.
const KINDS: [&str; 12] = [
    "INSERT",
    "COPY",
    "UPDATE",
    "DELETE",
    "key change",
    "prepared",
    "multi-row upsert",
    "ON CONFLICT DO NOTHING",
    "role NULL",
    "role ''",
    "upsert",
    "TRUNCATE",
];

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "plain-sql",
        unit: "statements",
        must_hold: "every committed change is seen once by each replica, in one revision per transaction; caches equal the table",
        short: SHORT,
        nightly: 10_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

/// A user, the role before and after; empty for none.
type Change = (i64, String, String);

/// What transactions have to be heard as.
type Due = HashMap<String, Vec<Change>>;

/// With it, each change is numbered before the next: the one way to several revisions of a transaction.
const IMMEDIATE: &str = "SET CONSTRAINTS ALL IMMEDIATE";

struct Writer {
    session: Session,
    first: i64,
    held: BTreeMap<i64, String>,
    due: Due,
    /// Transactions that were numbered by their statements.
    immediate: HashSet<String>,
    /// Statements that changed something, and were committed.
    kinds: BTreeMap<&'static str, u64>,
    /// Transactions of a kind.
    ways: BTreeMap<&'static str, u64>,
    /// Since PostgreSQL 15.
    has_merge: bool,
    errors: Vec<String>,
    random: fastrand::Rng,
}

/// What a transaction does, if it is committed.
struct Work {
    held: BTreeMap<i64, String>,
    changes: Vec<Change>,
    kinds: Vec<&'static str>,
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, ..Plan::default() }).await);
    let load = Load { writers: 2, readers: 2, watchers: 1, ..Load::default() };
    let mut traffic = Traffic::start(&cluster, load, &mut rounds.random);
    traffic.users.extend(FIRST..FIRST + SESSIONS * USERS);
    outcome.proves_nothing(traffic.run_up(200).await.err());
    let stop = CancellationToken::new();
    let watchers: Vec<_> = cluster
        .replicas
        .iter()
        .map(|replica| tokio::spawn(Watcher::after("0").follow(replica.client(), stop.clone())))
        .collect();
    let mut writers: Vec<Writer> =
        (0..SESSIONS).map(|n| Writer::new(&url, FIRST + n * USERS, rounds.random.fork())).collect();
    let mut due = Due::new();
    let mut truncates: u64 = 0;
    while writers.iter().map(Writer::statements).sum::<u64>() + truncates < rounds.count {
        let running: Vec<_> = writers
            .drain(..)
            .map(|mut writer| {
                tokio::task::spawn_blocking(move || {
                    (0..BATCH).for_each(|_| writer.transaction());
                    writer
                })
            })
            .collect();
        for writer in running {
            writers.push(writer.await.expect("a session does not panic"));
        }
        if rounds.random.u8(..3) == 0 {
            let printed = writers[0].session.run("begin; select pg_current_xact_id(); truncate users; commit;");
            outcome.violated(printed.contains("ERROR").then(|| format!("TRUNCATE was refused: {printed}")));
            let gone: Vec<Change> = writers.iter_mut().flat_map(Writer::forget_all).collect();
            truncates += u64::from(!gone.is_empty());
            due.insert(printed, gone);
        }
    }
    outcome.proves_nothing(traffic.throughout().err());
    traffic.settle(&mut outcome).await;
    stop.cancel();
    let log = cluster.log().await;
    for (watcher, replica) in watchers.into_iter().zip(&cluster.replicas) {
        let mut watcher = watcher.await.expect("a watcher does not panic");
        outcome.violated(watcher.until(log.head(), replica).await.err());
        outcome.violated(checker::watches_are_the_log(&watcher.seen, &log));
        outcome.violated(checker::watches_are_complete(&[watcher.seen], &log));
    }
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::from([("TRUNCATE", truncates)]);
    let mut immediate = HashSet::new();
    let mut ways: BTreeMap<&str, u64> = BTreeMap::new();
    for writer in writers {
        writer.ways.into_iter().for_each(|(way, times)| *ways.entry(way).or_default() += times);
        writer.kinds.into_iter().for_each(|(kind, times)| *kinds.entry(kind).or_default() += times);
        due.extend(writer.due);
        immediate.extend(writer.immediate);
        outcome.violated(writer.errors);
    }
    let missing = KINDS.iter().filter(|kind| rounds.count > SHORT && kinds.get(*kind).copied().unwrap_or(0) == 0);
    outcome.proves_nothing(missing.map(|kind| format!("no {kind}")));
    outcome.fired = kinds.values().sum::<u64>().min(rounds.count);
    outcome.violated(each_transaction_once(&cluster.shell, due, &immediate).await);
    outcome.violated(the_table_is_the_log(&log));
    outcome.figure("statements", format!("{kinds:?}"));
    outcome.figure("transactions", format!("{ways:?}"));
    outcome
}

// === impl Writer ===

impl Writer {
    fn new(url: &str, first: i64, random: fastrand::Rng) -> Self {
        let mut session = Session::open(url);
        session.run(
            "prepare upsert (bigint, text) as insert into users (user_id, role) values ($1, $2)
             on conflict (user_id) do update set role = excluded.role;",
        );
        let has_merge = session.run("show server_version_num;").parse::<u32>().expect("a version") >= 150_000;
        let (held, due, immediate, kinds, ways, errors) = Default::default();
        Self { session, first, held, due, immediate, kinds, ways, has_merge, errors, random }
    }

    fn statements(&self) -> u64 {
        self.kinds.values().sum()
    }

    /// Everybody is gone.
    fn forget_all(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.held).into_iter().map(|(user, role)| (user, role, String::new())).collect()
    }

    fn transaction(&mut self) {
        const XID: &str = "select pg_current_xact_id();";
        let mut work = Work { held: self.held.clone(), changes: Vec::new(), kinds: Vec::new() };
        let (mut way, mut sql) = ("one after the other", format!("begin; {XID}"));
        match self.random.u8(..9) {
            0 => {
                way = "one statement, and its COMMIT with it";
                sql = format!("{}\\; {XID}\n", self.statement(&mut work, false).trim_end_matches(';'));
            }
            choice @ 1..=2 => {
                way = if choice == 1 { "REPEATABLE READ" } else { "SERIALIZABLE" };
                sql = format!("begin isolation level {way}; {XID}");
                sql += &self.statement(&mut work, true);
                sql += &self.statement(&mut work, true);
            }
            3 => {
                way = "savepoint";
                sql += &self.statement(&mut work, true);
                sql += "savepoint s;";
                sql += &self.statement(&mut work.discarded(), true);
                sql += "rollback to s;";
                sql += &self.statement(&mut work, true);
            }
            4 => {
                way = "session_replication_role";
                sql = format!("begin; set local session_replication_role = replica; {XID}");
                sql += &self.statement(&mut work, true);
            }
            5 => {
                way = "rollback";
                sql += &self.statement(&mut work.discarded(), true);
            }
            6 => {
                way = IMMEDIATE;
                sql += "set constraints all immediate;";
                sql += &self.statement(&mut work, true);
                sql += &self.statement(&mut work, true);
            }
            _ => {
                for _ in 0..self.random.usize(1..4) {
                    sql += &self.statement(&mut work, true);
                }
            }
        }
        if sql.starts_with("begin") {
            sql += if way == "rollback" { "rollback;" } else { "commit;" };
        }
        let printed = self.session.run(&sql);
        // What a stranger has to expect there, and what was done is undone.
        if way == "SERIALIZABLE" && printed.contains("could not serialize") {
            *self.ways.entry("not serializable").or_default() += 1;
            // A COPY that failed leaves its rows, and the COMMIT behind them, as words that nobody understands.
            self.session.run("rollback;");
            return;
        }
        let Ok(_) = printed.parse::<u64>() else {
            self.errors.push(format!("refused: {sql}: {printed}"));
            return;
        };
        *self.ways.entry(way).or_default() += 1;
        work.kinds.iter().for_each(|kind| *self.kinds.entry(kind).or_default() += 1);
        if way == IMMEDIATE {
            self.immediate.insert(printed.clone());
        }
        self.held = work.held;
        self.due.insert(printed, work.changes);
    }

    /// A statement, whose changes go into the work.
    fn statement(&mut self, work: &mut Work, with_copy: bool) -> String {
        let before = work.changes.len();
        let user = self.first + self.random.i64(0..USERS);
        let role = (*self.random.choice(["user", "admin", "owner", "moderator"]).unwrap()).to_owned();
        let absent: Vec<i64> = (self.first..self.first + USERS).filter(|user| !work.held.contains_key(user)).collect();
        let (kind, sql) = match self.random.u8(..11) {
            0 if absent.len() > 1 => {
                work.set(absent[0], &role);
                ("INSERT", format!("insert into users (user_id, role) values ({}, '{role}');", absent[0]))
            }
            1 if absent.len() > 2 && with_copy => {
                work.set(absent[0], &role);
                work.set(absent[1], "admin");
                let rows = format!("{}\t{role}\n{}\tadmin", absent[0], absent[1]);
                ("COPY", format!("\ncopy users (user_id, role) from stdin;\n{rows}\n\\.\n"))
            }
            2 => {
                let there: Vec<i64> = work.held.range(user..user + 5).map(|(user, _)| *user).collect();
                there.into_iter().for_each(|user| work.set(user, &role));
                let (from, to) = (user, (user + 5).min(self.first + USERS));
                ("UPDATE", format!("update users set role = '{role}' where user_id >= {from} and user_id < {to};"))
            }
            3 => {
                if let Some(before) = work.held.remove(&user) {
                    work.changes.push((user, before, String::new()));
                }
                ("DELETE", format!("delete from users where user_id = {user};"))
            }
            4 if !absent.is_empty() && work.held.contains_key(&user) => {
                let (to, role) = (absent[0], work.held.remove(&user).unwrap());
                work.changes.push((user, role.clone(), String::new()));
                work.changes.push((to, String::new(), role.clone()));
                work.held.insert(to, role);
                ("key change", format!("update users set user_id = {to} where user_id = {user};"))
            }
            5 => {
                work.set(user, &role);
                ("prepared", format!("execute upsert ({user}, '{role}');"))
            }
            6 => {
                let other = if user == self.first { user + 1 } else { user - 1 };
                work.set(user, &role);
                work.set(other, "moderator");
                let rows = format!("({user}, '{role}'), ({other}, 'moderator')");
                ("multi-row upsert", upsert(&rows))
            }
            7 if self.has_merge => {
                work.set(user, &role);
                (
                    "MERGE",
                    format!(
                        "merge into users u using (values ({user}, '{role}')) v (id, role) on u.user_id = v.id
                         when matched then update set role = v.role
                         when not matched then insert (user_id, role) values (v.id, v.role);"
                    ),
                )
            }
            8 => {
                if !work.held.contains_key(&user) {
                    work.set(user, &role);
                }
                let insert = format!("insert into users (user_id, role) values ({user}, '{role}')");
                ("ON CONFLICT DO NOTHING", format!("{insert} on conflict (user_id) do nothing;"))
            }
            9 => {
                // Both read as the default role.
                work.set(user, DEFAULT);
                let (kind, nothing) = if self.random.bool() { ("role NULL", "null") } else { ("role ''", "''") };
                (kind, upsert(&format!("({user}, {nothing})")))
            }
            _ => {
                work.set(user, &role);
                ("upsert", upsert(&format!("({user}, '{role}')")))
            }
        };
        if work.changes.len() > before {
            work.kinds.push(kind);
        }
        sql
    }
}

fn upsert(rows: &str) -> String {
    format!("insert into users (user_id, role) values {rows} on conflict (user_id) do update set role = excluded.role;")
}

// === impl Work ===

impl Work {
    fn set(&mut self, user: i64, role: &str) {
        let before = self.held.insert(user, role.to_owned()).unwrap_or_default();
        if before != role {
            self.changes.push((user, before, role.to_owned()));
        }
    }

    /// For what is undone.
    fn discarded(&self) -> Self {
        Self { held: self.held.clone(), changes: Vec::new(), kinds: Vec::new() }
    }
}

/// Each transaction that changed anything has one revision, with what it changed.
async fn each_transaction_once(shell: &Shell, mut due: Due, immediate: &HashSet<String>) -> Vec<String> {
    let rows = shell
        .go(format!(
            "select c.xid || '|' || c.revision || '|' || ch.user_id || '|' || coalesce(ch.old_role, '') || '|' || coalesce(ch.new_role, '')
             from rolecache.commits c join rolecache.changes ch on ch.commit_id = c.id where ch.user_id >= {FIRST}"
        ))
        .await;
    let mut found = Vec::new();
    let mut logged: HashMap<&str, (&str, Vec<Change>)> = HashMap::new();
    for row in rows.lines() {
        let [xid, revision, user, old, new] = row.split('|').collect::<Vec<_>>()[..] else { panic!("{row}") };
        let (first, changes) = logged.entry(xid).or_insert((revision, Vec::new()));
        if *first != revision && !immediate.contains(xid) {
            found.push(format!("transaction {xid} has the revisions {first} and {revision}"));
        }
        changes.push((user.parse().unwrap(), old.to_owned(), new.to_owned()));
    }
    due.retain(|_, changes| !changes.is_empty());
    for (xid, (revision, mut changes)) in logged {
        let mut expected = due.remove(xid).unwrap_or_default();
        changes.sort();
        expected.sort();
        if changes != expected {
            found.push(format!("revision {revision} says {changes:?}, its transaction did {expected:?}"));
        }
    }
    found.extend(due.into_iter().map(|(xid, changes)| format!("not in the log: transaction {xid}: {changes:?}")));
    found
}

/// What the log leads to is what the table holds.
fn the_table_is_the_log(log: &Log) -> Option<String> {
    let mut table = BTreeMap::new();
    for entry in &log.entries {
        match &*entry.new {
            "" => table.remove(&entry.user),
            role => table.insert(entry.user, role.to_owned()),
        };
    }
    (table != log.table).then(|| format!("the log leads to {table:?}, the table holds {:?}", log.table))
}
