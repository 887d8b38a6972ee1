//! Every row of the contract's table of errors, once per cause: code, reason, metadata, field, and whether to wait.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use rolecache::{
    grpc,
    proto::v1::{
        BatchGetRolesRequest, ChangeKind, DeleteUserRequest, GetMailboxRequest, GetRoleRequest, ListRoleChangesRequest,
        ListUsersRequest, RegisterMailboxRequest, SetRoleRequest, Snapshot, TransferAdminRequest,
        WatchRoleChangesRequest, watch_role_changes_response::Event,
    },
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::support::{
    gates::Gates,
    logs,
    postgres::Session,
    proxy::Proxy,
    raw::{Raw, frame},
    server::{Db, Setup, TestServer},
    watch::{Watching, reason},
};

on_both! {
    a_field_at_fault_is_named,
    what_is_just_within_the_limits_is_taken,
    an_unknown_role_comes_with_those_that_are_known,
    a_request_id_is_for_one_request,
    a_mailbox_that_is_not_there,
    a_mailbox_that_is_somebody_elses,
    a_role_that_is_not_the_expected_one,
    only_an_admin_hands_over,
    only_the_creator_hands_a_mailbox_over,
    a_revision_that_is_not_there_yet,
    a_token_of_another_history,
    a_history_that_changes_under_a_watch,
    a_history_that_changes_between_frequent_heartbeats,
    a_log_that_is_trimmed,
    a_table_that_refuses_a_write,
    calls_over_the_limit,
    reads_of_the_store_over_the_limit,
    watches_over_the_limit,
    messages_over_the_limit,
    deadlines,
    a_store_that_is_silent,
    a_write_that_is_not_confirmed,
    a_server_that_starts,
    a_server_that_shuts_down,
    a_broken_invariant,
    a_panic,
    a_panic_in_a_task_of_a_watch,
}

/// What an error must say.
#[derive(Clone, Copy)]
struct Expected {
    code: Code,
    reason: &'static str,
    /// Keys, each with its value, or with * for any.
    metadata: &'static [(&'static str, &'static str)],
    field: Option<&'static str>,
    waits: bool,
}

fn expected(code: Code, reason: &'static str) -> Expected {
    Expected { code, reason, metadata: &[], field: None, waits: false }
}

impl Expected {
    fn with(self, metadata: &'static [(&'static str, &'static str)]) -> Self {
        Self { metadata, ..self }
    }

    fn of(self, field: &'static str) -> Self {
        Self { field: Some(field), ..self }
    }

    fn wait(self) -> Self {
        Self { waits: true, ..self }
    }

    #[track_caller]
    fn is(self, status: &Status) {
        let (code, told, metadata) = reason(status);
        assert_eq!((code, &*told), (self.code, self.reason), "{status:?}");
        assert_eq!(metadata.len(), self.metadata.len(), "{metadata:?}");
        for (key, value) in self.metadata {
            let told = metadata.get(*key).unwrap_or_else(|| panic!("no {key} in {metadata:?}"));
            assert!(*value == "*" && !told.is_empty() || told == value, "{key}: {told}");
        }
        let fields: Vec<String> = status
            .get_details_bad_request()
            .map(|it| it.field_violations.into_iter().map(|violation| violation.field).collect())
            .unwrap_or_default();
        assert_eq!(fields.first().map(String::as_str), self.field);
        let delay = status.get_details_retry_info().and_then(|it| it.retry_delay);
        assert_eq!(delay.is_some_and(|delay| !delay.is_zero()), self.waits, "{status:?}");
        let message = status.message();
        assert!(message.len() > 10 && !message.contains('\n'), "{message}");
        for word in ["sqlx", "SQLITE", "relation", "Err(", "Some("] {
            assert!(!message.contains(word), "{message}");
        }
    }
}

fn set(user_id: i64, role: &str) -> SetRoleRequest {
    SetRoleRequest { user_id, role: role.into(), ..Default::default() }
}

fn get(user_id: i64) -> GetRoleRequest {
    GetRoleRequest { user_id, ..Default::default() }
}

fn transfer(from_user_id: i64, to_user_id: i64) -> TransferAdminRequest {
    TransferAdminRequest { from_user_id, to_user_id, ..Default::default() }
}

async fn refused(server: &TestServer, request: SetRoleRequest) -> Status {
    server.try_set(request).await.expect_err("a refusal")
}

async fn register(server: &TestServer, mailbox_id: i64, creator_id: i64) {
    let request = RegisterMailboxRequest { mailbox_id, creator_id };
    server.client.clone().register_mailbox(request).await.expect("RegisterMailbox");
}

