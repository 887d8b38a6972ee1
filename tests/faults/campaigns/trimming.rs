//! The log is trimmed under watchers: slow ones, and ones that resume just at the boundary.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, future::join_all};
use rolecache::proto::v1::RoleChange;
use tokio::{task::JoinSet, time::sleep};
use tonic::Status;
use tonic_types::StatusExt;

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    cluster::{Cluster, Plan, Replica, postgres},
    log::{Entry, Log},
    support::server::Shell,
    traffic::{Load, Traffic, reason},
    watcher::Watcher,
};

/// Commits of 40 days ago at the start. The newest 10,000 always stay, so each that comes lets an old one go.
const AGED: i64 = 12_000;

/// Between the users of one of them.
const ASIDE: i64 = 100_000;

/// Commits at once, in a round.
const BURST: i64 = 200;

const SLOW: usize = 4;

/// From the boundary, where no round brings it: all rounds together may.
const FAR: i64 = 2_000;

/// Of what a resume goes on with, so many commits are read.
const READ: usize = 20;

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "trimming",
        unit: "boundaries",
        must_hold: "all of it, or REVISION_COMPACTED; never a hole",
        short: 50,
        nightly: 1_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

/// One change of a commit: whom it is about, the role before, empty for none, and the one after.
type Change = (i64, String, String);

/// What one stream told: where it began, the commits with their changes, and why it ended, if it did.
struct Told {
    after: i64,
    commits: Vec<(i64, Vec<Change>)>,
    compacted: bool,
    /// From where on there is a log, as REVISION_COMPACTED says it.
    oldest: Option<i64>,
    end: Option<String>,
}

/// The log as it was before anything of it was trimmed, and tokens of places in it.
#[derive(Default)]
struct Known {
    commits: BTreeMap<i64, Vec<Change>>,
    /// Of what was committed since the start.
    entries: Vec<Entry>,
    tokens: Mutex<BTreeMap<i64, String>>,
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let plan = Plan {
        replicas: 2,
        args: &["--retain-changes", "24h", "--log-level", "warn,rolecache=info,rolecache::audit=off"],
        env: &[("FAILPOINTS", "server::upkeep=return(20)")],
        ..Plan::default()
    };
    let cluster = Arc::new(Cluster::start(&url, plan).await);
    cluster.replicas.iter().for_each(Replica::kill);
    cluster.shell.go(aged()).await;
    for replica in &cluster.replicas {
        replica.start().await;
    }
    let mut traffic = Traffic::start(&cluster, Load { watchers: 0, ..Load::default() }, &mut rounds.random);
    outcome.proves_nothing(traffic.run_up(200).await.err());
    let mut known = Known { commits: (1..=AGED).map(|n| (n, of_aged(n))).collect(), ..Known::default() };
    let mut boundary = known.look(&cluster.shell).await;
    let over = Arc::new(AtomicBool::new(false));
    let mut slow = JoinSet::new();
    for n in 0..SLOW {
        slow.spawn(read_slowly(cluster.clone(), n % 2, boundary, rounds.random.fork(), over.clone()));
    }
    let mut told = Vec::new();
    while let Some(round) = outcome.next_of(rounds.count) {
        // The last of them is far from it: it has to go on.
        let near = [-1, 0, 1, 2 + rounds.random.i64(0..50), FAR].map(|off| boundary + off);
        let (shell, burst) = (cluster.shell.clone(), burst(round));
        let bursting = tokio::spawn(async move { shell.go(burst).await });
        let resumes = near.map(|after| {
            let replica = &cluster.replicas[rounds.random.usize(..2)];
            let token = known.tokens.lock().unwrap().get(&after).cloned().filter(|_| rounds.random.bool());
            resume(replica, after, token, &known, rounds.random.fork())
        });
        let resumed = join_all(resumes).await;
        bursting.await.expect("a burst does not panic");
        let before = std::mem::replace(&mut boundary, known.look(&cluster.shell).await);
        outcome.violated(resumed.iter().filter_map(|told| told.invented(boundary)));
        told.extend(resumed);
        match boundary > before {
            true => outcome.fired += 1,
            false => outcome.weak.push(format!("boundary {round}: it stayed at {before}")),
        }
    }
    over.store(true, Ordering::Relaxed);
    let mut slow_compacted = 0;
    while let Some(ended) = slow.join_next().await {
        let streams = ended.expect("a slow watcher does not panic");
        slow_compacted += streams.iter().filter(|told| told.compacted).count();
        told.extend(streams);
    }
    outcome.proves_nothing(traffic.throughout().err());
    traffic.stop_calling().await;
    boundary = known.look(&cluster.shell).await;
    let mut log = cluster.log().await;
    // What is trimmed by now was read before.
    log = Log::of(std::mem::take(&mut known.entries), log.table);
    traffic.users.extend(1_000..=1_000 + BURST);
    traffic.judge(&log, &mut outcome).await;
    outcome.violated(told.iter().filter_map(|told| told.invented(boundary)));
    outcome.violated(told.iter().filter_map(|told| told.hole(&known.commits)));
    let compacted = told.iter().filter(|told| told.compacted).count();
    outcome.figure("streams", format!("{}, of which {compacted} were told REVISION_COMPACTED", told.len()));
    outcome.figure("slow watchers overtaken by the trimmer", slow_compacted);
    outcome.figure("trimmed", format!("{boundary} commits"));
    let is_one_sided = compacted == told.len() || slow_compacted == 0;
    outcome.proves_nothing(is_one_sided.then(|| "nobody was overtaken, or everybody".to_owned()));
    outcome
}

