//! A cache whose entries count for five minutes after they were read, and a sweep that throws away those that do not.

use std::collections::HashMap;

use crate::{
    Day,
    trace::{Event, What},
};

const TTL: f64 = 5.0 * 60.0;
const SWEPT_EVERY: f64 = 60.0;

#[derive(Default)]
pub struct TtlCache {
    /// Whether a user is an admin by now, and since when.
    truth: HashMap<i64, (bool, f64)>,
    entries: HashMap<i64, Entry>,
    swept_at: f64,
    day: Day,
}

struct Entry {
    is_admin: bool,
    read_at: f64,
}

impl TtlCache {
    pub fn on(&mut self, event: &Event) -> &mut Self {
        while event.at >= self.swept_at + SWEPT_EVERY {
            self.swept_at += SWEPT_EVERY;
            self.day.swept += self.entries.len() as u64;
            self.entries.retain(|_, entry| self.swept_at < entry.read_at + TTL);
        }
        match event.what {
            What::Change(user) => {
                let (is_admin, since) = self.truth.entry(user).or_default();
                (*is_admin, *since) = (!*is_admin, event.at);
            }
            What::Request(user) => self.ask(user, event.at),
        }
        self
    }

    fn ask(&mut self, user: i64, at: f64) {
        let (is_admin, since) = self.truth.get(&user).copied().unwrap_or_default();
        match self.entries.get(&user).filter(|entry| at < entry.read_at + TTL) {
            Some(entry) => {
                self.day.hits += 1;
                if entry.is_admin != is_admin {
                    self.day.stale += 1;
                    self.day.stale_for = self.day.stale_for.max(at - since);
                }
            }
            None => {
                self.day.store_reads += 1;
                self.entries.insert(user, Entry { is_admin, read_at: at });
            }
        }
    }

    pub fn day(&self) -> Day {
        Day { entries: self.entries.len() as u64, ..self.day }
    }
}
