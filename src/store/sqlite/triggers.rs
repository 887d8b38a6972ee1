//! The triggers on `users` that log what anybody's SQL does, made from the shape of the table.
//!
//! Only built-in functions, so that the `sqlite3` shell fires them. What is logged is the row as it stands when the trigger
//! runs, not NEW: a bot's own trigger may have changed it since, and the last word in the log must be what the table holds.
//! They never name a conflict clause: the clause of the statement that fires them would rule instead.

use sqlx::{AssertSqlSafe, Connection, SqliteConnection};

use super::adopt::{Unique, Users};

/// A trigger as `sqlite_schema` holds it.
pub(super) struct Trigger {
    pub(super) name: &'static str,
    pub(super) sql: String,
}

/// Milliseconds since 1970.
pub(super) const NOW: &str = "cast(round((julianday('now') - 2440587.5) * 86400000.0) as integer)";

/// Every trigger that `users` needs.
pub(super) fn wanted(users: &Users) -> Vec<Trigger> {
    let candidates = candidates(users);
    let moved = moved(users);
    let name_of = |row: &str| match users.has_username {
        true => format!("{row}.username"),
        false => "null".to_owned(),
    };
    let (old_name, u_name) = (name_of("old"), name_of("u"));
    let (old_role, new_role) = (role("old.role"), role("new.role"));
    let (u_role, r_role) = (role("u.role"), role("r.role"));
    let change = "insert into rolecache_changes (commit_id, user_id, old_role, new_role, username)\n  \
         select (select max(id) from rolecache_commits)";
    let gone = |row: &str| format!("not exists (select 1 from users u where u.user_id = {row})");

    vec![
        trigger(
            "rolecache_before_insert",
            "before insert on users",
            &[
                "delete from rolecache_replaced where for_user is new.user_id".to_owned(),
                "delete from rolecache_replaced where for_user = -1".to_owned(),
                format!(
                    "insert into rolecache_replaced (for_user, user_id, role, username)\n  \
                     select new.user_id, u.user_id, u.role, {u_name} from users u\n  \
                     where typeof(u.user_id) = 'integer' and ({candidates})"
                ),
            ],
        ),
        trigger(
            "rolecache_after_insert",
            "after insert on users",
            &[
                open_commit(),
                // A row that gets its key by itself is about user -1 before it is inserted.
                format!(
                    "{change}, r.user_id, {r_role}, null, max(r.username)\n  from rolecache_replaced r\n  \
                     where (r.for_user is new.user_id or r.for_user = -1) and r.user_id is not new.user_id and {}\n  group by r.user_id",
                    gone("r.user_id")
                ),
                {
                    let old = format!(
                        "(select {r_role} from rolecache_replaced r\n    \
                         where (r.for_user is new.user_id or r.for_user = -1) and r.user_id = new.user_id limit 1)"
                    );
                    format!(
                        "{change}, u.user_id,\n    {old},\n    {u_role}, {u_name}\n  from users u\n  \
                         where u.user_id = new.user_id and typeof(u.user_id) = 'integer'\n    and {old} is not {u_role}"
                    )
                },
                forget_gone("(r.for_user is new.user_id or r.for_user = -1)"),
                "delete from rolecache_replaced where for_user is new.user_id".to_owned(),
                "delete from rolecache_replaced where for_user = -1".to_owned(),
                size_commit(),
                drop_empty_commit(),
            ],
        ),
        trigger(
            "rolecache_before_update",
            &format!("before update on users\nwhen {moved}"),
            &[
                "delete from rolecache_replaced where for_user is old.user_id".to_owned(),
                format!(
                    "insert into rolecache_replaced (for_user, user_id, role, username)\n  \
                     select old.user_id, u.user_id, u.role, {u_name} from users u\n  \
                     where typeof(u.user_id) = 'integer' and u.user_id is not old.user_id and ({candidates})"
                ),
            ],
        ),
        // Not `update of role`: an UPDATE OR REPLACE of any unique column removes others.
        trigger(
            "rolecache_after_update",
            &format!("after update on users\nwhen {old_role} is not {new_role}\n  or {moved}"),
            &[
                open_commit(),
                format!(
                    "{change}, r.user_id, {r_role}, null, max(r.username)\n  from rolecache_replaced r\n  \
                     where r.for_user is old.user_id and r.user_id is not old.user_id and r.user_id is not new.user_id\n    \
                     and {}\n  group by r.user_id",
                    gone("r.user_id")
                ),
                format!(
                    "{change}, old.user_id, {old_role}, null, {old_name}\n  \
                     where old.user_id is not new.user_id and typeof(old.user_id) = 'integer'\n    and {}",
                    gone("old.user_id")
                ),
                {
                    let old = format!(
                        "case when old.user_id is new.user_id then {old_role}\n      \
                         else (select {r_role} from rolecache_replaced r\n        \
                         where r.for_user is old.user_id and r.user_id = new.user_id limit 1) end"
                    );
                    format!(
                        "{change}, u.user_id,\n    {old},\n    {u_role}, {u_name}\n  from users u\n  \
                         where u.user_id = new.user_id and typeof(u.user_id) = 'integer'\n    and {old} is not {u_role}"
                    )
                },
                forget_gone("r.for_user is old.user_id"),
                "delete from rolecache_replaced where for_user is old.user_id".to_owned(),
                // What another statement, which this one runs inside of, has noted must stay true.
                "delete from rolecache_replaced where user_id = old.user_id and old.user_id is not new.user_id"
                    .to_owned(),
                "update rolecache_replaced set role = new.role where user_id = new.user_id".to_owned(),
                size_commit(),
                drop_empty_commit(),
            ],
        ),
        trigger(
            "rolecache_after_delete",
            "after delete on users\nwhen typeof(old.user_id) = 'integer'",
            &[
                open_commit(),
                format!("{change}, old.user_id, {old_role}, null, {old_name}\n  where {}", gone("old.user_id")),
                "delete from rolecache_replaced where user_id = old.user_id".to_owned(),
                size_commit(),
                drop_empty_commit(),
            ],
        ),
    ]
}

