//! The store is there and does nothing: its sessions wait for foreign locks, others have them all, or it stands still as a
//! whole.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::FutureExt;
use rolecache::proto::v1::{GetRoleRequest, Source};
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep},
};

use crate::{
    asking::until_serving,
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan, postgres},
    history::{Answer, History, Told, Write},
    sessions::Sessions,
    support::postgres::{Postgres, Session},
    traffic::{Load, Traffic, reason},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    /// Everything is locked, the log too, and users are asked for whom nobody knows. The replicas keep sessions free all the
    /// same: they bound what fills take.
    AllLocked,
    TableLocked,
    /// SIGSTOP of all its processes.
    Frozen,
    /// Others have every session that it gives.
    NoSessions,
    /// A transaction that numbers its commit long before it ends.
    FeedLocked,
}

const STUCK: [Fault; 4] = [Fault::AllLocked, Fault::TableLocked, Fault::Frozen, Fault::NoSessions];

/// What makes it so.
enum Hold {
    Lock(Session),
    Freeze,
    Sessions(Sessions),
}

/// Of a write whose user has the role already, or is not what it is for.
const NOTHING: &str = "nothing to do";

/// How long a cached read may take: half a second for a proof that does not come, and the rest.
const READ_ANSWERS: Duration = Duration::from_secs(1);

/// How long a read may take that has to ask the store.
const COLD_LIMIT: Duration = Duration::from_secs(6);

/// How long a write may take that was on its way: what became of it is looked for.
const ON_THEIR_WAY: Duration = Duration::from_secs(12);

/// Before it is stuck, and as many again while it is.
const WRITERS: usize = 16;

/// Reads of users that nobody knows.
const COLD: u64 = 60;

const LOCK_ALL: &str = "begin; lock table users, rolecache.commits, rolecache.changes, rolecache.requests,
    rolecache.feed in access exclusive mode;";
const LOCK_USERS: &str = "begin; lock table users in access exclusive mode;";
const LOCK_FEED: &str = "begin; set constraints all immediate;
    insert into users (user_id, role) values (999999, 'admin') on conflict (user_id) do update
      set role = case users.role when 'admin' then 'user' else 'admin' end;";

pub fn campaigns() -> Vec<Campaign> {
    vec![
        Campaign {
            name: "store-stuck",
            unit: "times stuck",
            must_hold: "cached reads go on, writes fail within 3 s",
            short: STUCK.len() as u64,
            nightly: 20,
            body: |rounds| {
                run(rounds, &STUCK, checker::STORE_STUCK, Duration::from_secs(6), Duration::from_secs(3)).boxed()
            },
        },
        Campaign {
            name: "feed-lock-held",
            unit: "times held",
            must_hold: "writes are refused within 6 s with the right reason, reads go on, all is well after",
            short: 1,
            nightly: 10,
            body: |rounds| {
                run(rounds, &[Fault::FeedLocked], checker::ROWS_HELD, Duration::from_secs(10), Duration::from_secs(6))
                    .boxed()
            },
        },
    ]
}

