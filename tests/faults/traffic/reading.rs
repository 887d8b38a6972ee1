//! Readers: one user at a time, or several at once, now and then at the newest revision that anybody was told of.

use rolecache::proto::v1::{
    BatchGetRolesRequest, GetRoleRequest, Source, role_cache_service_client::RoleCacheServiceClient,
};
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use super::{Caller, reason};
use crate::history::{Answer, Process, Read};

/// One in so many reads is of `TOGETHER` users at once.
const BATCHES: u8 = 8;
const TOGETHER: usize = 8;

pub(super) async fn read(mut caller: Caller, stop: CancellationToken) {
    let mut pace = interval(caller.load.pause);
    while !stop.is_cancelled() {
        pace.tick().await;
        let (replica, client) = caller.pick();
        let count = if caller.random.u8(..BATCHES) == 0 { TOGETHER } else { 1 };
        let users: Vec<i64> = (0..count).map(|_| caller.random.i64(1..=caller.load.users)).collect();
        // One in eight wants the newest that anybody was told of.
        let min_revision = if caller.random.u8(..8) == 0 { caller.history.newest() } else { 0 };
        let (process, begun) = (caller.process(replica), caller.history.now());
        let answer = match &users[..] {
            [user] => one(client, *user, min_revision).await,
            users => several(client, users, min_revision).await,
        };
        // Asked of one process and, for all that is known, answered by the next: by neither. An error is told of the one that was asked.
        let process = match answer {
            Ok(_) if caller.process(replica) != process => Process::NEITHER,
            _ => process,
        };
        let ended = caller.history.now();
        let told = |user, answer| Read { user, process, begun, ended, min_revision, answer };
        let reads = match answer {
            Ok(answers) => users.into_iter().zip(answers).map(|(user, answer)| told(user, Ok(answer))).collect(),
            Err(status) => vec![told(users[0], Err(reason(&status)))],
        };
        caller.history.read_together(reads);
    }
}

async fn one(
    mut client: RoleCacheServiceClient<Channel>,
    user_id: i64,
    min_revision: i64,
) -> Result<Vec<Answer>, Status> {
    let request = GetRoleRequest { user_id, min_revision, ..Default::default() };
    Ok(vec![Answer::from(client.get_role(request).await?.into_inner())])
}

/// Of all of them the same revision is told, and not where it comes from.
async fn several(
    mut client: RoleCacheServiceClient<Channel>,
    users: &[i64],
    min_revision: i64,
) -> Result<Vec<Answer>, Status> {
    let request = BatchGetRolesRequest { user_ids: users.to_vec(), min_revision, ..Default::default() };
    let batch = client.batch_get_roles(request).await?.into_inner();
    let answer = |index: &u32| Answer {
        role: batch.roles[*index as usize].clone(),
        revision: batch.revision,
        source: Source::Unspecified,
        stale: batch.stale,
    };
    assert_eq!(batch.role_indexes.len(), users.len(), "an answer for each user");
    Ok(batch.role_indexes.iter().map(answer).collect())
}
