//! Clients that hang up in the midst of a write, with the call, with the connection, or because their time is over.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use rolecache::proto::v1::StatsRequest;
use tokio::{sync::watch, task::JoinSet, time::sleep};
use tonic::{Code, Status};

use crate::{
    asking::{Attempt, until_told},
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan, postgres},
    history::History,
    request::{Done, Request},
    support::postgres::Session,
    traffic::{Load, Traffic},
};

const CLIENTS: usize = 32;

/// Users of these clients. Half of them are held by a stranger's transaction now and then, so that writes take long.
const USERS: i64 = 40;

/// Sessions of ours whose transaction waits for its client. Reads and writes are one statement each: there is none, ever.
const LEFT_OPEN: &str = "select pid, state, clock_timestamp() - state_change, left(query, 80) from pg_stat_activity
    where application_name = 'rolecache' and state like 'idle in transaction%'";

pub fn campaigns() -> Vec<Campaign> {
    vec![Campaign {
        name: "client-gone",
        unit: "writes",
        must_hold: "one effect per request_id, no open transaction left in the pool",
        short: 500,
        nightly: 10_000,
        body: |rounds| run(rounds).boxed(),
    }]
}

struct Client {
    cluster: Arc<Cluster>,
    history: Arc<History>,
    random: fastrand::Rng,
    /// What a write of late took, in microseconds: they hang up within that.
    usual: Arc<AtomicU64>,
}

async fn run(mut rounds: Rounds) -> Outcome {
    let mut outcome = Outcome::default();
    let (_postgres, url) = postgres().await;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, ..Plan::default() }).await);
    let load = Load { writers: 2, readers: 2, excuses: checker::ROWS_HELD, ..Load::default() };
    let traffic = Traffic::start(&cluster, load, &mut rounds.random);
    outcome.proves_nothing(traffic.run_up(200).await.err());
    let over = Arc::new(AtomicBool::new(false));
    let (begun, mut held) = watch::channel(false);
    let holding = std::thread::spawn({
        let (url, over, random) = (url.clone(), over.clone(), rounds.random.fork());
        move || hold_rows(&url, &over, random, &begun)
    });
    held.wait_for(|held| *held).await.expect("a stranger holds rows");
    let looking = std::thread::spawn({
        let (url, over) = (url.clone(), over.clone());
        move || look_for_open_transactions(&url, &over)
    });

    let left = Arc::new(AtomicI64::new(rounds.count as i64));
    let usual = Arc::new(AtomicU64::new(5_000));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (cluster, history, random) = (cluster.clone(), traffic.history.clone(), rounds.random.fork());
        let client = Client { cluster, history, random, usual: usual.clone() };
        clients.spawn(client.hang_up_often(left.clone()));
    }
    let mut kinds = [0; 3];
    while let Some(ended) = clients.join_next().await {
        let (fired, weak, found) = ended.expect("a client does not panic");
        outcome.weak.extend(weak);
        outcome.fired += fired.iter().sum::<u64>();
        kinds.iter_mut().zip(fired).for_each(|(all, fired)| *all += fired);
        outcome.violated(found);
    }
    over.store(true, Ordering::Relaxed);
    let holds = holding.join().expect("holding rows does not panic");
    let (looks, found) = looking.join().expect("looking does not panic");
    outcome.violated(found);
    outcome.proves_nothing(traffic.throughout().err());
    traffic.settle(&mut outcome).await;
    let left_open = cluster.shell.run(LEFT_OPEN);
    outcome.violated((!left_open.is_empty()).then(|| format!("left open in the end: {left_open}")));
    outcome.figure("hung up", format!("{} calls, {} connections, {} deadlines", kinds[0], kinds[1], kinds[2]));
    outcome.figure("rows were held", format!("{holds} times"));
    outcome.figure("looks at all sessions", looks);
    outcome
}

/// A stranger who locks rows for a while, so that writes of them wait; how often.
fn hold_rows(url: &str, over: &AtomicBool, mut random: fastrand::Rng, begun: &watch::Sender<bool>) -> u64 {
    let mut session = Session::open(url);
    let few = USERS / 2;
    let added = session.run(&format!(
        "insert into users (user_id, role) select n, 'user' from generate_series(1, {few}) n on conflict (user_id) do nothing;"
    ));
    assert_eq!(added, "");
    let hold = format!(
        "begin; select count(*) from (select from users where user_id <= {few} order by user_id for update) held;"
    );
    let mut holds = 0;
    while !over.load(Ordering::Relaxed) {
        let held = session.run(&hold);
        // Whom somebody deleted nobody holds.
        assert!(held.parse().is_ok_and(|held: i64| held > few / 8), "{held}");
        holds += 1;
        begun.send_replace(true);
        std::thread::sleep(Duration::from_millis(random.u64(20..400)));
        assert_eq!(session.run("commit;"), "");
        std::thread::sleep(Duration::from_millis(random.u64(5..60)));
    }
    holds
}