/// Old commits, and the table that they lead to: each makes an admin, one in ten three.
fn aged() -> String {
    format!(
        "begin;
         alter table users disable trigger user;
         insert into users (user_id, role)
         select 999 + n + m * {ASIDE}, 'admin' from generate_series(1, {AGED}) n, generate_series(0, 2) m
         where m = 0 or n % 10 = 0;
         alter table users enable always trigger _rolecache_insert, enable always trigger _rolecache_update,
           enable always trigger _rolecache_delete, enable always trigger _rolecache_truncate;
         insert into rolecache.commits (id, xid, revision, size, committed_at)
         select n, '3', n, case when n % 10 = 0 then 3 else 1 end, clock_timestamp() - interval '40 days'
         from generate_series(1, {AGED}) n;
         insert into rolecache.changes (commit_id, user_id, new_role)
         select n, 999 + n + m * {ASIDE}, 'admin' from generate_series(1, {AGED}) n, generate_series(0, 2) m
         where m = 0 or n % 10 = 0 order by n, m;
         select setval('rolecache.revision', {AGED}), setval('rolecache.commits_id_seq', {AGED});
         commit;
         analyze"
    )
}

fn of_aged(revision: i64) -> Vec<Change> {
    let users = (0..if revision % 10 == 0 { 3 } else { 1 }).map(|m| 999 + revision + m * ASIDE);
    users.map(|user| (user, String::new(), "admin".to_owned())).collect()
}

/// Commits of one change each, and all that there are 40 days older.
fn burst(round: u64) -> String {
    let role = ["user", "moderator", "owner"][round as usize % 3];
    format!(
        "do $$ begin for i in 1..{BURST} loop
           update users set role = '{role}' where user_id = 1000 + i;
           commit;
         end loop; end $$;
         update rolecache.commits set committed_at = committed_at - interval '40 days'
         where committed_at > clock_timestamp() - interval '1 day'"
    )
}

impl Known {
    /// Up to where the log is trimmed now.
    async fn look(&mut self, shell: &Shell) -> i64 {
        let newest = self.commits.last_key_value().map_or(0, |(revision, _)| *revision);
        let printed =
            shell.go(format!("select trimmed_revision from rolecache.feed; {}", Log::query(shell, newest))).await;
        let mut lines = printed.lines();
        let boundary = lines.next().expect("the feed has its row").parse().unwrap();
        let new: Vec<Entry> = lines.map(Entry::parse).collect();
        for Entry { revision, user, old, new, .. } in new.clone() {
            self.commits.entry(revision).or_default().push((user, old, new));
        }
        self.entries.extend(new);
        boundary
    }
}