async fn no_watch(server: &TestServer, request: WatchRoleChangesRequest) -> Status {
    match Watching::open(server.client.clone(), request).await {
        Ok(watching) => panic!("a watch was opened: {:?}", watching.started),
        Err(status) => status,
    }
}

fn after(token: impl Into<String>) -> WatchRoleChangesRequest {
    WatchRoleChangesRequest { after: token.into(), ..Default::default() }
}

async fn a_field_at_fault_is_named(db: Db) {
    let server = db.serve().await;
    let before = db.contents();
    let long = |bytes: usize| "x".repeat(bytes);
    let watch = WatchRoleChangesRequest::default;
    let heartbeat = |seconds, nanos| WatchRoleChangesRequest {
        heartbeat_interval: Some(prost_types::Duration { seconds, nanos }),
        ..Default::default()
    };
    let mut raw = Raw::connect(server.address).await;
    fn case(method: &'static str, message: impl Message, field: &'static str) -> (&'static str, Bytes, &'static str) {
        (method, frame(&message), field)
    }
    let cases = [
        case("GetRole", get(0), "user_id"),
        case("GetRole", GetRoleRequest { min_revision: -1, ..get(1) }, "min_revision"),
        case("BatchGetRoles", BatchGetRolesRequest { user_ids: vec![1, 0], ..Default::default() }, "user_ids[1]"),
        case("BatchGetRoles", BatchGetRolesRequest { user_ids: vec![1; 10_001], ..Default::default() }, "user_ids"),
        case("BatchGetRoles", BatchGetRolesRequest { min_revision: -1, ..Default::default() }, "min_revision"),
        case("SetRole", set(0, "admin"), "user_id"),
        case("SetRole", set(1, ""), "role"),
        case("SetRole", set(1, &long(65)), "role"),
        case("SetRole", set(1, "Admin"), "role"),
        case("SetRole", set(1, "ad min"), "role"),
        case("SetRole", set(1, "админ"), "role"),
        case("SetRole", SetRoleRequest { username: long(65), ..set(1, "admin") }, "username"),
        case("SetRole", SetRoleRequest { username: "\0".into(), ..set(1, "admin") }, "username"),
        case("SetRole", SetRoleRequest { reason: long(501), ..set(1, "admin") }, "reason"),
        case("SetRole", SetRoleRequest { request_id: long(65), ..set(1, "admin") }, "request_id"),
        case("SetRole", SetRoleRequest { expected_role: Some(long(65)), ..set(1, "admin") }, "expected_role"),
        case("TransferAdmin", transfer(0, 2), "from_user_id"),
        case("TransferAdmin", transfer(1, 0), "to_user_id"),
        case("TransferAdmin", transfer(1, 1), "to_user_id"),
        case("TransferAdmin", TransferAdminRequest { mailbox_id: Some(0), ..transfer(1, 2) }, "mailbox_id"),
        case("TransferAdmin", TransferAdminRequest { to_username: long(65), ..transfer(1, 2) }, "to_username"),
        case("TransferAdmin", TransferAdminRequest { reason: long(501), ..transfer(1, 2) }, "reason"),
        case("TransferAdmin", TransferAdminRequest { request_id: long(65), ..transfer(1, 2) }, "request_id"),
        case("DeleteUser", DeleteUserRequest::default(), "user_id"),
        case("DeleteUser", DeleteUserRequest { user_id: 1, reason: long(501), ..Default::default() }, "reason"),
        case("DeleteUser", DeleteUserRequest { user_id: 1, request_id: long(65), ..Default::default() }, "request_id"),
        case("RegisterMailbox", RegisterMailboxRequest { mailbox_id: 0, creator_id: 1 }, "mailbox_id"),
        case("RegisterMailbox", RegisterMailboxRequest { mailbox_id: 1, creator_id: 0 }, "creator_id"),
        case("GetMailbox", GetMailboxRequest { mailbox_id: 0 }, "mailbox_id"),
        case("ListUsers", ListUsersRequest { page_size: -1, ..Default::default() }, "page_size"),
        case("ListUsers", ListUsersRequest { page_size: 1_001, ..Default::default() }, "page_size"),
        case("ListUsers", ListUsersRequest { page_token: "x".into(), ..Default::default() }, "page_token"),
        case("ListUsers", ListUsersRequest { role: long(65), ..Default::default() }, "role"),
        case("ListRoleChanges", ListRoleChangesRequest { user_id: Some(0), ..Default::default() }, "user_id"),
        case("ListRoleChanges", ListRoleChangesRequest { after_revision: -1, ..Default::default() }, "after_revision"),
        case("ListRoleChanges", ListRoleChangesRequest { page_size: -1, ..Default::default() }, "page_size"),
        case("ListRoleChanges", ListRoleChangesRequest { page_size: 1_001, ..Default::default() }, "page_size"),
        case("ListRoleChanges", ListRoleChangesRequest { page_token: "x".into(), ..Default::default() }, "page_token"),
        case("WatchRoleChanges", WatchRoleChangesRequest { user_ids: vec![0], ..watch() }, "user_ids[0]"),
        case("WatchRoleChanges", WatchRoleChangesRequest { user_ids: vec![1; 10_001], ..watch() }, "user_ids"),
        case("WatchRoleChanges", WatchRoleChangesRequest { roles: vec!["a".into(), long(65)], ..watch() }, "roles[1]"),
        case("WatchRoleChanges", WatchRoleChangesRequest { kinds: vec![0], ..watch() }, "kinds[0]"),
        case("WatchRoleChanges", WatchRoleChangesRequest { kinds: vec![1, 99], ..watch() }, "kinds[1]"),
        case("WatchRoleChanges", heartbeat(0, 99_999_999), "heartbeat_interval"),
        case("WatchRoleChanges", heartbeat(3_600, 1), "heartbeat_interval"),
        case("WatchRoleChanges", after("x"), "after"),
        case("WatchRoleChanges", after("-1"), "after"),
    ];
    for (method, body, field) in cases {
        let status = raw.send(method, body).await.status.expect("a status");
        assert_eq!(status.get_details_bad_request().map(|it| it.field_violations[0].field.clone()), Some(field.into()));
        expected(Code::InvalidArgument, "INVALID_FIELD").of(field).is(&status);
        assert!(status.message().starts_with(field), "{}", status.message());
    }
    assert_eq!(db.contents(), before, "a refusal changes nothing");
}

