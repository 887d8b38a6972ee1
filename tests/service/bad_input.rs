//! Whatever comes in: it gets a status of the contract, changes nothing, and leaves the server well.

use std::{fmt::Write as _, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::{Bytes, BytesMut};
use proptest::{
    collection, option,
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use prost::Message;
use rolecache::proto::v1::{
    BatchGetRolesRequest, DeleteUserRequest, GetMailboxRequest, GetRoleRequest, ListRoleChangesRequest,
    ListUsersRequest, RegisterMailboxRequest, SetRoleRequest, StatsRequest, TransferAdminRequest,
    WatchRoleChangesRequest,
};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, Status};

use crate::support::{
    raw::{Answer, Raw, SERVICE, frame, frame_bytes},
    server::{Db, PATIENCE, TestServer},
    watch::reason,
};

on_both! {
    the_largest_and_smallest_ids_are_ids,
    any_text_is_taken_or_refused,
    broken_tokens,
    broken_durations,
    bytes_that_are_no_message,
    what_is_no_call_of_ours,
    what_is_no_http2,
    no_request_gets_a_status_without_a_reason,
}

const UNARY: [&str; 10] = [
    "GetRole",
    "BatchGetRoles",
    "SetRole",
    "TransferAdmin",
    "DeleteUser",
    "RegisterMailbox",
    "GetMailbox",
    "ListUsers",
    "ListRoleChanges",
    "Stats",
];

/// Every reason that a request can be refused with by a server that is well.
const REFUSALS: [&str; 12] = [
    "INVALID_FIELD",
    "UNKNOWN_ROLE",
    "REQUEST_ID_REUSED",
    "MAILBOX_NOT_FOUND",
    "MAILBOX_EXISTS",
    "ROLE_MISMATCH",
    "NOT_AN_ADMIN",
    "NOT_THE_CREATOR",
    "REVISION_UNKNOWN",
    "HISTORY_CHANGED",
    "DEADLINE",
    "MESSAGE_TOO_LARGE",
];

/// A server with something in it.
async fn furnished(db: &Db) -> TestServer {
    let server = db.serve().await;
    server.set(1, "admin").await;
    server.set(2, "moderator").await;
    let request = RegisterMailboxRequest { mailbox_id: 7, creator_id: 1 };
    server.client.clone().register_mailbox(request).await.unwrap();
    server
}

/// It answers, and is what it was.
#[track_caller]
fn unharmed(db: &Db, before: &str) {
    assert_eq!(db.contents(), before, "something was changed");
}

async fn well(server: &TestServer) {
    assert_eq!((&*server.get(1).await.role, &*server.get(2).await.role), ("admin", "moderator"));
    server.until_serving().await;
}

fn refusal(answer: Answer) -> (Code, String) {
    let (code, reason, _) = reason(&answer.status.expect("a status"));
    (code, reason)
}

fn invalid() -> (Code, String) {
    (Code::InvalidArgument, "INVALID_FIELD".to_owned())
}

async fn the_largest_and_smallest_ids_are_ids(db: Db) {
    let server = furnished(&db).await;
    let mut client = server.client.clone();
    for id in [i64::MIN, i64::MIN + 1, -1, i64::MAX - 1, i64::MAX] {
        assert_eq!(server.get(id).await.role, "user");
        let written = server.set(id, "admin").await.change.unwrap();
        assert_eq!((written.user_id, &*written.new_role), (id, "admin"));
        assert_eq!(server.get(id).await.role, "admin");
        let request = RegisterMailboxRequest { mailbox_id: id, creator_id: id };
        client.register_mailbox(request).await.unwrap();
        let request =
            TransferAdminRequest { from_user_id: id, to_user_id: 5, mailbox_id: Some(id), ..Default::default() };
        assert_eq!(client.transfer_admin(request).await.unwrap().into_inner().changes[0].user_id, 5);
        let mailbox = client.get_mailbox(GetMailboxRequest { mailbox_id: id }).await.unwrap().into_inner();
        assert_eq!((mailbox.mailbox_id, mailbox.creator_id), (id, 5));
        let request = ListRoleChangesRequest { user_id: Some(id), ..Default::default() };
        assert_eq!(client.list_role_changes(request).await.unwrap().into_inner().changes.len(), 1);
    }
    // From the first to beyond the last, one by one.
    let (mut listed, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListUsersRequest { page_size: 1, page_token, ..Default::default() };
        let page = client.list_users(request).await.unwrap().into_inner();
        listed.extend(page.users.iter().map(|user| user.user_id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, [i64::MIN, i64::MIN + 1, -1, 1, 2, 5, i64::MAX - 1, i64::MAX]);
    for id in [i64::MIN, i64::MAX] {
        let request = DeleteUserRequest { user_id: id, ..Default::default() };
        assert_eq!(client.delete_user(request).await.unwrap().into_inner().change.unwrap().user_id, id);
    }
}

async fn any_text_is_taken_or_refused(db: Db) {
    let server = furnished(&db).await;
    let mut client = server.client.clone();
    let texts = ["🦀🦀", "אבג", "e\u{301}", "'; drop table users; --", "\u{202e}x", "a\nb\tc", "%s\\", "\u{10ffff}"];
    for (user, text) in (100..).zip(texts) {
        // A role to write is plain; names and reasons are anything.
        let role = SetRoleRequest { user_id: user, role: text.into(), ..Default::default() };
        let status = server.try_set(role).await.unwrap_err();
        assert_eq!((status.code(), reason(&status).1.as_str()), (Code::InvalidArgument, "INVALID_FIELD"), "{text}");
        let request = SetRoleRequest {
            user_id: user,
            role: "admin".into(),
            username: text.into(),
            reason: text.into(),
            request_id: text.into(),
            expected_role: Some(String::new()),
        };
        let change = server.try_set(request.clone()).await.unwrap().change.unwrap();
        assert_eq!((&*change.username, &*change.reason), (text, text));
        assert_eq!(server.try_set(request.clone()).await.unwrap().change.unwrap(), change);
        let expecting = SetRoleRequest { expected_role: Some(text.into()), request_id: String::new(), ..request };
        assert_eq!(reason(&server.try_set(expecting).await.unwrap_err()).1, "ROLE_MISMATCH");
        let listed = client.list_users(ListUsersRequest { role: text.into(), ..Default::default() }).await.unwrap();
        assert!(listed.into_inner().users.is_empty());
        let request = WatchRoleChangesRequest { roles: vec![text.into()], ..Default::default() };
        server.watch(request).await;
    }
    let before = db.contents();
    let mut raw = Raw::connect(server.address).await;
    let nul = || "a\0b".to_owned();
    let set = SetRoleRequest { user_id: 1, role: "user".into(), ..Default::default() };
    let transfer = TransferAdminRequest { from_user_id: 1, to_user_id: 2, ..Default::default() };
    let delete = DeleteUserRequest { user_id: 1, ..Default::default() };
    for (method, body) in [
        ("SetRole", frame(&SetRoleRequest { role: nul(), ..set.clone() })),
        ("SetRole", frame(&SetRoleRequest { username: nul(), ..set.clone() })),
        ("SetRole", frame(&SetRoleRequest { reason: nul(), ..set.clone() })),
        ("SetRole", frame(&SetRoleRequest { request_id: nul(), ..set.clone() })),
        ("SetRole", frame(&SetRoleRequest { expected_role: Some(nul()), ..set })),
        ("TransferAdmin", frame(&TransferAdminRequest { to_username: nul(), ..transfer.clone() })),
        ("TransferAdmin", frame(&TransferAdminRequest { reason: nul(), ..transfer.clone() })),
        ("TransferAdmin", frame(&TransferAdminRequest { request_id: nul(), ..transfer })),
        ("DeleteUser", frame(&DeleteUserRequest { reason: nul(), ..delete.clone() })),
        ("DeleteUser", frame(&DeleteUserRequest { request_id: nul(), ..delete })),
        ("ListUsers", frame(&ListUsersRequest { role: nul(), ..Default::default() })),
        ("ListUsers", frame(&ListUsersRequest { page_token: nul(), ..Default::default() })),
        ("ListRoleChanges", frame(&ListRoleChangesRequest { page_token: nul(), ..Default::default() })),
        ("WatchRoleChanges", frame(&WatchRoleChangesRequest { after: nul(), ..Default::default() })),
        ("WatchRoleChanges", frame(&WatchRoleChangesRequest { roles: vec![nul()], ..Default::default() })),
    ] {
        assert_eq!(refusal(raw.send(method, body).await), invalid(), "{method}");
    }
    unharmed(&db, &before);
    well(&server).await;
}

/// A token of the form that the server makes, with contents of our choice.
fn forged(of: &[&[u8]], numbers: &[i64]) -> String {
    let mut hash = Sha256::new();
    for part in of {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let mut bytes = hash.finalize()[..8].to_vec();
    for number in numbers {
        bytes.extend(number.to_be_bytes());
    }
    URL_SAFE_NO_PAD.encode(bytes)
}

async fn broken_tokens(db: Db) {
    let server = furnished(&db).await;
    let mut client = server.client.clone();
    let before = db.contents();
    let first = client.list_users(ListUsersRequest { page_size: 1, ..Default::default() }).await.unwrap().into_inner();
    let users = first.next_page_token;
    let request = ListRoleChangesRequest { page_size: 1, ..Default::default() };
    let changes = client.list_role_changes(request).await.unwrap().into_inner().next_page_token;
    let resume = server.watch(WatchRoleChangesRequest::default()).await.started.resume_token;
    assert!(!users.is_empty() && !changes.is_empty());

    let mut raw = Raw::connect(server.address).await;
    let mut broken = vec![
        " ".to_owned(),
        "-".into(),
        "0".into(),
        "🦀".into(),
        "====".into(),
        "x".repeat(100_000),
        resume.clone(),
        users[1..].to_owned(),
        format!("{users}A"),
        format!("{users}="),
        users.to_lowercase(),
        changes[1..].to_owned(),
    ];
    broken.dedup();
    for token in &broken {
        let listing = ListUsersRequest { page_token: token.clone(), ..Default::default() };
        assert_eq!(refusal(raw.send("ListUsers", frame(&listing)).await), invalid(), "{token:.50}");
        let listing = ListRoleChangesRequest { page_token: token.clone(), ..Default::default() };
        assert_eq!(refusal(raw.send("ListRoleChanges", frame(&listing)).await), invalid(), "{token:.50}");
    }
    // Of another listing.
    for other in [
        ListUsersRequest { page_token: changes.clone(), ..Default::default() },
        ListUsersRequest { page_token: users.clone(), role: "admin".into(), ..Default::default() },
    ] {
        assert_eq!(refusal(raw.send("ListUsers", frame(&other)).await), invalid());
    }
    for other in [
        ListRoleChangesRequest { page_token: users.clone(), ..Default::default() },
        ListRoleChangesRequest { page_token: changes.clone(), user_id: Some(1), ..Default::default() },
        ListRoleChangesRequest { page_token: changes.clone(), after_revision: 1, ..Default::default() },
    ] {
        assert_eq!(refusal(raw.send("ListRoleChanges", frame(&other)).await), invalid());
    }
    // With the store and the tag that it should have, and a revision that no commit has.
    let mut negative = URL_SAFE_NO_PAD.decode(&resume).unwrap();
    negative[16..24].copy_from_slice(&(-1_i64).to_be_bytes());
    let negative = &*URL_SAFE_NO_PAD.encode(negative);
    let extended = &*format!("{resume}A");
    for token in ["x", "-1", "+1", "1.0", " 1", "99999999999999999999", &resume[1..], extended, &users, negative] {
        let watch = WatchRoleChangesRequest { after: token.into(), initial_snapshot: true, ..Default::default() };
        assert_eq!(refusal(raw.send("WatchRoleChanges", frame(&watch)).await), invalid(), "{token}");
    }
    // Of the right form, and never given: an answer or a refusal, and no bug.
    let extremes = &[i64::MIN, -1, 0, 1, 2, i64::MAX - 1, i64::MAX];
    for (revision, index, row) in
        extremes.iter().flat_map(move |a| extremes.iter().flat_map(move |b| extremes.iter().map(move |c| (*a, *b, *c))))
    {
        for user_id in [None, Some(1)] {
            let user = user_id.unwrap_or(0_i64).to_be_bytes();
            let token = forged(&[b"changes", &user, &0_i64.to_be_bytes()], &[revision, index, row]);
            let listing = ListRoleChangesRequest { page_token: token, user_id, ..Default::default() };
            let status = raw.send("ListRoleChanges", frame(&listing)).await.status.unwrap();
            if status.code() != Code::Ok {
                let (_, told, _) = reason(&status);
                assert!(
                    ["INVALID_FIELD", "REVISION_UNKNOWN"].contains(&&*told),
                    "{status:?}: {revision} {index} {row}"
                );
            }
        }
    }
    for id in extremes {
        let token = forged(&[b"users", b""], &[*id]);
        let listing = ListUsersRequest { page_token: token, ..Default::default() };
        assert_eq!(raw.send("ListUsers", frame(&listing)).await.status.unwrap().code(), Code::Ok);
    }
    unharmed(&db, &before);
    well(&server).await;
}

async fn broken_durations(db: Db) {
    let server = furnished(&db).await;
    let mut raw = Raw::connect(server.address).await;
    for (seconds, nanos) in [
        (0, 0),
        (-1, 0),
        (0, -1),
        (0, 99_999_999),
        (3_600, 1),
        (3_601, 0),
        (i64::MAX, 0),
        (i64::MIN, 0),
        (i64::MAX, i32::MAX),
        (i64::MIN, i32::MIN),
        (1, -1),
        (-1, 1),
        (1, 1_000_000_000),
        (0, i32::MAX),
        (0, i32::MIN),
        (2, -1_000_000_000),
    ] {
        let heartbeat_interval = Some(prost_types::Duration { seconds, nanos });
        let watch = WatchRoleChangesRequest { heartbeat_interval, ..Default::default() };
        assert_eq!(refusal(raw.send("WatchRoleChanges", frame(&watch)).await), invalid(), "{seconds} s {nanos} ns");
    }
    assert_eq!(server.stats().await.event_handlers, 0);
}

async fn bytes_that_are_no_message(db: Db) {
    let server = furnished(&db).await;
    let before = db.contents();
    let mut raw = Raw::connect(server.address).await;
    let whole = frame(&SetRoleRequest { user_id: 1, role: "user".into(), ..Default::default() });
    let mut two = BytesMut::from(&whole[..]);
    two.extend_from_slice(&whole);
    let bodies: Vec<(&str, Bytes)> = vec![
        ("nothing", Bytes::new()),
        ("half a head", Bytes::from_static(&[0, 0, 0])),
        ("half a message", whole.slice(..whole.len() - 1)),
        ("a head alone", Bytes::from_static(&[0, 0, 0, 0, 9])),
        ("a flag that is none", Bytes::from_static(&[7, 0, 0, 0, 0])),
        ("compressed, and not said how", Bytes::from_static(&[1, 0, 0, 0, 1, 0])),
        ("no protobuf", frame_bytes(&[0xff; 64])),
        ("a field number of 0", frame_bytes(&[0, 1])),
        ("a length beyond the end", frame_bytes(&[0x12, 0xff, 0xff, 0x7f])),
        ("text that is no UTF-8", frame_bytes(&[8, 1, 0x12, 2, 0xc3, 0x28])),
        ("a number of eleven bytes", frame_bytes(&[8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1])),
        ("a text where a number goes", frame_bytes(&[0x0a, 1, b'x'])),
    ];
    for method in ["SetRole", "DeleteUser", "WatchRoleChanges"] {
        for (what, body) in &bodies {
            if method == "DeleteUser" && *what == "half a message" {
                continue;
            }
            let answer = raw.send(method, body.clone()).await;
            assert_eq!(refusal(answer), invalid(), "{method} {what}");
        }
    }
    // A length that nobody may have, and no more bytes.
    let answer = raw.send("SetRole", Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff])).await;
    assert_eq!(refusal(answer), (Code::ResourceExhausted, "MESSAGE_TOO_LARGE".to_owned()));
    let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    for length in 1..200 {
        let mut bytes = vec![0; length];
        random.fill_bytes(&mut bytes);
        let method = UNARY[length % 9];
        let status = raw.send(method, frame_bytes(&bytes)).await.status.unwrap();
        assert_ne!(status.code(), Code::Internal, "{bytes:?}");
    }
    unharmed(&db, &before);
    well(&server).await;
}

async fn what_is_no_call_of_ours(db: Db) {
    let server = furnished(&db).await;
    let before = db.contents();
    let mut raw = Raw::connect(server.address).await;
    let body = frame(&SetRoleRequest { user_id: 1, role: "user".into(), ..Default::default() });
    for path in [
        format!("/{SERVICE}/DropTables"),
        format!("/{SERVICE}/"),
        format!("/{SERVICE}"),
        format!("/{SERVICE}/SetRole/"),
        format!("/{SERVICE}/setRole"),
        "/rolecache.v2.RoleCacheService/SetRole".into(),
        "/".into(),
    ] {
        let status = raw.send_to(&path, &[], body.clone()).await.status.expect("a status of gRPC");
        assert_eq!(status.code(), Code::Unimplemented, "{path}");
    }
    let path = format!("/{SERVICE}/SetRole");
    for kind in ["application/json", "text/html", "application/grpc-web"] {
        let answer = raw.send_to(&path, &[("content-type", kind)], body.clone()).await;
        assert_eq!(answer.http, 415, "{kind}");
    }
    let answer = raw.send_to(&path, &[("grpc-encoding", "zstd")], body.clone()).await;
    assert_eq!(answer.status.unwrap().code(), Code::Unimplemented, "a compression that nobody knows");
    let answer = raw.send_to(&path, &[("x-long", &"x".repeat(20_000))], body.clone()).await;
    assert_eq!(answer.http, 431, "more headers than anybody needs");
    // Headers that are none are passed over, an answer comes all the same.
    for header in [("grpc-timeout", "soon"), ("grpc-timeout", "-1S"), ("x-\u{75}ser-bin", "%%%")] {
        let answer = raw.send_to(&format!("/{SERVICE}/GetRole"), &[header], frame(&get(1))).await;
        assert_eq!(answer.status.unwrap().code(), Code::Ok, "{header:?}");
    }
    // No time at all: whichever comes first.
    let answer = raw.send_to(&format!("/{SERVICE}/GetRole"), &[("grpc-timeout", "0n")], frame(&get(3))).await;
    let status = answer.status.unwrap();
    assert!(status.code() == Code::Ok || reason(&status).1 == "DEADLINE", "{status:?}");
    unharmed(&db, &before);
    well(&server).await;
}

fn get(user_id: i64) -> GetRoleRequest {
    GetRoleRequest { user_id, ..Default::default() }
}

async fn what_is_no_http2(db: Db) {
    let server = furnished(&db).await;
    let before = db.contents();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut garbage = vec![0; 4_096];
    TestRng::deterministic_rng(RngAlgorithm::ChaCha).fill_bytes(&mut garbage);
    let after_preface = [&preface[..], &garbage].concat();
    let bodies: [&[u8]; 5] =
        [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"\n", &garbage, &after_preface];
    for bytes in bodies {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut said = Vec::new();
        // The server closes, with or without a word; a reset is an answer too.
        let _ = timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("the server closes the connection");
    }
    // Who begins, and then says no more, is not kept for ever.
    let mut silent = Vec::new();
    for said in [&[][..], &preface[..1], &preface[..23]] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(said).await.unwrap();
        silent.push(stream);
    }
    for mut stream in silent {
        let mut said = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("the server closes the connection");
    }
    unharmed(&db, &before);
    well(&server).await;
}

// === requests of all kinds ===

fn id() -> impl Strategy<Value = i64> {
    prop_oneof![4 => 1_i64..5, 1 => Just(0), 1 => Just(i64::MIN), 1 => Just(i64::MAX), 1 => any::<i64>()]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => Just(String::new()),
        4 => "[a-z]{1,8}",
        1 => ".{0,20}",
        1 => Just("\0".to_owned()),
        1 => "x{60,70}",
        1 => "x{495,505}",
    ]
}

