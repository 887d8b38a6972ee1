//! Calls in the background, calls that are refused, and waiting for what a server says of itself.

use std::{collections::HashMap, time::Duration};

use rolecache::proto::v1::{
    BatchGetRolesRequest, BatchGetRolesResponse, DeleteUserRequest, FeedState, GetRoleRequest, GetRoleResponse,
    Heartbeat, ListRoleChangesRequest, RoleChange, SetRoleRequest, SetRoleResponse, StatsResponse,
    TransferAdminRequest, TransferAdminResponse, WatchRoleChangesRequest,
    role_cache_service_client::RoleCacheServiceClient, watch_role_changes_response::Event,
};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use super::{
    server::{Db, PATIENCE, TestServer, client},
    watch::{Watching, reason},
};

/// A call on its way.
pub struct InFlight<T>(JoinHandle<Result<T, Status>>);

impl<T: Send + 'static> InFlight<T> {
    pub fn begin(call: impl Future<Output = Result<T, Status>> + Send + 'static) -> Self {
        Self(tokio::spawn(call))
    }

    pub async fn outcome(self) -> Result<T, Status> {
        timeout(PATIENCE, self.0).await.expect("a call should end in time").unwrap()
    }

    pub async fn answer(self) -> T {
        self.outcome().await.expect("the call should succeed")
    }

    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// As a client does that dies.
    pub fn hang_up(self) {
        self.0.abort();
    }
}

impl TestServer {
    pub fn begin_get(&self, request: GetRoleRequest) -> InFlight<GetRoleResponse> {
        let mut client = self.client.clone();
        InFlight::begin(async move { Ok(client.get_role(request).await?.into_inner()) })
    }

    pub fn begin_set(&self, user_id: i64, role: &str) -> InFlight<SetRoleResponse> {
        self.begin_request(SetRoleRequest { user_id, role: role.into(), ..Default::default() })
    }

    /// On a connection of its own, so that it may hang up.
    pub fn begin_request(&self, request: SetRoleRequest) -> InFlight<SetRoleResponse> {
        let address = self.address;
        InFlight::begin(async move { Ok(client(address).await.set_role(request).await?.into_inner()) })
    }

    pub fn begin_batch(&self, request: BatchGetRolesRequest) -> InFlight<BatchGetRolesResponse> {
        let mut client = self.client.clone();
        InFlight::begin(async move { Ok(client.batch_get_roles(request).await?.into_inner()) })
    }

    pub async fn batch(&self, user_ids: &[i64]) -> BatchGetRolesResponse {
        let request = BatchGetRolesRequest { user_ids: user_ids.to_vec(), ..Default::default() };
        self.begin_batch(request).answer().await
    }

    pub async fn fully_consistent(&self, user_id: i64) -> Result<GetRoleResponse, Status> {
        self.try_get(GetRoleRequest { user_id, fully_consistent: true, ..Default::default() }).await
    }

    pub async fn transfer(&self, request: TransferAdminRequest) -> Result<TransferAdminResponse, Status> {
        Ok(self.client.clone().transfer_admin(request).await?.into_inner())
    }

    pub async fn delete(&self, user_id: i64) -> (Option<RoleChange>, i64) {
        let request = DeleteUserRequest { user_id, ..Default::default() };
        let answer = self.client.clone().delete_user(request).await.expect("DeleteUser").into_inner();
        (answer.change, answer.revision)
    }

    /// Every change that the log still holds, oldest first.
    pub async fn log(&self) -> Vec<RoleChange> {
        self.changes(None).await
    }

    /// One user's part of it.
    pub async fn log_of(&self, user_id: i64) -> Vec<RoleChange> {
        self.changes(Some(user_id)).await
    }

    async fn changes(&self, user_id: Option<i64>) -> Vec<RoleChange> {
        logged(self.client.clone(), user_id).await
    }

    /// Waits until Stats say what the test needs to have happened.
    pub async fn until_stats(&self, what: &str, is_so: impl Fn(&StatsResponse) -> bool) -> StatsResponse {
        let mut last = None;
        let waited = timeout(PATIENCE, async {
            loop {
                let stats = self.stats().await;
                if is_so(&stats) {
                    return stats;
                }
                last = Some(stats);
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        waited.unwrap_or_else(|_| panic!("{what} should have come true: {last:#?}"))
    }

    /// A watch that says at once how the feed stands.
    pub async fn watch_feed(&self) -> Watching {
        self.watch(WatchRoleChangesRequest::default()).await
    }
}

impl Watching {
    /// Reads until a heartbeat says that the feed stands so.
    pub async fn until_feed(&mut self, state: FeedState) -> Heartbeat {
        loop {
            if let Event::Heartbeat(heartbeat) = self.next().await
                && heartbeat.feed_state() == state
            {
                return heartbeat;
            }
        }
    }
}

/// Every change that the log still holds, of one user or of all, oldest first.
pub async fn logged(mut client: RoleCacheServiceClient<Channel>, user_id: Option<i64>) -> Vec<RoleChange> {
    let mut request = ListRoleChangesRequest { user_id, page_size: 1_000, ..Default::default() };
    let mut changes = Vec::new();
    loop {
        let page = client.list_role_changes(request.clone()).await.expect("ListRoleChanges").into_inner();
        changes.extend(page.changes);
        if page.next_page_token.is_empty() {
            return changes;
        }
        request.page_token = page.next_page_token;
    }
}

/// Waits until `is_so`, which asks something outside of the server.
pub async fn until(what: &str, is_so: impl Fn() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !is_so() {
            sleep(Duration::from_millis(10)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what} should have come true"));
}

pub fn roles_in_order(answer: &BatchGetRolesResponse) -> Vec<&str> {
    answer.role_indexes.iter().map(|index| &*answer.roles[*index as usize]).collect()
}

/// Asserts that a call was refused so, and answers the metadata.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>, code: Code, why: &str) -> HashMap<String, String> {
    let status = outcome.expect_err("the call should be refused");
    let (actual, reason, metadata) = reason(&status);
    assert_eq!((actual, &*reason), (code, why), "{status:?}");
    metadata
}

/// The same, where the server says when to come back.
#[track_caller]
pub fn refused_for_now<T: std::fmt::Debug>(outcome: Result<T, Status>, code: Code, why: &str) {
    let status = outcome.expect_err("the call should be refused");
    let (actual, reason, _) = reason(&status);
    assert_eq!((actual, &*reason), (code, why), "{status:?}");
    let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(retry.is_some_and(|delay| delay > Duration::ZERO), "no retry delay: {status:?}");
}

impl Db {
    /// Gives users a role by plain SQL, in one transaction, and answers the newest revision.
    #[track_caller]
    pub fn put(&self, users: &[(i64, &str)]) -> i64 {
        let rows: Vec<String> = users.iter().map(|(user, role)| format!("({user}, '{role}')")).collect();
        self.sql(&format!(
            "insert into users (user_id, role) values {} on conflict (user_id) do update set role = excluded.role",
            rows.join(", ")
        ));
        self.head()
    }

    /// The newest revision, as the log itself has it.
    #[track_caller]
    pub fn head(&self) -> i64 {
        let head = match self {
            Self::Postgres { .. } => "select coalesce(max(revision), 0) from rolecache.commits",
            Self::Sqlite { .. } => "select coalesce(max(id), 0) from rolecache_commits",
        };
        self.sql(head).trim().parse().unwrap()
    }
}