async fn what_is_just_within_the_limits_is_taken(db: Db) {
    let mut setup = Setup::new(&db);
    let role: &'static str = Box::leak("r-_0".repeat(16).into_boxed_str());
    setup.roles.push(role);
    let server = setup.serve().await;
    let name = "é".repeat(32);
    let written = server
        .try_set(SetRoleRequest {
            username: name.clone(),
            reason: "ü".repeat(250),
            request_id: "-".repeat(64),
            expected_role: Some("user".into()),
            ..set(i64::MIN, role)
        })
        .await
        .unwrap();
    let change = written.change.unwrap();
    assert_eq!((change.user_id, &*change.new_role, &change.username), (i64::MIN, role, &name));
    let many = BatchGetRolesRequest { user_ids: (1..=10_000).collect(), ..Default::default() };
    assert_eq!(server.client.clone().batch_get_roles(many).await.unwrap().into_inner().role_indexes.len(), 10_000);
    let page = ListUsersRequest { page_size: 1_000, role: role.into(), ..Default::default() };
    assert_eq!(server.client.clone().list_users(page).await.unwrap().into_inner().users[0].username, name);
    let watch = WatchRoleChangesRequest {
        user_ids: (1..=10_000).collect(),
        roles: vec![role.into(), String::new(), "Админ".into()],
        kinds: (1..=6).collect(),
        heartbeat_interval: Some(prost_types::Duration { seconds: 3_600, nanos: 0 }),
        ..Default::default()
    };
    server.watch(watch).await;
}

async fn an_unknown_role_comes_with_those_that_are_known(db: Db) {
    let server = db.serve().await;
    let unknown = expected(Code::InvalidArgument, "UNKNOWN_ROLE").with(&[("known_roles", "user,admin,moderator")]);
    unknown.of("role").is(&refused(&server, set(1, "king")).await);
}

async fn a_request_id_is_for_one_request(db: Db) {
    let server = db.serve().await;
    let first = SetRoleRequest { request_id: "r1".into(), ..set(1, "admin") };
    let done = server.try_set(first.clone()).await.unwrap();
    assert_eq!(server.try_set(first).await.unwrap(), done, "the same request gets the first answer");
    let reused = expected(Code::InvalidArgument, "REQUEST_ID_REUSED").of("request_id");
    let other = SetRoleRequest { request_id: "r1".into(), ..set(2, "admin") };
    reused.is(&refused(&server, other).await);
    let other = DeleteUserRequest { user_id: 1, request_id: "r1".into(), ..Default::default() };
    reused.is(&server.client.clone().delete_user(other).await.unwrap_err());
    assert_eq!(server.get(1).await.role, "admin");
}

async fn a_mailbox_that_is_not_there(db: Db) {
    let server = db.serve().await;
    server.set(1, "admin").await;
    let absent = expected(Code::NotFound, "MAILBOX_NOT_FOUND").with(&[("mailbox_id", "7")]);
    let mut client = server.client.clone();
    absent.is(&client.get_mailbox(GetMailboxRequest { mailbox_id: 7 }).await.unwrap_err());
    let request = TransferAdminRequest { mailbox_id: Some(7), ..transfer(1, 2) };
    absent.is(&client.transfer_admin(request).await.unwrap_err());
}

