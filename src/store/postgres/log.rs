//! Reading the log: from an anchor on, page by page, each page one statement and so one moment.

use sqlx::Row;

use super::{
    Postgres,
    rows::{self, with_head},
    session,
};
use crate::{
    failpoint,
    role::{Anchor, Commit, Revision, Tag},
    store::{Facts, Inside, LogError, Page, Position, StoreError},
};

/// Commits per page, however small they are.
const SPINE: usize = 512;

pub(super) const HEAD: &str = with_head!();

// $1 anchor, $2 limit, $3 key of the last change read inside the first commit, $4 whether there is such
const PAGE: &str = concat!(
    "with meta as (",
    with_head!("(select c.tag from rolecache.commits c where c.revision = $1) as anchor_tag"),
    "), spine as (
      select s.*, row_number() over w as place, sum(s.size) over w as total
      from (
        select c.id, c.revision, c.tag, c.size, c.committed_at
        from rolecache.commits c
        where c.revision > $1
        order by c.revision
        limit 512
      ) s
      window w as (order by s.revision)
    )
    select m.*, p.revision, p.tag, p.size, (extract(epoch from p.committed_at) * 1000000)::bigint as at_us, ch.*
    from meta m
    left join spine p on p.place = 1 or (p.total <= $2 and not $4)
    left join lateral (
      select x.seq, x.user_id, x.old_role, x.new_role, x.username, x.origin, x.actor, x.reason,
        x.transfer_from, x.transfer_to, x.mailbox_id
      from rolecache.changes x
      where x.commit_id = p.id and x.seq > $3
      order by x.seq
      limit $2
    ) ch on true
    order by p.revision, ch.seq"
);

// $1 revision
const LOCATE: &str = with_head!(
    "a.revision, a.tag",
    "left join lateral (
      select c.revision, c.tag from rolecache.commits c where c.revision <= $1 order by c.revision desc limit 1
    ) a on true"
);

impl Postgres {
    pub(super) async fn head(&self) -> Result<Anchor, StoreError> {
        let rows = session::fetch(&self.pools.log, || sqlx::query(HEAD)).await?;
        Ok(rows::meta(rows::first(&rows)?, &self.facts)?.head)
    }

    pub(super) async fn read_log(&self, from: &Position, limit: usize) -> Result<Page, LogError> {
        let limit = limit.max(1);
        let query = || {
            sqlx::query(PAGE)
                .bind(from.anchor.revision.0)
                .bind(i64::try_from(limit).unwrap_or(i64::MAX))
                .bind(from.inside.map_or(i64::MIN, |inside| inside.row))
                .bind(from.inside.is_some())
        };
        let rows = session::fetch(&self.pools.log, query).await.map_err(StoreError::from)?;
        page(from, limit, &rows, &self.facts).map_err(StoreError::from)?
    }

    pub(super) async fn locate(&self, revision: Revision, tag: Option<Tag>) -> Result<Anchor, LogError> {
        let query = || sqlx::query(LOCATE).bind(revision.0);
        let rows = session::fetch(&self.pools.lists, query).await.map_err(StoreError::from)?;
        located(revision, tag, &rows, &self.facts).map_err(StoreError::from)?
    }
}

type Checked<T> = Result<Result<T, LogError>, session::Failure>;

fn page(from: &Position, limit: usize, rows: &[sqlx::postgres::PgRow], facts: &Facts) -> Checked<Page> {
    let first = rows::first(rows)?;
    let rows::Meta { head, trimmed } = rows::meta(first, facts)?;
    let found = first.try_get::<Option<uuid::Uuid>, _>("anchor_tag")?.map(Tag);
    if let Err(error) = must_have(from.anchor, found, trimmed, head) {
        return Ok(Err(error));
    }

    let mut commits: Vec<Commit> = Vec::new();
    let mut start = from.inside.map_or(0, |inside| inside.index);
    let mut last_row = 0;
    for row in rows {
        let Some(anchor) = rows::anchor(row)? else { break };
        if commits.last().is_none_or(|commit| commit.revision != anchor.revision) {
            if !commits.is_empty() {
                start = 0;
            }
            let size = u64::try_from(row.try_get::<i64, _>("size")?).unwrap_or(0);
            commits.push(Commit {
                revision: anchor.revision,
                tag: anchor.tag,
                at: rows::time(row.try_get("at_us")?),
                size,
                // Exactly: commits stay in memory, most have one change, and a vector that grows makes room for four.
                changes: Vec::with_capacity(rows.len().min(size as usize)),
            });
        }
        let Some(commit) = commits.last_mut() else { break };
        if let Some((seq, change)) = rows::change(row, start + commit.changes.len() as u64)? {
            commit.changes.push(change);
            last_row = seq;
        }
    }

    if let Some(inside) = from.inside
        && commits.first().map(Commit::anchor) != Some(inside.commit)
    {
        return Ok(Err(LogError::HistoryChanged { at: inside.commit, head: head.revision }));
    }
    let mut next = Position::from(from.anchor);
    for (place, commit) in commits.iter().enumerate() {
        let start = if place == 0 { from.inside.map_or(0, |inside| inside.index) } else { 0 };
        let read = start + commit.changes.len() as u64;
        if read == commit.size {
            next = commit.anchor().into();
        } else if place == 0 && read < commit.size && commit.changes.len() == limit {
            next.inside = Some(Inside { commit: commit.anchor(), index: read, row: last_row });
        } else {
            return Err(session::Failure::shape(format_args!(
                "commit {} has {read} changes and says {}",
                commit.revision, commit.size
            )));
        }
    }
    debug_assert!(commits.len() <= SPINE);
    Ok(Ok(Page { commits, next, head }))
}

fn located(revision: Revision, tag: Option<Tag>, rows: &[sqlx::postgres::PgRow], facts: &Facts) -> Checked<Anchor> {
    let first = rows::first(rows)?;
    let rows::Meta { head, trimmed } = rows::meta(first, facts)?;
    let newest = rows::anchor(first)?;
    let is_let_through = failpoint::is_on!("bug::trim_off_by_one") && revision.0 + 1 == trimmed.revision.0;
    Ok(match tag {
        Some(tag) => {
            let asked = Anchor { revision, tag };
            let found = newest.filter(|newest| newest.revision == revision).map(|newest| newest.tag);
            must_have(asked, found, trimmed, head).map(|()| asked)
        }
        None if revision < trimmed.revision && !is_let_through => Err(compacted(revision, trimmed, head)),
        None if revision > head.revision => Err(LogError::Unknown { requested: revision, head: head.revision }),
        None => Ok(newest.unwrap_or(trimmed)),
    })
}

/// Whether a reader can go on from `at`, whose revision has the tag `found` in the log.
fn must_have(at: Anchor, found: Option<Tag>, trimmed: Anchor, head: Anchor) -> Result<(), LogError> {
    if at == trimmed || (failpoint::is_on!("bug::trim_off_by_one") && at.revision.0 + 1 == trimmed.revision.0) {
        return Ok(());
    }
    let is_there = found == Some(at.tag) || (failpoint::is_on!("bug::tag_unchecked") && found.is_some());
    if at.revision > trimmed.revision && is_there {
        return Ok(());
    }
    // What is still there below the trim point has a hole after it.
    if at.revision >= trimmed.revision || is_there {
        return Err(LogError::HistoryChanged { at, head: head.revision });
    }
    Err(compacted(at.revision, trimmed, head))
}

pub(super) fn compacted(requested: Revision, trimmed: Anchor, head: Anchor) -> LogError {
    LogError::Compacted { requested, oldest: trimmed.revision, head: head.revision }
}
