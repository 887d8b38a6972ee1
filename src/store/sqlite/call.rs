//! The calls of one batch, inside its transaction.
//!
//! The triggers on `users` log what the statements do, ours too, under the batch's commit; each call then puts its name to
//! the rows that it caused.

use std::time::SystemTime;

use sqlx::{AssertSqlSafe, Row, Sqlite, SqliteConnection, query::Query, sqlite::SqliteArguments};

use super::{
    adopt::Users,
    batch::{Answer, Failed},
    error::{broken, is_rejection},
    plan::{Known, KnownUser, Step},
    rows::{self, CHANGE_COLUMNS, LoggedChange},
    triggers::{self, NOW},
    users,
};
use crate::{
    role::{Anchor, Change, MailboxId, UserId},
    store::{Call, Facts, Op, Refusal, StoreError, WriteError, Written},
};

/// A batch whose transaction is open.
pub(super) struct Batch<'a> {
    pub(super) connection: &'a mut SqliteConnection,
    users: &'a Users,
    facts: &'a Facts,
    known: Known,
    head: Anchor,
    /// Made for the first call that writes.
    commit: Option<(Anchor, SystemTime)>,
    /// The newest row of the log, and how many of this batch are in it.
    last_row: i64,
    size: u64,
    /// Whether anything at all was written, logged or not.
    pub(super) wrote: bool,
}

impl<'a> Batch<'a> {
    /// Reads what the calls are about, under the write lock.
    pub(super) async fn load(
        connection: &'a mut SqliteConnection,
        users: &'a Users,
        facts: &'a Facts,
        calls: &[Call],
    ) -> Result<Self, StoreError> {
        let ids: Vec<UserId> = calls.iter().flat_map(Call::users).collect();
        let username = if users.has_username { "cast(u.username as text)" } else { "null" };
        let role = triggers::role("u.role");
        let sql = format!(
            "select h.revision, h.tag, (select coalesce(max(seq), 0) from rolecache_changes),
                    u.user_id, {role}, {username}
             from rolecache_head h left join json_each(?1) j left join users u on u.user_id = j.value"
        );
        let found = sqlx::query(AssertSqlSafe(sql)).bind(users::json(&ids)).fetch_all(&mut *connection).await?;
        let first = rows::first(&found)?;
        let mut batch = Self {
            users,
            facts,
            known: Known { has_username: users.has_username, ..Known::default() },
            head: rows::anchor(first, 0)?,
            commit: None,
            last_row: first.try_get(2)?,
            size: 0,
            wrote: false,
            connection,
        };
        for row in &found {
            if row.try_get::<Option<i64>, _>(3)?.is_some() {
                let user = rows::user(row, 3)?;
                let known = KnownUser { role: user.role, username: user.username };
                batch.known.users.insert(user.user, known);
            }
        }
        for mailbox in calls.iter().filter_map(Call::mailbox) {
            let creator: Option<i64> =
                sqlx::query_scalar(users::CREATOR).bind(mailbox.0).fetch_optional(&mut *batch.connection).await?;
            if let Some(creator) = creator {
                batch.known.mailboxes.insert(mailbox, UserId(creator));
            }
        }
        Ok(batch)
    }

    /// One call, all or nothing.
    pub(super) async fn call(&mut self, call: &Call) -> Result<Answer, Failed> {
        if let Some(request) = &call.request
            && let Some(before) = self.answered_before(call, request).await?
        {
            if before.hash != request.hash {
                return Ok(Err(WriteError::Refused(Refusal::RequestIdReused)));
            }
            return Ok(self.repeat(&before).await?.map(|written| written.of(call)));
        }
        let steps = match self.known.plan(call, self.facts) {
            Ok(steps) => steps,
            Err(refusal) => return Ok(Err(WriteError::Refused(refusal))),
        };
        if steps.is_empty() {
            let written = self.written(Vec::new());
            if let Some(request) = &call.request {
                self.keep(call, request, &written, 0).await?;
            }
            return Ok(Ok(written));
        }
        self.open_commit().await?;
        match self.steps(call, &steps).await? {
            Ok(logged) => {
                let first_row = logged.first().map_or(0, |change| change.row);
                self.last_row = logged.last().map_or(self.last_row, |change| change.row);
                let mut changes = Vec::with_capacity(logged.len());
                for LoggedChange { change, .. } in logged {
                    self.known.apply(&change);
                    changes.push(Change { index: self.size, ..change });
                    self.size += 1;
                }
                if let Op::Transfer { mailbox: Some(mailbox), to, .. } = &call.op {
                    self.known.mailboxes.insert(*mailbox, *to);
                }
                self.wrote = true;
                let written = self.written(changes);
                if let Some(request) = &call.request {
                    self.keep(call, request, &written, first_row).await?;
                }
                sqlx::query("release one_call").execute(&mut *self.connection).await?;
                Ok(Ok(written.of(call)))
            }
            Err(refusal) => {
                let undone = sqlx::query("rollback to one_call; release one_call").execute(&mut *self.connection).await;
                match undone {
                    Ok(_) => Ok(Err(WriteError::Refused(refusal))),
                    // A RAISE(ROLLBACK) takes the neighbours with it.
                    Err(error) if is_rejection(&error) => Err(Failed::Guilty(refusal)),
                    Err(error) => Err(error.into()),
                }
            }
        }
    }

