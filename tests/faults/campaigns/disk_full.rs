//! The disk under the store is full, and then it is not.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use crate::{
    campaign::{Campaign, Outcome, Rounds},
    checker,
    cluster::{Cluster, Plan},
    history::{History, Told},
    support::postgres::Postgres,
    traffic::{Load, Traffic},
};

/// The environment says so where this process has mounts of its own.
const PRIVATE: &str = "ROLECACHE_FAULTS_PRIVATE_MOUNTS";

/// What a write may be told. PostgreSQL may end a session with it, and leave its client in doubt.
const CLEARLY: &[&str] = &["STORE_UNREACHABLE"];
const OR_IN_DOUBT: &[&str] = &["STORE_UNREACHABLE", "OUTCOME_UNKNOWN, in doubt"];

/// How long a store with a full disk is looked at, once it has refused something.
const LASTS: Duration = Duration::from_secs(2);

/// How long it may take until something is refused.
const PATIENCE: Duration = Duration::from_secs(20);

pub fn campaigns() -> Vec<Campaign> {
    let of = |name, body: fn(Rounds) -> BoxFuture<'static, Outcome>| Campaign {
        name,
        unit: "full disks",
        must_hold: "writes fail clearly, nothing acknowledged is lost, reads go on, all is well after",
        short: 1,
        nightly: 10,
        body,
    };
    vec![
        of("disk-full-postgres", |rounds| postgres(rounds).boxed()),
        of("disk-full-sqlite", |rounds| sqlite(rounds).boxed()),
    ]
}

/// Begins this process again where it can mount what nobody else sees, if it can be had.
pub fn with_private_mounts() {
    use std::os::unix::process::CommandExt;
    let may = Command::new("unshare").args(["--mount", "true"]).output().is_ok_and(|done| done.status.success());
    if may && std::env::var_os(PRIVATE).is_none() {
        let this = std::env::current_exe().unwrap();
        let error =
            Command::new("unshare").arg("--mount").arg(this).args(std::env::args_os().skip(1)).env(PRIVATE, "1").exec();
        panic!("unshare: {error}");
    }
}

async fn postgres(rounds: Rounds) -> Outcome {
    let Some(disk) = Disk::mount(256) else { return Disk::denied() };
    let path = disk.path.clone();
    let postgres = Arc::new(spawn_blocking(move || Postgres::start_in(&path)).await.unwrap());
    let url = postgres.fresh_database().await.url;
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 2, ..Plan::default() }).await);
    let outcome = run(rounds, &cluster, &disk, OR_IN_DOUBT, &|| postgres.start_again()).await;
    spawn_blocking(move || postgres.stop()).await.unwrap();
    outcome
}

async fn sqlite(rounds: Rounds) -> Outcome {
    let Some(disk) = Disk::mount(24) else { return Disk::denied() };
    let url = format!("sqlite://{}", disk.path.join("bot.db").display());
    let cluster = Arc::new(Cluster::start(&url, Plan { replicas: 1, ..Plan::default() }).await);
    run(rounds, &cluster, &disk, CLEARLY, &|| {}).await
}

async fn run(
    mut rounds: Rounds,
    cluster: &Arc<Cluster>,
    disk: &Disk,
    clearly: &[&str],
    heal: &(dyn Fn() + Sync),
) -> Outcome {
    let mut outcome = Outcome::default();
    let traffic =
        Traffic::start(cluster, Load { excuses: checker::STORE_BROKEN, ..Load::default() }, &mut rounds.random);
    let mut answers = BTreeMap::new();
    let mut back = Vec::new();
    while let Some(round) = outcome.next_of(rounds.count) {
        let weak = traffic.run_up(500).await;
        let begun = traffic.history.now();
        disk.fill();
        let until = Instant::now() + PATIENCE;
        while failed(&traffic.history, begun).is_empty() && Instant::now() < until {
            sleep(Duration::from_millis(20)).await;
        }
        sleep(LASTS).await;
        let met = failed(&traffic.history, begun);
        match weak {
            Err(weak) => outcome.weak.push(format!("disk {round}: {weak}")),
            Ok(()) if met.is_empty() => outcome.weak.push(format!("disk {round}: every write went through")),
            Ok(()) => outcome.fired += 1,
        }
        for told in met {
            if !clearly.contains(&told.as_str()) {
                outcome.violated([format!("disk {round}: a write was told {told}")]);
            }
            *answers.entry(told).or_insert(0) += 1;
        }
        outcome.violated(reads_went_on(&traffic.history, begun));
        disk.free();
        tokio::task::block_in_place(heal);
        let freed = Instant::now();
        for replica in &cluster.replicas {
            replica.until_in_step().await;
        }
        let begun = traffic.history.now();
        while done(&traffic.history, begun) < 20 && freed.elapsed() < PATIENCE {
            sleep(Duration::from_millis(20)).await;
        }
        if done(&traffic.history, begun) < 20 {
            outcome.violated([format!("disk {round}: {PATIENCE:?} after there is space again nothing is written")]);
        }
        back.push(freed.elapsed());
    }
    traffic.settle(&mut outcome).await;
    outcome.figure("failed writes were told", format!("{answers:?}"));
    outcome.times("20 writes done again after", back);
    outcome
}

/// What writes were told that failed since then.
fn failed(history: &History, since: Duration) -> Vec<String> {
    let writes = history.writes.lock().unwrap();
    let told = writes.iter().filter(|write| write.begun > since).filter_map(|write| match &write.told {
        Told::Done { .. } | Told::Declined { .. } => None,
        Told::Refused(reason) => Some(reason.clone()),
        Told::Unknown(reason) => Some(format!("{reason}, in doubt")),
    });
    told.collect()
}

fn done(history: &History, since: Duration) -> usize {
    let writes = history.writes.lock().unwrap();
    writes.iter().filter(|write| write.begun > since && matches!(write.told, Told::Done { .. })).count()
}

/// Reads of cached users that asked for no revision that cannot come.
fn reads_went_on(history: &History, since: Duration) -> Vec<String> {
    let reads = history.reads.lock().unwrap();
    let failed = reads.iter().filter(|read| read.begun > since && read.min_revision == 0 && read.answer.is_err());
    failed.map(|read| format!("a cached read failed: {read:?}")).collect()
}

/// A small disk of our own.
struct Disk {
    path: PathBuf,
    /// Held for its end.
    _directory: tempfile::TempDir,
}

impl Disk {
    /// None where we may not mount.
    fn mount(mebibytes: u64) -> Option<Self> {
        std::env::var_os(PRIVATE)?;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m,mode=777"), "tmpfs"]).arg(&path);
        mount.status().unwrap().success().then_some(Self { path, _directory: directory })
    }

    fn denied() -> Outcome {
        let mut outcome = Outcome::default();
        outcome.violated([
            "no disk can be filled here: unshare --mount and mount need to be allowed, as for root".to_owned()
        ]);
        outcome
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }

    /// To the last byte.
    fn fill(&self) {
        let mut ballast = File::create(self.ballast()).unwrap();
        for size in [1 << 20, 4096] {
            let zeros = vec![0; size];
            while ballast.write_all(&zeros).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: what dies last on it may still hold it.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
