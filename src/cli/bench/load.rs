//! Calls, as many as get their answers or as many as are due.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use rand_distr::{Distribution, Zipf};
use tokio::{
    task::{JoinSet, yield_now},
    time::{Instant, sleep_until},
};
use tonic::Status;

use super::{
    Mode, Plan,
    report::{Bar, Done, Samples},
};
use crate::{
    cli::{Exit, Failure, client::Client},
    proto::v1::{BatchGetRolesRequest, GetRoleRequest, SetRoleRequest},
};

/// Of `mixed`, one call in so many writes.
const WRITES: u32 = 20;

/// A timer wakes up to a millisecond late: for the rest of the way the caller looks at the clock.
const TIMER: Duration = Duration::from_millis(2);

/// The callers of one load.
pub(super) struct Calls<'a> {
    plan: &'a Plan,
    users: Users,
}

/// Which user is asked for.
#[derive(Clone)]
struct Users {
    first: i64,
    count: u32,
    skew: Option<Zipf<f64>>,
}

/// What all callers look at.
struct Shared {
    begun: Instant,
    measured: Instant,
    ends: Instant,
    /// Calls a second; 0 for no rate.
    rate: u32,
    /// Of the next call.
    number: AtomicU64,
}

struct Caller {
    mode: Mode,
    batch: u16,
    client: Client,
    users: Users,
    random: SmallRng,
    turn: u32,
}

impl<'a> Calls<'a> {
    pub(super) fn new(plan: &'a Plan) -> Result<Self, Failure> {
        let args = &plan.args;
        let zipf = || Zipf::new(f64::from(args.users), args.skew);
        let skew = (args.skew > 0.0).then(zipf).transpose();
        let skew = skew.map_err(|error| Failure::new(Exit::Usage, format!("--skew: {error}")))?;
        Ok(Self { plan, users: Users { first: args.first_user, count: args.users, skew } })
    }

    pub(super) async fn run(self) -> Result<Done, Failure> {
        let args = &self.plan.args;
        let begun = Instant::now();
        let measured = begun + args.duration / 10;
        let shared = Arc::new(Shared {
            begun,
            measured,
            ends: measured + args.duration,
            rate: args.rate,
            number: AtomicU64::new(0),
        });
        let bar = Bar::of(args.duration + args.duration / 10);
        let mut callers = JoinSet::new();
        for (number, client) in self.plan.clients.iter().enumerate() {
            for n in 0..args.in_flight {
                let seed = (number as u64) << 16 | u64::from(n);
                let caller = Caller {
                    mode: args.mode,
                    batch: args.batch,
                    client: client.clone(),
                    users: self.users.clone(),
                    random: SmallRng::seed_from_u64(seed),
                    turn: n.into(),
                };
                callers.spawn(caller.call_on(shared.clone()));
            }
        }
        let mut samples = Samples::new();
        while let Some(called) = callers.join_next().await {
            match called {
                Ok(called) => samples.add(&called),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
        drop(bar);
        let each = if args.mode == Mode::Batch { u64::from(args.batch) } else { 1 };
        Ok(Done { samples, took: args.duration, each, whole: args.duration + args.duration / 10 })
    }
}

impl Caller {
    async fn call_on(mut self, shared: Arc<Shared>) -> Samples {
        let mut samples = Samples::new();
        loop {
            let due = match shared.rate {
                0 => Instant::now(),
                rate => {
                    let number = shared.number.fetch_add(1, Ordering::Relaxed);
                    let due = shared.begun + Duration::from_secs_f64(number as f64 / f64::from(rate));
                    if due < shared.ends {
                        until(due).await;
                    }
                    due
                }
            };
            if due >= shared.ends {
                return samples;
            }
            let answered = self.call().await;
            let now = Instant::now();
            if due >= shared.measured {
                samples.count(now - due, answered.err().as_ref());
            }
        }
    }

    async fn call(&mut self) -> Result<(), Status> {
        self.turn = self.turn.wrapping_add(1);
        let user_id = self.users.next(&mut self.random);
        let mut rpc = self.client.rpc();
        let writes = match self.mode {
            Mode::Set => true,
            Mode::Mixed => self.turn.is_multiple_of(WRITES),
            Mode::Get | Mode::Batch | Mode::Watch => false,
        };
        if writes {
            let role = if self.turn.is_multiple_of(2) { "admin" } else { "user" };
            let request = SetRoleRequest { user_id, role: role.to_owned(), ..Default::default() };
            rpc.set_role(self.client.request(request)).await.map(drop)
        } else if self.mode == Mode::Batch {
            let user_ids = (0..self.batch).map(|_| self.users.next(&mut self.random)).collect();
            let request = BatchGetRolesRequest { user_ids, ..Default::default() };
            rpc.batch_get_roles(self.client.request(request)).await.map(drop)
        } else {
            let request = GetRoleRequest { user_id, ..Default::default() };
            rpc.get_role(self.client.request(request)).await.map(drop)
        }
    }
}

impl Users {
    fn next(&self, random: &mut SmallRng) -> i64 {
        let offset = match &self.skew {
            // 1 for the one who is asked for most.
            Some(zipf) => zipf.sample(random) as i64 - 1,
            None => random.random_range(0..self.count).into(),
        };
        self.first + offset
    }
}

async fn until(due: Instant) {
    if due > Instant::now() + TIMER {
        sleep_until(due - TIMER).await;
    }
    while Instant::now() < due {
        yield_now().await;
    }
}
