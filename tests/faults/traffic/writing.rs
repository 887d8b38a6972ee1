//! Writers: each sets roles, deletes users and hands admins' rights on, on any replica, and holds on to what it began until
//! somebody says what became of it.

use std::time::Duration;

use rolecache::proto::v1::{DeleteUserRequest, SetRoleRequest, TransferAdminRequest};
use tokio::time::{Instant, interval, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Caller, NO_REASON, ROLES, told};
use crate::history::{Giver, Told, Write};

/// For how long a writer goes on asking what became of a write.
const PERSISTENCE: Duration = Duration::from_secs(30);

/// One in so many writes deletes its user, and one is a transfer.
const OTHERS: u8 = 16;

/// A write under an id of its own, by which the log names it, too.
#[derive(Debug)]
enum Request {
    Set(SetRoleRequest),
    Delete(DeleteUserRequest),
    Transfer(TransferAdminRequest),
}

pub(super) async fn write(mut caller: Caller, stop: CancellationToken) {
    let mut pace = interval(caller.load.pause);
    while !stop.is_cancelled() {
        pace.tick().await;
        write_once(&mut caller).await;
    }
}

/// On any replica, until somebody says what became of it. Most give up on a refusal, as bots do.
pub(super) async fn write_once(caller: &mut Caller) {
    let request = Request::random(caller);
    let until = Instant::now() + PERSISTENCE;
    loop {
        let told = ask(caller, &request).await;
        match told {
            Told::Done { .. } => return request.done(caller),
            Told::Declined(_) => return request.believe_nothing(caller),
            Told::Refused(_) if caller.random.u8(..4) > 0 || Instant::now() > until => {
                return request.believe_nothing(caller);
            }
            Told::Unknown(_) if Instant::now() > until => {
                caller.history.untold.lock().unwrap().push(format!("{request:?}: {told:?}"));
                return;
            }
            _ => sleep(Duration::from_millis(caller.random.u64(1..30))).await,
        }
    }
}

async fn ask(caller: &mut Caller, request: &Request) -> Told {
    let (replica, mut client) = caller.pick();
    let (process, begun) = (caller.process(replica), caller.history.now());
    let answer = match request {
        Request::Set(set) => {
            client.set_role(set.clone()).await.map(|it| it.into_inner()).map(|it| (it.revision, it.change.is_some()))
        }
        Request::Delete(delete) => client
            .delete_user(delete.clone())
            .await
            .map(|it| it.into_inner())
            .map(|it| (it.revision, it.change.is_some())),
        Request::Transfer(transfer) => client
            .transfer_admin(transfer.clone())
            .await
            .map(|it| it.into_inner())
            .map(|it| (it.revision, !it.changes.is_empty())),
    };
    let told = tell(answer);
    // Asked of one process and answered by the next: of neither.
    let told = match told {
        Told::Done { .. } if caller.process(replica) != process => {
            Told::Unknown(format!("{NO_REASON}: of which process?"))
        }
        told => told,
    };
    let ended = caller.history.now();
    caller.history.wrote(Write { process, begun, ended, told: told.clone(), ..request.described() });
    told
}

fn tell(answer: Result<(i64, bool), Status>) -> Told {
    match answer {
        Ok((revision, changed)) => Told::Done { revision, changed },
        Err(status) => told(&status),
    }
}

// === impl Request ===

impl Request {
    fn random(caller: &mut Caller) -> Self {
        let id = format!("{:016x}", caller.random.u64(..));
        let user_id = caller.random.i64(1..=caller.load.users);
        let (reason, request_id) = (id.clone(), id);
        match caller.random.u8(..OTHERS) {
            0 => Self::Delete(DeleteUserRequest { user_id, reason, request_id }),
            1 => {
                // Most of the time from one who is an admin, as far as it knows.
                let admin = caller.believed.iter().find(|(_, role)| *role == ROLES[1]).map(|(user, _)| *user);
                let from_user_id = admin.unwrap_or(caller.random.i64(1..=caller.load.users));
                let to_user_id = if user_id == from_user_id { user_id % caller.load.users + 1 } else { user_id };
                let demote_from = caller.random.bool();
                let transfer = TransferAdminRequest {
                    from_user_id,
                    to_user_id,
                    demote_from,
                    reason,
                    request_id,
                    ..Default::default()
                };
                Self::Transfer(transfer)
            }
            _ => {
                // One in four goes by what it believes.
                let expected_role = caller.believed.get(&user_id).cloned().filter(|_| caller.random.u8(..4) == 0);
                let role = caller.random.choice(ROLES).unwrap().to_owned();
                Self::Set(SetRoleRequest { user_id, role, expected_role, reason, request_id, ..Default::default() })
            }
        }
    }

    /// As it is written down, before anything was told.
    fn described(&self) -> Write {
        let (id, user, role) = match self {
            Self::Set(set) => (&set.request_id, set.user_id, set.role.as_str()),
            Self::Delete(delete) => (&delete.request_id, delete.user_id, ""),
            Self::Transfer(transfer) => (&transfer.request_id, transfer.to_user_id, ROLES[1]),
        };
        let mut write = Write::of(id, user, role);
        match self {
            Self::Set(set) => write.expected = set.expected_role.clone(),
            Self::Delete(_) => {}
            Self::Transfer(transfer) => {
                write.giver = Some(Giver { user: transfer.from_user_id, demoted: transfer.demote_from });
            }
        }
        write
    }

    fn done(self, caller: &mut Caller) {
        match self {
            Self::Set(set) => drop(caller.believed.insert(set.user_id, set.role)),
            Self::Delete(delete) => drop(caller.believed.remove(&delete.user_id)),
            Self::Transfer(transfer) => {
                caller.believed.insert(transfer.to_user_id, ROLES[1].into());
                if transfer.demote_from {
                    caller.believed.remove(&transfer.from_user_id);
                }
            }
        }
    }

    fn believe_nothing(self, caller: &mut Caller) {
        match self {
            Self::Set(set) => drop(caller.believed.remove(&set.user_id)),
            Self::Delete(_) => {}
            Self::Transfer(transfer) => drop(caller.believed.remove(&transfer.from_user_id)),
        }
    }
}