async fn a_mailbox_that_is_somebody_elses(db: Db) {
    let server = db.serve().await;
    register(&server, 7, 1).await;
    register(&server, 7, 1).await;
    let other = server.client.clone().register_mailbox(RegisterMailboxRequest { mailbox_id: 7, creator_id: 2 }).await;
    expected(Code::AlreadyExists, "MAILBOX_EXISTS").with(&[("creator_id", "1")]).is(&other.unwrap_err());
}

async fn a_role_that_is_not_the_expected_one(db: Db) {
    let server = db.serve().await;
    server.set(1, "moderator").await;
    let mismatch = expected(Code::FailedPrecondition, "ROLE_MISMATCH");
    let expecting = |user, role: &str| SetRoleRequest { expected_role: Some(role.into()), ..set(user, "admin") };
    mismatch.with(&[("current_role", "moderator")]).is(&refused(&server, expecting(1, "user")).await);
    mismatch.with(&[("current_role", "moderator")]).is(&refused(&server, expecting(1, "")).await);
    mismatch.with(&[("current_role", "user")]).is(&refused(&server, expecting(2, "moderator")).await);
    assert_eq!((&*server.get(1).await.role, &*server.get(2).await.role), ("moderator", "user"));
    // What strangers wrote fits into no header; its beginning does.
    db.put(&[(3, &"é".repeat(20_000))]);
    let status = refused(&server, expecting(3, "moderator")).await;
    let (code, told, metadata) = reason(&status);
    assert_eq!((code, &*told, &*metadata["current_role"]), (mismatch.code, mismatch.reason, &*"é".repeat(64)));
}

async fn only_an_admin_hands_over(db: Db) {
    let server = db.serve().await;
    server.set(1, "moderator").await;
    let no_admin = expected(Code::FailedPrecondition, "NOT_AN_ADMIN");
    let mut client = server.client.clone();
    no_admin.with(&[("current_role", "moderator")]).is(&client.transfer_admin(transfer(1, 2)).await.unwrap_err());
    no_admin.with(&[("current_role", "user")]).is(&client.transfer_admin(transfer(3, 2)).await.unwrap_err());
}

async fn only_the_creator_hands_a_mailbox_over(db: Db) {
    let server = db.serve().await;
    server.set(1, "admin").await;
    register(&server, 7, 3).await;
    let request = TransferAdminRequest { mailbox_id: Some(7), ..transfer(1, 2) };
    let status = server.client.clone().transfer_admin(request).await.unwrap_err();
    expected(Code::FailedPrecondition, "NOT_THE_CREATOR").with(&[("creator_id", "3")]).is(&status);
}

async fn a_revision_that_is_not_there_yet(db: Db) {
    let server = db.serve().await;
    let head = server.set(1, "admin").await.revision;
    let metadata: &'static [_] = Box::leak(Box::new([("revision", &*Box::leak(head.to_string().into_boxed_str()))]));
    let unknown = expected(Code::FailedPrecondition, "REVISION_UNKNOWN").with(metadata);
    let request = GetRoleRequest { min_revision: head + 1, ..get(1) };
    unknown.is(&server.try_get(request).await.unwrap_err());
    let request = BatchGetRolesRequest { min_revision: i64::MAX, user_ids: vec![1], ..Default::default() };
    unknown.is(&server.client.clone().batch_get_roles(request).await.unwrap_err());
    let request = ListRoleChangesRequest { after_revision: head + 1, ..Default::default() };
    unknown.is(&server.client.clone().list_role_changes(request).await.unwrap_err());
    unknown.is(&no_watch(&server, after((head + 1).to_string())).await);
    unknown.is(&no_watch(&server, WatchRoleChangesRequest { initial_snapshot: true, ..after("9999") }).await);
}

async fn a_token_of_another_history(db: Db) {
    let server = db.serve().await;
    server.set(1, "admin").await;
    let token = server.watch(WatchRoleChangesRequest::default()).await.started.resume_token;
    let other_db = Db::sqlite();
    let other = other_db.serve().await;
    other.set(1, "admin").await;
    let of_other = other.watch(WatchRoleChangesRequest::default()).await.started.resume_token;
    // A character of the tag, at the end of the token, and one of the revision in the middle.
    let wrong_tag = changed(&token, token.len() - 3);
    let history = expected(Code::DataLoss, "HISTORY_CHANGED").with(&[("store_id", "*"), ("revision", "*")]);
    for token in [of_other, wrong_tag] {
        history.is(&no_watch(&server, after(&token)).await);
        let mut watch = server.watch(WatchRoleChangesRequest { initial_snapshot: true, ..after(&token) }).await;
        assert!(!watch.started.resumed);
        assert_eq!(watch.snapshot().await.len(), 1);
    }
}