fn role() -> impl Strategy<Value = String> {
    prop_oneof![6 => prop_oneof!["user", "admin", "moderator"], 1 => text()]
}

fn revision() -> impl Strategy<Value = i64> {
    prop_oneof![4 => Just(0), 2 => 0_i64..10, 1 => any::<i64>()]
}

fn request() -> impl Strategy<Value = (&'static str, Bytes)> {
    fn of<M: Message>(method: &'static str) -> impl Fn(M) -> (&'static str, Bytes) {
        move |message| (method, frame(&message))
    }
    let ids = || collection::vec(id(), 0..5);
    let roles = collection::vec(role(), 0..3);
    prop_oneof![
        (id(), revision(), any::<bool>())
            .prop_map(|(user_id, min_revision, fully_consistent)| GetRoleRequest {
                user_id,
                min_revision,
                fully_consistent
            })
            .prop_map(of("GetRole")),
        (ids(), revision(), any::<bool>())
            .prop_map(|(user_ids, min_revision, fully_consistent)| BatchGetRolesRequest {
                user_ids,
                min_revision,
                fully_consistent
            })
            .prop_map(of("BatchGetRoles")),
        (id(), role(), text(), option::of(role()), text(), text())
            .prop_map(|(user_id, role, username, expected_role, reason, request_id)| SetRoleRequest {
                user_id,
                role,
                username,
                expected_role,
                reason,
                request_id
            })
            .prop_map(of("SetRole")),
        (id(), id(), option::of(id()), any::<bool>(), text(), text(), text())
            .prop_map(|(from_user_id, to_user_id, mailbox_id, demote_from, to_username, reason, request_id)| {
                TransferAdminRequest {
                    from_user_id,
                    to_user_id,
                    mailbox_id,
                    demote_from,
                    to_username,
                    reason,
                    request_id,
                }
            })
            .prop_map(of("TransferAdmin")),
        (id(), text(), text())
            .prop_map(|(user_id, reason, request_id)| DeleteUserRequest { user_id, reason, request_id })
            .prop_map(of("DeleteUser")),
        (id(), id())
            .prop_map(|(mailbox_id, creator_id)| RegisterMailboxRequest { mailbox_id, creator_id })
            .prop_map(of("RegisterMailbox")),
        id().prop_map(|mailbox_id| GetMailboxRequest { mailbox_id }).prop_map(of("GetMailbox")),
        (role(), -1..1_002, text())
            .prop_map(|(role, page_size, page_token)| ListUsersRequest { role, page_size, page_token })
            .prop_map(of("ListUsers")),
        (option::of(id()), revision(), -1..1_002, text())
            .prop_map(|(user_id, after_revision, page_size, page_token)| ListRoleChangesRequest {
                user_id,
                after_revision,
                page_size,
                page_token
            })
            .prop_map(of("ListRoleChanges")),
        Just(StatsRequest {}).prop_map(of("Stats")),
        (text(), any::<bool>(), ids(), roles, collection::vec(-1..9, 0..3), option::of((-1_i64..5, any::<i32>())))
            .prop_map(|(after, initial_snapshot, user_ids, roles, kinds, heartbeat)| WatchRoleChangesRequest {
                after,
                initial_snapshot,
                user_ids,
                roles,
                kinds,
                heartbeat_interval: heartbeat.map(|(seconds, nanos)| prost_types::Duration { seconds, nanos }),
            })
            .prop_map(of("WatchRoleChanges")),
    ]
}

async fn no_request_gets_a_status_without_a_reason(db: Db) {
    let server = furnished(&db).await;
    let mut raw = Raw::connect(server.address).await;
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let requests = request();
    let mut refused = String::new();
    let mut answered = 0;
    for _ in 0..400 {
        let (method, body) = requests.new_tree(&mut runner).unwrap().current();
        // A watch that is opened ends by its deadline.
        let limit = if method == "WatchRoleChanges" { "20m" } else { "10S" };
        let headers = [("grpc-timeout", limit)];
        let answer = raw.send_to(&format!("/{SERVICE}/{method}"), &headers, body.clone()).await;
        let status: Status = answer.status.expect("a status");
        if status.code() == Code::Ok {
            answered += 1;
            continue;
        }
        let (_, told, _) = reason(&status);
        assert!(REFUSALS.contains(&&*told), "{method} {body:?}: {status:?}");
        write!(refused, "{told} ").unwrap();
    }
    assert!(answered > 50, "{answered} were answered; the others: {refused}");
    assert!(refused.contains("INVALID_FIELD") && refused.contains("UNKNOWN_ROLE"), "{refused}");
    timeout(Duration::from_secs(10), server.until_serving()).await.expect("it serves on");
}
