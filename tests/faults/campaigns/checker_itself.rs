//! Histories that break a promise, made by hand: the checker has to say so of each, and nothing of one that is sound.

use std::{collections::BTreeMap, time::Duration};

use futures::FutureExt;
use rolecache::proto::v1::Source;

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker::{self, Excuses},
    history::{Answer, History, MISMATCH, Process, Read, Told, Write},
    log::{Entry, Log},
    traffic::NO_REASON,
};

/// A history, and what has to be found in it: nothing, where that is empty.
type Case = (&'static str, fn(&History));

const CASES: [Case; 12] = [
    ("", |_| {}),
    ("never true", |history| {
        // At 20 the user became an admin, at the earliest; this was told before.
        history.read(read(1, 15, "admin"));
    }),
    ("ahead of its time", |history| {
        history.read(Read { process: Process { replica: 1, start: 1 }, ..read(2, 15, "admin") });
    }),
    ("a no-op that was none", |history| {
        let told = Told::Done { revision: 1, changed: false };
        history.wrote(write("no-op", "admin", [12, 15], told));
    }),
    ("older than asked for", |history| {
        let Read { answer: Ok(answer), .. } = read(1, 15, "moderator") else { unreachable!("it is answered") };
        history.read(Read { min_revision: 2, answer: Ok(Answer { stale: true, ..answer }), ..read(1, 15, "") });
    }),
    ("a read was told REVISION_UNKNOWN", |history| {
        history.read(Read { answer: Err("REVISION_UNKNOWN".into()), ..read(0, 15, "") });
    }),
    ("a read was told Cancelled without a reason", |history| {
        // No server was away.
        history.read(Read { answer: Err(format!("Cancelled {NO_REASON}: Timeout expired")), ..read(0, 8_010, "") });
    }),
    ("a write was told ROLE_MISMATCH", |history| {
        history.wrote(write("refused", "user", [40, 50], Told::Refused(MISMATCH.into())));
    }),
    ("refused, and done all the same", |history| {
        let mut writes = history.writes.lock().unwrap();
        writes[1] = Write { expected: Some("user".into()), told: Told::Refused(MISMATCH.into()), ..writes[1].clone() };
    }),
    ("done though another role was expected", |history| {
        history.writes.lock().unwrap()[1].expected = Some("user".into());
    }),
    ("a no-op though another role was expected", |history| {
        let told = Told::Done { revision: 2, changed: false };
        history.wrote(Write { expected: Some("user".into()), ..write("no-op", "admin", [32, 35], told) });
    }),
    ("never told what became of it", |history| history.untold.lock().unwrap().push("a write".into())),
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
        sound(&history);
        add(&history);
        let found = checker::all(&history, &log(), &Excuses::default());
        let is_it = |found: &String| !due.is_empty() && found.contains(due);
        outcome.violated((!due.is_empty() && !found.iter().any(is_it)).then(|| format!("not found: {due}")));
        let strange = found.iter().filter(|found| !is_it(found));
        outcome.violated(strange.map(|found| format!("with {due:?} this was found: {found}")));
        outcome.fired += 1;
    }
    outcome.violated(lost_histories());
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

/// User 1 became a moderator and then an admin, each by a write of its own, and was read in between.
fn sound(history: &History) {
    history.wrote(write("first", "moderator", [0, 10], Told::Done { revision: 1, changed: true }));
    history.read(read(1, 15, "moderator"));
    history.wrote(write("second", "admin", [20, 30], Told::Done { revision: 2, changed: true }));
    history.read(read(1, 25, "admin"));
    history.read(read(2, 35, "admin"));
}

fn log() -> Log {
    let entry = |revision, old: &str, new: &str, reason: &str| Entry {
        revision,
        user: 1,
        old: old.into(),
        new: new.into(),
        reason: reason.into(),
    };
    let entries = vec![entry(1, "", "moderator", "first"), entry(2, "moderator", "admin", "second")];
    Log::of(entries, BTreeMap::from([(1, "admin".into())]))
}

const PROCESS: Process = Process { replica: 0, start: 1 };

fn write(id: &str, role: &str, [begun, ended]: [u64; 2], told: Told) -> Write {
    let [begun, ended] = [begun, ended].map(Duration::from_millis);
    Write { id: id.into(), user: 1, role: role.into(), expected: None, process: PROCESS, begun, ended, told }
}

/// Of user 1, for two milliseconds.
fn read(revision: i64, ended: u64, role: &str) -> Read {
    let answer = Answer { role: role.into(), revision, source: Source::Cache, stale: false };
    let [begun, ended] = [ended - 2, ended].map(Duration::from_millis);
    Read { user: 1, process: PROCESS, begun, ended, min_revision: 0, answer: Ok(answer) }
}
