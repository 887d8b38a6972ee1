//! The last commits in memory: pure data, bounded in bytes, without locks and without waiting.
//!
//! The ring holds every commit after `floor` up to the newest that was appended, none missing.

use std::{collections::VecDeque, mem::size_of, sync::Arc};

use crate::role::{Anchor, Change, Commit, RoleName};

/// A run of the log without a gap. Commits are whole, or stand for one that is read from the store.
pub struct Ring {
    commits: VecDeque<Arc<Commit>>,
    /// Of the commit before the first that is here.
    floor: Anchor,
    bytes: usize,
    bound: usize,
}

/// What the ring knows about what follows a revision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lookup {
    Next(Arc<Commit>),
    /// Nothing: it is the newest, or past it.
    UpToDate,
    /// It fell out of the ring.
    Behind,
    /// The ring is without this commit, and so of another history.
    Foreign,
}

impl Ring {
    /// An empty ring that starts after `floor` and keeps at most `bound` bytes of commits, but always the newest.
    pub fn new(floor: Anchor, bound: usize) -> Self {
        Self { commits: VecDeque::new(), floor, bytes: 0, bound }
    }

    /// # Panics
    /// If the commit is not newer than the newest.
    pub fn append(&mut self, commit: Arc<Commit>) {
        let newest = self.commits.back().map_or(self.floor.revision, |newest| newest.revision);
        assert!(commit.revision > newest, "{} follows {newest} in the ring", commit.revision);
        self.bytes += bytes(&commit);
        self.commits.push_back(commit);
        while self.bytes > self.bound && self.commits.len() > 1 {
            if let Some(oldest) = self.commits.pop_front() {
                self.bytes -= bytes(&oldest);
                self.floor = oldest.anchor();
            }
        }
    }

    /// The first commit after `anchor`, which is a commit of the store's.
    pub fn after(&self, anchor: Anchor) -> Lookup {
        if anchor.revision < self.floor.revision {
            return Lookup::Behind;
        }
        let next = self.commits.partition_point(|commit| commit.revision <= anchor.revision);
        let before = next.checked_sub(1).map_or(self.floor, |last| self.commits[last].anchor());
        match self.commits.get(next) {
            // A number that was skipped here and not in the store: what follows it there is another commit.
            Some(_) if before != anchor => Lookup::Foreign,
            None if before.revision == anchor.revision && before.tag != anchor.tag => Lookup::Foreign,
            Some(commit) => Lookup::Next(commit.clone()),
            None => Lookup::UpToDate,
        }
    }
}

/// What a commit takes in memory, near enough: its own structures, the texts that no other commit shares, and what the
/// allocator and reference counts add to each of them.
pub(super) fn bytes(commit: &Commit) -> usize {
    const BLOCK: usize = 16;
    const COUNTS: usize = 16;
    let text = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len() + BLOCK);
    let change = |change: &Change| {
        let role = |role: &Option<RoleName>| role.as_ref().map_or(0, |role| role.as_str().len() + COUNTS + BLOCK);
        role(&change.old)
            + role(&change.new)
            + text(&change.username)
            + text(&change.reason)
            + (change.actor.len() + COUNTS + BLOCK)
    };
    let own = size_of::<Arc<Commit>>() + size_of::<Commit>() + COUNTS + BLOCK;
    let changes = commit.changes.capacity() * size_of::<Change>() + BLOCK;
    own + changes + commit.changes.iter().map(change).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::role::{Origin, Revision, Tag, UserId};

    fn anchor(revision: i64) -> Anchor {
        Anchor { revision: Revision(revision), tag: Tag(Uuid::from_u128(revision as u128)) }
    }

    fn commit(revision: i64, changes: u64) -> Arc<Commit> {
        let change = |index| Change {
            index,
            user: UserId(revision),
            old: None,
            new: Some(RoleName::held("user")),
            username: None,
            origin: Origin::Sql,
            actor: "bot".into(),
            reason: None,
            transfer: None,
        };
        let Anchor { revision, tag } = anchor(revision);
        let changes: Vec<_> = (0..changes).map(change).collect();
        Arc::new(Commit { revision, tag, at: SystemTime::UNIX_EPOCH, size: changes.len() as u64, changes })
    }

    #[test]
    fn what_fell_out_is_behind_and_the_floor_itself_is_not() {
        let mut ring = Ring::new(anchor(10), 3 * bytes(&commit(11, 1)));
        assert_eq!(ring.after(anchor(9)), Lookup::Behind);
        assert_eq!(ring.after(anchor(10)), Lookup::UpToDate);
        for revision in [11, 13, 14, 15] {
            ring.append(commit(revision, 1));
        }
        assert_eq!(ring.after(anchor(10)), Lookup::Behind);
        assert_eq!(ring.after(anchor(11)), Lookup::Next(commit(13, 1)));
        assert_eq!(ring.after(anchor(12)), Lookup::Foreign, "there is no such commit here");
        assert_eq!(ring.after(anchor(15)), Lookup::UpToDate);
        assert_eq!(ring.after(anchor(99)), Lookup::UpToDate);
        for revision in [11, 14, 15] {
            let foreign = Anchor { tag: anchor(1).tag, ..anchor(revision) };
            assert_eq!(ring.after(foreign), Lookup::Foreign);
        }
    }

    #[test]
    fn a_commit_over_the_bound_stays_while_it_is_the_newest() {
        let mut ring = Ring::new(anchor(0), 1);
        ring.append(commit(1, 50));
        assert_eq!(ring.after(anchor(0)), Lookup::Next(commit(1, 50)));
        ring.append(commit(2, 1));
        assert_eq!(ring.after(anchor(0)), Lookup::Behind);
    }

    proptest! {
        /// Against a plain vector: every lookup is right, and the bytes stay under the bound.
        #[test]
        fn a_ring_is_the_tail_of_the_log(
            steps in prop::collection::vec((1i64..4, 0u64..5), 1..60),
            asked in prop::collection::vec(-5i64..200, 1..40),
            bound in 1usize..4_000,
        ) {
            let mut ring = Ring::new(anchor(5), bound);
            let mut log: Vec<Arc<Commit>> = Vec::new();
            let mut revision = 5;
            for (gap, changes) in steps {
                revision += gap;
                let commit = commit(revision, changes);
                ring.append(commit.clone());
                log.push(commit);
                let held: usize = ring.commits.iter().map(|commit| bytes(commit)).sum();
                prop_assert_eq!(held, ring.bytes);
                prop_assert!(held <= bound || ring.commits.len() == 1);
            }
            for after in asked {
                let is_there = after == 5 || log.iter().any(|commit| commit.revision.0 == after);
                let expected = match log.iter().find(|commit| commit.revision.0 > after) {
                    _ if after < ring.floor.revision.0 => Lookup::Behind,
                    Some(_) if !is_there => Lookup::Foreign,
                    Some(next) => Lookup::Next(next.clone()),
                    None => Lookup::UpToDate,
                };
                prop_assert_eq!(ring.after(anchor(after)), expected);
            }
            let held: Vec<_> = ring.commits.iter().cloned().collect();
            prop_assert_eq!(&held[..], &log[log.len() - held.len()..]);
        }
    }
}