    /// Closes the batch's commit. Answers whether there is anything to commit, and what it is logged as.
    pub(super) async fn finish(self) -> Result<(bool, Option<Anchor>), StoreError> {
        let Some((commit, _)) = self.commit else { return Ok((self.wrote, None)) };
        if !self.wrote {
            return Ok((false, None));
        }
        let sql = match self.size {
            0 => {
                "delete from rolecache_commits where id = ?1;
                 update rolecache_feed set open_commit = null"
            }
            _ => {
                "update rolecache_commits set size = ?2 where id = ?1;
                 update rolecache_feed set open_commit = null;
                 delete from rolecache_replaced"
            }
        };
        sqlx::query(sql).bind(commit.revision.0).bind(self.size as i64).execute(self.connection).await?;
        Ok((true, (self.size > 0).then_some(commit)))
    }

    async fn open_commit(&mut self) -> Result<(), StoreError> {
        if self.commit.is_some() {
            return Ok(());
        }
        let sql = format!(
            "insert into rolecache_commits (tag, committed_at, size) values (randomblob(16), {NOW}, 0)
             returning id, tag, committed_at;
             update rolecache_feed set open_commit = (select max(id) from rolecache_commits)"
        );
        let made = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *self.connection).await?;
        let Some(made) = made.first() else { return Err(broken("a commit could not be made")) };
        self.commit = Some((rows::anchor(made, 0)?, rows::time(made, 2)?));
        Ok(())
    }

    /// Runs the steps and answers what they logged, or why the bot's own tables refuse them.
    async fn steps(&mut self, call: &Call, steps: &[Step]) -> Result<Result<Vec<LoggedChange>, Refusal>, Failed> {
        for (index, step) in steps.iter().enumerate() {
            let sql = self.statement(step);
            // In one go with the first step: each trip to the connection's thread costs as much as a statement.
            let done = match index {
                0 => bound(sqlx::query(AssertSqlSafe(format!("savepoint one_call; {sql}"))), step),
                _ => bound(sqlx::query(sql), step),
            };
            let done = done.fetch_all(&mut *self.connection).await;
            match done {
                Ok(rows) if rows.is_empty() => return Ok(rejected(format!("a trigger of the table swallowed: {sql}"))),
                Ok(_) => {}
                Err(error) if is_rejection(&error) => return Ok(rejected(error.to_string())),
                Err(error) => return Err(error.into()),
            }
        }
        let logged = self.sign(call).await?;
        // What the table's own triggers, keys and conflicts did to others was done by the caller.
        let roles = logged.iter().flat_map(|logged| [&logged.change.old, &logged.change.new]).flatten();
        if let Some(role) = roles.into_iter().find(|role| !call.grant.covers(role, &self.facts.default_role)) {
            return Ok(Err(Refusal::NotGranted { role: role.clone() }));
        }
        for (user, role) in steps.iter().filter_map(Step::outcome) {
            let last = logged.iter().rev().find(|logged| logged.change.user == user);
            if last.is_none_or(|last| last.change.new.as_ref() != role) {
                return Ok(rejected(format!("a trigger of the table kept user {user} from what was written")));
            }
        }
        Ok(Ok(logged))
    }

    /// Each answers a row where it did something.
    fn statement(&self, step: &Step) -> &'static str {
        let named = self.users.has_username;
        match step {
            Step::Insert { username: Some(_), .. } if named => {
                "insert into users (user_id, role, username) values (?1, ?2, ?3) returning 1"
            }
            Step::Insert { .. } => "insert into users (user_id, role) values (?1, ?2) returning 1",
            Step::SetRole { username: Some(_), .. } if named => {
                "update users set role = ?2, username = ?3 where user_id = ?1 returning 1"
            }
            Step::SetRole { .. } => "update users set role = ?2 where user_id = ?1 returning 1",
            Step::SetUsername { .. } => "update users set username = ?2 where user_id = ?1 returning 1",
            Step::LogAgain { .. } => {
                "insert into rolecache_changes (commit_id, user_id, old_role, new_role, username)
                 values ((select max(id) from rolecache_commits), ?1, ?2, ?2, ?3) returning 1"
            }
            Step::Delete { .. } => "delete from users where user_id = ?1 returning 1",
            Step::InsertMailbox { .. } => {
                "insert into mailboxes (id, creator_id) values (?1, ?2)
                 on conflict (id) do update set creator_id = excluded.creator_id
                   where typeof(mailboxes.creator_id) <> 'integer' returning 1"
            }
            Step::SetCreator { .. } => "update mailboxes set creator_id = ?2 where id = ?1 returning 1",
        }
    }

    /// Says who and why in the rows that the triggers wrote since the last call.
    async fn sign(&mut self, call: &Call) -> Result<Vec<LoggedChange>, StoreError> {
        let (named, username, reason) = match &call.op {
            Op::Set { user, username, reason, .. } => (Some(*user), username, reason),
            Op::Transfer { to, to_username, reason, .. } => (Some(*to), to_username, reason),
            Op::Delete { reason, .. } => (None, &None, reason),
            Op::Register { .. } => (None, &None, &None),
        };
        let transfer = match &call.op {
            Op::Transfer { from, to, mailbox, .. } => Some((from.0, to.0, mailbox.map(|mailbox| mailbox.0))),
            _ => None,
        };
        let sql = format!(
            "update rolecache_changes set origin = 1, actor = ?2, reason = ?3,
               username = coalesce(username, case when user_id = ?4 then ?5 end),
               transfer_from = case when user_id in (?6, ?7) then ?6 end,
               transfer_to = case when user_id in (?6, ?7) then ?7 end,
               mailbox_id = case when user_id in (?6, ?7) then ?8 end
             where seq > ?1 returning {CHANGE_COLUMNS}"
        );
        let signed = sqlx::query(AssertSqlSafe(sql))
            .bind(self.last_row)
            .bind(&*call.actor)
            .bind(reason.as_deref())
            .bind(named.map(|user| user.0))
            .bind(username.as_deref())
            .bind(transfer.map(|(from, ..)| from))
            .bind(transfer.map(|(_, to, _)| to))
            .bind(transfer.and_then(|(.., mailbox)| mailbox))
            .fetch_all(&mut *self.connection)
            .await?;
        let mut changes = signed.iter().map(|row| rows::change(row, 0)).collect::<Result<Vec<_>, _>>()?;
        changes.sort_by_key(|change| change.row);
        Ok(changes)
    }

    fn written(&self, changes: Vec<Change>) -> Written {
        match self.commit {
            // What a call without changes found may be what one before it in this batch left.
            Some((commit, at)) if self.size > 0 => {
                Written { revision: commit.revision, tag: Some(commit.tag), at, changes }
            }
            _ => Written { revision: self.head.revision, tag: Some(self.head.tag), at: now(), changes },
        }
    }
}

fn rejected<T>(cause: String) -> Result<T, Refusal> {
    Err(Refusal::Rejected { cause })
}

fn bound<'q>(query: Query<'q, Sqlite, SqliteArguments>, step: &'q Step) -> Query<'q, Sqlite, SqliteArguments> {
    match step {
        Step::Insert { user, role, username }
        | Step::SetRole { user, role, username }
        | Step::LogAgain { user, role, username } => query.bind(user.0).bind(role.as_str()).bind(username.as_deref()),
        Step::SetUsername { user, username } => query.bind(user.0).bind(&**username),
        Step::Delete { user } => query.bind(user.0),
        Step::InsertMailbox { mailbox: MailboxId(mailbox), creator }
        | Step::SetCreator { mailbox: MailboxId(mailbox), creator } => query.bind(*mailbox).bind(creator.0),
    }
}

/// In milliseconds, like everything that the log says about time.
fn now() -> SystemTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(since.as_millis() as u64)
}
