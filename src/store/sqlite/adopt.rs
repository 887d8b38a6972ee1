//! What `users` and `mailboxes` look like, and whether they can be served as they are.
//!
//! Looks only; whoever opens the store creates what is absent. A row whose `user_id` is not a whole number (a column that is
//! no rowid alias may hold NULL, text or a fraction) is nobody's: neither read nor logged.

use sqlx::{Row, SqliteConnection};

use super::triggers::quoted;

/// `users`, as far as it matters to us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Users {
    pub(super) has_username: bool,
    /// Through which an INSERT OR REPLACE can remove others, besides `user_id` itself.
    pub(super) uniques: Vec<Unique>,
    words: String,
}

/// The columns of a unique index with their collations.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Unique {
    pub(super) columns: Vec<(String, String)>,
}

/// What was found; None where the table is absent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Found {
    pub(super) users: Option<Users>,
    pub(super) mailboxes: Option<String>,
}

/// Why a table cannot be served.
#[derive(Debug)]
pub(super) enum AdoptError {
    Refused(String),
    Sql(sqlx::Error),
}

struct Column {
    name: String,
    declared: String,
    key: i64,
    generated: bool,
}

struct Index {
    origin: String,
    partial: bool,
    /// None for an expression.
    columns: Vec<Option<(String, String)>>,
}

struct Table {
    name: &'static str,
    columns: Vec<Column>,
    uniques: Vec<Index>,
}

// === impl Found ===

impl Found {
    pub(super) async fn look(connection: &mut SqliteConnection) -> Result<Self, AdoptError> {
        let users = match Table::look(connection, "users").await? {
            Some(table) => Some(table.as_users()?),
            None => None,
        };
        let mailboxes = match Table::look(connection, "mailboxes").await? {
            Some(table) => Some(table.as_mailboxes()?),
            None => None,
        };
        Ok(Self { users, mailboxes })
    }

    /// One sentence for the start log.
    pub(super) fn sentence(&self) -> String {
        match (&self.users, &self.mailboxes) {
            (None, None) => "created users and mailboxes".to_owned(),
            (Some(users), None) => format!("adopted users ({}) and created mailboxes", users.words),
            (None, Some(mailboxes)) => format!("created users and adopted mailboxes ({mailboxes})"),
            (Some(users), Some(mailboxes)) => {
                format!("adopted users ({}) and mailboxes ({mailboxes})", users.words)
            }
        }
    }
}

// === impl Table ===

impl Table {
    async fn look(connection: &mut SqliteConnection, name: &'static str) -> Result<Option<Self>, AdoptError> {
        let kind: Option<String> =
            sqlx::query_scalar("select type from pragma_table_list where schema = 'main' and name = ?1 collate nocase")
                .bind(name)
                .fetch_optional(&mut *connection)
                .await?;
        match kind.as_deref() {
            None => return Ok(None),
            Some("table") => {}
            Some("view") => return refuse(format!("{name} is a view; its rows cannot be watched for changes")),
            Some(kind) => return refuse(format!("{name} is a {kind} table; it fires no triggers")),
        }
        let columns = sqlx::query("select name, type, pk, hidden from pragma_table_xinfo(?1)")
            .bind(name)
            .fetch_all(&mut *connection)
            .await?
            .into_iter()
            .map(|row| {
                Ok(Column {
                    name: row.try_get::<String, _>(0)?,
                    declared: row.try_get(1)?,
                    key: row.try_get(2)?,
                    generated: row.try_get::<i64, _>(3)? > 1,
                })
            })
            .collect::<Result<_, sqlx::Error>>()?;
        let listed =
            sqlx::query(r#"select name, origin, partial from pragma_index_list(?1) where "unique" order by name"#)
                .bind(name)
                .fetch_all(&mut *connection)
                .await?;
        let mut uniques = Vec::new();
        for row in listed {
            let parts = sqlx::query("select name, coll from pragma_index_xinfo(?1) where key order by seqno")
                .bind(row.try_get::<String, _>(0)?)
                .fetch_all(&mut *connection)
                .await?;
            let column = |part: sqlx::sqlite::SqliteRow| {
                let name: Option<String> = part.try_get(0)?;
                let collation: String = part.try_get(1)?;
                Ok(name.map(|name| (name, collation)))
            };
            let columns = parts.into_iter().map(column).collect::<Result<_, sqlx::Error>>()?;
            uniques.push(Index { origin: row.try_get(1)?, partial: row.try_get::<i64, _>(2)? != 0, columns });
        }
        Ok(Some(Self { name, columns, uniques }))
    }

    fn as_users(&self) -> Result<Users, AdoptError> {
        let key = self.integer("user_id")?;
        self.must_be_key("user_id")?;
        let role = self.column("role")?;
        if affinity(&role.declared) != "TEXT" {
            return refuse(format!("users.role is declared {}, not as text", shown(&role.declared)));
        }
        let has_username = self.find("username").is_some();
        let mut uniques = Vec::new();
        for index in &self.uniques {
            let Some(columns) = index.columns.iter().cloned().collect::<Option<Vec<_>>>() else {
                return refuse(
                    "users has a unique index on an expression, through which INSERT OR REPLACE would remove rows unseen"
                        .to_owned(),
                );
            };
            if let Some((_, other)) = columns.iter().find(|(_, name)| !is_built_in(name)) {
                return refuse(format!("users has a unique index with the collation {other}, which is not built in"));
            }
            if !is_only(&columns, "user_id") {
                uniques.push(Unique { columns });
            }
        }
        uniques.sort();
        uniques.dedup();

        let more = self.columns.len() - 2 - usize::from(has_username);
        let words = format!(
            "user_id {}, role {}, {}{}",
            shown(&key.declared),
            shown(&role.declared),
            if has_username { "username" } else { "no username" },
            if more > 0 { format!(", {more} more") } else { String::new() },
        );
        Ok(Users { has_username, uniques, words })
    }

    fn as_mailboxes(&self) -> Result<String, AdoptError> {
        let key = self.integer("id")?;
        self.must_be_key("id")?;
        let creator = self.integer("creator_id")?;
        Ok(format!("id {}, creator_id {}", shown(&key.declared), shown(&creator.declared)))
    }

    fn find(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name.eq_ignore_ascii_case(name))
    }

