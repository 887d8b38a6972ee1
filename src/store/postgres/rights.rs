//! What our database role may do: enough to serve, and no other role so much, by a grant on a table, that the log could be forged.
//!
//! The grants are in `docs/postgresql.md`, which is what the tests set up.

use sqlx::{PgConnection, Row};

use super::session::Failure;
use crate::store::OpenError;

// Only of what is there: the rest is for a migration to make. By the catalogs, which everybody may read.
const MISSING: &str = "
    select current_user::text as me, string_agg(w.need, ', ' order by w.need) as missing
    from (
      select format('%s on %s.%s', r.need, n.nspname, c.relname) as need, has_table_privilege(c.oid, r.need) as has
      from (values
        ('public', 'users', 'select'), ('public', 'mailboxes', 'select'),
        ('rolecache', 'feed', 'select'), ('rolecache', 'commits', 'select'), ('rolecache', 'changes', 'select'),
        ('rolecache', 'migrations', 'select')
      ) as r (place, name, need)
      join pg_namespace n on n.nspname = r.place
      join pg_class c on c.relnamespace = n.oid and c.relname = r.name
      union all
      select format('execute on function %s.%s', n.nspname, p.proname), has_function_privilege(p.oid, 'execute')
      from pg_proc p join pg_namespace n on n.oid = p.pronamespace
      where n.nspname = 'rolecache' and p.proname in ('write', 'trim', 'repair_sequences')
      union all
      select format('usage on schema %s', n.nspname), has_schema_privilege(n.oid, 'usage')
      from pg_namespace n where n.nspname in ('public', 'rolecache')
    ) w
    where not w.has and exists (select from pg_namespace where nspname = 'rolecache')";

// Of each role, table and kind one row: a grant of everything has many.
const OTHERS: &str = "
    select distinct c.oid::regclass::text as place, n.nspname = 'rolecache' as is_ours,
      case when a.grantee = 0 then 'everybody' else pg_get_userbyid(a.grantee)::text end as who
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    cross join lateral aclexplode(c.relacl) a
    where a.grantee <> c.relowner and case
      when n.nspname = 'rolecache' then a.privilege_type in ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER')
      else a.privilege_type = 'TRIGGER' and c.oid in (to_regclass('public.users'), to_regclass('public.mailboxes'))
    end
    order by 1, 3";

/// Refuses in one sentence what would otherwise fail call by call.
pub(super) async fn check(conn: &mut PgConnection) -> Result<(), OpenError> {
    let row = sqlx::query(MISSING).fetch_one(conn).await.map_err(Failure::from)?;
    match row.try_get::<Option<&str>, _>("missing").map_err(Failure::from)? {
        None => Ok(()),
        Some(missing) => {
            let me: &str = row.try_get("me").map_err(Failure::from)?;
            Err(OpenError::Refused(format!(
                "our database role {me} lacks {missing}; docs/postgresql.md has the grants"
            )))
        }
    }
}

/// Who else could forge the log: a trigger runs with the rights of whoever writes, and that is its owner.
pub(super) async fn warn(conn: &mut PgConnection) -> Result<(), OpenError> {
    for row in sqlx::query(OTHERS).fetch_all(conn).await.map_err(Failure::from)? {
        let place: &str = row.try_get("place").map_err(Failure::from)?;
        let who: &str = row.try_get("who").map_err(Failure::from)?;
        match row.try_get("is_ours").map_err(Failure::from)? {
            true => tracing::warn!("{who} may write {place}, which is the log's: revoke that right"),
            false => {
                tracing::warn!(
                    "{who} may make triggers on {place}, and they run as the owner of the log: revoke that right"
                )
            }
        }
    }
    Ok(())
}
