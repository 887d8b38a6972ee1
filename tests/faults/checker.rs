//! The promises that a history can break, each a function with its name. All judge by the log in the store.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use super::{
    history::{Answer, End, Giver, History, MISMATCH, NO_ADMIN, Process, Read, Seen, Snapshot, Told, Write},
    log::{DEFAULT, Entry, Log},
    request::ADMIN,
    traffic::NO_REASON,
};

/// How old an answer may be that is not marked stale: the promise of bounded staleness.
pub const STALENESS: Duration = Duration::from_secs(2);

/// The newest revision that can have been there by some moment: what was given to a write that began later is newer, and
/// so is all above it. Nothing bounds it after the last write.
struct Horizon {
    /// When a write began, and the least revision that was given to it or to one that began after it.
    given: Vec<(Duration, i64)>,
}

/// The newest revision that anybody had been told of by some moment.
struct Newest {
    told: Vec<(Duration, i64)>,
}

/// What excuses a call that fails, beside what the caller did itself.
#[derive(Default)]
pub struct Excuses {
    /// Reasons of the contract that what is broken here brings about.
    pub reasons: &'static [&'static str],
    /// Of this replica only; None for any.
    pub excused: Option<usize>,
    /// When nothing was broken: what began and ended within one has no excuse but an outage.
    pub calms: Vec<(Duration, Duration)>,
    /// When each replica did not run, or was not ready yet, by its number: then, or when its clients find out, and only then, a
    /// connection may break or time out. A server that is not ready has no store yet.
    pub outages: HashMap<usize, Vec<(Duration, Duration)>>,
}

/// What calls may be told while their store is out of reach.
pub const STORE_BROKEN: &[&str] = &["STORE_UNREACHABLE", "OUTCOME_UNKNOWN", "OVERLOADED"];

/// A store out of reach whose sessions may hold rows.
pub const STORE_STUCK: &[&str] = &["STORE_UNREACHABLE", "OUTCOME_UNKNOWN", "OVERLOADED", "USER_BUSY"];

/// The same, and what was told of is gone when it is back.
pub const HISTORY_LOST: &[&str] = &["STORE_UNREACHABLE", "OUTCOME_UNKNOWN", "OVERLOADED", "REVISION_UNKNOWN"];

/// Rows are held, and that is all.
pub const ROWS_HELD: &[&str] = &["USER_BUSY"];

/// What no read is ever told.
const OF_WRITES: [&str; 2] = ["OUTCOME_UNKNOWN", "USER_BUSY"];

/// How long a call may take while nothing is broken.
const PROMPT: Duration = Duration::from_secs(3);

/// After an outage: who has called before finds the connection broken by the next call.
const FOUND_BROKEN: Duration = Duration::from_secs(1);

/// What is written down of a call whose client did not wait for the answer.
pub const GONE: &str = "the client was gone";

/// Everything that must hold of any history, whatever was broken.
pub fn all(history: &History, log: &Log, excuses: &Excuses) -> Vec<String> {
    let writes = history.writes.lock().unwrap();
    let reads = history.reads.lock().unwrap();
    let seen = history.seen.lock().unwrap();
    let mut found = failures_have_reasons(&writes, &reads, excuses);
    found.extend(history.untold.lock().unwrap().iter().map(|write| format!("never told what became of it: {write}")));
    found.extend(writes_are_durable_and_single(&writes, log));
    found.extend(declines_are_true(&writes, &reads, log));
    found.extend(reads_are_true(&reads, &writes, log));
    found.extend(calls_are_prompt(&writes, &reads, &excuses.calms));
    found.extend(revisions_never_go_back(&reads, &writes));
    found.extend(seen.iter().flat_map(|seen| watches_are_the_log(seen, log)));
    found.extend(seen.iter().flat_map(|seen| watches_begin_well(seen, log)));
    found.extend(watches_stay_open(&history.ends.lock().unwrap(), excuses));
    found
}