fn changed(token: &str, place: usize) -> String {
    let other = if &token[place..=place] == "A" { "B" } else { "A" };
    format!("{}{other}{}", &token[..place], &token[place + 1..])
}

async fn a_history_that_changes_under_a_watch(db: Db) {
    let server = db.serve().await;
    server.set(1, "admin").await;
    server.set(2, "admin").await;
    let mut watch = server.watch(WatchRoleChangesRequest::default()).await;
    lose_the_last_commit(&db);
    let history = expected(Code::DataLoss, "HISTORY_CHANGED").with(&[("store_id", "*"), ("revision", "*")]);
    history.is(&watch.until_end().await);
    assert_eq!(server.get(1).await.role, "admin", "reads go on from a new cache");
}

/// The server cannot follow the new history, and is interrupted again and again while it waits for that.
async fn a_history_that_changes_between_frequent_heartbeats(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    server.set(1, "admin").await;
    let heartbeat_interval = Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 });
    let mut watch = server.watch(WatchRoleChangesRequest { heartbeat_interval, ..Default::default() }).await;
    gates.head.close();
    lose_the_last_commit(&db);
    gates.head.arrived().await;
    expected(Code::DataLoss, "HISTORY_CHANGED")
        .with(&[("store_id", "*"), ("revision", "*")])
        .is(&watch.until_end().await);
    gates.head.open();
}

/// A backup from before it.
fn lose_the_last_commit(db: &Db) {
    match db {
        Db::Postgres { .. } => db.sql(
            "begin; delete from rolecache.changes where commit_id = (select max(id) from rolecache.commits);
             delete from rolecache.commits where id = (select max(id) from rolecache.commits); commit",
        ),
        Db::Sqlite { .. } => db.sql(
            "begin; delete from rolecache_changes where commit_id = (select max(id) from rolecache_commits);
             delete from rolecache_commits where id = (select max(id) from rolecache_commits); commit",
        ),
    };
}

async fn a_log_that_is_trimmed(db: Db) {
    let server = db.serve().await;
    let mut revisions = Vec::new();
    for role in ["admin", "user", "moderator", "admin"] {
        revisions.push(server.set(1, role).await.revision);
    }
    // What the trimmer does, without its ten thousand commits.
    let point = revisions[2];
    match db {
        Db::Postgres { .. } => db.sql(&format!(
            "begin; update rolecache.feed set trimmed_revision = {point},
               trimmed_tag = (select tag from rolecache.commits where revision = {point});
             delete from rolecache.changes where commit_id in
               (select id from rolecache.commits where revision <= {point});
             delete from rolecache.commits where revision <= {point}; commit"
        )),
        Db::Sqlite { .. } => db.sql(&format!(
            "begin; update rolecache_feed set trimmed_revision = {point},
               trimmed_tag = (select tag from rolecache_commits where id = {point});
             delete from rolecache_changes where commit_id <= {point};
             delete from rolecache_commits where id <= {point}; commit"
        )),
    };
    let text = |number: i64| &*Box::leak(number.to_string().into_boxed_str());
    let below = revisions[1];
    let metadata: &'static [_] = Box::leak(Box::new([
        ("requested", text(below)),
        ("oldest", text(point)),
        ("revision", text(revisions[3])),
        ("store_id", "*"),
    ]));
    let compacted = expected(Code::OutOfRange, "REVISION_COMPACTED").with(metadata);
    compacted.is(&no_watch(&server, after(below.to_string())).await);
    let request = ListRoleChangesRequest { after_revision: below, ..Default::default() };
    compacted.is(&server.client.clone().list_role_changes(request).await.unwrap_err());

    let mut watch = server.watch(after(point.to_string())).await;
    assert_eq!(watch.next_commit().await.revision, revisions[3], "the oldest that is named works");
    let watch = server.watch(WatchRoleChangesRequest { initial_snapshot: true, ..after(below.to_string()) }).await;
    assert!(!watch.started.resumed);
    let all = server.client.clone().list_role_changes(ListRoleChangesRequest::default()).await.unwrap().into_inner();
    assert_eq!(all.changes.len(), 1, "0 is whatever is kept");
}

