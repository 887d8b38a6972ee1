//! Writers: each sets roles, deletes users and hands admins' rights on, on any replica, and holds on to what it began until
//! somebody says what became of it.

use std::time::Duration;

use tokio::time::{Instant, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::{Caller, ROLES, told};
use crate::{
    history::{Process, Told, Write},
    request::{ADMIN, Request},
};

/// For how long a writer goes on asking what became of a write.
const PERSISTENCE: Duration = Duration::from_secs(30);

/// One in so many writes deletes its user, and one is a transfer.
const OTHERS: u8 = 16;

pub(super) async fn write(mut caller: Caller, stop: CancellationToken) {
    let mut pace = interval(caller.load.pause);
    while !stop.is_cancelled() {
        pace.tick().await;
        write_once(&mut caller).await;
    }
}

/// On any replica, until somebody says what became of it. Most give up on a refusal, as bots do.
pub(super) async fn write_once(caller: &mut Caller) {
    let request = random(caller);
    let until = Instant::now() + PERSISTENCE;
    loop {
        let told = ask(caller, &request).await;
        match told {
            Told::Done { .. } => return believe(request, caller),
            Told::Declined { .. } => return believe_nothing(&request, caller),
            Told::Refused(_) if caller.random.u8(..4) > 0 || Instant::now() > until => {
                return believe_nothing(&request, caller);
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
    let answer = request.send(&mut client, None).await;
    let told = match answer {
        Ok(done) => Told::Done { revision: done.revision, changed: done.changed },
        Err(status) => told(&status),
    };
    // Asked of one process and, for all that is known, answered by the next: done it is, by neither.
    let process = match told {
        Told::Done { .. } if caller.process(replica) != process => Process::NEITHER,
        _ => process,
    };
    let ended = caller.history.now();
    caller.history.wrote(Write { process, begun, ended, told: told.clone(), ..request.described() });
    told
}

/// Of any user of its load.
fn random(caller: &mut Caller) -> Request {
    let user = caller.random.i64(1..=caller.load.users);
    match caller.random.u8(..OTHERS) {
        0 => Request::delete(user, &mut caller.random),
        1 => {
            // Most of the time from one who is an admin, as far as it knows.
            let admin = caller.believed.iter().find(|(_, role)| *role == ADMIN).map(|(user, _)| *user);
            let from = admin.unwrap_or(caller.random.i64(1..=caller.load.users));
            let to = if user == from { user % caller.load.users + 1 } else { user };
            Request::transfer(from, to, &mut caller.random)
        }
        _ => {
            let role = caller.random.choice(ROLES).unwrap();
            let mut request = Request::set(user, role, &mut caller.random);
            // One in four goes by what it believes.
            if let Request::Set(set) = &mut request
                && caller.random.u8(..4) == 0
            {
                set.expected_role = caller.believed.get(&user).cloned();
            }
            request
        }
    }
}

/// What its writer believes afterwards.
fn believe(request: Request, caller: &mut Caller) {
    match request {
        Request::Set(set) => drop(caller.believed.insert(set.user_id, set.role)),
        Request::Delete(delete) => drop(caller.believed.remove(&delete.user_id)),
        Request::Transfer(transfer) => {
            caller.believed.insert(transfer.to_user_id, ADMIN.into());
            if transfer.demote_from {
                caller.believed.remove(&transfer.from_user_id);
            }
        }
    }
}

fn believe_nothing(request: &Request, caller: &mut Caller) {
    match request {
        Request::Set(set) => drop(caller.believed.remove(&set.user_id)),
        Request::Delete(_) => {}
        Request::Transfer(transfer) => drop(caller.believed.remove(&transfer.from_user_id)),
    }
}