/// Watches stay open whatever becomes of their store; only a server that goes takes its own with it. One that cannot open
/// says why.
pub fn watches_stay_open(ends: &[End], excuses: &Excuses) -> Vec<String> {
    let is_excused = |end: &&End| match end.was_open {
        true => excuses.is_of_an_outage(&end.why, end.process, [end.last, end.ended]),
        false => excuses.cover(&end.why, end.process, [end.last, end.ended]),
    };
    ends.iter().filter(|end| !is_excused(end)).map(|end| format!("a watch ended: {end:?}")).collect()
}

/// Whatever fails says why, and what it says fits to what is broken. A call that ends without a reason had no server;
/// that its client ended it is written down the same way: waiting without a bound.
pub fn failures_have_reasons(writes: &[Write], reads: &[Read], excuses: &Excuses) -> Vec<String> {
    let mut found = Vec::new();
    for write in writes {
        let (Told::Unknown(what) | Told::Refused(what) | Told::Declined { why: what, .. }) = &write.told else {
            continue;
        };
        let is_asked_for = what == GONE
            || (what == MISMATCH && write.expected.is_some())
            || (what == NO_ADMIN && write.giver.is_some());
        if !is_asked_for && !excuses.cover(what, write.process, [write.begun, write.ended]) {
            found.push(format!("a write was told {what}: {write:?}"));
        }
    }
    for read in reads {
        // A read leaves nothing in doubt, and waits for no row.
        if let Err(what) = &read.answer
            && (OF_WRITES.contains(&what.as_str()) || !excuses.cover(what, read.process, [read.begun, read.ended]))
        {
            found.push(format!("a read was told {what}: {read:?}"));
        }
    }
    found
}

/// While nothing is broken, calls get what they ask for.
pub fn most_succeed(calls: u64, succeeded: u64) -> Option<String> {
    (2 * succeeded < calls).then(|| format!("only {succeeded} of {calls} calls succeeded though nothing was broken"))
}

/// *Durable*, and one effect per request: what was acknowledged is in the log once, where it was said to be; what was
/// refused is not; nothing is there that nobody asked for.
pub fn writes_are_durable_and_single(writes: &[Write], log: &Log) -> Vec<String> {
    let mut found = Vec::new();
    let horizon = Horizon::of(writes);
    let mut logged: HashMap<&str, Vec<_>> = HashMap::new();
    for entry in log.entries.iter().filter(|entry| !entry.reason.is_empty()) {
        logged.entry(&entry.reason).or_default().push(entry);
    }
    let mut attempts: BTreeMap<&str, Vec<&Write>> = BTreeMap::new();
    for write in writes {
        attempts.entry(&write.id).or_default().push(write);
    }
    for (id, attempts) in &attempts {
        let entries = logged.remove(id).unwrap_or_default();
        let is_split = entries.iter().any(|entry| entry.revision != entries[0].revision);
        let mut answers = attempts.iter().filter(|write| matches!(write.told, Told::Done { .. }));
        let first = answers.next();
        // Where nobody was told, any of the bodies that came under this id may be the one.
        let of_any = attempts.iter().map(|write| write.changes()).max().unwrap_or_default();
        let most = first.map_or(of_any, |write| write.changes());
        if is_split || entries.len() > most {
            found.push(format!("doubled: {id} is in the log {} times: {entries:?}", entries.len()));
        }
        for other in answers {
            if first.is_some_and(|first| first.told != other.told) {
                found.push(format!("two answers: {id} was told {:?} and {:?}", first.unwrap().told, other.told));
            }
        }
        match first.map(|write| (write, &write.told)) {
            Some((write, Told::Done { revision, changed: true })) => {
                let is_it =
                    |entry: &&Entry| entry.revision == *revision && entry.user == write.user && entry.new == write.role;
                found.extend(write.giver.and_then(|giver| gave(giver, *revision, &entries, log)));
                match entries.first().filter(|entry| is_it(entry)) {
                    None => found.push(format!("lost: {write:?} was acknowledged, the log has {entries:?}")),
                    Some(entry) if !write.expects(&entry.old) => {
                        found.push(format!("done though another role was expected: {write:?}: {entry:?}"));
                    }
                    Some(_) => {}
                }
            }
            Some((write, Told::Done { revision, changed: false })) => {
                if !entries.is_empty() {
                    found.push(format!("{id} was said to change nothing, and did: {entries:?}"));
                } else if !write.expects(&write.role) {
                    found.push(format!("a no-op though another role was expected: {write:?}"));
                } else if !log.had(write.user, role_of(&write.role), *revision, horizon.at(write.ended)) {
                    found.push(format!("a no-op that was none: {write:?}"));
                }
            }
            _ => {
                let in_doubt = attempts.iter().any(|write| matches!(write.told, Told::Unknown(_)));
                if !in_doubt && !entries.is_empty() {
                    found.push(format!("refused, and done all the same: {attempts:?}: {entries:?}"));
                }
            }
        }
    }
    found.extend(logged.into_values().map(|entries| format!("nobody asked for {entries:?}")));
    found
}

