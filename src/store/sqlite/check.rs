//! Whether what logs changes is in place.

use sqlx::{Connection, SqliteConnection};

use super::{
    adopt::{AdoptError, Found},
    pool::Pool,
    triggers,
};
use crate::store::StoreError;

/// What is missing or different, in sentences: a unique index added later needs other triggers, a table made anew has none.
pub(super) async fn triggers(pool: &Pool) -> Result<Vec<String>, StoreError> {
    let mut lease = pool.lease().await?;
    let answer = look(&mut lease).await;
    lease.end(answer)
}

async fn look(connection: &mut SqliteConnection) -> Result<Vec<String>, StoreError> {
    let mut moment = connection.begin().await?;
    let found = match Found::look(&mut moment).await {
        Ok(found) => found,
        Err(AdoptError::Refused(sentence)) => return Ok(vec![sentence]),
        Err(AdoptError::Sql(error)) => return Err(error.into()),
    };
    let mut sentences = match &found.users {
        Some(users) => triggers::differences(&mut moment, users).await?,
        None => vec!["the table users is gone".to_owned()],
    };
    if found.mailboxes.is_none() {
        sentences.push("the table mailboxes is gone".to_owned());
    }
    let left_open: Option<i64> =
        sqlx::query_scalar("select open_commit from rolecache_feed").fetch_one(&mut *moment).await?;
    if left_open.is_some() {
        sentences.push(
            "rolecache_feed.open_commit is set outside of a batch: others' changes are logged under an old commit"
                .to_owned(),
        );
    }
    moment.commit().await?;
    Ok(sentences)
}
