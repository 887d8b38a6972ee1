//! The service: each RPC converts, calls, converts, and has no logic of its own.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use tokio::time::Instant;
use tonic::{Extensions, Request, Response, Status};

use super::{
    Core, convert,
    deadline::Deadline,
    door::{Asker, Door},
    fault::Fault,
    token::{ChangesPlace, Listing, UsersPlace},
    watch::{self, WatchStream},
};
use crate::{
    cache::{Query, Source},
    proto::{
        Method,
        v1::{self, role_cache_service_server::RoleCacheService},
    },
    role::{Revision, RoleName},
    store::{Call, Grant, ListPosition, Op, RequestId, Written},
};

/// The RPCs of the contract, over a core that is there once the store has been reached.
#[derive(Clone)]
pub(super) struct RoleService {
    core: Arc<OnceLock<Arc<Core>>>,
    /// Those that writes may set.
    roles: Arc<[RoleName]>,
    door: Arc<Door>,
}

impl RoleService {
    pub(super) fn new(core: Arc<OnceLock<Arc<Core>>>, roles: Vec<RoleName>, door: Arc<Door>) -> Self {
        Self { core, roles: roles.into(), door }
    }

    fn core(&self) -> Result<&Arc<Core>, Fault> {
        self.core.get().ok_or(Fault::StoreUnreachable)
    }

    /// A write in its caller's name, of roles that `grant` has.
    async fn write(
        &self,
        method: Method,
        asker: &Asker,
        grant: Grant,
        request: Option<RequestId>,
        op: Op,
    ) -> Result<Written, Fault> {
        // Its request may have been on its way for as long as its deadline lets it.
        if asker.caller.is_revoked() {
            self.door.log(Some(&asker.caller), &asker.peer, method, &Fault::BadCredentials);
            return Err(Fault::BadCredentials);
        }
        let call = Call { actor: asker.caller.name.clone(), grant, request, op };
        let written = self.core()?.write(call).await;
        if let Err(fault @ Fault::ScopeMissing { .. }) = &written {
            self.door.log(Some(&asker.caller), &asker.peer, method, fault);
        }
        written
    }
}

#[tonic::async_trait]
impl RoleCacheService for RoleService {
    type WatchRoleChangesStream = WatchStream;

    async fn get_role(&self, request: Request<v1::GetRoleRequest>) -> Result<Response<v1::GetRoleResponse>, Status> {
        let (_, extensions, request) = request.into_parts();
        let user = convert::user_id("user_id", request.user_id)?;
        let query = query(request.min_revision, request.fully_consistent, &extensions)?;
        let answer = self.core()?.cache.get(user, query).await.map_err(Fault::read)?;
        let source = match answer.source {
            Source::Cache => v1::Source::Cache,
            Source::Store => v1::Source::Store,
        };
        Ok(Response::new(v1::GetRoleResponse {
            user_id: user.0,
            role: answer.role.to_string(),
            revision: answer.revision.0,
            source: source.into(),
            stale: answer.stale,
        }))
    }

    async fn batch_get_roles(
        &self,
        request: Request<v1::BatchGetRolesRequest>,
    ) -> Result<Response<v1::BatchGetRolesResponse>, Status> {
        let (_, extensions, request) = request.into_parts();
        let users = convert::user_ids("user_ids", &request.user_ids)?;
        let query = query(request.min_revision, request.fully_consistent, &extensions)?;
        let answers = self.core()?.cache.get_many(&users, query).await.map_err(Fault::read)?;
        let mut roles: Vec<String> = Vec::new();
        let mut places: HashMap<RoleName, u32> = HashMap::new();
        let place = |role: RoleName| {
            *places.entry(role).or_insert_with_key(|role| {
                roles.push(role.to_string());
                roles.len() as u32 - 1
            })
        };
        let role_indexes = answers.roles.into_iter().map(place).collect();
        let (revision, stale) = (answers.revision.0, answers.stale);
        Ok(Response::new(v1::BatchGetRolesResponse { roles, role_indexes, revision, stale }))
    }