fn trigger(name: &'static str, when: &str, body: &[String]) -> Trigger {
    let body: String = body.iter().map(|statement| format!("  {statement};\n")).collect();
    // The prefix is the one that SQLite writes into sqlite_schema, whatever the statement had.
    Trigger { name, sql: format!("CREATE TRIGGER {name} {when}\nbegin\n{body}end") }
}

/// How a role reads: NULL and '' are the default role.
pub(super) fn role(column: &str) -> String {
    format!("coalesce(nullif(cast({column} as text) collate binary, ''), (select default_role from rolecache_feed))")
}

fn open_commit() -> String {
    format!(
        "insert into rolecache_commits (tag, committed_at, size)\n  select randomblob(16), {NOW}, 0\n  \
         where (select open_commit from rolecache_feed) is null"
    )
}

fn size_commit() -> String {
    "update rolecache_commits\n  \
     set size = (select count(*) from rolecache_changes c where c.commit_id = rolecache_commits.id)\n  \
     where id = (select max(id) from rolecache_commits) and (select open_commit from rolecache_feed) is null"
        .to_owned()
}

fn drop_empty_commit() -> String {
    "delete from rolecache_commits\n  where id = (select max(id) from rolecache_commits) and size = 0\n    \
     and (select open_commit from rolecache_feed) is null"
        .to_owned()
}

/// Who was logged as gone is nobody's candidate any more. Asks first whether there is anything to do at all: the list of
/// an IN costs more than the rest of the trigger.
fn forget_gone(frame: &str) -> String {
    format!(
        "delete from rolecache_replaced\n  where exists (select 1 from rolecache_replaced r where {frame}) and user_id in (\n    select r.user_id from rolecache_replaced r\n    \
         where {frame} and not exists (select 1 from users u where u.user_id = r.user_id))"
    )
}

