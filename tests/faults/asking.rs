//! Single writes, each attempt written down.

use std::time::Duration;

use rolecache::proto::v1::{
    GetRoleRequest, SetRoleRequest, SetRoleResponse, role_cache_service_client::RoleCacheServiceClient,
};
use tokio::time::{Instant, sleep};
use tonic::{Request, Status, transport::Channel};

use super::{
    checker::GONE,
    cluster::Cluster,
    history::{History, Told, Write},
    traffic::told,
};

/// How long a writer goes on asking.
const PERSISTENCE: Duration = Duration::from_secs(30);

/// Users whom only one write is about.
const OF_NOBODY: std::ops::Range<i64> = 1 << 40..1 << 50;

/// A role for a user, under an id of its own by which the log names it, too.
pub fn request(user: i64, role: &str, random: &mut fastrand::Rng) -> SetRoleRequest {
    let id = format!("{:016x}", random.u64(..));
    SetRoleRequest { user_id: user, role: role.into(), reason: id.clone(), request_id: id, ..Default::default() }
}

/// An attempt that has begun.
pub struct Attempt<'a> {
    history: &'a History,
    write: Write,
}

impl<'a> Attempt<'a> {
    pub fn begin(cluster: &Cluster, history: &'a History, replica: usize, request: &SetRoleRequest) -> Self {
        let now = history.now();
        let write = Write {
            expected: request.expected_role.clone(),
            process: cluster.replicas[replica].process(),
            begun: now,
            ended: now,
            told: Told::Unknown(GONE.into()),
            ..Write::of(&request.request_id, request.user_id, &request.role)
        };
        Self { history, write }
    }

    /// With what was told, or nothing to a client that is gone.
    pub fn end(mut self, answer: Option<&Result<SetRoleResponse, Status>>) -> Told {
        match answer {
            Some(Ok(answer)) => {
                self.write.told = Told::Done { revision: answer.revision, changed: answer.change.is_some() };
            }
            Some(Err(status)) => self.write.told = told(status),
            None => {}
        }
        self.write.ended = self.history.now();
        self.history.wrote(self.write.clone());
        self.write.told
    }
}

/// Asks on, on any of these replicas, until it is done; Err says what was told instead.
pub async fn until_done(
    cluster: &Cluster,
    clients: &[RoleCacheServiceClient<Channel>],
    history: &History,
    request: &SetRoleRequest,
    random: &mut fastrand::Rng,
) -> Result<SetRoleResponse, String> {
    let until = Instant::now() + PERSISTENCE;
    loop {
        let replica = random.usize(..clients.len());
        let (told, answer) = ask(cluster, replica, clients[replica].clone(), history, request).await;
        match answer {
            Some(answer) => return Ok(answer),
            None if Instant::now() > until => return Err(format!("never answered: {request:?}: {told:?}")),
            None => sleep(Duration::from_millis(random.u64(1..20))).await,
        }
    }
}

async fn ask(
    cluster: &Cluster,
    replica: usize,
    mut client: RoleCacheServiceClient<Channel>,
    history: &History,
    request: &SetRoleRequest,
) -> (Told, Option<SetRoleResponse>) {
    let attempt = Attempt::begin(cluster, history, replica, request);
    let answer = client.set_role(Request::new(request.clone())).await.map(|it| it.into_inner());
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
    let write = request(random.i64(OF_NOBODY), "admin", &mut random);
    let read = GetRoleRequest { user_id: write.user_id, fully_consistent: true, ..Default::default() };
    let mut revision = None;
    while begun.elapsed() < PERSISTENCE {
        match revision {
            None => {
                let (_, answer) = ask(cluster, replica, client.clone(), history, &write).await;
                revision = answer.map(|answer| answer.revision);
            }
            Some(written) => match client.get_role(read).await.map(|answer| answer.into_inner()) {
                Ok(answer) if answer.role == write.role && answer.revision >= written => return Ok(begun.elapsed()),
                Ok(answer) => return Err(format!("replica {replica} wrote at {written} and reads {answer:?}")),
                Err(_) => {}
            },
        }
        sleep(Duration::from_millis(10)).await;
    }
    Err(format!("replica {replica} does not serve, revision {revision:?}"))
}
