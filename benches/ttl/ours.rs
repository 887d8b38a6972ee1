//! The cache of this project over a real store.

use std::collections::HashSet;

use rolecache::{
    cache::{Mode, Query},
    role::{Revision, UserId},
};

use crate::{
    Day,
    heart::{Heart, role, set},
    trace::{Event, What},
};

pub const MODES: [Mode; 2] = [Mode::Lazy { capacity: None }, Mode::Complete];
const SIMPLE: Query = Query { min_revision: Revision(0), fully_consistent: false, deadline: None };

pub struct Ours {
    heart: Heart,
    /// In truth.
    admins: HashSet<i64>,
    stale: u64,
}

impl Ours {
    pub async fn start(mode: Mode, users: u32) -> Self {
        Self { heart: Heart::start(mode, users).await, admins: HashSet::new(), stale: 0 }
    }

    pub async fn on(&mut self, event: &Event) {
        let Heart { store, cache, step, .. } = &self.heart;
        match event.what {
            What::Request(user) => {
                let answer = cache.get(UserId(user), SIMPLE).await.unwrap();
                self.stale += u64::from(answer.role != role(self.admins.contains(&user)));
            }
            What::Change(user) => {
                let is_admin = self.admins.insert(user) || !self.admins.remove(&user);
                let written = store.write(&[set(user, is_admin)]).await.remove(0).unwrap();
                step.nudge();
                step.reach(written.revision).await.unwrap();
            }
        }
    }

    pub fn day(&self) -> Day {
        let stats = self.heart.cache.stats();
        Day {
            hits: stats.hits,
            store_reads: stats.store_reads,
            stale: self.stale,
            entries: stats.users,
            ..Day::default()
        }
    }
}
