//! Whether the tables that are there can be served truthfully, and what they are like.
//!
//! Only looks; whatever cannot be adopted is refused in a sentence, and nothing is changed.

use std::fmt;

use sqlx::{PgConnection, Row, postgres::PgRow};

use super::session::Failure;

const TABLE: &str = "
    select c.relkind::text as kind, c.relpersistence::text as persistence, c.relispartition as is_partition,
      exists (select from pg_inherits i where i.inhparent = c.oid) as is_parent,
      exists (select from pg_inherits i where i.inhrelid = c.oid) as is_child,
      row_security_active(c.oid) as is_row_secured
    from pg_class c
    where c.oid = to_regclass($1)";

const COLUMNS: &str = "
    select a.attname::text as name, format_type(a.atttypid, null) as type, a.attnotnull as is_required,
      a.attgenerated <> '' as is_generated,
      coalesce((select not l.collisdeterministic from pg_collation l where l.oid = a.attcollation), false) as is_loose,
      exists (
        select from pg_index i
        where i.indrelid = a.attrelid and i.indisunique and i.indisvalid and i.indimmediate
          and i.indpred is null and i.indexprs is null and i.indnkeyatts = 1 and i.indkey[0] = a.attnum
      ) as is_key
    from pg_attribute a
    where a.attrelid = to_regclass($1) and a.attnum > 0 and not a.attisdropped
    order by a.attnum";

const IDS: &[&str] = &["smallint", "integer", "bigint"];
const TEXTS: &[&str] = &["text", "character varying"];

/// What a table must have: its key first.
struct Wanted {
    table: &'static str,
    columns: &'static [Column],
}

struct Column {
    name: &'static str,
    types: &'static [&'static str],
    is_optional: bool,
}

const USERS: Wanted = Wanted {
    table: "users",
    columns: &[
        Column { name: "user_id", types: IDS, is_optional: false },
        Column { name: "role", types: TEXTS, is_optional: false },
        Column { name: "username", types: TEXTS, is_optional: true },
    ],
};

const MAILBOXES: Wanted = Wanted {
    table: "mailboxes",
    columns: &[
        Column { name: "id", types: IDS, is_optional: false },
        Column { name: "creator_id", types: IDS, is_optional: false },
    ],
};

/// What is there, or will be.
pub(super) struct Adopted {
    pub(super) users: Option<String>,
    pub(super) mailboxes: Option<String>,
}

/// Looks at both tables; the inner error is a sentence for the person who starts the server.
pub(super) async fn inspect(conn: &mut PgConnection) -> Result<Result<Adopted, String>, Failure> {
    let users = match table(conn, &USERS).await? {
        Ok(users) => users,
        Err(sentence) => return Ok(Err(sentence)),
    };
    let mailboxes = match table(conn, &MAILBOXES).await? {
        Ok(mailboxes) => mailboxes,
        Err(sentence) => return Ok(Err(sentence)),
    };
    Ok(Ok(Adopted { users, mailboxes }))
}

async fn table(conn: &mut PgConnection, wanted: &Wanted) -> Result<Result<Option<String>, String>, Failure> {
    let name = format!("public.{}", wanted.table);
    let found = sqlx::query(TABLE).bind(&name).fetch_optional(&mut *conn).await?;
    let Some(found) = found else { return Ok(Ok(None)) };
    let refuse = |why: &dyn fmt::Display| Ok(Err(format!("the table {name} cannot be adopted: {why}")));
    if let Some(why) = wrong_kind(&found)? {
        return refuse(&why);
    }
    let columns = sqlx::query(COLUMNS).bind(&name).fetch_all(&mut *conn).await?;
    let mut like = Vec::new();
    for (place, column) in wanted.columns.iter().enumerate() {
        match column_like(&name, &columns, column, place == 0)? {
            Ok(words) => like.push(words),
            Err(why) => return refuse(&why),
        }
    }
    let others = columns.len() - like.iter().filter(|words| !words.starts_with("no ")).count();
    let others = match others {
        0 => String::new(),
        1 => "; one of its columns is not ours".to_owned(),
        n => format!("; {n} of its columns are not ours"),
    };
    Ok(Ok(Some(format!("{} ({}{others})", wanted.table, like.join(", ")))))
}

fn wrong_kind(row: &PgRow) -> Result<Option<&'static str>, Failure> {
    Ok(match row.try_get::<&str, _>("kind")? {
        "v" => Some("it is a view"),
        "m" => Some("it is a materialized view"),
        "f" => Some("it is a foreign table"),
        "p" => Some("it is partitioned, and changes of its partitions would not be logged"),
        "r" if row.try_get("is_partition")? => Some("it is a partition of another table"),
        "r" if row.try_get("is_parent")? => Some("other tables inherit from it, and their changes would not be logged"),
        "r" if row.try_get("is_child")? => Some("it inherits from another table"),
        "r" if row.try_get::<&str, _>("persistence")? != "p" => {
            Some("it is unlogged, so a crash empties it without a trace in the change log")
        }
        "r" if row.try_get("is_row_secured")? => {
            Some("row level security hides rows of it from our database role; give the role BYPASSRLS or the table")
        }
        "r" => None,
        _ => Some("it is not a table"),
    })
}

/// One column in words, or why it will not do.
fn column_like(
    table: &str,
    columns: &[PgRow],
    wanted: &Column,
    is_key: bool,
) -> Result<Result<String, String>, Failure> {
    let Column { name, types, is_optional } = wanted;
    for row in columns {
        if row.try_get::<&str, _>("name")? != *name {
            continue;
        }
        let found: &str = row.try_get("type")?;
        if !types.contains(&found) {
            return Ok(Err(format!("its column {name} is {found}, and must be {}", types.join(" or "))));
        }
        if row.try_get("is_generated")? {
            return Ok(Err(format!("its column {name} is generated, so it cannot be written")));
        }
        if *name == "role" && row.try_get("is_loose")? {
            return Ok(Err(format!(
                "its column {name} takes different texts for equal, by a nondeterministic collation; give it another, as by \
                 `alter table {table} alter {name} type text collate \"C\"`"
            )));
        }
        if is_key && !(row.try_get::<bool, _>("is_key")? && row.try_get::<bool, _>("is_required")?) {
            return Ok(Err(format!(
                "its column {name} is no key; it needs a primary key, or a unique index that is neither partial nor \
                 deferrable and `not null`, on {name} alone"
            )));
        }
        let found = if found == "character varying" { "varchar" } else { found };
        return Ok(Ok(format!("{found} {name}")));
    }
    Ok(if *is_optional { Ok(format!("no {name}")) } else { Err(format!("it has no column {name}")) })
}
