//! rolecache: reads of one and of many, writes, and watches. The empty server speaks the first of them as well.

use prost::Message;
use rolecache::proto::v1::{
    BatchGetRolesRequest, BatchGetRolesResponse, GetRoleRequest, GetRoleResponse, SetRoleRequest, SetRoleResponse,
    Source, WatchRoleChangesRequest, WatchRoleChangesResponse, watch_role_changes_response::Event,
};

use crate::{
    grpc::{Method, Stream},
    protocol::{Broken, Told},
    users::{Users, Writes},
};

pub(crate) const GET_ROLE: &str = "/rolecache.v1.RoleCacheService/GetRole";

pub(crate) struct GetRole(pub(crate) Users);

pub(crate) struct BatchGetRoles {
    pub(crate) users: Users,
    pub(crate) batch: usize,
}

/// All users once, in their order.
pub(crate) struct Fill {
    pub(crate) next: i64,
    pub(crate) end: i64,
    pub(crate) batch: usize,
}

pub(crate) struct SetRole(pub(crate) Writes);

/// A change is known by its user: of users from this one on there is one change each.
pub(crate) struct Watch {
    pub(crate) first: i64,
}

impl Method for GetRole {
    fn path(&self) -> &'static str {
        GET_ROLE
    }

    fn request(&mut self, message: &mut Vec<u8>) {
        put(&GetRoleRequest { user_id: self.0.next(), ..Default::default() }, message);
    }

    /// A hit.
    fn is_right(&self, answer: &[u8]) -> bool {
        GetRoleResponse::decode(answer)
            .is_ok_and(|answer| !answer.role.is_empty() && answer.source() == Source::Cache && !answer.stale)
    }
}

impl Method for BatchGetRoles {
    fn path(&self) -> &'static str {
        "/rolecache.v1.RoleCacheService/BatchGetRoles"
    }

    fn request(&mut self, message: &mut Vec<u8>) {
        let user_ids = (0..self.batch).map(|_| self.users.next()).collect();
        put(&BatchGetRolesRequest { user_ids, ..Default::default() }, message);
    }

    fn is_right(&self, answer: &[u8]) -> bool {
        BatchGetRolesResponse::decode(answer)
            .is_ok_and(|answer| answer.role_indexes.len() == self.batch && !answer.stale)
    }
}

impl Method for Fill {
    fn path(&self) -> &'static str {
        "/rolecache.v1.RoleCacheService/BatchGetRoles"
    }

    fn request(&mut self, message: &mut Vec<u8>) {
        let end = self.end.min(self.next + self.batch as i64);
        put(&BatchGetRolesRequest { user_ids: (self.next..end).collect(), ..Default::default() }, message);
        self.next = end;
    }

    fn is_right(&self, answer: &[u8]) -> bool {
        BatchGetRolesResponse::decode(answer).is_ok_and(|answer| !answer.role_indexes.is_empty())
    }
}

impl Method for SetRole {
    fn path(&self) -> &'static str {
        "/rolecache.v1.RoleCacheService/SetRole"
    }

    fn request(&mut self, message: &mut Vec<u8>) {
        let (_, user_id, role) = self.0.next();
        put(&SetRoleRequest { user_id, role: role.to_owned(), ..Default::default() }, message);
    }

    /// Something was written.
    fn is_right(&self, answer: &[u8]) -> bool {
        SetRoleResponse::decode(answer).is_ok_and(|answer| answer.change.is_some())
    }
}

impl Stream for Watch {
    fn path(&self) -> &'static str {
        "/rolecache.v1.RoleCacheService/WatchRoleChanges"
    }

    fn request(&self) -> Vec<u8> {
        WatchRoleChangesRequest::default().encode_to_vec()
    }

    fn goes_on(&self) -> bool {
        false
    }

    fn read(&self, message: &[u8], told: &mut Vec<Told>) -> Result<(), Broken> {
        let message = WatchRoleChangesResponse::decode(message).map_err(|error| Broken(error.to_string()))?;
        match message.event {
            Some(Event::Started(_)) => told.push(Told::Subscribed),
            Some(Event::Commit(commit)) => {
                let numbers =
                    commit.changes.iter().filter_map(|change| u64::try_from(change.user_id - self.first).ok());
                told.extend(numbers.map(Told::Change));
            }
            Some(Event::Heartbeat(_) | Event::Snapshot(_)) | None => {}
        }
        Ok(())
    }
}

fn put(request: &impl Message, message: &mut Vec<u8>) {
    request.encode(message).expect("a vector grows");
}