/// *No invented rights* of what a write says that it found: the role that it names was there, and it was not what the write was
/// for. And a write that has been done knows that when it is asked again.
pub fn declines_are_true(writes: &[Write], reads: &[Read], log: &Log) -> Vec<String> {
    let mut found = Vec::new();
    let (horizon, newest) = (Horizon::of(writes), Newest::of(writes, reads));
    let mut logged: HashMap<&str, i64> = HashMap::new();
    for entry in &log.entries {
        logged.entry(&entry.reason).or_insert(entry.revision);
    }
    for write in writes {
        let Told::Declined { current, .. } = &write.told else { continue };
        let (user, wanted) = match write.giver {
            Some(giver) => (giver.user, ADMIN),
            None => (write.user, write.expected.as_deref().unwrap_or_default()),
        };
        let (from, to) = (newest.at(write.begun), horizon.at(write.ended));
        if log.had_only(user, wanted, from, to) {
            found.push(format!("declined though all was as it should be: {write:?}"));
        }
        if !log.had(user, current, from, to) {
            found.push(format!("declined for a role that was not there from {from} to {to}: {write:?}"));
        }
        if logged.get(write.id.as_str()).is_some_and(|revision| *revision <= from) {
            found.push(format!("declined though it had been done: {write:?}"));
        }
    }
    found
}

/// While nothing is broken nobody waits for long.
pub fn calls_are_prompt(writes: &[Write], reads: &[Read], calms: &[(Duration, Duration)]) -> Vec<String> {
    let is_slow = |begun: Duration, ended: Duration| {
        calms.iter().any(|(from, to)| (*from..*to).contains(&begun) && ended.min(*to) - begun > PROMPT)
    };
    let slow_writes = writes.iter().filter(|write| is_slow(write.begun, write.ended));
    let slow_reads = reads.iter().filter(|read| is_slow(read.begun, read.ended));
    let writes = slow_writes.map(|write| format!("slow though nothing was broken: {write:?}"));
    writes.chain(slow_reads.map(|read| format!("slow though nothing was broken: {read:?}"))).collect()
}

/// The second half of a transfer: who gave was an admin, and is none afterwards where that was asked for.
fn gave(giver: Giver, revision: i64, entries: &[&Entry], log: &Log) -> Option<String> {
    let gives = |entry: &&Entry| (entry.user, entry.old.as_str(), entry.new.as_str()) == (giver.user, ADMIN, DEFAULT);
    let is_told = !giver.demoted || entries.get(1).is_some_and(gives);
    let was_admin = log.had(giver.user, ADMIN, revision - 1, revision - 1);
    (!is_told || !was_admin).then(|| format!("half a transfer, or from no admin: {giver:?}: {entries:?}"))
}