    async fn set_role(&self, request: Request<v1::SetRoleRequest>) -> Result<Response<v1::SetRoleResponse>, Status> {
        let (asker, mut request) = parts(request)?;
        let request_id = std::mem::take(&mut request.request_id);
        let request_id = convert::request_id("SetRole", request_id, &request)?;
        let user = convert::user_id("user_id", request.user_id)?;
        let role = convert::role_to_write("role", &request.role, &self.roles)?;
        let username = convert::name("username", request.username)?;
        let compare = |role| convert::role_to_compare("expected_role", role);
        let expected = request.expected_role.map(compare).transpose()?;
        let reason = convert::reason("reason", request.reason)?;
        let op = Op::Set { user, role, username, expected, reason };
        let core = self.core()?;
        let written = self.write(Method::SetRole, &asker, asker.caller.scopes.grant().clone(), request_id, op).await?;
        let revision = written.revision.0;
        Ok(Response::new(v1::SetRoleResponse { change: core.changes(&written).pop(), revision }))
    }

    async fn transfer_admin(
        &self,
        request: Request<v1::TransferAdminRequest>,
    ) -> Result<Response<v1::TransferAdminResponse>, Status> {
        let (asker, mut request) = parts(request)?;
        let request_id = std::mem::take(&mut request.request_id);
        let request_id = convert::request_id("TransferAdmin", request_id, &request)?;
        let from = convert::user_id("from_user_id", request.from_user_id)?;
        let to = convert::user_id("to_user_id", request.to_user_id)?;
        if from == to {
            return Err(Fault::field("to_user_id", "it must not be from_user_id").into());
        }
        let mailbox = request.mailbox_id.map(|id| convert::mailbox_id("mailbox_id", id)).transpose()?;
        let to_username = convert::name("to_username", request.to_username)?;
        let reason = convert::reason("reason", request.reason)?;
        // The scope `transfer` is the power to make admins, whatever roles the caller's other writes may touch.
        let op = Op::Transfer { from, to, mailbox, demote_from: request.demote_from, to_username, reason };
        let core = self.core()?;
        let written = self.write(Method::TransferAdmin, &asker, Grant::Any, request_id, op).await?;
        let revision = written.revision.0;
        Ok(Response::new(v1::TransferAdminResponse { changes: core.changes(&written), revision }))
    }

    async fn delete_user(
        &self,
        request: Request<v1::DeleteUserRequest>,
    ) -> Result<Response<v1::DeleteUserResponse>, Status> {
        let (asker, mut request) = parts(request)?;
        let request_id = std::mem::take(&mut request.request_id);
        let request_id = convert::request_id("DeleteUser", request_id, &request)?;
        let user = convert::user_id("user_id", request.user_id)?;
        let reason = convert::reason("reason", request.reason)?;
        let op = Op::Delete { user, reason };
        let core = self.core()?;
        let written =
            self.write(Method::DeleteUser, &asker, asker.caller.scopes.grant().clone(), request_id, op).await?;
        let revision = written.revision.0;
        Ok(Response::new(v1::DeleteUserResponse { change: core.changes(&written).pop(), revision }))
    }

    async fn register_mailbox(
        &self,
        request: Request<v1::RegisterMailboxRequest>,
    ) -> Result<Response<v1::RegisterMailboxResponse>, Status> {
        let (asker, request) = parts(request)?;
        let mailbox = convert::mailbox_id("mailbox_id", request.mailbox_id)?;
        let creator = convert::user_id("creator_id", request.creator_id)?;
        let op = Op::Register { mailbox, creator };
        // It is no change of a role, so that nothing else tells who said whose it is. Before the write, which goes on where its
        // caller does not wait.
        tracing::info!(
            target: "rolecache::audit",
            mailbox_id = mailbox.0,
            creator_id = creator.0,
            actor = &*asker.caller.name,
            "mailbox to be registered"
        );
        // What the table's own triggers make of it is this caller's doing.
        let grant = asker.caller.scopes.grant().clone();
        self.write(Method::RegisterMailbox, &asker, grant, None, op).await?;
        Ok(Response::new(v1::RegisterMailboxResponse {}))
    }

    async fn get_mailbox(
        &self,
        request: Request<v1::GetMailboxRequest>,
    ) -> Result<Response<v1::GetMailboxResponse>, Status> {
        let (asker, request) = parts(request)?;
        let mailbox = convert::mailbox_id("mailbox_id", request.mailbox_id)?;
        let core = self.core()?;
        let _turn = core.lookup(&asker.caller).await?;
        let creator = core.store.mailbox(mailbox).await.map_err(Fault::store)?;
        let creator = creator.ok_or(Fault::MailboxNotFound { mailbox })?;
        Ok(Response::new(v1::GetMailboxResponse { mailbox_id: mailbox.0, creator_id: creator.0 }))
    }

