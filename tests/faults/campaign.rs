//! What a campaign is, and what it says in the end.

use std::{
    any::Any,
    collections::HashMap,
    panic::AssertUnwindSafe,
    time::{Duration, Instant},
};

use futures::{FutureExt, future::BoxFuture};
use tokio::time::timeout;

use crate::pulse::Pulse;

/// How long a campaign is.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Tier {
    /// In `scripts/test`.
    Short,
    Nightly,
    /// Four times nightly.
    Release,
}

/// One way to break something, and what must hold all the same.
pub struct Campaign {
    pub name: &'static str,
    /// What a round is: kills, pairs, writes.
    pub unit: &'static str,
    pub must_hold: &'static str,
    pub short: u64,
    pub nightly: u64,
    pub body: fn(Rounds) -> BoxFuture<'static, Outcome>,
}

/// How many rounds, and where their random choices come from.
pub struct Rounds {
    pub count: u64,
    pub random: fastrand::Rng,
}

/// What came of a campaign.
#[derive(Default)]
pub struct Outcome {
    /// Rounds whose fault did fire, under a load that deserves the name.
    pub fired: u64,
    /// Rounds that prove nothing, and why.
    pub weak: Vec<String>,
    /// Why none of them proves anything.
    pub hollow: Vec<String>,
    pub violations: Vec<String>,
    /// What was measured on the way.
    pub figures: Vec<(&'static str, String)>,
}

pub struct Report {
    pub name: &'static str,
    unit: &'static str,
    wanted: u64,
    outcome: Outcome,
    took: Duration,
    standstills: Vec<Duration>,
}

/// Of rounds, one in so many may prove nothing, and has to be run again.
const WEAK_SHARE: u64 = 10;

/// What it may take: whoever waits for ever says nothing.
const LIMIT: Duration = Duration::from_secs(5 * 60);
const LIMIT_EACH: Duration = Duration::from_secs(30);
/// Who has more rounds has short ones.
const MOST_LONG: u64 = 400;

/// Rounds that prove nothing of which it is printed why.
const PRINTED: usize = 20;

/// Violations that are printed of those that begin with the same words, so many; the first tell the most.
const OF_A_KIND: usize = 5;
const KIND: usize = 3;

// === impl Campaign ===

impl Campaign {
    pub fn rounds(&self, tier: Tier) -> u64 {
        match tier {
            Tier::Short => self.short,
            Tier::Nightly => self.nightly,
            Tier::Release => 4 * self.nightly,
        }
    }

    /// A panic of the harness is a violation like any other: what it waited for did not happen.
    pub fn run(&self, rounds: u64, seed: u64) -> Report {
        let begun = Instant::now();
        // Its own choices, whichever campaigns run beside it.
        let own = self.name.bytes().fold(seed, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
        let rounds_of = Rounds { count: rounds, random: fastrand::Rng::with_seed(own) };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let limit = LIMIT + LIMIT_EACH * rounds.min(MOST_LONG) as u32;
        let body = AssertUnwindSafe((self.body)(rounds_of)).catch_unwind();
        let pulse = Pulse::start();
        let ran = runtime.block_on(async { timeout(limit, body).await });
        runtime.shutdown_timeout(Duration::from_secs(5));
        let outcome = match ran {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(left)) => Outcome { violations: vec![text(&*left)], ..Outcome::default() },
            Err(_) => Outcome { violations: vec![format!("it is not done within {limit:?}")], ..Outcome::default() },
        };
        let (took, standstills) = (begun.elapsed(), pulse.stop());
        Report { name: self.name, unit: self.unit, wanted: rounds, outcome, took, standstills }
    }
}

fn text(left: &(dyn Any + Send)) -> String {
    let text = left.downcast_ref::<String>().cloned();
    text.or_else(|| left.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or("a panic".to_owned())
}

// === impl Outcome ===

impl Outcome {
    /// The number of the next round, from 0, while one is due: as many have to count as are wanted. Each is counted as fired
    /// or as weak.
    pub fn next_of(&self, wanted: u64) -> Option<u64> {
        let weak = self.weak.len() as u64;
        (self.fired < wanted && weak * WEAK_SHARE <= wanted).then_some(self.fired + weak)
    }

    /// Of two parts of a campaign.
    pub fn and(mut self, other: Self) -> Self {
        self.fired += other.fired;
        self.weak.extend(other.weak);
        self.hollow.extend(other.hollow);
        self.violations.extend(other.violations);
        self.figures.extend(other.figures);
        self
    }

    pub fn violated(&mut self, found: impl IntoIterator<Item = String>) {
        self.violations.extend(found);
    }

    /// Something that the campaign as a whole needs was not there.
    pub fn proves_nothing(&mut self, why: impl IntoIterator<Item = String>) {
        self.hollow.extend(why);
    }

    pub fn figure(&mut self, name: &'static str, value: impl ToString) {
        self.figures.push((name, value.to_string()));
    }

    /// The longest and the median of what was measured.
    pub fn times(&mut self, name: &'static str, mut times: Vec<Duration>) {
        times.sort();
        if let (Some(longest), Some(median)) = (times.last(), times.get(times.len() / 2)) {
            self.figure(name, format!("{:.0?} at most, {:.0?} median of {}", longest, median, times.len()));
        }
    }
}

// === impl Report ===

impl Report {
    /// No violation, and enough rounds that could have found one.
    pub fn holds(&self) -> bool {
        let weak = self.outcome.weak.len() as u64;
        self.outcome.violations.is_empty()
            && self.outcome.hollow.is_empty()
            && weak * WEAK_SHARE <= self.wanted
            && self.outcome.fired >= self.wanted
    }

    pub fn print(&self) {
        let Self { name, unit, wanted, outcome, took, standstills } = self;
        for (name, value) in &outcome.figures {
            println!("   {name}: {value}");
        }
        // It excuses nothing: it is for whoever looks for the cause.
        for standstill in standstills {
            println!("   the machine stood still for {standstill:.1?}");
        }
        for reason in &outcome.hollow {
            println!("   PROVES NOTHING: {reason}");
        }
        for reason in outcome.weak.iter().take(PRINTED) {
            println!("   proves nothing: {reason}");
        }
        let mut kinds: HashMap<String, usize> = HashMap::new();
        for violation in &outcome.violations {
            let kind: Vec<&str> = violation.split_whitespace().take(KIND).collect();
            let printed = kinds.entry(kind.join(" ")).or_default();
            *printed += 1;
            if *printed <= OF_A_KIND {
                println!("   VIOLATION: {violation}");
            }
        }
        let verdict = if self.holds() { "holds" } else { "FAILS" };
        let fired = outcome.fired;
        let bound = if fired > 0 { 3.0 / fired as f64 } else { 1.0 };
        let violations = outcome.violations.len();
        let means = match violations {
            0 => format!("; 0 of {fired} means under {:.2} %", bound * 100.0),
            _ => String::new(),
        };
        println!("{verdict} {name}: {fired} of {wanted} {unit} fired, {violations} violations in {took:.1?}{means}");
    }
}