async fn a_table_that_refuses_a_write(db: Db) {
    db.sql(match db {
        Db::Postgres { .. } => {
            "create table users (user_id int primary key, role varchar(9) check (role <> 'moderator'),
               username text unique)"
        }
        Db::Sqlite { .. } => {
            "create table users (user_id integer primary key check (user_id < 2147483648),
               role text check (role <> 'moderator' and length(role) < 10), username text unique)"
        }
    });
    let mut setup = Setup::new(&db);
    setup.roles.push("a-long-role");
    let server = setup.serve().await;
    let named = |user, name: &str| SetRoleRequest { username: name.into(), ..set(user, "admin") };
    server.try_set(named(1, "bob")).await.unwrap();
    let rejected = expected(Code::FailedPrecondition, "STORE_REJECTED");
    rejected.is(&refused(&server, set(1, "moderator")).await);
    rejected.is(&refused(&server, named(2, "bob")).await);
    rejected.is(&refused(&server, set(2, "a-long-role")).await);
    rejected.is(&refused(&server, set(1 << 40, "admin")).await);
    let status = server.client.clone().transfer_admin(transfer(1, 1 << 40)).await.unwrap_err();
    rejected.is(&status);
    assert_eq!(server.get(1).await.role, "admin");
    assert_eq!(server.get(1 << 40).await.role, "user", "whom the table cannot hold has the default role");
    let gone = DeleteUserRequest { user_id: 1 << 40, ..Default::default() };
    assert!(server.client.clone().delete_user(gone).await.unwrap().into_inner().change.is_none());
    assert_eq!(db.sql("select count(*) from users").trim(), "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_somebody_holds() {
    let db = Db::postgres().await;
    let server = db.serve().await;
    server.set(1, "user").await;
    let mut session = Session::open(&db.url());
    session.run("begin; update users set role = 'x' where user_id = 1;");
    let busy = expected(Code::Aborted, "USER_BUSY").wait();
    let (held, other) = tokio::join!(refused(&server, set(1, "admin")), server.try_set(set(2, "admin")));
    busy.is(&held);
    other.expect("the neighbour is not delayed");
    session.run("rollback;");
    server.set(1, "admin").await;
}

/// SQLite has one lock for the whole file: whoever writes holds every row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_somebody_holds() {
    let db = Db::sqlite();
    let server = db.serve().await;
    server.set(1, "user").await;
    let mut session = Session::of_file(&db.file());
    session.run("begin immediate;");
    expected(Code::Aborted, "USER_BUSY").wait().is(&refused(&server, set(1, "admin")).await);
    assert_eq!(server.get(1).await.role, "user");
    session.run("rollback;");
    server.set(1, "admin").await;
}

async fn calls_over_the_limit(db: Db) {
    let gates = Gates::default();
    let mut setup = Setup::new(&db).wrap(gates.guard());
    setup.limits = grpc::Limits { calls: 1, watches: 10, ..setup.limits };
    let server = setup.serve().await;
    gates.roles.close();
    let held = tokio::spawn({
        let mut client = server.client.clone();
        async move { client.get_role(get(1)).await }
    });
    gates.roles.arrived().await;
    let overloaded = expected(Code::ResourceExhausted, "OVERLOADED").wait();
    overloaded.is(&server.try_get(get(2)).await.unwrap_err());
    overloaded.is(&refused(&server, set(2, "admin")).await);
    gates.roles.open();
    held.await.unwrap().expect("the call that was there goes on");
    assert_eq!(server.get(2).await.role, "user");
}

/// While the feed catches up, reads go to the store, so many at once.
async fn reads_of_the_store_over_the_limit(db: Db) {
    let gates = Gates::default();
    let mut setup = Setup::new(&db).complete().wrap(gates.guard());
    setup.fallback_reads = 1;
    gates.snapshot.close();
    let server = setup.start().await;
    gates.snapshot.arrived().await;
    gates.roles.close();
    let held = tokio::spawn({
        let mut client = server.client.clone();
        async move { client.get_role(get(1)).await }
    });
    gates.roles.arrived().await;
    expected(Code::ResourceExhausted, "OVERLOADED").wait().is(&server.try_get(get(2)).await.unwrap_err());
    gates.roles.open();
    gates.snapshot.open();
    held.await.unwrap().expect("the read that was there goes on");
}

