//! The heart of a server as it builds it, over a real store, without gRPC around it.
#![allow(dead_code, reason = "each bench uses its part")]

use std::{sync::Arc, time::Duration};

use rolecache::{
    cache::{self, Mode, RoleCache},
    feed::{self, Apply},
    role::{Commit, RoleName, UserId},
    step::{self, Step},
    store::{Call, Grant, Op, Options, Store, sqlite},
};
use tempfile::TempDir;
use tokio::task::JoinSet;

pub struct Heart {
    pub store: Arc<dyn Store>,
    pub cache: Arc<RoleCache>,
    pub step: Step,
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

impl Heart {
    /// In step, over users from 1 on who have the default role. A lazy cache knows none of them yet.
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
        Self { store, cache, step, _tasks: tasks, _dir: dir }
    }
}

pub fn role(is_admin: bool) -> RoleName {
    RoleName::held(if is_admin { "admin" } else { "user" })
}

pub fn set(user: i64, is_admin: bool) -> Call {
    let op = Op::Set { user: UserId(user), role: role(is_admin), username: None, expected: None, reason: None };
    Call { actor: "bench".into(), grant: Grant::Any, request: None, op }
}
