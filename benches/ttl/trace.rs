//! A day of a bot: who is asked for when, and who gets another role when. All of it from a seed.

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Zipf};
use serde::Serialize;

const DAY: f64 = 24.0 * 60.0 * 60.0;
const SEED: u64 = 20_261_201;

#[derive(Serialize, Clone, Copy)]
pub struct Trace {
    pub requests: u32,
    pub users: u32,
    pub changes: u32,
    /// How much more often some users are asked for than others: the exponent of a Zipf distribution.
    pub skew: f64,
}

/// What happens, and when, in seconds since the day began.
pub struct Event {
    pub at: f64,
    pub what: What,
}

pub enum What {
    Request(i64),
    /// The user gets the other role of the two.
    Change(i64),
}

/// The first is the day that the in-process cache was praised for; of the others each differs from it in one way.
pub fn all() -> Vec<Trace> {
    let day = Trace { requests: 10_000, users: 1_050, changes: 5, skew: 0.0 };
    let requests = [1_000, 100_000, 1_000_000].map(|requests| Trace { requests, ..day });
    let skews = [0.8, 1.2].map(|skew| Trace { skew, ..day });
    let changes = [50, 500].map(|changes| Trace { changes, ..day });
    [&[day][..], &requests, &skews, &changes].concat()
}

impl Trace {
    pub fn events(&self) -> Vec<Event> {
        let mut random = StdRng::seed_from_u64(SEED);
        let zipf = Zipf::new(f64::from(self.users), self.skew).unwrap();
        let user = |random: &mut StdRng| zipf.sample(random) as i64;
        let mut events = Vec::new();
        for _ in 0..self.requests {
            let what = What::Request(user(&mut random));
            events.push(Event { at: random.random_range(0.0..DAY), what });
        }
        for _ in 0..self.changes {
            let what = What::Change(user(&mut random));
            events.push(Event { at: random.random_range(0.0..DAY), what });
        }
        events.sort_by(|a, b| a.at.total_cmp(&b.at));
        events
    }
}
