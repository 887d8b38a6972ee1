//! Reads of the log: from an anchor on, in pages, each as of one moment.
//!
//! Rows of `rolecache_changes` are numbered under the write lock, so `seq` grows along with the revision, and a page goes on
//! by `seq` alone, however large the commit is that it lies in.

use sqlx::{AssertSqlSafe, Connection, Row, SqliteConnection, sqlite::SqliteRow};

use super::{
    error::broken,
    pool::Pool,
    rows::{self, CHANGE_COLUMNS},
};
use crate::{
    failpoint,
    role::{Anchor, Change, Commit, Revision, Tag},
    store::{Inside, LogError, Page, Position, StoreError},
};

/// The log at one moment, and what it has at one revision.
pub(super) struct State {
    pub(super) head: Anchor,
    pub(super) trimmed: Anchor,
    found: Option<Tag>,
}

/// A row of `rolecache_commits`.
struct CommitRow {
    commit: Commit,
    size: usize,
}

pub(super) async fn head(pool: &Pool) -> Result<Anchor, StoreError> {
    let mut lease = pool.lease().await?;
    let row = sqlx::query("select revision, tag from rolecache_head").fetch_one(&mut *lease).await;
    rows::anchor(&lease.end(row)?, 0)
}

pub(super) async fn read(pool: &Pool, from: &Position, limit: usize) -> Result<Page, LogError> {
    let mut lease = pool.lease().await?;
    let answer = read_page(&mut lease, from, limit.max(1)).await;
    lease.end(answer)
}

async fn read_page(connection: &mut SqliteConnection, from: &Position, limit: usize) -> Result<Page, LogError> {
    let mut moment = connection.begin().await?;
    let state = State::at(&mut moment, from.anchor.revision).await?;
    let head = state.head;
    state.must_have(from.anchor)?;
    let page = match from.inside {
        None if from.anchor == head => Page { commits: Vec::new(), next: *from, head },
        None => read_commits(&mut moment, from.anchor, head, limit).await?,
        Some(inside) => {
            let Some(following) = commits_after(&mut moment, from.anchor.revision, 1).await?.pop() else {
                return Err(LogError::HistoryChanged { at: inside.commit, head: head.revision });
            };
            if following.commit.anchor() != inside.commit {
                return Err(LogError::HistoryChanged { at: inside.commit, head: head.revision });
            }
            read_part(&mut moment, from.anchor, following, inside, head, limit).await?
        }
    };
    moment.commit().await?;
    Ok(page)
}

async fn read_commits(
    moment: &mut SqliteConnection,
    anchor: Anchor,
    head: Anchor,
    limit: usize,
) -> Result<Page, LogError> {
    let mut following = commits_after(moment, anchor.revision, limit).await?;
    let Some(first) = following.first() else {
        return Err(broken("the log has a head that no commit leads to").into());
    };
    if first.size > limit {
        let inside = Inside { commit: first.commit.anchor(), index: 0, row: 0 };
        return read_part(moment, anchor, following.swap_remove(0), inside, head, limit).await;
    }
    let mut total = 0;
    following.retain(|next| {
        total += next.size;
        total <= limit
    });
    let (Some(first), Some(last)) = (following.first(), following.last()) else {
        return Err(broken("a page without a commit").into());
    };
    let (first, last) = (first.commit.revision, last.commit.revision);
    let sql = format!(
        "select {CHANGE_COLUMNS} from rolecache_changes
         where commit_id between ?1 and ?2 order by commit_id, seq limit ?3"
    );
    // One more than there should be: a row too many is noticed.
    let query = sqlx::query(AssertSqlSafe(sql)).bind(first.0).bind(last.0).bind(limit as i64 + 1);
    let mut changes = rows::each(query.fetch(moment), |row| rows::change(row, 0)).await?.into_iter().peekable();
    let mut commits = Vec::with_capacity(following.len());
    for CommitRow { mut commit, size } in following {
        // Exactly: commits stay in memory, most have one change, and a vector that grows makes room for four.
        commit.changes.reserve_exact(size);
        while let Some(mut next) = changes.next_if(|next| next.revision == commit.revision) {
            next.change.index = commit.changes.len() as u64;
            commit.changes.push(next.change);
        }
        if commit.changes.len() != size {
            return Err(incomplete(&commit, commit.changes.len()));
        }
        commits.push(commit);
    }
    if let Some(left) = changes.next() {
        return Err(broken(format!("the log has a change too many in commit {}", left.revision)).into());
    }
    let next = commits.last().map_or(anchor, Commit::anchor);
    Ok(Page { commits, next: next.into(), head })
}