/// Each fault lasts for so long, and lets writes fail after `limit` at most.
async fn run(
    mut rounds: Rounds,
    faults: &[Fault],
    excuses: &'static [&'static str],
    lasts: Duration,
    limit: Duration,
) -> Outcome {
    let mut outcome = Outcome::default();
    let (postgres, url) = postgres().await;
    let postgres = Arc::new(postgres);
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, ..Plan::default() }).await);
    let load = Load { writers: WRITERS, excuses, ..Load::default() };
    let mut traffic = Traffic::start(&cluster, load, &mut rounds.random);
    let mut met = Met { limit, ..Met::default() };
    let mut stuck = Vec::new();
    while let Some(round) = outcome.next_of(rounds.count) {
        let fault = faults[round as usize % faults.len()];
        let weak = traffic.run_up(1000).await;
        let begun = traffic.history.now();
        let hold = begin(fault, &postgres, &url).await;
        let holds = traffic.history.now();
        traffic.write_now(WRITERS, load, &mut rounds.random);
        // They take what sessions fills may have; what reads the log has its own.
        let mut cold = JoinSet::new();
        if matches!(fault, Fault::AllLocked | Fault::TableLocked) {
            ask_cold(&cluster, &mut rounds.random, &mut cold);
        }
        sleep(lasts).await;
        let ends = traffic.history.now();
        end(fault, &postgres, hold).await;
        while let Some(found) = cold.join_next().await {
            outcome.violated(found.expect("a caller does not panic"));
        }
        for (replica, number) in cluster.replicas.iter().zip(0..) {
            met.back.push(replica.until_in_step().await);
            // Its writer too.
            let serves = until_serving(&cluster, number, &traffic.history, rounds.random.fork()).await;
            outcome.violated(serves.err().map(|why| format!("{fault:?} {round}: {why}")));
        }
        let weak = weak.and(traffic.run_up(1000).await);
        let refused = refused(&traffic.history, [holds, ends]);
        stuck.push((fault, [begun, holds, ends]));
        match weak {
            Err(weak) => outcome.weak.push(format!("{fault:?} {round}: {weak}")),
            Ok(()) if !refused => outcome.weak.push(format!("{fault:?} {round}: no write met it")),
            Ok(()) => outcome.fired += 1,
        }
    }
    // Whatever was on its way is in the book then.
    traffic.stop_calling().await;
    for (fault, times) in stuck {
        met.judge(fault, &traffic.history, times);
    }
    traffic.settle(&mut outcome).await;
    met.tell(&mut outcome);
    let memory = cluster.replicas.iter().map(|replica| replica.memory("VmHWM"));
    outcome.figure("memory, in MiB, at most", memory.fold(0.0, f64::max));
    outcome
}

async fn begin(fault: Fault, postgres: &Arc<Postgres>, url: &str) -> Hold {
    let (postgres, url) = (postgres.clone(), url.to_owned());
    let begun = spawn_blocking(move || match fault {
        Fault::AllLocked => lock(&url, LOCK_ALL),
        Fault::TableLocked => lock(&url, LOCK_USERS),
        Fault::FeedLocked => lock(&url, LOCK_FEED),
        Fault::NoSessions => Hold::Sessions(Sessions::take_all(&url)),
        Fault::Frozen => {
            postgres.freeze();
            Hold::Freeze
        }
    });
    begun.await.unwrap()
}

fn lock(url: &str, sql: &str) -> Hold {
    let mut session = Session::open(url);
    // Against writers who take the same locks in another order.
    while !session.run(sql).is_empty() {
        session.run("rollback;");
    }
    Hold::Lock(session)
}

async fn end(fault: Fault, postgres: &Arc<Postgres>, hold: Hold) {
    let postgres = postgres.clone();
    let ended = spawn_blocking(move || match hold {
        Hold::Lock(mut session) => {
            assert_eq!(session.run(if fault == Fault::FeedLocked { "commit;" } else { "rollback;" }), "")
        }
        Hold::Freeze => postgres.thaw(),
        Hold::Sessions(sessions) => drop(sessions),
    });
    ended.await.unwrap();
}

/// Asks for users whom nobody has heard of; each says what is wrong with its answer.
fn ask_cold(cluster: &Cluster, random: &mut fastrand::Rng, asking: &mut JoinSet<Option<String>>) {
    for replica in &cluster.replicas {
        for _ in 0..COLD {
            let (mut client, user_id) = (replica.client(), random.i64(1_000_000..));
            asking.spawn(async move {
                let begun = Instant::now();
                let answer = client.get_role(GetRoleRequest { user_id, ..Default::default() }).await;
                let is_right = match &answer {
                    Ok(answer) => answer.get_ref().role == "user",
                    Err(status) => ["STORE_UNREACHABLE", "OVERLOADED"].contains(&reason(status).as_str()),
                };
                let took = begun.elapsed();
                (!is_right || took > COLD_LIMIT).then(|| format!("a cold read took {took:.1?}: {answer:?}"))
            });
        }
    }
}