/// Resumes after a revision, by a token of it where there is one, and reads on for a while.
async fn resume(
    replica: &Replica,
    after: i64,
    token: Option<String>,
    known: &Known,
    mut random: fastrand::Rng,
) -> Told {
    let mut watcher = Watcher::after(token.unwrap_or(after.to_string()));
    let mut end = None;
    if let Err(status) = watcher.open(&mut replica.narrow_client().await).await {
        end = Some(status);
    }
    while end.is_none() && watcher.seen.commits.len() < READ {
        end = watcher.next().await.err();
        if random.u8(..4) == 0 {
            sleep(Duration::from_millis(random.u64(1..10))).await;
        }
    }
    let seen = watcher.seen.commits.iter().map(|(_, commit)| (commit.revision, commit.resume_token.clone()));
    known.tokens.lock().unwrap().extend(seen);
    Told::of(after, &watcher, end)
}

/// Reads less than comes, and starts over where it is told to.
async fn read_slowly(
    cluster: Arc<Cluster>,
    replica: usize,
    mut after: i64,
    mut random: fastrand::Rng,
    over: Arc<AtomicBool>,
) -> Vec<Told> {
    let mut client = cluster.replicas[replica].narrow_client().await;
    let mut streams = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let mut watcher = Watcher::after(after);
        let mut end = watcher.open(&mut client).await.err();
        while end.is_none() && !over.load(Ordering::Relaxed) {
            end = watcher.next().await.err();
            sleep(Duration::from_millis(random.u64(1..20))).await;
        }
        let oldest = end.as_ref().and_then(oldest);
        streams.push(Told::of(after, &watcher, end));
        after = oldest.unwrap_or(watcher.at());
    }
    streams
}

/// From where on there is a log, as REVISION_COMPACTED says it.
fn oldest(status: &Status) -> Option<i64> {
    status.get_details_error_info()?.metadata.get("oldest")?.parse().ok()
}

impl Told {
    fn of(after: i64, watcher: &Watcher, end: Option<Status>) -> Self {
        let change = |change: RoleChange| (change.user_id, change.old_role, change.new_role);
        let commits: Vec<_> = watcher
            .seen
            .commits
            .iter()
            .map(|(_, commit)| (commit.revision, commit.changes.iter().cloned().map(change).collect()))
            .collect();
        let compacted = end.as_ref().is_some_and(|status| {
            let at = commits.last().map_or(after, |(revision, _): &(i64, Vec<Change>)| *revision);
            reason(status) == "REVISION_COMPACTED" && oldest(status).is_some_and(|oldest| oldest > at)
        });
        Self { after, commits, compacted, oldest: end.as_ref().and_then(oldest), end: end.as_ref().map(reason) }
    }

    /// What it was told is trimmed, and is not.
    fn invented(&self, boundary: i64) -> Option<String> {
        let Self { after, oldest, .. } = self;
        let is_there = self.compacted && oldest.is_none_or(|oldest| oldest > boundary);
        is_there
            .then(|| format!("a watch after {after} was told REVISION_COMPACTED to {oldest:?}, the log to {boundary}"))
    }

    /// What is wrong with it, if anything.
    fn hole(&self, known: &BTreeMap<i64, Vec<Change>>) -> Option<String> {
        let Self { after, commits, compacted, end, .. } = self;
        let due = known.range(after + 1..);
        if let Some((due, told)) = due.zip(commits).find(|(due, told)| *due != (&told.0, &told.1)) {
            return Some(format!("a hole: a watch after {after} was told of {told:?} where {due:?} was due"));
        }
        match end {
            Some(end) if !compacted => Some(format!("a watch after {after} ended with {end} at {:?}", commits.last())),
            _ => None,
        }
    }
}
