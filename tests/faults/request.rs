//! Writes of every kind, as they are sent and as they are written down.

use std::{fmt::Debug, time::Duration};

use rolecache::proto::v1::{
    DeleteUserRequest, SetRoleRequest, TransferAdminRequest, role_cache_service_client::RoleCacheServiceClient,
};
use tonic::{Status, transport::Channel};

use super::history::{Giver, Write};

/// Whom a transfer makes one.
pub const ADMIN: &str = "admin";

/// A write under an id of its own, by which the log names it, too.
#[derive(Clone, PartialEq, Debug)]
pub enum Request {
    Set(SetRoleRequest),
    Delete(DeleteUserRequest),
    Transfer(TransferAdminRequest),
}

/// What is told of one that is done.
#[derive(Clone, PartialEq, Debug)]
pub struct Done {
    pub revision: i64,
    pub changed: bool,
    /// In every field.
    pub whole: String,
}

// === impl Request ===

impl Request {
    pub fn set(user_id: i64, role: &str, random: &mut fastrand::Rng) -> Self {
        let (reason, request_id) = ids(random);
        Self::Set(SetRoleRequest { user_id, role: role.into(), reason, request_id, ..Default::default() })
    }

    pub fn delete(user_id: i64, random: &mut fastrand::Rng) -> Self {
        let (reason, request_id) = ids(random);
        Self::Delete(DeleteUserRequest { user_id, reason, request_id })
    }

    pub fn transfer(from_user_id: i64, to_user_id: i64, random: &mut fastrand::Rng) -> Self {
        let (reason, request_id) = ids(random);
        let demote_from = random.bool();
        Self::Transfer(TransferAdminRequest {
            from_user_id,
            to_user_id,
            demote_from,
            reason,
            request_id,
            ..Default::default()
        })
    }

    pub fn id(&self) -> &str {
        match self {
            Self::Set(set) => &set.request_id,
            Self::Delete(delete) => &delete.request_id,
            Self::Transfer(transfer) => &transfer.request_id,
        }
    }

    /// With a deadline, or without one.
    pub async fn send(
        &self,
        client: &mut RoleCacheServiceClient<Channel>,
        deadline: Option<Duration>,
    ) -> Result<Done, Status> {
        fn within<T>(message: T, deadline: Option<Duration>) -> tonic::Request<T> {
            let mut request = tonic::Request::new(message);
            if let Some(deadline) = deadline {
                request.set_timeout(deadline);
            }
            request
        }
        Ok(match self.clone() {
            Self::Set(set) => {
                let answer = client.set_role(within(set, deadline)).await?.into_inner();
                Done::new(answer.revision, answer.change.is_some(), &answer)
            }
            Self::Delete(delete) => {
                let answer = client.delete_user(within(delete, deadline)).await?.into_inner();
                Done::new(answer.revision, answer.change.is_some(), &answer)
            }
            Self::Transfer(transfer) => {
                let answer = client.transfer_admin(within(transfer, deadline)).await?.into_inner();
                Done::new(answer.revision, !answer.changes.is_empty(), &answer)
            }
        })
    }

    /// As it is written down, before anything was told.
    pub fn described(&self) -> Write {
        let (user, role) = match self {
            Self::Set(set) => (set.user_id, set.role.as_str()),
            Self::Delete(delete) => (delete.user_id, ""),
            Self::Transfer(transfer) => (transfer.to_user_id, ADMIN),
        };
        let mut write = Write::of(self.id(), user, role);
        match self {
            Self::Set(set) => write.expected = set.expected_role.clone(),
            Self::Delete(_) => {}
            Self::Transfer(transfer) => {
                write.giver = Some(Giver { user: transfer.from_user_id, demoted: transfer.demote_from });
            }
        }
        write
    }
}

/// Of the log's line, and of the request.
fn ids(random: &mut fastrand::Rng) -> (String, String) {
    let id = format!("{:016x}", random.u64(..));
    (id.clone(), id)
}

// === impl Done ===

impl Done {
    fn new(revision: i64, changed: bool, answer: &impl Debug) -> Self {
        Self { revision, changed, whole: format!("{answer:?}") }
    }
}