/// Whether a write that began meanwhile was refused.
fn refused(history: &History, [holds, ends]: [Duration; 2]) -> bool {
    let is_met = |write: &Write| (holds..ends).contains(&write.begun);
    let is_refused = |write: &Write| matches!(write.told, Told::Refused(_) | Told::Unknown(_));
    history.writes.lock().unwrap().iter().any(|write| is_met(write) && is_refused(write))
}

/// What clients met in the meantime.
#[derive(Default)]
struct Met {
    limit: Duration,
    writes: Vec<Duration>,
    /// Of writes that were on their way when it began: their outcome may have to be found out afterwards.
    on_their_way: Vec<Duration>,
    reads: Vec<Duration>,
    back: Vec<Duration>,
    answers: BTreeMap<String, usize>,
    found: Vec<String>,
}

impl Met {
    fn judge(&mut self, fault: Fault, history: &History, [begun, holds, ends]: [Duration; 3]) {
        let writes = history.writes.lock().unwrap();
        for write in writes.iter().filter(|write| write.begun < ends && write.ended > holds) {
            let took = write.ended - write.begun;
            if write.begun < holds {
                self.on_their_way.push(took);
                if took > ON_THEIR_WAY {
                    self.found.push(format!("{fault:?} from {begun:.1?}: a write took {took:.1?}: {write:?}"));
                }
                continue;
            }
            let what = match &write.told {
                Told::Done { changed: true, .. } => "done".to_owned(),
                // It numbers no commit, and so waits for nobody.
                Told::Done { .. } | Told::Declined { .. } => NOTHING.to_owned(),
                Told::Refused(reason) => reason.clone(),
                Told::Unknown(reason) => format!("{reason}, in doubt"),
            };
            if fault == Fault::FeedLocked && what == "done" && write.ended < ends {
                self.found.push(format!("{fault:?}: a write was done: {write:?}"));
            }
            if fault == Fault::FeedLocked && !["done", NOTHING, "USER_BUSY"].contains(&what.as_str()) {
                self.found.push(format!("{fault:?}: a write was told {what}: {write:?}"));
            }
            *self.answers.entry(format!("{fault:?}: {what}")).or_default() += 1;
            if took > self.limit {
                self.found
                    .push(format!("{fault:?} from {holds:.1?} to {ends:.1?}: a write took {took:.1?}: {write:?}"));
            }
            self.writes.push(took);
        }
        for read in history.reads.lock().unwrap().iter() {
            // A revision that cannot come is worth waiting for; where only the feed lock is held none is on its way.
            if (read.min_revision > 0 && fault != Fault::FeedLocked) || read.begun < begun || read.begun > ends {
                continue;
            }
            let took = read.ended - read.begun;
            // Where the log can be read the cache is proven.
            let is_proven = matches!(fault, Fault::TableLocked | Fault::FeedLocked);
            let is_well = |answer: &Answer| answer.source != Source::Store && !(is_proven && answer.stale);
            if took > READ_ANSWERS || !read.answer.as_ref().is_ok_and(is_well) {
                self.found.push(format!("{fault:?}: a cached read took {took:.1?}: {read:?}"));
            }
            self.reads.push(took);
        }
    }

    fn tell(self, outcome: &mut Outcome) {
        outcome.violated(self.found);
        outcome.times("writes answered after", self.writes);
        outcome.times("writes on their way when it began, after", self.on_their_way);
        outcome.times("cached reads answered after", self.reads);
        outcome.times("in step again after", self.back);
        outcome.figure("writes were told", format!("{:?}", self.answers));
    }
}
