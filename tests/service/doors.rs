//! Who is let in, and to what: every RPC by every way to show who one is, and what a writer may not touch.

use std::num::NonZeroU32;

use rcgen::{CertificateParams, DnType, SanType};
use rolecache::{
    access::credentials::Credential,
    proto::{
        Method,
        v1::{
            BatchGetRolesRequest, DeleteUserRequest, GetMailboxRequest, GetRoleRequest, ListRoleChangesRequest,
            ListUsersRequest, RegisterMailboxRequest, SetRoleRequest, StatsRequest, TransferAdminRequest,
            WatchRoleChangesRequest,
        },
    },
};
use tokio::net::TcpStream;
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::support::{
    calls::refused,
    doors::{Ca, House, Identity, Rpc, Shown, certificate, plain, rpc, token},
    logs,
    raw::SERVICE,
    server::{Db, PATIENCE, Setup, TestServer},
    watch::reason,
};

on_both! {
    a_manager_of_moderators_neither_makes_nor_unmakes_an_admin,
    what_a_mailbox_sets_off_needs_the_grant_too,
}

const SCOPES: [&str; 7] = ["read", "watch", "list", "write", "mailbox", "transfer", "stats"];

/// The table of the README, written a second time.
fn scope(method: Method) -> &'static str {
    match method {
        Method::GetRole | Method::BatchGetRoles => "read",
        Method::WatchRoleChanges => "watch",
        Method::ListUsers | Method::ListRoleChanges | Method::GetMailbox => "list",
        Method::SetRole | Method::DeleteUser => "write",
        Method::RegisterMailbox => "mailbox",
        Method::TransferAdmin => "transfer",
        Method::Stats => "stats",
    }
}

/// A call that succeeds for who may make it. User 1 is an admin, mailbox 7 is theirs.
async fn call(rpc: &mut Rpc, method: Method) -> Result<(), Status> {
    match method {
        Method::GetRole => rpc.get_role(GetRoleRequest { user_id: 1, ..Default::default() }).await.map(drop),
        Method::BatchGetRoles => {
            rpc.batch_get_roles(BatchGetRolesRequest { user_ids: vec![1], ..Default::default() }).await.map(drop)
        }
        Method::WatchRoleChanges => rpc.watch_role_changes(WatchRoleChangesRequest::default()).await.map(drop),
        Method::ListUsers => rpc.list_users(ListUsersRequest::default()).await.map(drop),
        Method::ListRoleChanges => rpc.list_role_changes(ListRoleChangesRequest::default()).await.map(drop),
        Method::GetMailbox => rpc.get_mailbox(GetMailboxRequest { mailbox_id: 7 }).await.map(drop),
        Method::SetRole => {
            rpc.set_role(SetRoleRequest { user_id: 3, role: "admin".into(), ..Default::default() }).await.map(drop)
        }
        Method::DeleteUser => rpc.delete_user(DeleteUserRequest { user_id: 4, ..Default::default() }).await.map(drop),
        Method::RegisterMailbox => {
            rpc.register_mailbox(RegisterMailboxRequest { mailbox_id: 7, creator_id: 1 }).await.map(drop)
        }
        Method::TransferAdmin => {
            let request = TransferAdminRequest { from_user_id: 1, to_user_id: 2, ..Default::default() };
            rpc.transfer_admin(request).await.map(drop)
        }
        Method::Stats => rpc.stats(StatsRequest {}).await.map(drop),
    }
}

/// Code, reason, and the scope where one is missing.
fn told(outcome: Result<(), Status>) -> (Code, String, String) {
    match outcome {
        Ok(()) => (Code::Ok, String::new(), String::new()),
        Err(status) => {
            let (code, reason, mut metadata) = reason(&status);
            (code, reason, metadata.remove("scope").unwrap_or_default())
        }
    }
}

