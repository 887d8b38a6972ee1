//! Histories that break a promise, made by hand: the checker has to say so of each, and nothing of one that is sound.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use futures::FutureExt;
use rolecache::proto::v1::{Commit, RoleChange, Source};

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker::{self, Excuses},
    history::{Answer, End, Giver, History, MISMATCH, Process, Read, Seen, Snapshot, Told, Write},
    log::{Entry, Log},
    traffic::NO_REASON,
};

/// A history, and what has to be found in it: nothing, where that is empty.
type Case = (&'static str, fn(&History, &mut Vec<Entry>));

const CASES: [Case; 36] = [
    ("", |_, _| {}),
    ("never true", |history, _| {
        // At 20 the user became an admin, at the earliest; this was told before.
        history.read(read(1, 15, "admin"));
    }),
    ("ahead of its time", |history, _| {
        history.read(Read { process: Process { replica: 1, start: 1 }, ..read(2, 15, "admin") });
    }),
    ("a no-op that was none", |history, _| {
        let told = Told::Done { revision: 1, changed: false };
        history.wrote(write("no-op", "admin", [12, 15], told));
    }),
    ("older than asked for", |history, _| {
        let Read { answer: Ok(answer), .. } = read(1, 15, "moderator") else { unreachable!("it is answered") };
        history.read(Read { min_revision: 2, answer: Ok(Answer { stale: true, ..answer }), ..read(1, 15, "") });
    }),
    ("a read was told REVISION_UNKNOWN", |history, _| {
        history.read(Read { answer: Err("REVISION_UNKNOWN".into()), ..read(0, 15, "") });
    }),
    ("a read was told Cancelled without a reason", |history, _| {
        // No server was away.
        history.read(Read { answer: Err(format!("Cancelled {NO_REASON}: Timeout expired")), ..read(0, 8_010, "") });
    }),
    ("a write was told ROLE_MISMATCH", |history, _| {
        history.wrote(write("refused", "user", [40, 50], declined("admin")));
    }),
    ("refused, and done all the same", |history, _| {
        let mut writes = history.writes.lock().unwrap();
        writes[1] = Write { expected: Some("user".into()), told: declined("moderator"), ..writes[1].clone() };
    }),
    ("done though another role was expected", |history, _| {
        history.writes.lock().unwrap()[1].expected = Some("user".into());
    }),
    ("a no-op though another role was expected", |history, _| {
        let told = Told::Done { revision: 2, changed: false };
        history.wrote(Write { expected: Some("user".into()), ..write("no-op", "admin", [32, 35], told) });
    }),
    ("never told what became of it", |history, _| history.untold.lock().unwrap().push("a write".into())),
    ("lost: ", |history, _| {
        history.wrote(write("third", "user", [40, 50], Told::Done { revision: 3, changed: true }));
    }),
    ("doubled: ", |_, entries| entries.push(entry(3, "admin", "admin", "second"))),
    ("two answers: ", |history, _| {
        history.wrote(write("second", "admin", [31, 33], Told::Done { revision: 3, changed: true }));
    }),
    ("was said to change nothing, and did", |history, _| {
        history.writes.lock().unwrap()[1].told = Told::Done { revision: 2, changed: false };
    }),
    ("nobody asked for", |_, entries| entries.push(entry(3, "admin", "user", "a stranger"))),
    ("stale, and answered as truth", |history, _| {
        history.read(Read { process: Process { replica: 1, start: 1 }, ..read(1, 2_100, "moderator") });
    }),
    ("went back behind", |history, _| history.read(read(1, 60, "moderator"))),
    ("missed 1", |history, _| drop(history.seen.lock().unwrap()[0].commits.remove(0))),
    ("was told twice, or out of order, before 2", |history, _| {
        let commits = &mut history.seen.lock().unwrap()[0].commits;
        commits.insert(1, commits[0].clone());
    }),
    ("a watch was told", |history, _| {
        history.seen.lock().unwrap()[0].commits[1].1.changes[0].new_role = "owner".into();
    }),
    ("which is not in the log", |history, _| {
        history.seen.lock().unwrap()[0].commits.push(seen(&entry(3, "admin", "user", "")));
    }),
    ("a heartbeat promised 2", |history, _| history.seen.lock().unwrap()[0].heartbeats.push((2, 1))),
    ("", |history, _| {
        // It was a moderator until 20 at the earliest.
        let told = declined("moderator");
        history.wrote(Write { expected: Some("admin".into()), ..write("declined", "user", [12, 25], told) });
    }),
    ("declined though all was as it should be", |history, _| {
        let told = declined("admin");
        history.wrote(Write { expected: Some("admin".into()), ..write("declined", "user", [32, 35], told) });
    }),
    ("declined for a role that was not there", |history, _| {
        let told = declined("moderator");
        history.wrote(Write { expected: Some("user".into()), ..write("declined", "user", [32, 35], told) });
    }),
    ("declined though it had been done", |history, _| {
        // Its first answer got lost.
        let told = declined("admin");
        let expected = Some("moderator".into());
        history.writes.lock().unwrap()[1].expected.clone_from(&expected);
        history.wrote(Write { expected, ..write("second", "admin", [32, 35], told) });
    }),
    ("slow though nothing was broken", |history, _| {
        history.read(Read { begun: Duration::from_millis(110), ..read(2, 3_150, "admin") });
    }),
    ("a write was told STORE_UNREACHABLE", |history, _| {
        // Nothing was broken from 100 to 4,000.
        history.wrote(write("refused", "user", [110, 190], Told::Refused("STORE_UNREACHABLE".into())));
    }),
    ("doubled: ", |_, entries| {
        // A transfer may have two changes, in one commit.
        entries.push(Entry { user: 2, ..entry(3, "admin", "user", "first") });
    }),
    ("half a transfer", |history, _| {
        // User 2 was to give up what it had.
        history.writes.lock().unwrap()[1].giver = Some(Giver { user: 2, demoted: true });
    }),
    ("or from no admin", |history, _| {
        history.writes.lock().unwrap()[1].giver = Some(Giver { user: 2, demoted: false });
    }),
    ("a snapshot at 0 has", |history, _| {
        let users = vec![(1, "admin".into())];
        history.seen.lock().unwrap()[0].snapshot = Some(Snapshot { revision: 0, users });
    }),
    ("a watch started over", |history, _| history.seen.lock().unwrap()[0].started_over.push(2)),
    ("a watch ended", |history, _| {
        let [last, ended] = [40, 50].map(Duration::from_millis);
        let why = "STORE_UNREACHABLE".into();
        history.ends.lock().unwrap().push(End { process: PROCESS, last, ended, was_open: true, why });
    }),
];

pub fn campaigns() -> Vec<Campaign> {
    let count = CASES.len() as u64;
    vec![Campaign {
        name: "checker",
        unit: "histories made by hand",
        must_hold: "what is broken in each is found, and nothing else",
        short: count,
        nightly: count,
        body: |rounds| async { run(rounds) }.boxed(),
    }]
}

fn run(rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    for (due, add) in CASES.into_iter().cycle().take(rounds.count as usize) {
        let history = History::new();
        let mut entries = sound(&history);
        add(&history, &mut entries);
        let log = Log::of(entries, BTreeMap::from([(1, "admin".into())]));
        // A store that is away for a while ends no watch.
        let calms = vec![(Duration::from_millis(100), Duration::from_millis(4_000))];
        let excuses = Excuses { reasons: &["STORE_UNREACHABLE"], calms, ..Excuses::default() };
        let found = checker::all(&history, &log, &excuses);
        let is_it = |found: &String| !due.is_empty() && found.contains(due);
        outcome.violated((!due.is_empty() && !found.iter().any(is_it)).then(|| format!("not found: {due}")));
        let strange = found.iter().filter(|found| !is_it(found));
        outcome.violated(strange.map(|found| format!("with {due:?} this was found: {found}")));
        outcome.fired += 1;
    }
    outcome.violated(lost_histories());
    outcome.violated(ends());
    outcome.violated(checker::most_succeed(100, 49).is_none().then(|| "half of the calls may fail".to_owned()));
    outcome
}

/// The second of the two commits is lost, from when the store stops at 40 on; another took its place.
fn lost_histories() -> Vec<String> {
    let (before, mut after) = (log(), log().entries);
    after[1].new = "user".into();
    let after = Log::of(after, BTreeMap::from([(1, "user".into())]));
    let stale = |read: Read| Read { answer: read.answer.map(|answer| Answer { stale: true, ..answer }), ..read };
    let cases = [
        ("", vec![read(2, 1_500, "admin"), stale(read(2, 2_500, "admin")), read(2, 2_600, "user")]),
        ("told as the truth", vec![read(2, 2_050, "admin")]),
        ("after the new one", vec![read(2, 100, "user"), stale(read(2, 200, "admin"))]),
        ("older than asked for", vec![Read { min_revision: 2, ..read(1, 2_600, "moderator") }]),
        ("true in neither", vec![read(2, 100, "owner")]),
    ];
    let mut wrong = Vec::new();
    for (due, reads) in cases {
        let found = checker::answers_follow(&reads, [&before, &after], Duration::from_millis(40));
        if found.is_empty() != due.is_empty() || !found.iter().any(|found| found.contains(due)) && !due.is_empty() {
            wrong.push(format!("with {due:?} of a lost history this was found: {found:?}"));
        }
    }
    wrong
}

/// In the end: a cache beside the table, a watch that has not seen all, and one that was late.
fn ends() -> Vec<String> {
    let log = log();
    let whole = Seen { commits: log.entries.iter().map(seen).collect(), ..Seen::default() };
    let half = Seen { commits: vec![seen(&log.entries[0])], ..Seen::default() };
    let known = HashMap::from([(1, Duration::ZERO), (2, Duration::ZERO)]);
    let in_time = |limit| checker::changes_come_in_time(&whole, &known, Duration::from_millis(limit)).0.len();
    let counts = [
        checker::cache_equals_table(0, &[(1, "admin".into()), (2, "user".into())], &log).len(),
        checker::cache_equals_table(0, &[(1, "moderator".into()), (2, "admin".into())], &log).len(),
        checker::watches_are_complete(std::slice::from_ref(&whole), &log).len(),
        checker::watches_are_complete(&[whole.clone(), half], &log).len(),
        in_time(100),
        in_time(15),
    ];
    let due = [0, 2, 0, 1, 0, 1];
    (counts != due).then(|| format!("found in the end: {counts:?} instead of {due:?}")).into_iter().collect()
}

/// User 1 became a moderator and then an admin, each by a write of its own, was read in between, and watched. The log of it.
fn sound(history: &History) -> Vec<Entry> {
    history.wrote(write("first", "moderator", [0, 10], Told::Done { revision: 1, changed: true }));
    history.read(read(1, 15, "moderator"));
    history.wrote(write("second", "admin", [20, 30], Told::Done { revision: 2, changed: true }));
    history.read(read(1, 25, "admin"));
    history.read(read(2, 35, "admin"));
    let log = log();
    let watch = Seen { commits: log.entries.iter().map(seen).collect(), ..Seen::default() };
    history.seen.lock().unwrap().push(watch);
    log.entries
}

fn log() -> Log {
    let entries = vec![entry(1, "", "moderator", "first"), entry(2, "moderator", "admin", "second")];
    Log::of(entries, BTreeMap::from([(1, "admin".into())]))
}

fn entry(revision: i64, old: &str, new: &str, reason: &str) -> Entry {
    Entry { revision, user: 1, old: old.into(), new: new.into(), reason: reason.into() }
}

/// What a watch is told of it, ten milliseconds a revision.
fn seen(entry: &Entry) -> (Duration, Commit) {
    let Entry { revision, user, old, new, .. } = entry.clone();
    let change = RoleChange { revision, user_id: user, old_role: old, new_role: new, ..RoleChange::default() };
    (Duration::from_millis(10 * revision as u64), Commit { revision, changes: vec![change], ..Commit::default() })
}

fn declined(current: &str) -> Told {
    Told::Declined { why: MISMATCH.into(), current: current.into() }
}

const PROCESS: Process = Process { replica: 0, start: 1 };

fn write(id: &str, role: &str, [begun, ended]: [u64; 2], told: Told) -> Write {
    let [begun, ended] = [begun, ended].map(Duration::from_millis);
    Write { process: PROCESS, begun, ended, told, ..Write::of(id, 1, role) }
}

/// Of user 1, for two milliseconds.
fn read(revision: i64, ended: u64, role: &str) -> Read {
    let answer = Answer { role: role.into(), revision, source: Source::Cache, stale: false };
    let [begun, ended] = [ended - 2, ended].map(Duration::from_millis);
    Read { user: 1, process: PROCESS, begun, ended, min_revision: 0, answer: Ok(answer) }
}
