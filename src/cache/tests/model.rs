//! The cache against a model: whatever the order in which commits, queries, evictions and new histories come, every
//! entry is the store's state at `applied`, and every answer is true as of its revision.

use std::{sync::Arc, time::Duration};

use proptest::prelude::*;
use tokio::{
    task::{JoinHandle, yield_now},
    time::{Instant, timeout},
};

use super::truth::{DEFAULT, State, Truth, anchor, commit, role_in};
use crate::{
    cache::{Answer, Mode, Options, Query, ReadError, RoleCache, cache},
    role::{Commit, Revision, UserId},
    step::{self, Moment, Stepper},
};

const USERS: i64 = 4;
/// One that no memory keeps.
const LONG: &str = match std::str::from_utf8(&[b'x'; 300]) {
    Ok(text) => text,
    Err(_) => unreachable!(),
};

/// One step of a schedule.
#[derive(Clone, Debug)]
enum Op {
    /// The store commits; this replica does not know yet.
    Commit(Vec<(i64, Option<&'static str>)>),
    /// The tailer brings the next commit.
    Apply,
    /// Somebody asks.
    Read(i64, Freshness),
    /// A query that was sent reads now.
    LetRead,
    /// The answer of a query that has read arrives.
    LetArrive,
    /// A complete cache is loaded, and each chunk of its snapshot arrives.
    Load,
    LetChunkArrive,
    /// The cache is compared with its store.
    Check,
    /// The store loses its last commits, and the tailer finds out.
    Rewrite(usize),
}

#[derive(Clone, Copy, Debug)]
enum Freshness {
    Any,
    /// At least the store's newest revision.
    Head,
    FullyConsistent,
}

/// A read on its way, and what it may expect.
struct Reader {
    user: i64,
    history: usize,
    at_least: Revision,
    answer: JoinHandle<Result<Answer, ReadError>>,
}

/// A cache, its store, and everything that has ever been.
struct World {
    truth: Arc<Truth>,
    cache: Arc<RoleCache>,
    stepper: Stepper,
    commits: Vec<Commit>,
    applied: usize,
    /// The states of the histories that have ended.
    ended: Vec<Vec<State>>,
    readers: Vec<Reader>,
    loads: Vec<JoinHandle<()>>,
    check: Option<JoinHandle<()>>,
    /// The newest revision that any answer of this history had.
    told: Revision,
}

// === impl World ===

impl World {
    fn new(mode: Mode) -> Self {
        let truth = Arc::new(Truth::new());
        let (stepper, step) = step::start();
        stepper.begin_history();
        stepper.follow_from(anchor(0));
        let options = Options { mode, max_staleness: Duration::from_secs(60), fallback_reads: 1_000, oversized: 2 };
        let (cache, filler) = cache(options, truth.clone(), step);
        tokio::spawn(filler.run());
        Self {
            truth,
            cache,
            stepper,
            commits: Vec::new(),
            applied: 0,
            ended: Vec::new(),
            readers: Vec::new(),
            loads: Vec::new(),
            check: None,
            told: Revision(0),
        }
    }

    async fn run(mode: Mode, schedule: &[Op]) {
        let mut world = Self::new(mode);
        for op in schedule {
            world.step(op).await;
        }
        world.finish().await;
    }

    async fn step(&mut self, op: &Op) {
        // How old a proof may be is another test's matter.
        self.prove();
        match op {
            Op::Commit(changes) => self.commit(changes),
            Op::Apply => self.apply(),
            Op::Read(user, freshness) => self.read(*user, *freshness),
            Op::LetRead => self.truth.may_read.add_permits(1),
            Op::LetArrive => self.truth.may_arrive.add_permits(1),
            Op::Load if self.cache.options.mode == Mode::Complete && !self.cache.is_loaded() => {
                let cache = self.cache.clone();
                self.loads.push(tokio::spawn(async move { drop(cache.load().await) }));
            }
            Op::Load => {}
            Op::Check if self.check.as_ref().is_none_or(JoinHandle::is_finished) => {
                let cache = self.cache.clone();
                self.check = Some(tokio::spawn(async move { drop(cache.check().await) }));
            }
            Op::Check => {}
            Op::LetChunkArrive => self.truth.chunk_may_arrive.add_permits(1),
            Op::Rewrite(lost) => self.rewrite(*lost),
        }
        self.settle().await;
    }

    /// Lets every task go as far as it can.
    async fn settle(&mut self) {
        for _ in 0..40 {
            yield_now().await;
        }
        self.check_entries();
        assert_eq!(self.cache.stats().mismatches, 0, "a check took a race for a difference");
        let (ended, running) = self.readers.drain(..).partition(|reader| reader.answer.is_finished());
        self.readers = running;
        for reader in ended {
            self.check_answer(reader).await;
        }
    }

    fn commit(&mut self, changes: &[(i64, Option<&'static str>)]) {
        let mut states = self.truth.states.lock().unwrap();
        let mut state = states.last().unwrap().clone();
        let revision = states.len();
        let log = changes.iter().map(|(user, new)| {
            let old = match new {
                Some(role) => state.insert(*user, role),
                None => state.remove(user),
            };
            (*user, old, *new)
        });
        self.commits.push(commit(revision, log));
        states.push(state);
    }

    fn apply(&mut self) {
        if let Some(commit) = self.commits.get(self.applied) {
            self.cache.apply(commit);
            self.stepper.saw_head(commit.revision);
            self.stepper.advance(commit.anchor());
            self.applied += 1;
        }
    }

    /// The tailer has looked at the log. That it has also taken in what it saw is left to the schedule.
    fn prove(&self) {
        let (head, _) = self.truth.newest();
        self.stepper.saw_head(Revision(head as i64));
        self.stepper.prove(Moment::now());
    }

    fn read(&mut self, user: i64, freshness: Freshness) {
        let (head, _) = self.truth.newest();
        let head = Revision(head as i64);
        let (min_revision, fully_consistent, asked) = match freshness {
            Freshness::Any => (Revision(0), false, Revision(0)),
            Freshness::Head => (head, false, head),
            Freshness::FullyConsistent => (Revision(0), true, head),
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        let (cache, query) = (self.cache.clone(), Query { min_revision, fully_consistent, deadline: Some(deadline) });
        self.readers.push(Reader {
            user,
            history: self.ended.len(),
            // Nor older than what anybody was told before it began.
            at_least: asked.max(self.told),
            answer: tokio::spawn(async move { cache.get(UserId(user), query).await }),
        });
    }

    fn rewrite(&mut self, lost: usize) {
        let mut states = self.truth.states.lock().unwrap();
        self.ended.push(states.clone());
        let kept = states.len().saturating_sub(lost).max(1);
        states.truncate(kept);
        // Not a prefix of what was: the new history has a commit of its own in place of those that it lost.
        let mut state = states.last().unwrap().clone();
        state.insert(1 + lost as i64 % USERS, "moderator");
        states.push(state);
        let head = anchor(states.len() - 1);
        drop(states);
        self.commits.truncate(kept - 1);
        self.commits.push(commit(head.revision.0 as usize, []));
        self.applied = self.commits.len();
        self.told = Revision(0);
        self.stepper.begin_history();
        self.cache.reset();
        self.stepper.follow_from(head);
        self.prove();
    }

    /// *Prefix*: every entry is the state at `applied`; and where absence is an answer, it is the right one.
    fn check_entries(&self) {
        let states = self.truth.states.lock().unwrap();
        let state = &states[self.applied];
        let complete = self.cache.completeness.number().is_some();
        for user in 1..=USERS {
            let held = self.cache.entries.get(UserId(user)).map(|id| self.cache.names.name(id));
            let role = role_in(state, user);
            match held {
                Some(held) => {
                    assert_eq!(held.as_str(), role, "the entry of {user} at {}", self.applied);
                    assert!(!complete || role != DEFAULT, "{user} takes memory for nothing");
                }
                None => assert!(!complete || role == DEFAULT, "{user} is not in a complete cache"),
            }
        }
        if let Mode::Lazy { capacity: Some(capacity) } = self.cache.options.mode {
            assert!(self.cache.entries.len() <= capacity);
        }
    }

    async fn check_answer(&mut self, reader: Reader) {
        let answer = match reader.answer.await.unwrap() {
            Ok(answer) => answer,
            // Its history ended under it: it was told so, or that its revision is gone.
            Err(_) if reader.history != self.ended.len() => return,
            Err(error) => panic!("the read of {} failed: {error}", reader.user),
        };
        assert!(!answer.stale);
        let is_true = |states: &[State]| {
            let since = usize::try_from(answer.revision.0).unwrap();
            states.iter().skip(since).any(|state| role_in(state, reader.user) == answer.role.as_str())
        };
        let now = self.truth.states.lock().unwrap().clone();
        if reader.history == self.ended.len() {
            assert!(answer.revision >= reader.at_least, "{answer:?} is older than {:?}", reader.at_least);
            assert!(answer.revision.0 <= self.applied as i64, "{answer:?} is ahead of the cache");
            assert!(is_true(&now), "{answer:?} of {} was never true since", reader.user);
            self.told = self.told.max(answer.revision);
        } else {
            let mut histories = self.ended[reader.history..].iter().chain([&now]);
            assert!(histories.any(|states| is_true(states)), "{answer:?} of {} was never true", reader.user);
        }
    }

    /// Everything arrives: then everybody has an answer, and every user the role that the store says.
    async fn finish(mut self) {
        self.truth.may_read.add_permits(10_000);
        self.truth.may_arrive.add_permits(10_000);
        self.truth.chunk_may_arrive.add_permits(10_000);
        while self.applied < self.commits.len() {
            self.step(&Op::Apply).await;
        }
        self.settle().await;
        let until = Instant::now() + Duration::from_secs(20);
        while !self.readers.is_empty() || self.check.as_ref().is_some_and(|check| !check.is_finished()) {
            assert!(Instant::now() < until, "{} reads, or a check, never end", self.readers.len());
            self.prove();
            self.settle().await;
        }
        for load in self.loads.drain(..) {
            timeout(Duration::from_secs(20), load).await.expect("a load never ends").unwrap();
        }
        let (_, state) = self.truth.newest();
        for user in 1..=USERS {
            let query = Query {
                min_revision: Revision(0),
                fully_consistent: false,
                deadline: Some(Instant::now() + Duration::from_secs(20)),
            };
            self.prove();
            let answer = self.cache.get(UserId(user), query).await.unwrap();
            assert_eq!(answer.role.as_str(), role_in(&state, user), "of {user} in the end");
        }
    }
}

fn any_op() -> impl Strategy<Value = Op> {
    let user = || 1..=USERS;
    let role = prop_oneof![
        2 => Just(None),
        2 => Just(Some("user")),
        3 => Just(Some("admin")),
        3 => Just(Some("moderator")),
        1 => Just(Some(LONG)),
    ];
    let freshness = prop_oneof![
        3 => Just(Freshness::Any),
        1 => Just(Freshness::Head),
        1 => Just(Freshness::FullyConsistent),
    ];
    prop_oneof![
        4 => prop::collection::vec((user(), role), 1..4).prop_map(Op::Commit),
        4 => Just(Op::Apply),
        5 => (user(), freshness).prop_map(|(user, freshness)| Op::Read(user, freshness)),
        4 => Just(Op::LetRead),
        4 => Just(Op::LetArrive),
        1 => Just(Op::Load),
        2 => Just(Op::LetChunkArrive),
        1 => Just(Op::Check),
        1 => (0_usize..4).prop_map(Op::Rewrite),
    ]
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Lazy { capacity: None }),
        Just(Mode::Lazy { capacity: Some(1) }),
        Just(Mode::Lazy { capacity: Some(2) }),
        Just(Mode::Complete),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_order_the_cache_is_a_state_of_the_store(
        mode in any_mode(),
        schedule in prop::collection::vec(any_op(), 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(World::run(mode, &schedule));
    }
}
