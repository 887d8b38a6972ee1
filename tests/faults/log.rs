//! The change log as the store holds it, read with the store's own shell: what everything else is judged by.

use std::collections::{BTreeMap, HashMap};

use super::support::server::Shell;

/// The role of whom the store does not know.
pub const DEFAULT: &str = "user";

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub revision: i64,
    pub user: i64,
    /// Empty for none.
    pub old: String,
    pub new: String,
    /// Of our own writers: the request id.
    pub reason: String,
}

/// The whole log, in order.
pub struct Log {
    pub entries: Vec<Entry>,
    /// The roles that a user had, each from the revision on that gave it.
    roles: HashMap<i64, BTreeMap<i64, String>>,
    /// What `users` holds now.
    pub table: BTreeMap<i64, String>,
}

impl Log {
    pub fn read(shell: &Shell) -> Self {
        let rows = shell.run(&Self::query(shell, 0));
        let entries: Vec<Entry> = rows.lines().map(Entry::parse).collect();
        let table =
            shell.run("select user_id || '|' || coalesce(nullif(role, ''), 'user') from users order by user_id");
        let table = table.lines().map(|row| row.split_once('|').unwrap());
        Self::of(entries, table.map(|(user, role)| (user.parse().unwrap(), role.to_owned())).collect())
    }

    /// What is in it after a revision, each row an [`Entry`].
    pub fn query(shell: &Shell, after: i64) -> String {
        let (prefix, revision) = match shell {
            Shell::Psql(_) => ("rolecache.", "c.revision"),
            Shell::Sqlite(_) => ("rolecache_", "c.id"),
        };
        format!(
            "select {revision} || '|' || ch.user_id || '|' || coalesce(ch.old_role, '') || '|' || coalesce(ch.new_role, '')
               || '|' || coalesce(ch.reason, '')
             from {prefix}changes ch join {prefix}commits c on c.id = ch.commit_id where {revision} > {after}
             order by {revision}, ch.seq"
        )
    }

    pub fn of(entries: Vec<Entry>, table: BTreeMap<i64, String>) -> Self {
        let mut roles: HashMap<i64, BTreeMap<i64, String>> = HashMap::new();
        for entry in &entries {
            let role = if entry.new.is_empty() { DEFAULT } else { &entry.new };
            roles.entry(entry.user).or_default().insert(entry.revision, role.to_owned());
        }
        Self { entries, roles, table }
    }

    /// Whether the user had this role at `from`, or at a revision after it up to `to`.
    pub fn had(&self, user: i64, role: &str, from: i64, to: i64) -> bool {
        let Some(roles) = self.roles.get(&user) else { return role == DEFAULT };
        let at = roles.range(..=from).next_back().map_or(DEFAULT, |(_, role)| role);
        at == role || (from < to && roles.range(from + 1..=to).any(|(_, later)| later == role))
    }

    /// Whether the user had this role at `from`, and at every revision after it up to `to`.
    pub fn had_only(&self, user: i64, role: &str, from: i64, to: i64) -> bool {
        let Some(roles) = self.roles.get(&user) else { return role == DEFAULT };
        let at = roles.range(..=from).next_back().map_or(DEFAULT, |(_, role)| role);
        at == role && (from >= to || roles.range(from + 1..=to).all(|(_, later)| later == role))
    }

    /// Who had a role other than the default at a revision, in order.
    pub fn roles_at(&self, revision: i64) -> Vec<(i64, String)> {
        let at = |roles: &BTreeMap<i64, String>| roles.range(..=revision).next_back().map(|(_, role)| role.clone());
        let mut all: Vec<_> = self.roles.iter().filter_map(|(user, roles)| Some((*user, at(roles)?))).collect();
        all.retain(|(_, role)| role != DEFAULT);
        all.sort();
        all
    }

    /// Nobody is asked for what was written up to a revision.
    pub fn forget_reasons(&mut self, to: i64) {
        self.entries.iter_mut().filter(|entry| entry.revision <= to).for_each(|entry| entry.reason.clear());
    }

    /// The revisions that changed anything, after `from`, with their changes.
    pub fn commits_after(&self, from: i64) -> Vec<(i64, Vec<&Entry>)> {
        let mut commits: Vec<(i64, Vec<&Entry>)> = Vec::new();
        for entry in self.entries.iter().filter(|entry| entry.revision > from) {
            match commits.last_mut() {
                Some((revision, entries)) if *revision == entry.revision => entries.push(entry),
                _ => commits.push((entry.revision, vec![entry])),
            }
        }
        commits
    }

    pub fn head(&self) -> i64 {
        self.entries.last().map_or(0, |entry| entry.revision)
    }
}

impl Entry {
    pub fn parse(row: &str) -> Self {
        let mut fields = row.splitn(5, '|');
        let mut field = || fields.next().unwrap();
        Self {
            revision: field().parse().unwrap(),
            user: field().parse().unwrap(),
            old: field().to_owned(),
            new: field().to_owned(),
            reason: field().to_owned(),
        }
    }
}