/// A caller with each scope alone, and one with all others, by token and by certificate.
fn callers() -> Vec<Credential> {
    let of_scope = |scope: &&'static str| {
        let others: Vec<&str> = SCOPES.into_iter().filter(|other| other != scope).collect();
        let others = others.join(" ");
        [
            token(&format!("only-{scope}"), &format!("secret-{scope}"), scope),
            token(&format!("not-{scope}"), &format!("secret-not-{scope}"), &others),
            certificate(&format!("cert-{scope}"), &format!("{scope}.test"), scope),
            certificate(&format!("cert-not-{scope}"), &format!("not-{scope}.test"), &others),
        ]
    };
    SCOPES.iter().flat_map(of_scope).collect()
}

/// Waits until the callers of the file are those who may come in; the last of them may read.
async fn until_taken(server: &TestServer, house: &House, client: Option<&Identity>, secret: &str) {
    let mut rpc = rpc(house.connect(server.address, client).await.unwrap(), Some(secret));
    let taken = async { while call(&mut rpc, Method::GetRole).await.is_err() {} };
    tokio::time::timeout(PATIENCE, taken).await.expect("a credentials file is read again in time");
}

async fn every_way_in(required: bool) {
    let house = House::new();
    let db = Db::sqlite();
    let mut known = callers();
    known.push(token("gone", "secret-revoked", "read watch list write mailbox transfer stats"));
    house.admit(&known);
    let server = house.tls(Setup::new(&db), required).start().await;
    // Of an authority that is trusted, for a name that nobody has given rights to.
    let stranger = house.clients.sign(&["stranger.test"]);
    let mut named_only = CertificateParams::new(Vec::new()).unwrap();
    named_only.distinguished_name.push(DnType::CommonName, "read.test");
    let named_only = house.clients.sign_as(named_only);
    let without = if required { Some(&stranger) } else { None };
    until_taken(&server, &house, without, "secret-revoked").await;
    db.sql("insert into users (user_id, role) values (1, 'admin'); insert into mailboxes values (7, 1)");
    known.pop();
    known.push(token("new", "secret-new", "read"));
    house.admit(&known);
    until_taken(&server, &house, without, "secret-new").await;

    let none = (Code::Unauthenticated, "NO_CREDENTIALS");
    let bad = (Code::Unauthenticated, "BAD_CREDENTIALS");
    let missing = (Code::PermissionDenied, "SCOPE_MISSING");
    let right = (Code::Ok, "");
    for method in Method::ALL {
        let scope = scope(method);
        let name = |name: &str| house.clients.sign(&[name]);
        let (with, lacking) = (name(&format!("{scope}.test")), name(&format!("not-{scope}.test")));
        let (token, not_token) = (format!("secret-{scope}"), format!("secret-not-{scope}"));
        let (token, not_token) = (Some(&*token), Some(&*not_token));
        let table = [
            ("nothing", without, None, none),
            ("a certificate of a common name alone", Some(&named_only), None, none),
            ("a wrong token", without, Some("secret"), bad),
            ("an empty token", without, Some(""), bad),
            ("a revoked token", without, Some("secret-revoked"), bad),
            ("a token without the scope", without, not_token, missing),
            ("the right token", without, token, right),
            ("a certificate with the scope", Some(&with), None, right),
            ("a certificate without the scope", Some(&lacking), None, missing),
            ("both", Some(&with), token, right),
            ("both, the token alone with the scope", Some(&lacking), token, right),
            ("both, the certificate alone with the scope", Some(&with), not_token, missing),
            ("both, the token wrong", Some(&with), Some("secret"), bad),
        ];
        for (way, client, token, (code, reason)) in table {
            let mut rpc = rpc(house.connect(server.address, client).await.unwrap(), token);
            let lacks = if reason == "SCOPE_MISSING" { scope } else { "" };
            let expected = (code, reason.to_owned(), lacks.to_owned());
            assert_eq!(told(call(&mut rpc, method).await), expected, "{method:?} by {way}, required: {required}");
        }
    }
    let other = Ca::new("others").sign(&["read.test"]);
    for client in [Some(&other), None] {
        if client.is_none() && !required {
            continue;
        }
        // TLS 1.3 tells a client that it was not let in when it says the first thing.
        if let Ok(channel) = house.connect(server.address, client).await {
            let refused = call(&mut rpc(channel, Some("secret-read")), Method::GetRole).await.unwrap_err();
            assert!(refused.get_details_error_info().is_none(), "let in: {refused:?}");
        }
    }
    let health = house.connect(server.address, without).await.unwrap();
    HealthClient::new(health).check(HealthCheckRequest::default()).await.expect("health is open");
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_rpc_by_each_way_in() {
    every_way_in(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_rpc_by_each_way_in_where_certificates_are_required() {
    every_way_in(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_uri_in_a_certificate_is_a_name() {
    let house = House::new();
    house.admit(&[certificate("workload", "spiffe://corp/bots/shop", "read")]);
    let db = Db::sqlite();
    let server = house.tls(Setup::new(&db), true).start().await;
    let mut params = CertificateParams::new(vec!["shop.test".into()]).unwrap();
    params.subject_alt_names.push(SanType::URI("spiffe://corp/bots/shop".try_into().unwrap()));
    let client = house.clients.sign_as(params);
    let mut rpc = rpc(house.connect(server.address, Some(&client)).await.unwrap(), None);
    let (code, reason, _) = told(call(&mut rpc, Method::Stats).await);
    assert_eq!((code, &*reason), (Code::PermissionDenied, "SCOPE_MISSING"), "known, and not allowed");
}

/// An authority that is held to some DNS names is not held to any URIs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_uri_in_a_certificate_is_no_dns_name() {
    let house = House::new();
    house.admit(&[certificate("shop", "shop.test", "read")]);
    let db = Db::sqlite();
    let server = house.tls(Setup::new(&db), true).start().await;
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.subject_alt_names.push(SanType::URI("shop.test".try_into().unwrap()));
    let client = house.clients.sign_as(params);
    let mut rpc = rpc(house.connect(server.address, Some(&client)).await.unwrap(), None);
    let (code, reason, _) = told(call(&mut rpc, Method::GetRole).await);
    assert_eq!((code, &*reason), (Code::Unauthenticated, "NO_CREDENTIALS"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_that_is_no_bearer_token_is_bad_credentials() {
    let house = House::new();
    house.admit(&[token("bot", "sesame", "read")]);
    let db = Db::sqlite();
    let server = house.closed(Setup::new(&db)).serve().await;
    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
    for shown in ["sesame", "Basic sesame", "Bearer", "Bearer  sesame", "Bearer sesame ", "Bearer sesam", ""] {
        let mut rpc = rolecache::proto::v1::role_cache_service_client::RoleCacheServiceClient::with_interceptor(
            channel.clone(),
            Shown(Some(shown.into())),
        );
        let outcome = rpc.get_role(GetRoleRequest { user_id: 1, ..Default::default() }).await;
        // A client or HTTP/2 itself may cut spaces off the end.
        if shown.trim_end() == "Bearer sesame" {
            continue;
        }
        let metadata = refused(outcome, Code::Unauthenticated, "BAD_CREDENTIALS");
        assert!(metadata.is_empty());
    }
}

async fn a_manager_of_moderators_neither_makes_nor_unmakes_an_admin(db: Db) {
    logs::capture();
    let house = House::new();
    let manager = format!("manager-{}", if db.is_postgres() { "p" } else { "s" });
    house.admit(&[
        token(&manager, "manager", "read list write:moderator"),
        token("boss", "boss", "write transfer mailbox"),
    ]);
    let server = house.closed(Setup::new(&db)).serve().await;
    let [mut manages, mut boss] =
        [plain(server.address, Some("manager")).await, plain(server.address, Some("boss")).await];
    let set = |user_id, role: &str| SetRoleRequest { user_id, role: role.into(), ..Default::default() };
    boss.set_role(set(1, "admin")).await.unwrap();
    manages.set_role(set(2, "moderator")).await.unwrap();
    manages.set_role(set(3, "moderator")).await.unwrap();
    manages.set_role(set(3, "user")).await.unwrap();

    let before = db.contents();
    let denied = |outcome: Result<(), Status>, scope: &str| {
        assert_eq!(refused(outcome, Code::PermissionDenied, "SCOPE_MISSING")["scope"], scope);
    };
    for (user, role) in [(1, "user"), (1, "moderator"), (2, "admin"), (4, "admin"), (1, "admin")] {
        denied(manages.set_role(set(user, role)).await.map(drop), "write:admin");
    }
    let expecting = SetRoleRequest { expected_role: Some("user".into()), ..set(1, "user") };
    denied(manages.set_role(expecting).await.map(drop), "write:admin");
    let delete = |user_id| DeleteUserRequest { user_id, ..Default::default() };
    denied(manages.delete_user(delete(1)).await.map(drop), "write:admin");
    let transfer = TransferAdminRequest { from_user_id: 1, to_user_id: 2, ..Default::default() };
    denied(manages.transfer_admin(transfer).await.map(drop), "transfer");
    let mailbox = RegisterMailboxRequest { mailbox_id: 9, creator_id: 2 };
    denied(manages.register_mailbox(mailbox).await.map(drop), "mailbox");
    assert_eq!(db.contents(), before);

    manages.delete_user(delete(2)).await.unwrap();
    let transfer = TransferAdminRequest { from_user_id: 1, to_user_id: 3, demote_from: true, ..Default::default() };
    boss.transfer_admin(transfer).await.unwrap();
    let log = manages.list_role_changes(ListRoleChangesRequest::default()).await.unwrap().into_inner().changes;
    let actors: Vec<&str> = log.iter().map(|change| &*change.actor).collect();
    assert_eq!(actors, ["boss", &manager, &manager, &manager, &manager, "boss", "boss"]);

    let lines = logs::lines_with(&manager);
    for (method, reason) in [
        ("SetRole", "SCOPE_MISSING write:admin"),
        ("DeleteUser", "SCOPE_MISSING write:admin"),
        ("TransferAdmin", "SCOPE_MISSING transfer"),
        ("RegisterMailbox", "SCOPE_MISSING mailbox"),
    ] {
        let is_told = |line: &String| line.contains("denied") && line.contains(method) && line.contains(reason);
        assert!(lines.iter().any(is_told), "{method} {reason} is not in {lines:#?}");
    }
}

/// A trigger of the bot's own makes the creator of a mailbox an admin.
async fn what_a_mailbox_sets_off_needs_the_grant_too(db: Db) {
    let house = House::new();
    house.admit(&[token("shop", "1", "mailbox write:moderator"), token("boss", "2", "mailbox write list read")]);
    let server = house.closed(Setup::new(&db)).serve().await;
    let promote = |users: &str| {
        format!(
            "insert into {users} (user_id, role) values (new.creator_id, 'admin')
             on conflict (user_id) do update set role = 'admin';"
        )
    };
    db.sql(&match db.is_postgres() {
        true => format!(
            "create function promote() returns trigger language plpgsql as $$ begin {} return null; end $$;
             create trigger promote after insert on mailboxes for each row execute function promote();",
            promote("public.users")
        ),
        false => format!("create trigger promote after insert on mailboxes begin {} end;", promote("users")),
    });
    let [mut shop, mut boss] = [plain(server.address, Some("1")).await, plain(server.address, Some("2")).await];
    let before = db.contents();
    let mailbox = RegisterMailboxRequest { mailbox_id: 9, creator_id: 5 };
    let outcome = shop.register_mailbox(mailbox).await;
    assert_eq!(refused(outcome, Code::PermissionDenied, "SCOPE_MISSING")["scope"], "write:admin");
    assert_eq!(db.contents(), before);
    boss.register_mailbox(mailbox).await.unwrap();
    // What it set off is there for whoever knows that it is done.
    assert_eq!(
        boss.get_role(GetRoleRequest { user_id: 5, ..Default::default() }).await.unwrap().into_inner().role,
        "admin"
    );
    let log = boss.list_role_changes(ListRoleChangesRequest::default()).await.unwrap().into_inner().changes;
    let told: Vec<_> = log.iter().map(|change| (change.user_id, &*change.new_role, &*change.actor)).collect();
    assert_eq!(told, [(5, "admin", "boss")]);
}

/// Whoever it is, and why not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_denial_is_in_the_log() {
    logs::capture();
    let house = House::new();
    house.admit(&[token("denied-often", "1", "read watch"), certificate("c", "c.test", "read")]);
    let db = Db::sqlite();
    let mut setup = house.closed(Setup::new(&db));
    setup.doors.allowance.calls_per_second = NonZeroU32::new(2);
    let server = setup.serve().await;
    let is_told = |who: String, reason: &str| {
        let lines = logs::lines_with(&who);
        let is_it = |line: &String| line.contains("denied") && line.contains("GetRole") && line.contains(reason);
        assert!(lines.iter().any(is_it), "{reason} of {who} is not in {lines:#?}");
    };
    for (secret, reason) in [(None, "NO_CREDENTIALS"), (Some("wrong"), "BAD_CREDENTIALS")] {
        let stream = TcpStream::connect(server.address).await.unwrap();
        let peer = format!("peer={}", stream.local_addr().unwrap());
        let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let mut head = http::Request::post(format!("http://{}/{SERVICE}/GetRole", server.address));
        head = head.header("content-type", "application/grpc").header("te", "trailers");
        if let Some(secret) = secret {
            head = head.header("authorization", format!("Bearer {secret}"));
        }
        let (answer, _request): (_, h2::SendStream<bytes::Bytes>) =
            sender.send_request(head.body(()).unwrap(), false).unwrap();
        assert_eq!(answer.await.unwrap().headers()["grpc-status"], "16");
        is_told(peer, reason);
    }
    let mut client = plain(server.address, Some("1")).await;
    let mut watch = client.watch_role_changes(WatchRoleChangesRequest::default()).await.unwrap().into_inner();
    watch.message().await.unwrap();
    while client.get_role(GetRoleRequest { user_id: 1, ..Default::default() }).await.is_ok() {}
    is_told("denied-often".into(), "RATE_LIMITED");
    // A watch that was let in, and whose caller is revoked.
    house.admit(&[token("other", "2", "read")]);
    let ended = tokio::time::timeout(PATIENCE, watch.message()).await.expect("it ends").unwrap_err();
    assert_eq!(ended.code(), Code::Unauthenticated);
    let lines = logs::lines_with("denied-often");
    let is_it = |line: &String| line.contains("denied from now on") && line.contains("WatchRoleChanges");
    assert!(lines.iter().any(is_it), "{lines:#?}");

    // One who does not even get as far as HTTP/2.
    let server = house.tls(Setup::new(&db), true).start().await;
    let stranger = Ca::new("strangers").sign(&["c.test"]);
    let refused = async {
        loop {
            let _ = house.connect(server.address, Some(&stranger)).await;
            if !logs::lines_with("denied: no TLS").is_empty() {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.expect("it is told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_knocks_however_fast_the_log_stays_short() {
    logs::capture();
    let house = House::new();
    house.admit(&[token("knocker", "sesame", "watch"), token("quiet-caller", "1", "watch")]);
    let db = Db::sqlite();
    let server = house.closed(Setup::new(&db)).serve().await;
    let mut knocks = plain(server.address, Some("sesame")).await;
    let begun = std::time::Instant::now();
    for _ in 0..500 {
        assert!(call(&mut knocks, Method::Stats).await.is_err());
    }
    let lines = logs::lines_with("knocker");
    let most = 10 * (2 + begun.elapsed().as_secs() as usize);
    assert!((10..=most).contains(&lines.len()), "{} lines", lines.len());
    assert!(lines[0].contains("peer=127.0.0.1:") && lines[0].contains("SCOPE_MISSING stats"), "{}", lines[0]);
    // Nor does it hide what somebody else tries.
    assert!(call(&mut plain(server.address, Some("1")).await, Method::Stats).await.is_err());
    assert_eq!(logs::lines_with("quiet-caller").len(), 1);
    // What was not logged is counted in the next line that is.
    let counted = async {
        loop {
            assert!(call(&mut knocks, Method::Stats).await.is_err());
            if logs::lines_with("knocker").last().is_some_and(|line| !line.contains("unlogged=0")) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.expect("they are counted");
}
