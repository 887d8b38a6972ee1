//! Complete mode: every user with a role other than the default, loaded at one revision while commits go on.
//!
//! Until the load is done, commits leave an entry for every user that they touch, those with the default role too. The
//! snapshot is taken after that began, and put in only once its revision is applied, and only where no entry is: so what
//! is there is at least as new, and what is put in is the state at `applied`. Whatever ends completeness ends a load, too,
//! before it can put in another entry.

use std::{sync::Arc, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::sleep;

use super::{NotKept, RoleCache};
use crate::{
    role::UserId,
    step::HistoryEnded,
    store::{SNAPSHOT_LIMIT, StoreError},
    sync::timeout,
};

#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    History(#[from] HistoryEnded),
    #[error("the change log was not caught up with in {} s", SNAPSHOT_LIMIT.as_secs())]
    Behind,
    #[error("the role of user {0} is not kept in memory: {1}")]
    NotKept(UserId, NotKept),
    #[error("a commit that came meanwhile could not be applied")]
    Spoiled,
    #[error("the commit that they are as of is not in the log that is followed, or too long passed")]
    Passed,
}

impl RoleCache {
    /// Keeps a complete cache complete: loads at start, and again whenever completeness is lost. Never returns.
    pub async fn keep_complete(self: Arc<Self>) -> std::convert::Infallible {
        loop {
            let mut delays = ExponentialBuilder::default()
                .with_min_delay(Duration::from_millis(200))
                .with_max_delay(Duration::from_secs(30))
                .with_jitter()
                .without_max_times()
                .build();
            while self.completeness.number().is_none() {
                if let Err(reason) = self.load().await {
                    tracing::warn!(%reason, "loading all roles failed: reads go to the store, and the load is tried again");
                    sleep(delays.next().unwrap_or(Duration::from_secs(30))).await;
                }
            }
            self.completeness.lost.notified().await;
        }
    }

    pub(super) async fn load(&self) -> Result<(), LoadError> {
        // Nothing can be loaded before there is a history to load it in.
        self.step.started().await;
        let before = self.completeness.before_load();
        let history = self.step.history();
        let mut snapshot = self.store.snapshot().await?;
        let at = snapshot.anchor().revision;
        self.step.nudge();
        timeout(SNAPSHOT_LIMIT, self.step.reach_in(history, at)).await.map_err(|_| LoadError::Behind)??;
        if self.step.has(snapshot.anchor()) != Some(true) {
            return Err(LoadError::Passed);
        }
        loop {
            let users = snapshot.next().await?;
            if users.is_empty() {
                break;
            }
            let users = users
                .into_iter()
                .map(|row| match self.names.intern(&row.role) {
                    Ok(role) => Ok((row.user, role)),
                    Err(reason) => Err(LoadError::NotKept(row.user, reason)),
                })
                .collect::<Result<Vec<_>, _>>()?;
            let put_in = || users.into_iter().for_each(|(user, role)| self.entries.insert_if_absent(user, role));
            self.completeness.unless_lost(before, put_in).ok_or(LoadError::Spoiled)?;
        }
        self.end_load(before)?;
        tracing::info!(users = self.entries.len(), revision = at.0, "all roles are loaded");
        Ok(())
    }

    /// From now on absence means the default role.
    pub(super) fn end_load(&self, before: u64) -> Result<(), LoadError> {
        self.completeness.gain(before).ok_or(LoadError::Spoiled)?;
        // Whoever puts one in from now on takes it out again; these are from before.
        self.entries.remove_all_with(self.default_id);
        Ok(())
    }
}