/// Rows `u` that NEW may replace: of its key, or equal to it in every column of some unique index.
fn candidates(users: &Users) -> String {
    let alike = |unique: &Unique| {
        let columns = unique.columns.iter().map(|(name, collation)| {
            let name = quoted(name);
            format!("u.{name} = new.{name} collate {collation}")
        });
        format!("({})", columns.collect::<Vec<_>>().join(" and "))
    };
    let others = users.uniques.iter().map(alike);
    std::iter::once("u.user_id = new.user_id".to_owned()).chain(others).collect::<Vec<_>>().join("\n    or ")
}

/// Whether an UPDATE touches what can replace another row.
fn moved(users: &Users) -> String {
    let columns = users.uniques.iter().flat_map(|unique| &unique.columns).map(|(name, _)| quoted(name));
    let mut columns: Vec<_> = columns.collect();
    columns.sort();
    columns.dedup();
    let differs = |name: &String| format!("old.{name} is not new.{name} collate binary");
    let others = columns.iter().map(differs);
    std::iter::once("old.user_id is not new.user_id".to_owned()).chain(others).collect::<Vec<_>>().join(" or ")
}

pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Makes the triggers that are missing or different, and removes ours that nobody wants any more. Where they were there
/// before, changes may have been made that nobody logged: whoever goes on from before would never hear of them. So that
/// ends the history, and everybody starts over; the commits stay for those who look at what was logged.
pub(super) async fn install(connection: &mut SqliteConnection, users: &Users, is_new: bool) -> Result<(), sqlx::Error> {
    let wanted = wanted(users);
    let mut transaction = connection.begin_with("begin immediate").await?;
    let wrong = differences(&mut transaction, users).await?;
    let standing = standing(&mut transaction).await?;
    for (name, sql) in &standing {
        if !wanted.iter().any(|trigger| trigger.name == name && trigger.sql == *sql) {
            sqlx::raw_sql(AssertSqlSafe(format!("drop trigger {}", quoted(name)))).execute(&mut *transaction).await?;
        }
    }
    for trigger in wanted {
        if !standing.iter().any(|(name, sql)| name == trigger.name && *sql == trigger.sql) {
            sqlx::raw_sql(AssertSqlSafe(trigger.sql)).execute(&mut *transaction).await?;
        }
    }
    if !is_new && !wrong.is_empty() {
        sqlx::raw_sql(AssertSqlSafe(format!(
            "insert into rolecache_commits (tag, committed_at, size) values (randomblob(16), {NOW}, 0);
             update rolecache_feed set (trimmed_revision, trimmed_tag) =
               (select id, tag from rolecache_commits order by id desc limit 1)"
        )))
        .execute(&mut *transaction)
        .await?;
    }
    transaction.commit().await?;
    if !is_new && !wrong.is_empty() {
        for sentence in wrong {
            tracing::warn!("{sentence}, so changes of roles may be missing from the log");
        }
        tracing::warn!(
            "the triggers are made anew; changes may have been missed, so every reader of the log starts over"
        );
    }
    Ok(())
}

/// What stands otherwise than it should, in sentences.
pub(super) async fn differences(connection: &mut SqliteConnection, users: &Users) -> Result<Vec<String>, sqlx::Error> {
    let standing = standing(connection).await?;
    let sentences =
        wanted(users).into_iter().filter_map(|trigger| match standing.iter().find(|(name, _)| name == trigger.name) {
            None => Some(format!("the trigger {} on users is missing", trigger.name)),
            Some((_, sql)) if *sql != trigger.sql => {
                Some(format!("the trigger {} does not fit the table users as it is now", trigger.name))
            }
            Some(_) => None,
        });
    Ok(sentences.collect())
}

async fn standing(connection: &mut SqliteConnection) -> Result<Vec<(String, String)>, sqlx::Error> {
    sqlx::query_as(
        r"select name, sql from sqlite_schema where type = 'trigger' and name like 'rolecache\_%' escape '\'",
    )
    .fetch_all(connection)
    .await
}
