//! Single writes, each attempt written down.

use std::time::Duration;

use rolecache::proto::v1::{GetRoleRequest, role_cache_service_client::RoleCacheServiceClient};
use tokio::time::{Instant, sleep};
use tonic::{Status, transport::Channel};

use super::{
    checker::GONE,
    cluster::Cluster,
    history::{History, Told, Write},
    request::{ADMIN, Done, Request},
    traffic::told,
};

/// How long a writer goes on asking.
const PERSISTENCE: Duration = Duration::from_secs(30);

/// Users whom only one write is about.
const OF_NOBODY: std::ops::Range<i64> = 1 << 40..1 << 50;

/// An attempt that has begun.
pub struct Attempt<'a> {
    history: &'a History,
    write: Write,
}

impl<'a> Attempt<'a> {
    pub fn begin(cluster: &Cluster, history: &'a History, replica: usize, request: &Request) -> Self {
        let now = history.now();
        let write = Write {
            process: cluster.replicas[replica].process(),
            begun: now,
            ended: now,
            told: Told::Unknown(GONE.into()),
            ..request.described()
        };
        Self { history, write }
    }

    /// With what was told, or nothing to a client that is gone.
    pub fn end(mut self, answer: Option<&Result<Done, Status>>) -> Told {
        match answer {
            Some(Ok(done)) => self.write.told = Told::Done { revision: done.revision, changed: done.changed },
            Some(Err(status)) => self.write.told = told(status),
            None => {}
        }
        self.write.ended = self.history.now();
        self.history.wrote(self.write.clone());
        self.write.told
    }
}

/// Asks on, on any of these replicas, until it is done, or declined for what is in the store; Err says what was told instead.
pub async fn until_told(
    cluster: &Cluster,
    clients: &[RoleCacheServiceClient<Channel>],
    history: &History,
    request: &Request,
    random: &mut fastrand::Rng,
) -> Result<Option<Done>, String> {
    let until = Instant::now() + PERSISTENCE;
    loop {
        let replica = random.usize(..clients.len());
        let (told, answer) = ask(cluster, replica, clients[replica].clone(), history, request).await;
        match (answer, told) {
            (Some(done), _) => return Ok(Some(done)),
            (None, Told::Declined { .. }) => return Ok(None),
            (None, told) if Instant::now() > until => return Err(format!("never answered: {request:?}: {told:?}")),
            _ => sleep(Duration::from_millis(random.u64(1..20))).await,
        }
    }
}

async fn ask(
    cluster: &Cluster,
    replica: usize,
    mut client: RoleCacheServiceClient<Channel>,
    history: &History,
    request: &Request,
) -> (Told, Option<Done>) {
    let attempt = Attempt::begin(cluster, history, replica, request);
    let answer = request.send(&mut client, None).await;
    (attempt.end(Some(&answer)), answer.ok())
}

/// How long a replica takes until it commits a write, of a user of nobody else's, and reads it from the store: nothing that
/// a cache could answer. Err says that it does not.
pub async fn until_serving(
    cluster: &Cluster,
    replica: usize,
    history: &History,
    mut random: fastrand::Rng,
) -> Result<Duration, String> {
    let begun = Instant::now();
    let mut client = cluster.replicas[replica].client();
    let user_id = random.i64(OF_NOBODY);
    let write = Request::set(user_id, ADMIN, &mut random);
    let read = GetRoleRequest { user_id, fully_consistent: true, ..Default::default() };
    let mut revision = None;
    while begun.elapsed() < PERSISTENCE {
        match revision {
            None => {
                let (_, answer) = ask(cluster, replica, client.clone(), history, &write).await;
                revision = answer.map(|answer| answer.revision);
            }
            Some(written) => match client.get_role(read).await.map(|answer| answer.into_inner()) {
                Ok(answer) if answer.role == ADMIN && answer.revision >= written => return Ok(begun.elapsed()),
                Ok(answer) => return Err(format!("replica {replica} wrote at {written} and reads {answer:?}")),
                Err(_) => {}
            },
        }
        sleep(Duration::from_millis(10)).await;
    }
    Err(format!("replica {replica} does not serve, revision {revision:?}"))
}