    async fn list_users(
        &self,
        request: Request<v1::ListUsersRequest>,
    ) -> Result<Response<v1::ListUsersResponse>, Status> {
        let (asker, request) = parts(request)?;
        let limit = convert::page_size(request.page_size)?;
        let role = convert::role_to_compare("role", request.role)?;
        let listing = Listing::new(&[b"users", role.as_bytes()]);
        let after = match &*request.page_token {
            "" => None,
            token => Some(UsersPlace::parse(token, listing).map_err(|_| broken_page_token())?.after),
        };
        let role = Some(&*role).filter(|role| !role.is_empty());
        let core = self.core()?;
        let turn = core.lookup(&asker.caller).await?;
        let mut page = core.store.list_users(role, after, limit + 1).await.map_err(Fault::store)?;
        drop(turn);
        core.applied(page.head).await?;
        let next_page_token = last_of_page(&mut page.users, limit)
            .map_or_else(String::new, |last| UsersPlace { listing, after: last.user }.token());
        let users = page.users.into_iter().map(convert::user_role).collect();
        Ok(Response::new(v1::ListUsersResponse { users, next_page_token, revision: page.head.revision.0 }))
    }

    async fn list_role_changes(
        &self,
        request: Request<v1::ListRoleChangesRequest>,
    ) -> Result<Response<v1::ListRoleChangesResponse>, Status> {
        let (asker, request) = parts(request)?;
        let limit = convert::page_size(request.page_size)?;
        let user = request.user_id.map(|id| convert::user_id("user_id", id)).transpose()?;
        let after = convert::revision("after_revision", request.after_revision)?;
        let of_user = user.map_or(0, |user| user.0).to_be_bytes();
        let listing = Listing::new(&[b"changes", &of_user, &after.0.to_be_bytes()]);
        let kept_only = after == Revision(0);
        let from = match &*request.page_token {
            "" => ListPosition { revision: after, inside: None, kept_only },
            token => {
                let place = ChangesPlace::parse(token, listing).map_err(|_| broken_page_token())?;
                ListPosition { revision: place.revision, inside: Some((place.index, place.row)), kept_only }
            }
        };
        let core = self.core()?;
        let turn = core.lookup(&asker.caller).await?;
        let page = core.store.list_changes(user, from, limit + 1).await;
        drop(turn);
        let mut page = page.map_err(|error| Fault::log(error, core.store.facts().store_id))?;
        core.applied(page.head).await?;
        // The place of the change that was read beyond the page: the next page starts with it.
        let next_page_token = page.changes.get(limit).map_or_else(String::new, |next| {
            ChangesPlace { listing, revision: next.revision, index: next.change.index, row: next.row }.token()
        });
        page.changes.truncate(limit);
        let change = |listed: &crate::store::ListedChange| {
            convert::change(&listed.change, listed.revision, listed.at, &core.store.facts().admin_role)
        };
        let changes = page.changes.iter().map(change).collect();
        Ok(Response::new(v1::ListRoleChangesResponse { changes, next_page_token }))
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        Ok(Response::new(self.core()?.stats()))
    }

    async fn watch_role_changes(
        &self,
        request: Request<v1::WatchRoleChangesRequest>,
    ) -> Result<Response<Self::WatchRoleChangesStream>, Status> {
        let deadline = deadline(request.extensions());
        let (asker, request) = parts(request)?;
        let stream = watch::open(self.core()?.clone(), asker.caller, request, deadline).await?;
        Ok(Response::new(stream))
    }
}

/// Who asks, and what.
fn parts<T>(request: Request<T>) -> Result<(Asker, T), Fault> {
    let (_, mut extensions, request) = request.into_parts();
    let asker = extensions.remove::<Asker>().ok_or_else(|| Fault::bug(&"a call came past the door"))?;
    Ok((asker, request))
}

fn query(min_revision: i64, fully_consistent: bool, extensions: &Extensions) -> Result<Query, Fault> {
    let min_revision = convert::revision("min_revision", min_revision)?;
    Ok(Query { min_revision, fully_consistent, deadline: deadline(extensions) })
}

fn deadline(extensions: &Extensions) -> Option<Instant> {
    extensions.get::<Deadline>().map(|deadline| deadline.0)
}

fn broken_page_token() -> Fault {
    Fault::field("page_token", "it is none that this listing gave")
}

/// Cuts a page that was read with one row more than asked for. The last that stays, if there is more.
fn last_of_page<T>(rows: &mut Vec<T>, limit: usize) -> Option<&T> {
    if rows.len() <= limit {
        return None;
    }
    rows.truncate(limit);
    rows.last()
}
