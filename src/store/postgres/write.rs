//! Writes: a batch is one statement, and what comes of it is read afterwards by the commit's own id.
//!
//! A batch that fails as a whole changed nothing; it is halved until the guilty call is alone.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use backon::{BackoffBuilder, ExponentialBuilder};
use serde_json::{Value, json};
use sqlx::{Row, postgres::PgRow, types::Json};

use super::{
    Postgres, rows,
    session::{self, Failure, Lease},
};
use crate::{
    failpoint,
    role::{Change, Revision, RoleName, Tag, UserId},
    store::{Call, Cause, Grant, Op, Refusal, WriteError, Written},
};

/// Contended batches are halved for so long; what is left is busy.
const CONTENTION_LIMIT: Duration = Duration::from_millis(500);
/// How long the result of a committed write is asked for.
const RESULT_LIMIT: Duration = Duration::from_secs(5);

// $1 calls, $2 store id
const WRITE: &str =
    "select n, outcome, commit_id, revision, tag, detail, at_us from rolecache.write($1, $2) order by n";

// $1 commit ids, $2 users
const RESULT: &str = "
    select c.id, c.revision, c.tag, (extract(epoch from c.committed_at) * 1000000)::bigint as at_us, ch.*
    from rolecache.commits c
    left join lateral (
      select row_number() over (order by x.seq) - 1 as place, x.seq, x.user_id, x.old_role, x.new_role, x.username,
        x.origin, x.actor, x.reason, x.transfer_from, x.transfer_to, x.mailbox_id
      from rolecache.changes x
      where x.commit_id = c.id
    ) ch on ch.user_id = any($2)
    where c.id = any($1)
    order by c.id, ch.seq";

type Answer = Result<Written, WriteError>;

/// What one statement said about one call.
enum Outcome {
    /// In this commit, now, with its tag, or at the first attempt.
    Committed(i64, Option<Tag>),
    Answered(Box<Answer>),
}

/// Why a whole batch failed.
enum Trouble {
    /// There is no session to send it over.
    Unreachable(Cause),
    /// Sent, and nothing came back in time.
    Silent(Cause),
    Unsent(Cause),
    Unknown(Cause),
    Contended,
    /// Somebody has numbered a commit long before ending it: nobody can commit, whatever is halved.
    FeedHeld,
    Rejected(Cause),
    /// Somebody was changed whom no call names, and it is not known by which.
    Entangled(Cause),
    /// The role that some call would have given or taken by way of the table's own triggers and keys.
    NotGranted(RoleName),
    Broken(Cause),
}

/// A commit as its calls see it.
struct Record {
    revision: Revision,
    tag: Tag,
    at: std::time::SystemTime,
    changes: Vec<Change>,
}

impl Postgres {
    pub(super) async fn write(&self, calls: &[Call]) -> Vec<Answer> {
        debug_assert!(are_apart(calls), "a batch names each user, mailbox and request id at most once");
        let started = Instant::now();
        let mut outcomes: Vec<Option<Outcome>> = calls.iter().map(|_| None).collect();
        let mut left: Vec<Range<usize>> = std::iter::once(0..calls.len()).collect();
        while let Some(range) = left.pop() {
            if range.is_empty() {
                continue;
            }
            match self.attempt(&calls[range.clone()]).await {
                Ok(batch) => {
                    for (place, outcome) in range.zip(batch) {
                        outcomes[place] = Some(outcome);
                    }
                }
                Err(trouble) if range.len() > 1 && trouble.is_worth_halving(started) => {
                    let middle = range.start + range.len() / 2;
                    left.push(middle..range.end);
                    left.push(range.start..middle);
                }
                Err(trouble) => {
                    let mut tell = |range: Range<usize>, trouble: &Trouble| {
                        for place in range {
                            outcomes[place] = Some(Outcome::Answered(Box::new(Err(trouble.answer()))));
                        }
                    };
                    tell(range, &trouble);
                    // The others would find the same, one after the other, and their callers wait for it.
                    if let Some(trouble) = trouble.of_the_others() {
                        left.drain(..).for_each(|range| tell(range, &trouble));
                    }
                }
            }
        }
        self.answers(calls, outcomes).await
    }