/// What a user has who was given this.
fn role_of(given: &str) -> &str {
    if given.is_empty() { DEFAULT } else { given }
}

/// *No invented rights*, *at least as fresh*, *bounded staleness*: every answer is a role that the user had at the answer's
/// revision or later, but before the answer was there, and, unless it is marked stale, nothing that had been acknowledged
/// two seconds before is missing.
pub fn reads_are_true(reads: &[Read], writes: &[Write], log: &Log) -> Vec<String> {
    let mut found = Vec::new();
    let horizon = Horizon::of(writes);
    let mut done: Vec<(Duration, i64)> = writes
        .iter()
        .filter_map(|write| match write.told {
            Told::Done { revision, .. } => Some((write.ended, revision)),
            _ => None,
        })
        .collect();
    done.sort();
    // The newest revision that was acknowledged by then.
    let mut newest = 0;
    for (_, revision) in &mut done {
        newest = newest.max(*revision);
        *revision = newest;
    }
    for read in reads {
        let Ok(answer) = &read.answer else { continue };
        let due = if answer.stale {
            0
        } else {
            let since = read.begun.saturating_sub(STALENESS);
            let known = done.partition_point(|(at, _)| *at < since);
            known.checked_sub(1).map_or(0, |last| done[last].1)
        };
        // Marked or not.
        if answer.revision < read.min_revision {
            found.push(format!("older than asked for: {read:?}"));
        }
        let newest = horizon.at(read.ended);
        if answer.revision > newest {
            found.push(format!("ahead of its time: at most {newest} was there by then: {read:?}"));
        }
        if !log.had(read.user, &answer.role, answer.revision, newest) {
            found.push(format!("never true: {read:?}"));
        }
        if answer.revision < due {
            found.push(format!("stale, and answered as truth: {due} had been acknowledged: {read:?}"));
        }
    }
    found
}

/// While a history is lost: an answer is of the one or of the other. Of the one that is gone nothing is the truth once
/// nobody can have proven it for two seconds, and nothing at all is told by a process that has told of the new one.
pub fn answers_follow(reads: &[Read], [before, after]: [&Log; 2], stops: Duration) -> Vec<String> {
    let answers: Vec<_> = reads.iter().filter_map(|read| Some((read, read.answer.as_ref().ok()?))).collect();
    let is_of = |log: &Log, user, answer: &Answer| {
        answer.revision <= log.head() && log.had(user, &answer.role, answer.revision, i64::MAX)
    };
    let mut noticed: HashMap<Process, Duration> = HashMap::new();
    for (read, answer) in &answers {
        if !is_of(before, read.user, answer) {
            let first = noticed.entry(read.process).or_insert(read.ended);
            *first = (*first).min(read.ended);
        }
    }
    let old = answers.iter().filter(|(read, answer)| answer.revision < read.min_revision);
    let mut found: Vec<String> = old.map(|(read, _)| format!("older than asked for: {read:?}")).collect();
    for (read, answer) in answers.iter().filter(|(read, answer)| !is_of(after, read.user, answer)) {
        if !is_of(before, read.user, answer) {
            found.push(format!("true in neither history: {read:?}"));
        }
        if !answer.stale && read.begun >= stops + STALENESS {
            found.push(format!("of the lost history, and told as the truth: {read:?}"));
        }
        if noticed.get(&read.process).is_some_and(|noticed| *noticed < read.begun) {
            found.push(format!("of the lost history, after the new one: {read:?}"));
        }
    }
    found
}