/// A run of the commit after `anchor`, from `inside` on.
async fn read_part(
    moment: &mut SqliteConnection,
    anchor: Anchor,
    CommitRow { mut commit, size }: CommitRow,
    inside: Inside,
    head: Anchor,
    limit: usize,
) -> Result<Page, LogError> {
    let left = size.saturating_sub(inside.index as usize);
    let wanted = left.min(limit);
    let sql = format!(
        "select {CHANGE_COLUMNS} from rolecache_changes where commit_id = ?1 and seq > ?2 order by seq limit ?3"
    );
    let query = sqlx::query(AssertSqlSafe(sql)).bind(commit.revision.0).bind(inside.row).bind(wanted as i64 + 1);
    let mut found = rows::each(query.fetch(moment), |row| rows::change(row, 0)).await?;
    let is_whole = wanted == left;
    if found.len() < wanted || (is_whole && found.len() > wanted) {
        return Err(incomplete(&commit, inside.index as usize + found.len()));
    }
    let mut row = inside.row;
    commit.changes.reserve_exact(wanted);
    found.truncate(wanted);
    for (index, found) in (inside.index..).zip(found) {
        row = found.row;
        commit.changes.push(Change { index, ..found.change });
    }
    let next = match is_whole {
        true => commit.anchor().into(),
        false => {
            let inside = Inside { commit: commit.anchor(), index: inside.index + wanted as u64, row };
            Position { anchor, inside: Some(inside) }
        }
    };
    Ok(Page { commits: vec![commit], next, head })
}

async fn commits_after(
    moment: &mut SqliteConnection,
    revision: Revision,
    limit: usize,
) -> Result<Vec<CommitRow>, StoreError> {
    let query =
        sqlx::query("select id, tag, committed_at, size from rolecache_commits where id > ?1 order by id limit ?2")
            .bind(revision.0)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
    let commit = |row: &SqliteRow| {
        let Anchor { revision, tag } = rows::anchor(row, 0)?;
        let size: i64 = row.try_get(3)?;
        if size < 1 {
            return Err(broken(format!("commit {revision} has the size {size}")));
        }
        let commit = Commit { revision, tag, at: rows::time(row, 2)?, size: size as u64, changes: Vec::new() };
        Ok(CommitRow { commit, size: size as usize })
    };
    rows::each(query.fetch(moment), commit).await
}

fn incomplete(commit: &Commit, found: usize) -> LogError {
    broken(format!("commit {} should have {} changes and has {found}", commit.revision, commit.size)).into()
}

pub(super) async fn locate(pool: &Pool, revision: Revision, tag: Option<Tag>) -> Result<Anchor, LogError> {
    let mut lease = pool.lease().await?;
    let answer = find(&mut lease, revision, tag).await;
    lease.end(answer)
}

async fn find(connection: &mut SqliteConnection, revision: Revision, tag: Option<Tag>) -> Result<Anchor, LogError> {
    let mut moment = connection.begin().await?;
    let state = State::at(&mut moment, revision).await?;
    let head = state.head;
    let is_let_through = failpoint::is_on!("bug::trim_off_by_one") && revision.0 + 1 == state.trimmed.revision.0;
    let anchor = match tag {
        Some(tag) => {
            let anchor = Anchor { revision, tag };
            state.must_have(anchor)?;
            anchor
        }
        None if revision > head.revision => return Err(LogError::Unknown { requested: revision, head: head.revision }),
        None if revision < state.trimmed.revision && !is_let_through => return Err(state.compacted(revision)),
        None => {
            let found = sqlx::query("select id, tag from rolecache_commits where id <= ?1 order by id desc limit 1")
                .bind(revision.0)
                .fetch_optional(&mut *moment)
                .await?;
            found.map_or(Ok(state.trimmed), |row| rows::anchor(&row, 0))?
        }
    };
    moment.commit().await?;
    Ok(anchor)
}

// === impl State ===

impl State {
    pub(super) async fn at(moment: &mut SqliteConnection, revision: Revision) -> Result<Self, StoreError> {
        let row = sqlx::query(
            "select h.revision, h.tag, f.trimmed_revision, f.trimmed_tag,
                    (select c.tag from rolecache_commits c where c.id = ?1)
             from rolecache_head h, rolecache_feed f",
        )
        .bind(revision.0)
        .fetch_one(moment)
        .await?;
        let found = row.try_get::<Option<uuid::Uuid>, _>(4)?.map(Tag);
        Ok(Self { head: rows::anchor(&row, 0)?, trimmed: rows::anchor(&row, 2)?, found })
    }

    /// The anchor is the one that [`State::at`] was asked about.
    fn must_have(&self, anchor: Anchor) -> Result<(), LogError> {
        let is_let_through =
            failpoint::is_on!("bug::trim_off_by_one") && anchor.revision.0 + 1 == self.trimmed.revision.0;
        if anchor == self.trimmed || is_let_through {
            return Ok(());
        }
        let is_there = self.found == Some(anchor.tag);
        if anchor.revision > self.trimmed.revision && is_there {
            return Ok(());
        }
        // What is still there below the trim point has a hole after it.
        if anchor.revision >= self.trimmed.revision || is_there {
            return Err(LogError::HistoryChanged { at: anchor, head: self.head.revision });
        }
        Err(self.compacted(anchor.revision))
    }

    pub(super) fn compacted(&self, requested: Revision) -> LogError {
        LogError::Compacted { requested, oldest: self.trimmed.revision, head: self.head.revision }
    }
}
