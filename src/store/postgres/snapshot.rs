//! All users at one revision: a cursor in a repeatable read transaction, on a connection that nobody else uses and
//! that is closed with it.

use std::time::Instant;

use async_trait::async_trait;
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};

use super::{
    log::HEAD,
    rows,
    session::{self, Failure},
};
use crate::{
    role::{Anchor, RoleName, UserRow},
    store::{Facts, SNAPSHOT_LIMIT, Snapshot, StoreError},
};

const BEGIN: &str = "begin transaction isolation level repeatable read read only";

// A role of NULL or '' is the default role, which a snapshot leaves out.
const OPEN: &str = "
    declare users_snapshot no scroll cursor for
    select s.user_id::bigint as user_id, s.role::text as role, (select username::text from (select s.*) x) as username
    from public.users s cross join (select null::text as username) absent
    where s.role <> '' and s.role <> (select f.default_role from rolecache.feed f)
    order by s.user_id";

// SNAPSHOT_CHUNK
const NEXT: &str = "fetch forward 1000 from users_snapshot";

struct Cursor {
    conn: Option<PgConnection>,
    anchor: Anchor,
    default: RoleName,
    until: Instant,
}

pub(super) async fn open(url: &PgConnectOptions, facts: &Facts) -> Result<Box<dyn Snapshot>, StoreError> {
    let until = Instant::now() + SNAPSHOT_LIMIT;
    let options = session::session(url, SNAPSHOT_LIMIT)
        .options([("idle_in_transaction_session_timeout", format!("{}s", SNAPSHOT_LIMIT.as_secs()))]);
    let mut conn = session::connect(&options).await?;
    let begun = async {
        sqlx::query(BEGIN).execute(&mut conn).await?;
        let rows = sqlx::query(HEAD).fetch_all(&mut conn).await?;
        sqlx::query(OPEN).execute(&mut conn).await?;
        Ok::<_, sqlx::Error>(rows)
    };
    let rows = within(until, begun).await?;
    let anchor = rows::meta(rows::first(&rows)?, facts)?.head;
    Ok(Box::new(Cursor { conn: Some(conn), anchor, default: facts.default_role.clone(), until }))
}

#[async_trait]
impl Snapshot for Cursor {
    fn anchor(&self) -> Anchor {
        self.anchor
    }

    async fn next(&mut self) -> Result<Vec<UserRow>, StoreError> {
        let Some(mut conn) = self.conn.take() else { return Ok(Vec::new()) };
        let rows = within(self.until, sqlx::query(NEXT).fetch_all(&mut conn)).await?;
        let mut users = Vec::with_capacity(rows.len());
        for row in &rows {
            users.extend(rows::user(row, &self.default)?);
        }
        if users.is_empty() {
            let _ = tokio::time::timeout(session::CONNECT_LIMIT, conn.close()).await;
        } else {
            self.conn = Some(conn);
        }
        Ok(users)
    }
}

async fn within<T>(until: Instant, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Failure> {
    match tokio::time::timeout_at(until.into(), work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Failure::Silent(SNAPSHOT_LIMIT)),
    }
}