/// *Prefix* and *own write*: what one process answers never goes back behind what it had answered before.
pub fn revisions_never_go_back(reads: &[Read], writes: &[Write]) -> Vec<String> {
    let mut told: HashMap<Process, Vec<(Duration, i64)>> = HashMap::new();
    let fresh =
        |read: &&Read| read.process != Process::NEITHER && read.answer.as_ref().is_ok_and(|answer| !answer.stale);
    for read in reads.iter().filter(fresh) {
        told.entry(read.process).or_default().push((read.ended, read.answer.as_ref().unwrap().revision));
    }
    for write in writes {
        if let Told::Done { revision, .. } = write.told {
            told.entry(write.process).or_default().push((write.ended, revision));
        }
    }
    for told in told.values_mut() {
        told.sort();
        let mut newest = 0;
        for (_, revision) in told {
            newest = newest.max(*revision);
            *revision = newest;
        }
    }
    let mut found = Vec::new();
    for read in reads.iter().filter(fresh) {
        let told = &told[&read.process];
        let before = told.partition_point(|(ended, _)| *ended < read.begun);
        let floor = before.checked_sub(1).map_or(0, |last| told[last].1);
        if read.answer.as_ref().unwrap().revision < floor {
            found.push(format!("went back behind {floor}: {read:?}"));
        }
    }
    found
}

/// *Watch*: ordered, unique, whole, reliable, resumable, and heartbeats that promise nothing early.
pub fn watches_are_the_log(seen: &Seen, log: &Log) -> Vec<String> {
    let mut found = Vec::new();
    let due = log.commits_after(seen.from);
    let seen_to = seen.commits.last().map_or(seen.from, |(_, commit)| commit.revision);
    let due: Vec<_> = due.into_iter().filter(|(revision, _)| *revision <= seen_to).collect();
    let mut told = seen.commits.iter();
    let mut is_in_step = true;
    for (revision, entries) in &due {
        let Some((_, commit)) = told.next() else {
            found.push(format!("a watch from {} missed {revision}", seen.from));
            is_in_step = false;
            break;
        };
        if commit.revision != *revision {
            let what = if commit.revision > *revision { "missed" } else { "was told twice, or out of order, before" };
            found.push(format!("a watch from {} {what} {revision}: it was told {}", seen.from, commit.revision));
            is_in_step = false;
            break;
        }
        let same = commit.changes.len() == entries.len()
            && commit.changes.iter().zip(entries).all(|(change, entry)| {
                (change.user_id, &change.old_role, &change.new_role) == (entry.user, &entry.old, &entry.new)
            });
        if !same {
            found.push(format!("a watch was told {:?} of {entries:?}", commit.changes));
        }
    }
    if is_in_step && let Some((_, commit)) = told.next() {
        found.push(format!("a watch from {} was told of {}, which is not in the log", seen.from, commit.revision));
    }
    for (revision, before) in &seen.heartbeats {
        if let Some((_, next)) = seen.commits.get(*before)
            && next.revision <= *revision
        {
            found.push(format!("a heartbeat promised {revision}, and {} came after it", next.revision));
        }
    }
    found
}

/// A watch that began with a snapshot was given what the log leads to, and no watch begins a second time.
pub fn watches_begin_well(seen: &Seen, log: &Log) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(Snapshot { revision, users }) = &seen.snapshot {
        let mut told = users.clone();
        told.sort();
        let due = log.roles_at(*revision);
        if *revision != seen.from || told != due {
            found.push(format!("a snapshot at {revision} has {told:?} instead of {due:?}"));
        }
    }
    found.extend(seen.started_over.iter().map(|revision| format!("a watch started over at {revision}")));
    found
}

/// A watch has to have seen all of it in the end.
pub fn watches_are_complete(seen: &[Seen], log: &Log) -> Vec<String> {
    let head = log.head();
    let behind = |seen: &&Seen| seen.commits.last().map_or(seen.from, |(_, commit)| commit.revision) < head;
    seen.iter()
        .filter(behind)
        .map(|seen| {
            format!(
                "a watch from {} ended at {:?}, before {head}",
                seen.from,
                seen.commits.last().map(|c| c.1.revision)
            )
        })
        .collect()
}

