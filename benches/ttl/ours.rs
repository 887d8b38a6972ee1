//! The cache of this project as the server builds it, over a real store.

use std::{collections::HashSet, sync::Arc, time::Duration};

use rolecache::{
    cache::{self, Mode, Query, RoleCache},
    feed::{self, Apply},
    role::{Commit, Revision, RoleName, UserId},
    step::{self, Step},
    store::{Call, Grant, Op, Options, Store, sqlite},
};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::{
    Day,
    trace::{Event, What},
};

pub const MODES: [Mode; 2] = [Mode::Lazy { capacity: None }, Mode::Complete];
const SIMPLE: Query = Query { min_revision: Revision(0), fully_consistent: false, deadline: None };

pub struct Ours {
    store: Arc<dyn Store>,
    cache: Arc<RoleCache>,
    step: Step,
    /// In truth.
    admins: HashSet<i64>,
    stale: u64,
    _tasks: JoinSet<()>,
    _dir: TempDir,
}

struct IntoCache(Arc<RoleCache>);

impl Apply for IntoCache {
    fn apply(&self, commit: &Commit) {
        self.0.apply(commit);
    }

    fn reset(&self) {
        self.0.reset();
    }
}

impl Ours {
    /// In step, with nobody in the cache who was not asked for.
    pub async fn start(mode: Mode, users: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/roles.db", dir.path().display());
        let (default_role, admin_role) = (role(false), role(true));
        let store = sqlite::open(&Options { url, default_role, admin_role, migrate: true }).await.unwrap();
        let all: Vec<_> = (1..=i64::from(users)).map(|user| set(user, false)).collect();
        assert!(store.write(&all).await.iter().all(Result::is_ok));
        let options = cache::Options {
            mode,
            max_staleness: Duration::from_secs(60),
            fallback_reads: 64,
            oversized: feed::OVERSIZED,
        };
        let (stepper, step) = step::start();
        let (cache, filler) = cache::cache(options, store.clone(), step.clone());
        let options = feed::Options { poll_interval: Duration::from_millis(500), ring_bytes: 64 << 20 };
        let (_feed, tailer) = feed::feed(options, store.clone(), stepper, Arc::new(IntoCache(cache.clone())));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(tailer.run().await) });
        tasks.spawn(async move { match filler.run().await {} });
        if mode == Mode::Complete {
            let cache = cache.clone();
            tasks.spawn(async move { match cache.keep_complete().await {} });
        }
        step.started().await;
        step.proven().await;
        while !cache.is_loaded() {
            tokio::task::yield_now().await;
        }
        Self { store, cache, step, admins: HashSet::new(), stale: 0, _tasks: tasks, _dir: dir }
    }

    pub async fn on(&mut self, event: &Event) {
        match event.what {
            What::Request(user) => {
                let answer = self.cache.get(UserId(user), SIMPLE).await.unwrap();
                self.stale += u64::from(answer.role != role(self.admins.contains(&user)));
            }
            What::Change(user) => {
                let is_admin = self.admins.insert(user) || !self.admins.remove(&user);
                let written = self.store.write(&[set(user, is_admin)]).await.remove(0).unwrap();
                self.step.nudge();
                self.step.reach(written.revision).await.unwrap();
            }
        }
    }

    pub fn day(&self) -> Day {
        let stats = self.cache.stats();
        Day {
            hits: stats.hits,
            store_reads: stats.store_reads,
            stale: self.stale,
            entries: stats.users,
            ..Day::default()
        }
    }
}

fn role(is_admin: bool) -> RoleName {
    RoleName::held(if is_admin { "admin" } else { "user" })
}

fn set(user: i64, is_admin: bool) -> Call {
    let op = Op::Set { user: UserId(user), role: role(is_admin), username: None, expected: None, reason: None };
    Call { actor: "bench".into(), grant: Grant::Any, request: None, op }
}