async fn watches_over_the_limit(db: Db) {
    let mut setup = Setup::new(&db);
    setup.limits = grpc::Limits { calls: 10, watches: 1, ..setup.limits };
    let server = setup.serve().await;
    let first = server.watch(WatchRoleChangesRequest::default()).await;
    let full = expected(Code::ResourceExhausted, "TOO_MANY_WATCHES").wait();
    full.is(&no_watch(&server, WatchRoleChangesRequest::default()).await);
    full.is(&no_watch(&server, WatchRoleChangesRequest::default()).await);
    assert_eq!(server.stats().await.event_handlers, 1);
    drop(first);
    // The server hears of it a moment later.
    tokio::time::timeout(crate::support::server::PATIENCE, async {
        while server.stats().await.event_handlers > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("a closed watch makes room");
    server.watch(WatchRoleChangesRequest::default()).await;
}

async fn messages_over_the_limit(db: Db) {
    let server = db.serve().await;
    let before = db.contents();
    let too_large = expected(Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    let request = SetRoleRequest { reason: "x".repeat(256 * 1024), ..set(1, "admin") };
    too_large.is(&refused(&server, request).await);
    let request = WatchRoleChangesRequest { roles: vec!["x".repeat(300_000)], ..Default::default() };
    too_large.is(&no_watch(&server, request).await);
    let request = SetRoleRequest { reason: "x".repeat(255 * 1024), ..set(1, "admin") };
    expected(Code::InvalidArgument, "INVALID_FIELD").of("reason").is(&refused(&server, request).await);
    assert_eq!(db.contents(), before);
}

async fn deadlines(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let mut raw = Raw::connect(server.address).await;
    let passed = expected(Code::DeadlineExceeded, "DEADLINE");
    let time = Duration::from_millis(150);

    gates.roles.close();
    passed.is(&raw.within(time, "GetRole", &get(1)).await);
    let batch = BatchGetRolesRequest { user_ids: vec![1, 2], ..Default::default() };
    passed.is(&raw.within(time, "BatchGetRoles", &batch).await);
    gates.roles.open();

    gates.write.close();
    let write = SetRoleRequest { request_id: "r1".into(), ..set(1, "admin") };
    passed.is(&raw.within(time, "SetRole", &write).await);
    gates.write.open();
    // It may have happened, and does so once, whoever waits for it.
    let again = server.try_set(write).await.unwrap();
    assert_eq!(again.change.unwrap().new_role, "admin");

    gates.locate.close();
    passed.is(&raw.within(time, "WatchRoleChanges", &after("0")).await);
    gates.locate.open();
    passed.is(&raw.within(time, "WatchRoleChanges", &after("0")).await);
}

/// The log cannot be read, and so no read is proven any more.
async fn a_store_that_is_silent(db: Db) {
    let gates = Gates::default();
    let mut setup = Setup::new(&db).wrap(gates.guard());
    setup.max_staleness = Duration::from_secs(2);
    let server = setup.serve().await;
    server.set(1, "admin").await;
    let heartbeat_interval = Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 });
    let mut watch = server.watch(WatchRoleChangesRequest { heartbeat_interval, ..Default::default() }).await;
    gates.read_log.close();
    watch.until_disconnected().await;
    expected(Code::Unavailable, "TOO_STALE")
        .with(&[("age_ms", "*")])
        .wait()
        .is(&server.try_get(get(1)).await.unwrap_err());
    let unreachable = expected(Code::Unavailable, "STORE_UNREACHABLE").wait();
    unreachable.is(&server.try_get(get(2)).await.unwrap_err());
    let fresh = GetRoleRequest { fully_consistent: true, ..get(1) };
    unreachable.is(&server.try_get(fresh).await.unwrap_err());
    gates.read_log.open();
    server.until_live().await;
    assert_eq!(server.get(1).await.role, "admin");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_cannot_be_reached() {
    let db = Db::postgres().await;
    let proxy = Proxy::before(&db.url()).await;
    let mut setup = Setup::new(&db);
    setup.url = proxy.url.clone();
    setup.max_staleness = Duration::from_secs(2);
    let server = setup.serve().await;
    server.set(1, "admin").await;
    let mut watch = server.watch(WatchRoleChangesRequest::default()).await;
    proxy.freeze();
    watch.until_disconnected().await;
    let unreachable = expected(Code::Unavailable, "STORE_UNREACHABLE").wait();
    let mut client = server.client.clone();
    let (stale, missed, mailbox, users, changes) = tokio::join!(
        server.try_get(get(1)),
        server.try_get(get(2)),
        async { client.clone().get_mailbox(GetMailboxRequest { mailbox_id: 1 }).await.unwrap_err() },
        async { client.clone().list_users(ListUsersRequest::default()).await.unwrap_err() },
        async { client.clone().list_role_changes(ListRoleChangesRequest::default()).await.unwrap_err() },
    );
    expected(Code::Unavailable, "TOO_STALE").with(&[("age_ms", "*")]).wait().is(&stale.unwrap_err());
    for status in [missed.unwrap_err(), mailbox, users, changes] {
        unreachable.is(&status);
    }
    // A new connection cannot be had, so nothing was sent.
    unreachable.is(&refused(&server, set(2, "admin")).await);
    unreachable.is(&no_watch(&server, after("0")).await);
    proxy.thaw();
    server.until_live().await;
    assert_eq!(server.get(2).await.role, "user", "nothing was changed");
    let _ = client.get_role(get(1)).await.expect("all is as before");
}

async fn a_write_that_is_not_confirmed(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    expected(Code::Unknown, "OUTCOME_UNKNOWN").is(&refused(&server, set(1, "admin")).await);
    gates.read_log.open();
    server.until_live().await;
    assert_eq!(server.get(1).await.role, "admin", "it had happened");
}

/// Before its first look at the log: what is begun here would not survive it.
async fn a_server_that_starts(db: Db) {
    let gates = Gates::default();
    gates.head.close();
    let server = Setup::new(&db).wrap(gates.guard()).start().await;
    gates.head.arrived().await;
    let unreachable = expected(Code::Unavailable, "STORE_UNREACHABLE").wait();
    unreachable.is(&server.try_get(get(1)).await.unwrap_err());
    unreachable.is(&refused(&server, set(1, "admin")).await);
    unreachable.is(&no_watch(&server, WatchRoleChangesRequest::default()).await);
    unreachable.is(&no_watch(&server, after("0")).await);
    gates.head.open();
    server.until_serving().await;
    assert_eq!(server.get(1).await.role, "user", "nothing was changed");
}

async fn a_server_that_shuts_down(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let mut watch = server.watch(WatchRoleChangesRequest::default()).await;
    gates.snapshot.close();
    let request = WatchRoleChangesRequest { initial_snapshot: true, ..Default::default() };
    let mut loading = server.watch(request).await;
    gates.snapshot.arrived().await;
    gates.roles.close();
    let held = tokio::spawn({
        let mut client = server.client.clone();
        async move { client.get_role(get(1)).await }
    });
    gates.roles.arrived().await;
    let stopping = tokio::spawn(server.stop());
    let shutting_down = expected(Code::Unavailable, "SHUTTING_DOWN").wait();
    assert!(matches!(watch.next().await, Event::Heartbeat(_)), "a point to resume from comes first");
    shutting_down.is(&watch.until_end().await);
    shutting_down.is(&loading.until_end().await);
    assert!(!loading.transcript.iter().any(|it| matches!(it, Event::Snapshot(Snapshot { last: true, .. }))));
    gates.roles.open();
    held.await.unwrap().expect("a call in flight finishes");
    stopping.await.unwrap().expect("a clean end");
}

async fn a_broken_invariant(db: Db) {
    logs::capture();
    let server = db.serve().await;
    server.set(1, "admin").await;
    let changes = match db {
        Db::Postgres { .. } => "rolecache.changes",
        Db::Sqlite { .. } => "rolecache_changes",
    };
    db.sql(&format!("update {changes} set new_role = ''"));
    let status = server.client.clone().list_role_changes(ListRoleChangesRequest::default()).await.unwrap_err();
    bug(&status, "empty role");
    assert_eq!(server.get(1).await.role, "admin", "the rest goes on");
}

async fn a_panic(db: Db) {
    logs::capture();
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    gates.mailbox_panics.store(true, std::sync::atomic::Ordering::SeqCst);
    let request = GetMailboxRequest { mailbox_id: 7 };
    let status = server.client.clone().get_mailbox(request).await.unwrap_err();
    bug(&status, "nobody may look for");
    gates.mailbox_panics.store(false, std::sync::atomic::Ordering::SeqCst);
    let status = server.client.clone().get_mailbox(request).await.unwrap_err();
    expected(Code::NotFound, "MAILBOX_NOT_FOUND").with(&[("mailbox_id", "7")]).is(&status);
}

/// The task that reads a snapshot for a watch: its client is told, and the connection stays.
async fn a_panic_in_a_task_of_a_watch(db: Db) {
    logs::capture();
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    gates.snapshot_panics.store(true, std::sync::atomic::Ordering::SeqCst);
    let request = WatchRoleChangesRequest { initial_snapshot: true, ..Default::default() };
    let mut watch = server.client.clone().watch_role_changes(request.clone()).await.unwrap().into_inner();
    bug(&watch.message().await.unwrap_err(), "nobody may take");
    gates.snapshot_panics.store(false, std::sync::atomic::Ordering::SeqCst);
    server.watch(request).await.snapshot().await;
}

/// An incident: in the message, in the metadata, and in the log with its cause, which nobody else is told.
#[track_caller]
fn bug(status: &Status, cause: &str) {
    expected(Code::Internal, "BUG").with(&[("incident", "*")]).is(status);
    let incident = &reason(status).2["incident"];
    assert!(status.message().contains(incident.as_str()), "{}", status.message());
    assert!(!status.message().contains(cause));
    let log = logs::lines_with(incident);
    assert!(matches!(&log[..], [line] if line.contains(cause) && line.contains("ERROR")), "{log:#?}");
}

/// The kinds that the contract has, and no more: a new one needs its line here and in the table of the contract.
#[test]
fn the_contract_has_six_kinds() {
    assert!((1..=6).all(|kind| ChangeKind::try_from(kind).is_ok()) && ChangeKind::try_from(7).is_err());
}