    async fn attempt(&self, calls: &[Call]) -> Result<Vec<Outcome>, Trouble> {
        let batch: Vec<Value> = calls.iter().enumerate().map(|(n, call)| to_json(n, call)).collect();
        let query = sqlx::query(WRITE).bind(Json(Value::Array(batch))).bind(self.facts.store_id);
        let rows = match Lease::of(&self.pools.writer).await {
            #[cfg(feature = "failpoints")]
            _ if failpoint::is_on!("bug::write_in_request") => self.in_a_transaction(query).await?,
            Ok(mut lease) => lease.fetch(query).await.map_err(Trouble::from)?,
            Err(failure) => return Err(failure.into()),
        };
        if rows.is_empty() {
            return Err(Trouble::Broken(Failure::Another.cause()));
        }
        // It is committed: what cannot be read of it is no reason to send it again.
        if rows.len() != calls.len() {
            return Err(Trouble::Unknown(Failure::shape("a call has no outcome").cause()));
        }
        rows.iter().map(|row| outcome(row).map_err(|failure| Trouble::Unknown(failure.cause()))).collect()
    }

    /// A bug for tests, where the caller may be dropped: sqlx then leaves the transaction open in its pool.
    #[cfg(feature = "failpoints")]
    async fn in_a_transaction(
        &self,
        query: sqlx::query::Query<'_, sqlx::Postgres, sqlx::postgres::PgArguments>,
    ) -> Result<Vec<PgRow>, Trouble> {
        let write = async {
            let mut transaction = self.pools.writer.begin().await?;
            let rows = query.fetch_all(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(rows)
        };
        write.await.map_err(|error| Trouble::from(Failure::Sql(error)))
    }

    async fn answers(&self, calls: &[Call], outcomes: Vec<Option<Outcome>>) -> Vec<Answer> {
        let committed = |outcome: &Option<Outcome>| match outcome {
            Some(Outcome::Committed(id, _)) => Some(*id),
            _ => None,
        };
        let ids: HashSet<i64> = outcomes.iter().filter_map(committed).collect();
        let users: Vec<i64> = calls
            .iter()
            .zip(&outcomes)
            .filter(|(_, outcome)| committed(outcome).is_some())
            .flat_map(|(call, _)| call.users().map(|user| user.0))
            .collect();
        let results = if ids.is_empty() { Ok(HashMap::new()) } else { self.results(ids, users).await };
        let one = |(call, outcome): (&Call, Option<Outcome>)| match outcome {
            Some(Outcome::Answered(answer)) => *answer,
            Some(Outcome::Committed(id, tag)) => match &results {
                // The id may be another commit's by now: of a standby that lacks this one and has taken over.
                Ok(results) => result(call, results.get(&id).filter(|found| tag.is_none_or(|tag| tag == found.tag))),
                Err(cause) => Err(WriteError::OutcomeUnknown(Arc::clone(cause))),
            },
            None => Err(WriteError::Broken(Failure::shape("a call was left out").cause())),
        };
        calls.iter().zip(outcomes).map(one).collect()
    }

    /// What was committed is only a matter of reading it, on another connection if need be.
    async fn results(&self, ids: HashSet<i64>, users: Vec<i64>) -> Result<HashMap<i64, Record>, Cause> {
        let ids: Vec<i64> = ids.into_iter().collect();
        let read = async {
            let mut pauses = ExponentialBuilder::default().with_jitter().without_max_times().build();
            loop {
                let query = || sqlx::query(RESULT).bind(&ids).bind(&users);
                match session::fetch(&self.pools.writer, query).await.and_then(|rows| results(&rows)) {
                    Err(failure) if failure.passes() => {
                        tracing::debug!(error = %failure, "a committed write could not be read back");
                        tokio::time::sleep(pauses.next().unwrap_or_default().min(RESULT_LIMIT / 10)).await;
                    }
                    other => return other.map_err(Failure::cause),
                }
            }
        };
        tokio::time::timeout(RESULT_LIMIT, read).await.unwrap_or_else(|_| Err(Failure::Silent(RESULT_LIMIT).cause()))
    }
}

fn to_json(n: usize, call: &Call) -> Value {
    let mut value = match &call.op {
        Op::Set { user, role, username, expected, reason } => json!({
            "op": "set", "user": user.0, "role": role.as_str(), "name": username, "expected": expected, "reason": reason,
        }),
        Op::Transfer { from, to, mailbox, demote_from, to_username, reason } => json!({
            "op": "transfer", "from": from.0, "to": to.0, "mailbox": mailbox.map(|it| it.0), "demote": demote_from,
            "name": to_username, "reason": reason,
        }),
        Op::Delete { user, reason } => json!({ "op": "delete", "user": user.0, "reason": reason }),
        Op::Register { mailbox, creator } => json!({ "op": "register", "mailbox": mailbox.0, "creator": creator.0 }),
    };
    value["n"] = n.into();
    value["actor"] = (*call.actor).into();
    if let Grant::Only(roles) = &call.grant {
        value["grant"] = roles.iter().map(RoleName::as_str).collect();
    }
    if let Some(request) = &call.request
        && !failpoint::is_on!("bug::request_id_ignored")
    {
        let hash = request.hash.iter().fold(String::with_capacity(64), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        value["request"] = (*request.id).into();
        value["hash"] = hash.into();
    }
    value
}

fn outcome(row: &PgRow) -> Result<Outcome, Failure> {
    let detail = || row.try_get::<&str, _>("detail");
    let role = || Ok::<_, Failure>(RoleName::held(detail()?));
    let user = || detail()?.parse().map(UserId).map_err(Failure::shape);
    let refusal = match row.try_get::<&str, _>("outcome")? {
        "changed" => {
            let tag = row.try_get::<Option<uuid::Uuid>, _>("tag")?.map(Tag);
            return Ok(Outcome::Committed(row.try_get("commit_id")?, tag));
        }
        "same" => {
            let revision = Revision(row.try_get("revision")?);
            let at = rows::time(row.try_get("at_us")?);
            let tag = row.try_get::<Option<uuid::Uuid>, _>("tag")?.map(Tag);
            return Ok(Outcome::Answered(Box::new(Ok(Written { revision, tag, at, changes: Vec::new() }))));
        }
        "underway" => return Ok(Outcome::Answered(Box::new(Err(WriteError::Underway)))),
        "busy" => return Ok(Outcome::Answered(Box::new(Err(WriteError::Busy)))),
        "not_granted" => Refusal::NotGranted { role: role()? },
        "mismatch" => Refusal::RoleMismatch { current: role()? },
        "not_admin" => Refusal::NotAnAdmin { current: role()? },
        "not_creator" => Refusal::NotTheCreator { creator: user()? },
        "no_mailbox" => Refusal::MailboxNotFound,
        "mailbox_exists" => Refusal::MailboxExists { creator: user()? },
        "reused" => Refusal::RequestIdReused,
        other => return Err(Failure::shape(format_args!("unknown outcome {other}"))),
    };
    Ok(Outcome::Answered(Box::new(Err(WriteError::Refused(refusal)))))
}

fn results(rows: &[PgRow]) -> Result<HashMap<i64, Record>, Failure> {
    let mut results = HashMap::new();
    for row in rows {
        let revision = row.try_get::<Option<i64>, _>("revision")?;
        let revision = Revision(revision.ok_or_else(|| Failure::shape("a commit has no revision"))?);
        let at = rows::time(row.try_get("at_us")?);
        let tag = Tag(row.try_get("tag")?);
        let result: &mut Record =
            results.entry(row.try_get("id")?).or_insert_with(|| Record { revision, tag, at, changes: Vec::new() });
        let index = row.try_get::<Option<i64>, _>("place")?.unwrap_or(0);
        result.changes.extend(rows::change(row, index.unsigned_abs())?.map(|(_, change)| change));
    }
    Ok(results)
}

fn result(call: &Call, result: Option<&Record>) -> Answer {
    let result = result.ok_or(WriteError::Forgotten)?;
    let Record { revision, tag, at, changes } = result;
    Ok(Written { revision: *revision, tag: Some(*tag), at: *at, changes: changes.clone() }.of(call))
}

fn are_apart(calls: &[Call]) -> bool {
    let (mut users, mut mailboxes, mut requests) = (HashSet::new(), HashSet::new(), HashSet::new());
    calls.iter().all(|call| {
        call.users().all(|user| users.insert(user))
            && call.mailbox().is_none_or(|mailbox| mailboxes.insert(mailbox))
            && call.request.as_ref().is_none_or(|request| requests.insert((&call.actor, &request.id)))
    })
}

// === impl Trouble ===

impl Trouble {
    fn is_worth_halving(&self, started: Instant) -> bool {
        match self {
            Self::Contended => started.elapsed() < CONTENTION_LIMIT,
            Self::Rejected(_) | Self::Entangled(_) | Self::NotGranted(_) | Self::Broken(_) => true,
            Self::Unreachable(_) | Self::Silent(_) | Self::Unsent(_) | Self::Unknown(_) | Self::FeedHeld => false,
        }
    }

    /// What it is for the calls that have not been sent, where it is no matter of those that have.
    fn of_the_others(&self) -> Option<Self> {
        match self {
            Self::Unreachable(cause) | Self::Silent(cause) => Some(Self::Unreachable(Arc::clone(cause))),
            Self::FeedHeld => Some(Self::FeedHeld),
            _ => None,
        }
    }

    fn answer(&self) -> WriteError {
        match self {
            Self::Unreachable(cause) | Self::Unsent(cause) => WriteError::Unreachable(Arc::clone(cause)),
            Self::Silent(cause) | Self::Unknown(cause) => WriteError::OutcomeUnknown(Arc::clone(cause)),
            Self::Contended => WriteError::Busy,
            Self::FeedHeld => WriteError::AllHeld,
            Self::Rejected(cause) => WriteError::Refused(Refusal::Rejected { cause: cause.to_string() }),
            Self::NotGranted(role) => WriteError::Refused(Refusal::NotGranted { role: role.clone() }),
            // One call alone is always told apart.
            Self::Entangled(cause) | Self::Broken(cause) => WriteError::Broken(Arc::clone(cause)),
        }
    }
}

impl From<Failure> for Trouble {
    /// By what PostgreSQL says; whatever it does not say happened after the statement was sent.
    fn from(failure: Failure) -> Self {
        let code = failure.code();
        let Some(code) = code.as_deref() else {
            return match failure {
                Failure::NoConnection(_) | Failure::Standby => Self::Unreachable(failure.cause()),
                Failure::Silent(_) => Self::Silent(failure.cause()),
                Failure::Shape(_) | Failure::Another => Self::Broken(failure.cause()),
                Failure::Sql(_) => Self::Unknown(failure.cause()),
            };
        };
        match code {
            "40003" => Self::Unknown(failure.cause()),
            "55P03" if failure.is_in("number_commit") => Self::FeedHeld,
            "55P03" | "40001" | "40P01" => Self::Contended,
            // A pooler has given us a session that does not know our statements: nothing was run.
            session::STATEMENT_MISSING | session::STATEMENT_KNOWN if !failure.is_in_a_foreign_function() => {
                Self::Unsent(failure.cause())
            }
            // It took longer than a statement may. Whether the next one would as well, no caller waits to see.
            "57014" => Self::Unreachable(failure.cause()),
            "42501" => Self::Rejected(failure.cause()),
            "RC002" => Self::Broken(failure.cause()),
            "RC004" => Self::Entangled(failure.cause()),
            "RC003" => match failure.message() {
                Some(role) if !role.is_empty() => Self::NotGranted(RoleName::held(&role)),
                _ => Self::Broken(failure.cause()),
            },
            _ => match &code[..2] {
                "08" | "57" => Self::Unknown(failure.cause()),
                "25" | "53" | "58" => Self::Unsent(failure.cause()),
                // A trigger of the table's own that is wrong, or that looks for its tables in a search_path which is not ours.
                _ if failure.is_in_a_foreign_function() => Self::Rejected(failure.cause()),
                "0A" | "42" | "54" | "55" | "F0" | "XX" => Self::Broken(failure.cause()),
                // Data, constraints, and whatever a trigger of the table raises.
                _ => Self::Rejected(failure.cause()),
            },
        }
    }
}
