//! The table of the cache: user to role, nothing else per user, with an optional bound.

use std::mem::size_of;

use super::{
    map::{DashMap, Entry, RefMulti},
    names::RoleId,
};
use crate::{
    role::UserId,
    sync::{Mutex, PoisonError},
};

pub(super) struct Entries {
    table: DashMap<UserId, RoleId>,
    bound: Option<Bound>,
}

/// Keeps a lazy cache at its capacity: any entry may go at any time, so a random one does.
struct Bound {
    capacity: usize,
    /// Every user in the table, in no order, and now and then one that is not any more. Locked
    /// before the table is touched, never while a guard of the table is held.
    users: Mutex<Vec<UserId>>,
}

impl Entries {
    pub(super) fn new(capacity: Option<usize>) -> Self {
        let bound = capacity.map(|capacity| Bound { capacity, users: Mutex::default() });
        Self { table: DashMap::new(), bound }
    }

    pub(super) fn get(&self, user: UserId) -> Option<RoleId> {
        self.table.get(&user).map(|entry| *entry)
    }

    pub(super) fn insert(&self, user: UserId, role: RoleId) {
        if self.table.insert(user, role).is_none() {
            self.admit(user);
        }
    }

    pub(super) fn insert_if_absent(&self, user: UserId, role: RoleId) {
        if let Entry::Vacant(place) = self.table.entry(user) {
            place.insert(role);
        }
    }

    pub(super) fn remove(&self, user: UserId) {
        self.table.remove(&user);
    }

    pub(super) fn remove_if(&self, user: UserId, role: RoleId) {
        self.table.remove_if(&user, |_, held| *held == role);
    }

    pub(super) fn remove_all_with(&self, role: RoleId) {
        self.table.retain(|_, held| *held != role);
        self.table.shrink_to_fit();
    }

    pub(super) fn clear(&self) {
        // Held over both: a user who comes in between would be in the table and never be found again for eviction.
        let mut users = self.bound.as_ref().map(|bound| bound.users.lock().unwrap_or_else(PoisonError::into_inner));
        self.table.clear();
        self.table.shrink_to_fit();
        if let Some(users) = &mut users {
            users.clear();
        }
    }

    /// Up to `count` users who are held, from a random place on: the table is in the order of a hash.
    pub(super) fn sample(&self, count: usize) -> Vec<UserId> {
        let held = self.len();
        let begin = if count < held { random_below(held) } else { 0 };
        let user = |entry: RefMulti<'_, UserId, RoleId>| *entry.key();
        let mut users: Vec<UserId> = self.table.iter().skip(begin).take(count).map(user).collect();
        users.extend(self.table.iter().take(begin.min(count - users.len())).map(user));
        // The table changes between the two walks, and may bring somebody twice.
        users.sort_unstable();
        users.dedup();
        users
    }

    pub(super) fn users_in_order(&self) -> Vec<UserId> {
        let mut users: Vec<UserId> = self.table.iter().map(|entry| *entry.key()).collect();
        users.sort_unstable();
        users
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// Of the table: its buckets are a power of two of which it fills seven eighths, with a byte of control each.
    pub(super) fn bytes(&self) -> usize {
        self.table.capacity() * 8 / 7 * (size_of::<(UserId, RoleId)>() + 1)
    }

    /// Makes room for a user who is new in the table.
    fn admit(&self, user: UserId) {
        let Some(bound) = &self.bound else { return };
        let mut users = bound.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.push(user);
        while users.len() > bound.capacity {
            let victim = random_below(users.len());
            let victim = users.swap_remove(victim);
            self.table.remove(&victim);
        }
    }
}

/// Good enough to spread evictions; `RandomState` is seeded by the system.
pub(super) fn random_below(bound: usize) -> usize {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(bound) % bound as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cache::names::Names, role::RoleName};

    #[test]
    fn a_sample_has_as_many_users_as_there_are_and_none_twice() {
        let role = Names::new().intern(&RoleName::held("user")).unwrap();
        let entries = Entries::new(None);
        (0..100).for_each(|user| entries.insert(UserId(user), role));
        let mut met = std::collections::HashSet::new();
        for (count, expected) in [(0, 0), (1, 1), (60, 60), (99, 99), (100, 100), (101, 100)] {
            for _ in 0..50 {
                let mut users = entries.sample(count);
                met.extend(users.iter().copied());
                users.sort_unstable();
                users.dedup();
                assert_eq!(users.len(), expected, "of {count}");
            }
        }
        assert_eq!(met.len(), 100);
    }

    #[test]
    fn a_bound_table_never_holds_more_than_its_capacity() {
        let role = Names::new().intern(&RoleName::held("user")).unwrap();
        let entries = Entries::new(Some(10));
        for user in 0..1_000 {
            entries.insert(UserId(user % 50), role);
            assert!(entries.len() <= 10);
            if user % 7 == 0 {
                entries.remove(UserId(user % 50));
            }
        }
        assert!(entries.len() > 0);
        assert!(entries.bound.as_ref().unwrap().users.lock().unwrap().len() <= 10);
    }
}