/// *Prefix*, in the end: what a replica answers from its cache is what the table holds.
pub fn cache_equals_table(replica: usize, answers: &[(i64, String)], log: &Log) -> Vec<String> {
    let held = |user: &i64| log.table.get(user).map_or(DEFAULT, String::as_str);
    answers
        .iter()
        .filter(|(user, role)| held(user) != role)
        .map(|(user, role)| format!("replica {replica} says {role:?} of {user}, the table {:?}", held(user)))
        .collect()
}

/// Every commit that somebody was told of, by then at the latest, arrived at most so much later; how late each was.
pub fn changes_come_in_time(
    seen: &Seen,
    known: &HashMap<i64, Duration>,
    limit: Duration,
) -> (Vec<String>, Vec<Duration>) {
    let mut found = Vec::new();
    let mut times = Vec::new();
    for (at, commit) in &seen.commits {
        let Some(known) = known.get(&commit.revision) else { continue };
        let late = at.saturating_sub(*known);
        if late > limit {
            found.push(format!("{} came {late:.1?} late, at {at:.1?}", commit.revision));
        }
        times.push(late);
    }
    (found, times)
}

// === impl Excuses ===

impl Excuses {
    fn cover(&self, what: &str, process: Process, during: [Duration; 2]) -> bool {
        let [begun, ended] = during;
        let is_calm = self.calms.iter().any(|(from, to)| *from <= begun && ended <= *to);
        let is_broken = self.excused.is_none_or(|replica| replica == process.replica);
        (self.reasons.contains(&what) && is_broken && !is_calm) || self.is_of_an_outage(what, process, during)
    }

    fn is_of_an_outage(&self, what: &str, process: Process, [begun, ended]: [Duration; 2]) -> bool {
        let mut outages = self.outages.get(&process.replica).into_iter().flatten();
        let afterwards = match what {
            what if what.contains(NO_REASON) => FOUND_BROKEN,
            "STORE_UNREACHABLE" => Duration::ZERO,
            _ => return false,
        };
        outages.any(|(from, to)| *from <= ended && begun <= to.saturating_add(afterwards))
    }
}

// === impl Newest ===

impl Newest {
    fn of(writes: &[Write], reads: &[Read]) -> Self {
        let done = writes.iter().filter_map(|write| match write.told {
            Told::Done { revision, .. } => Some((write.ended, revision)),
            _ => None,
        });
        let answered = reads.iter().filter_map(|read| Some((read.ended, read.answer.as_ref().ok()?.revision)));
        let mut told: Vec<_> = done.chain(answered).collect();
        told.sort();
        let mut newest = 0;
        for (_, revision) in &mut told {
            newest = newest.max(*revision);
            *revision = newest;
        }
        Self { told }
    }

    fn at(&self, moment: Duration) -> i64 {
        let before = self.told.partition_point(|(ended, _)| *ended < moment);
        before.checked_sub(1).map_or(0, |last| self.told[last].1)
    }
}

// === impl Horizon ===

impl Horizon {
    fn of(writes: &[Write]) -> Self {
        // A repeat is told the revision of an earlier attempt, which it was given after that one began.
        let mut begun: HashMap<&str, Duration> = HashMap::new();
        for write in writes {
            let first = begun.entry(&write.id).or_insert(write.begun);
            *first = (*first).min(write.begun);
        }
        let mut given: Vec<(Duration, i64)> = writes
            .iter()
            .filter_map(|write| match write.told {
                Told::Done { revision, changed: true } => Some((begun[write.id.as_str()], revision)),
                _ => None,
            })
            .collect();
        given.sort();
        let mut least = i64::MAX;
        for (_, revision) in given.iter_mut().rev() {
            least = least.min(*revision);
            *revision = least;
        }
        Self { given }
    }

    fn at(&self, moment: Duration) -> i64 {
        let later = self.given.partition_point(|(begun, _)| *begun <= moment);
        self.given.get(later).map_or(i64::MAX, |(_, revision)| revision - 1)
    }
}