/// How often it looked, and what it found.
fn look_for_open_transactions(url: &str, over: &AtomicBool) -> (u64, Option<String>) {
    let mut session = Session::open(url);
    let (mut looks, mut found) = (0, None);
    while !over.load(Ordering::Relaxed) {
        let left = session.run(&format!("{LEFT_OPEN};"));
        if !left.is_empty() {
            found.get_or_insert(format!("a transaction was left open: {left}"));
        }
        looks += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    (looks, found)
}

impl Client {
    /// Which of the three ways fired how often, which did not, and what was violated.
    async fn hang_up_often(mut self, left: Arc<AtomicI64>) -> ([u64; 3], Vec<String>, Vec<String>) {
        let clients: Vec<_> = self.cluster.replicas.iter().map(|replica| replica.client()).collect();
        let (mut fired, mut weak, mut found) = ([0; 3], Vec::new(), Vec::new());
        'next: while left.fetch_sub(1, Ordering::Relaxed) > 0 {
            let way = self.random.usize(..3);
            // Many are answered before their client is gone.
            for _ in 0..400 {
                let write = self.some_write(way);
                let gone = self.ask_and_go(way, &write).await;
                let again = until_told(&self.cluster, &clients, &self.history, &write, &mut self.random).await;
                found.extend(again.err());
                if gone {
                    fired[way] += 1;
                    continue 'next;
                }
            }
            weak.push(format!("always answered before the client was gone, by way {way}"));
            // Another one in its place, unless that would not end.
            if weak.len() < 10 {
                left.fetch_add(1, Ordering::Relaxed);
            }
        }
        (fired, weak, found)
    }

    fn some_write(&mut self, way: usize) -> Request {
        // A deadline is longer than most writes: it is for those whose row is held.
        let user = self.random.i64(1..=if way == 2 { USERS / 2 } else { USERS });
        match self.random.u8(..8) {
            0 => Request::delete(user, &mut self.random),
            // Half of all are admins.
            1 => Request::transfer(user, user % USERS + 1, &mut self.random),
            _ => {
                let role = *self.random.choice(&["user", "admin"]).unwrap();
                Request::set(user, role, &mut self.random)
            }
        }
    }

    /// Whether it was gone before it was answered.
    async fn ask_and_go(&mut self, way: usize, write: &Request) -> bool {
        let replica = self.random.usize(..self.cluster.replicas.len());
        // A connection of its own, which goes with it.
        let mut client = self.cluster.replicas[replica].client();
        if client.stats(StatsRequest {}).await.is_err() {
            return false;
        }
        let attempt = Attempt::begin(&self.cluster, &self.history, replica, write);
        let begun = self.history.now();
        let usual = self.usual.load(Ordering::Relaxed);
        let deadline = (way == 2).then(|| Duration::from_millis(self.random.u64(1..=500)));
        let gone = match way {
            2 => std::future::pending().left_future(),
            _ => sleep(Duration::from_micros(self.random.u64(..2 * usual))).right_future(),
        };
        let mut stays = client.clone();
        let answer: Option<Result<Done, Status>> = tokio::select! {
            answer = write.send(&mut stays, deadline) => Some(answer),
            () = gone => None,
        };
        if way == 1 {
            drop((client, stays));
        }
        let took = self.history.now() - begun;
        let is_over = deadline.is_some_and(|deadline| took >= deadline)
            && matches!(&answer, Some(Err(status)) if matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled));
        if matches!(answer, Some(Ok(_))) {
            // Of late, and not more than a few times as long: most rows are not held.
            let took = (took.as_micros() as u64).min(8 * usual);
            self.usual.store((usual * 15 + took) / 16, Ordering::Relaxed);
        }
        // Its own deadline is nobody else's reason.
        attempt.end(answer.as_ref().filter(|_| !is_over));
        answer.is_none() || is_over
    }
}