    fn column(&self, name: &str) -> Result<&Column, AdoptError> {
        let Some(column) = self.find(name) else {
            return refuse(format!("{} has no column {name}", self.name));
        };
        if column.generated {
            return refuse(format!("{}.{name} is a generated column, which cannot be written", self.name));
        }
        Ok(column)
    }

    fn integer(&self, name: &str) -> Result<&Column, AdoptError> {
        let column = self.column(name)?;
        if affinity(&column.declared) != "INTEGER" {
            let declared = shown(&column.declared);
            return refuse(format!("{}.{name} is declared {declared}, not as an integer", self.name));
        }
        Ok(column)
    }

    fn must_be_key(&self, name: &str) -> Result<(), AdoptError> {
        let keys: Vec<_> = self.columns.iter().filter(|column| column.key > 0).collect();
        // A rowid alias has no index of its own.
        let is_alias = matches!(keys[..], [key] if key.name.eq_ignore_ascii_case(name)
            && key.declared.eq_ignore_ascii_case("integer")
            && self.uniques.iter().all(|index| index.origin != "pk"));
        let is_unique = self.uniques.iter().any(|index| {
            let columns: Option<Vec<_>> = index.columns.iter().cloned().collect();
            !index.partial && columns.is_some_and(|columns| is_only(&columns, name))
        });
        if is_alias || is_unique {
            return Ok(());
        }
        let table = self.name;
        refuse(format!("{table}.{name} is neither the primary key nor unique, so {} would be ambiguous", quoted(name)))
    }
}

// === impl AdoptError ===

impl From<sqlx::Error> for AdoptError {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error)
    }
}

fn refuse<T>(sentence: String) -> Result<T, AdoptError> {
    Err(AdoptError::Refused(sentence))
}

fn is_only(columns: &[(String, String)], name: &str) -> bool {
    matches!(columns, [(only, _)] if only.eq_ignore_ascii_case(name))
}

fn is_built_in(collation: &str) -> bool {
    ["binary", "nocase", "rtrim"].iter().any(|name| collation.eq_ignore_ascii_case(name))
}

fn shown(declared: &str) -> &str {
    if declared.is_empty() { "without a type" } else { declared }
}

/// How SQLite derives a column's affinity from its declared type, as far as we tell them apart.
fn affinity(declared: &str) -> &'static str {
    let declared = declared.to_ascii_uppercase();
    let has = |part: &str| declared.contains(part);
    match () {
        () if has("INT") => "INTEGER",
        () if has("CHAR") || has("CLOB") || has("TEXT") => "TEXT",
        () => "OTHER",
    }
}
