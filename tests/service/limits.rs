//! Each limit acting: what is over it is refused, closed or waits, and what is within it goes on.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    num::NonZeroU32,
    process::Command,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use h2::client;
use http::{Request, StatusCode};
use prost::Message;
use rolecache::{
    grpc,
    proto::v1::{
        BatchGetRolesRequest, GetRoleRequest, ListUsersRequest, SetRoleRequest, StatsRequest, WatchRoleChangesRequest,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    task::JoinSet,
    time::timeout,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{
    support::{
        calls::{refused, refused_for_now},
        child::ChildServer,
        crowd::Crowd,
        doors::{House, plain, token},
        gates::Gates,
        raw::{Raw, SERVICE, Wire, frame, frame_bytes},
        server::{Db, PATIENCE, Setup, TestServer, try_client},
        watch::{Watching, reason},
    },
    watch::every,
};

const SELDOM: Duration = Duration::from_secs(3_600);
/// Beside what a limit is, what busy processors may add.
const SLACK: Duration = Duration::from_secs(5);
/// How long a client has to answer a ping.
const PING: Duration = Duration::from_secs(10);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// An empty frame of settings.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

async fn serve(limits: impl FnOnce(&mut grpc::Limits)) -> (TestServer, Db) {
    let db = Db::sqlite();
    let mut setup = Setup::new(&db);
    limits(&mut setup.limits);
    (setup.serve().await, db)
}

fn get(user_id: i64) -> GetRoleRequest {
    GetRoleRequest { user_id, ..Default::default() }
}

/// Reads to the end of a connection, whichever it is; how long that took.
async fn until_closed(stream: &mut (impl AsyncReadExt + Unpin)) -> Duration {
    let begun = Instant::now();
    let mut bytes = [0; 1_024];
    timeout(PATIENCE, async { while let Ok(1..) = stream.read(&mut bytes).await {} }).await.expect("it is closed");
    begun.elapsed()
}

#[track_caller]
fn in_time(took: Duration, limit: Duration) {
    assert!((limit.mul_f32(0.9)..limit + SLACK).contains(&took), "{took:?} where {limit:?} was the limit");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections() {
    // Two of them are the test's client and the look at health that waited for the start.
    let (server, _db) = serve(|limits| limits.connections = 2).await;
    server.get(1).await;
    let mut second = TcpStream::connect(server.address).await.unwrap();
    second.write_all(&[PREFACE, &SETTINGS].concat()).await.unwrap();
    let mut bytes = [0; 64];
    timeout(PATIENCE, second.read(&mut bytes)).await.expect("the second is served").unwrap();
    let mut third = TcpStream::connect(server.address).await.unwrap();
    third.write_all(&[PREFACE, &SETTINGS].concat()).await.unwrap();
    let waited = timeout(Duration::from_millis(500), third.read(&mut bytes)).await;
    assert!(waited.is_err(), "a third one is served");
    server.get(1).await;
    drop(second);
    let answered = timeout(PATIENCE, third.read(&mut bytes)).await.expect("it is its turn").unwrap();
    assert!(answered > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_one_connection() {
    let (server, _db) = serve(|limits| limits.streams = 3).await;
    let mut crowd = Crowd::open(server.address, 1, 3, &every(SELDOM)).await;
    let client = server.client.clone();
    let mut watches = Vec::new();
    for _ in 0..3 {
        watches.push(Watching::open(client.clone(), every(SELDOM)).await.unwrap());
    }
    // The client waits with a fourth, until another ends.
    let mut fourth = tokio::spawn({
        let mut client = client.clone();
        async move { client.get_role(get(1)).await }
    });
    assert!(timeout(Duration::from_millis(300), &mut fourth).await.is_err(), "a fourth stream is open");
    // A connection of its own has streams of its own.
    try_client(server.address).await.unwrap().get_role(get(1)).await.unwrap();
    watches.pop();
    timeout(PATIENCE, fourth).await.expect("a stream is free").unwrap().unwrap();
    crowd.watchers.clear();
}

/// A client that leaves answers unread: no more of each may be sent than so many bytes, and their headers.
async fn unreading(address: SocketAddr, window: u32) -> client::SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.unwrap();
    let mut settings = client::Builder::new();
    settings.initial_window_size(window);
    let (sender, connection) = settings.handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn head(address: SocketAddr, path: &str) -> Request<()> {
    let head = Request::post(format!("http://{address}/{path}"));
    head.header("content-type", "application/grpc").header("te", "trailers").body(()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_never_read_gives_its_place_back() {
    let limits = |limits: &mut grpc::Limits| {
        limits.calls = 1;
        limits.deadline = Duration::from_secs(1);
    };
    let (server, _db) = serve(limits).await;
    let mut sender = unreading(server.address, 0).await;
    let batch = BatchGetRolesRequest { user_ids: (1..=1_000).collect(), ..Default::default() };
    let head = head(server.address, &format!("{SERVICE}/BatchGetRoles"));
    let (answer, mut request) = sender.send_request(head, false).unwrap();
    request.send_data(frame(&batch), true).unwrap();
    let _unread = timeout(PATIENCE, answer).await.unwrap().unwrap().into_body();
    refused_for_now(server.try_get(get(1)).await, Code::ResourceExhausted, "OVERLOADED");
    let free = async { while server.try_get(get(1)).await.is_err() {} };
    timeout(PATIENCE, free).await.expect("the place is free in the end");
}

/// Health and reflection, for which nobody needs credentials.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_open_to_all_takes_little_and_not_for_long() {
    let (server, _db) = serve(|limits| limits.deadline = Duration::from_secs(1)).await;
    let large = frame_bytes(&[0x0a; 4_097]);
    let answer = Raw::connect(server.address).await.send_to("/grpc.health.v1.Health/Check", &[], large).await;
    assert_eq!(answer.status.expect("a status").code(), Code::OutOfRange);
    for path in ["grpc.health.v1.Health/Check", "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"] {
        for begun in [&[0, 0, 0, 0x0f, 0xff][..], &[0, 0xff, 0xff, 0xff, 0xff], &[0]] {
            let stream = TcpStream::connect(server.address).await.unwrap();
            let (mut sender, connection) = client::handshake(stream).await.unwrap();
            tokio::spawn(connection);
            let (answer, mut request) = sender.send_request(head(server.address, path), false).unwrap();
            request.send_data(Bytes::from_static(begun), false).unwrap();
            // A stream of questions goes on as long as its client likes, with as much as one of them takes.
            if path.contains("Health") || begun[1..].starts_with(&[0xff]) {
                let ended = async {
                    let Ok(answer) = answer.await else { return };
                    let mut body = answer.into_body();
                    while let Some(Ok(_)) = body.data().await {}
                };
                timeout(PATIENCE, ended).await.expect("it is not waited for");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_in_the_filter_of_a_watch() {
    let (server, _db) = serve(|_| {}).await;
    let filtered = |count: usize| WatchRoleChangesRequest {
        roles: (0..count).map(|n| n.to_string()).collect(),
        ..Default::default()
    };
    server.watch(filtered(1_000)).await;
    let status = Watching::open(server.client.clone(), filtered(1_001)).await.map(|_| ()).unwrap_err();
    assert_eq!((status.code(), &*reason(&status).1), (Code::InvalidArgument, "INVALID_FIELD"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_nobody_reads_keeps_its_place() {
    let (server, _db) = serve(|limits| limits.calls = 1).await;
    let stream = TcpStream::connect(server.address).await.unwrap();
    let mut settings = client::Builder::new();
    // Nothing of an answer may be sent but its headers.
    settings.initial_window_size(0);
    let (mut sender, mut connection) = settings.handshake(stream).await.unwrap();
    let (read, reading) = oneshot::channel();
    tokio::spawn(async move {
        tokio::select! {
            _ = &mut connection => return,
            _ = reading => connection.set_initial_window_size(1 << 16).unwrap(),
        }
        let _ = connection.await;
    });
    let batch = BatchGetRolesRequest { user_ids: (1..=1_000).collect(), ..Default::default() };
    let head = Request::post(format!("http://{}/{SERVICE}/BatchGetRoles", server.address));
    let head = head.header("content-type", "application/grpc").header("te", "trailers").body(()).unwrap();
    let (answer, mut request) = sender.send_request(head, false).unwrap();
    request.send_data(frame(&batch), true).unwrap();
    let mut answer = timeout(PATIENCE, answer).await.unwrap().unwrap().into_body();
    refused_for_now(server.try_get(get(1)).await, Code::ResourceExhausted, "OVERLOADED");
    read.send(()).unwrap();
    while let Some(bytes) = timeout(PATIENCE, answer.data()).await.unwrap() {
        let bytes = bytes.unwrap();
        answer.flow_control().release_capacity(bytes.len()).unwrap();
    }
    let free = async { while server.try_get(get(1)).await.is_err() {} };
    timeout(PATIENCE, free).await.expect("the place is free once it is read");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_per_second_of_each_caller() {
    let house = House::new();
    house.admit(&[token("eager", "1", "read"), token("eager", "2", "read"), token("other", "3", "read")]);
    let db = Db::sqlite();
    let mut setup = house.closed(Setup::new(&db));
    setup.doors.allowance.calls_per_second = NonZeroU32::new(5);
    let server = setup.serve().await;
    let mut eager = plain(server.address, Some("1")).await;
    let mut again = plain(server.address, Some("2")).await;
    let mut let_in = 0;
    let status = loop {
        match eager.get_role(get(1)).await {
            Ok(_) => let_in += 1,
            Err(status) => break status,
        }
        assert!(let_in < 1_000, "no limit");
    };
    assert!(let_in >= 5, "{let_in}");
    let (code, why, _) = reason(&status);
    assert_eq!((code, &*why), (Code::ResourceExhausted, "RATE_LIMITED"));
    let wait = status.get_details_retry_info().and_then(|info| info.retry_delay).expect("when to come back");
    assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
    // By another token and connection it is the same caller; somebody else is not.
    refused_for_now(again.get_role(get(1)).await, Code::ResourceExhausted, "RATE_LIMITED");
    plain(server.address, Some("3")).await.get_role(get(1)).await.expect("another caller");
    tokio::time::sleep(wait).await;
    eager.get_role(get(1)).await.expect("after the wait that was asked for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_in_flight_of_each_caller() {
    let house = House::new();
    house.admit(&[token("eager", "1", "read"), token("other", "2", "write stats")]);
    let db = Db::sqlite();
    let gates = Gates::default();
    let mut setup = house.closed(Setup::new(&db));
    setup.doors.allowance.calls = 3;
    let server = setup.wrap(gates.guard()).serve().await;
    gates.roles.close();
    let eager = plain(server.address, Some("1")).await;
    let waiting: Vec<_> = (1..=3)
        .map(|user| {
            let mut eager = eager.clone();
            tokio::spawn(async move { eager.get_role(get(user)).await })
        })
        .collect();
    let mut other = plain(server.address, Some("2")).await;
    let all_wait = async { while other.stats(StatsRequest {}).await.unwrap().into_inner().misses < 3 {} };
    timeout(PATIENCE, all_wait).await.expect("three wait");
    refused_for_now(eager.clone().get_role(get(4)).await, Code::ResourceExhausted, "OVERLOADED");
    let set = SetRoleRequest { user_id: 9, role: "admin".into(), ..Default::default() };
    timeout(PATIENCE, other.set_role(set)).await.unwrap().expect("another caller");
    gates.roles.open();
    for call in waiting {
        call.await.unwrap().unwrap();
    }
    eager.clone().get_role(get(4)).await.expect("its places are free");
}

/// Filters are held as long as their watches are open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_in_the_filters_of_each_caller() {
    let house = House::new();
    house.admit(&[token("a", "1", "watch"), token("b", "2", "watch")]);
    let db = Db::sqlite();
    let server = house.closed(Setup::new(&db)).serve().await;
    let (mut a, mut b) = (plain(server.address, Some("1")).await, plain(server.address, Some("2")).await);
    let request = |first: i64| WatchRoleChangesRequest { user_ids: (first..first + 10_000).collect(), ..every(SELDOM) };
    let mut open = Vec::new();
    for turn in 0..100 {
        open.push(a.watch_role_changes(request(1 + turn * 10_000)).await.expect("a million users"));
    }
    refused_for_now(a.watch_role_changes(request(1)).await.map(drop), Code::ResourceExhausted, "TOO_MANY_WATCHES");
    a.watch_role_changes(every(SELDOM)).await.expect("one without a filter");
    b.watch_role_changes(request(1)).await.expect("another caller");
    open.pop();
    let free = async { while a.watch_role_changes(request(1)).await.is_err() {} };
    timeout(PATIENCE, free).await.expect("their places are free");
}

/// Who leaves theirs unread keeps a turn for some seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_of_each_caller() {
    let house = House::new();
    house.admit(&[token("eager", "1", "watch"), token("other", "2", "watch write")]);
    let db = Db::sqlite();
    let gates = Gates::default();
    let server = house.closed(Setup::new(&db)).wrap(gates.guard()).serve().await;
    gates.snapshot.close();
    let (eager, mut other) = (plain(server.address, Some("1")).await, plain(server.address, Some("2")).await);
    let request = || WatchRoleChangesRequest { initial_snapshot: true, ..Default::default() };
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(eager.clone().watch_role_changes(request()).await.unwrap().into_inner());
    }
    for _ in 0..3 {
        gates.snapshot.arrived().await;
    }
    let mut stream = other.watch_role_changes(request()).await.unwrap().into_inner();
    timeout(PATIENCE, gates.snapshot.arrived()).await.expect("another caller's has its turn");
    gates.snapshot.open();
    timeout(PATIENCE, stream.message()).await.unwrap().unwrap().expect("it starts");
}

/// Opens calls, so many over a connection, whose requests are announced longer than what comes of them; those that are answered
/// all the same.
async fn unfinished(
    address: SocketAddr,
    path: &str,
    secret: Option<&str>,
    [calls, of_each]: [usize; 2],
    announced: usize,
    sent: usize,
) -> (JoinSet<String>, Vec<h2::SendStream<Bytes>>) {
    let (mut answers, mut open) = (JoinSet::new(), Vec::new());
    for first in (0..calls).step_by(of_each) {
        let (mut sender, connection) = client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
        tokio::spawn(connection);
        for _ in first..(first + of_each).min(calls) {
            let mut head = head(address, path);
            if let Some(secret) = secret {
                head.headers_mut().insert("authorization", format!("Bearer {secret}").parse().unwrap());
            }
            sender = sender.ready().await.unwrap();
            let (answer, mut request) = sender.send_request(head, false).unwrap();
            let mut half = BytesMut::from(&[0_u8][..]);
            half.put_u32(announced as u32);
            half.resize(sent, 0);
            // Whose stream was reset by then is answered.
            let _ = request.send_data(half.freeze(), false);
            open.push(request);
            answers.spawn(async move {
                let answer = answer.await.expect("an answer");
                answer.headers().get("grpc-status").map_or(String::new(), |code| code.to_str().unwrap().to_owned())
            });
        }
    }
    (answers, open)
}

/// A caller whose large requests never end holds 16 MiB at most, and keeps nobody else from sending large ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_all_requests_of_a_caller() {
    let house = House::new();
    house.admit(&[token("hog", "1", "stats"), token("other", "2", "read")]);
    let db = Db::sqlite();
    let server = house.closed(Setup::new(&db)).serve().await;
    let (announced, sent) = (256 << 10, 200_000);
    let fit = (16 << 20) / (sent - (4 << 10));
    let path = format!("{SERVICE}/Stats");
    let (mut answers, _open) = unfinished(server.address, &path, Some("1"), [200, 100], announced - 5, sent).await;
    for _ in fit..200 {
        let answer = timeout(PATIENCE, answers.join_next()).await.expect("what is too much is refused");
        assert_eq!(answer.unwrap().unwrap(), "8", "RESOURCE_EXHAUSTED");
    }
    let mut other = plain(server.address, Some("2")).await;
    let batch = BatchGetRolesRequest { user_ids: (1..=10_000).collect(), ..Default::default() };
    other.batch_get_roles(batch).await.expect("another caller has room");
    assert_eq!(answers.len(), fit, "the others wait for the rest");
}

/// A caller who leaves long lists unread holds 16 MiB of them at most, and keeps nobody else from reading theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_all_answers_of_a_caller() {
    let house = House::new();
    house.admit(&[token("hog", "1", "list"), token("other", "2", "list")]);
    let db = Db::sqlite();
    let server = house.closed(Setup::new(&db)).serve().await;
    db.sql(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 1000)
         insert into users (user_id, role, username) select i, 'admin', printf('%0500d', i) from n",
    );
    let list = || ListUsersRequest { page_size: 1_000, ..Default::default() };
    let mut other = plain(server.address, Some("2")).await;
    let bytes = prost::Message::encoded_len(&other.list_users(list()).await.unwrap().into_inner());
    let fit = (16 << 20) / (bytes - (4 << 10));
    assert!((20..60).contains(&fit), "{bytes} bytes");
    // HTTP/2 takes all of an answer whose first byte may be sent.
    let mut sender = unreading(server.address, 1).await;
    let (mut ends, mut kept) = (JoinSet::new(), Vec::new());
    for _ in 0..fit + 10 {
        let mut head = head(server.address, &format!("{SERVICE}/ListUsers"));
        head.headers_mut().insert("authorization", "Bearer 1".parse().unwrap());
        sender = sender.ready().await.unwrap();
        let (answer, mut request) = sender.send_request(head, false).unwrap();
        request.send_data(frame(&list()), true).unwrap();
        let mut body = timeout(PATIENCE, answer).await.unwrap().unwrap().into_body();
        kept.push(request);
        ends.spawn(async move { body.trailers().await.unwrap().unwrap()["grpc-status"].clone() });
    }
    for _ in 0..10 {
        let status = timeout(PATIENCE, ends.join_next()).await.expect("what is too much is given up").unwrap().unwrap();
        assert_eq!(status, "8", "RESOURCE_EXHAUSTED");
    }
    other.list_users(list()).await.expect("another caller has room");
    assert_eq!(ends.len(), fit, "the others wait for their client");
}

/// Nobody needs credentials for them. Who holds all places does so for a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_of_health_are_bounded() {
    let (server, _db) = serve(|limits| limits.deadline = 2 * PATIENCE).await;
    let path = "grpc.health.v1.Health/Check";
    let (mut answers, _open) = unfinished(server.address, path, None, [2_000, 16], 10, 6).await;
    let mut told = BTreeMap::new();
    while let Some(answer) = timeout(PATIENCE, answers.join_next()).await.expect("each is answered") {
        *told.entry(answer.unwrap()).or_insert(0) += 1;
    }
    // Late, and too many.
    assert_eq!(told.keys().collect::<Vec<_>>(), ["4", "8"], "{told:?}");
    let mut raw = Raw::connect(server.address).await;
    let answer = raw.send_to(&format!("/{path}"), &[], frame_bytes(&[])).await;
    assert_eq!(answer.status.unwrap().code(), Code::Ok, "the places are free");
}

/// Few callers with many users each, whom the store does not answer, leave room for others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_leave_room_for_single_reads() {
    const BATCH: i64 = 10_000;
    let db = Db::sqlite();
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    gates.roles.close();
    let mut batches = JoinSet::new();
    for batch in 0..12 {
        let mut client = server.client.clone();
        let user_ids = (1 + batch * BATCH..=(batch + 1) * BATCH).collect();
        batches.spawn(
            async move { client.batch_get_roles(BatchGetRolesRequest { user_ids, ..Default::default() }).await },
        );
    }
    let first = timeout(PATIENCE, batches.join_next()).await.expect("there is a bound").unwrap().unwrap();
    refused_for_now(first, Code::ResourceExhausted, "OVERLOADED");
    let mut client = server.client.clone();
    let single = tokio::spawn(async move { client.get_role(get(1_000_000)).await });
    gates.roles.arrived().await;
    gates.roles.open();
    single.await.unwrap().expect("it has a place");
}

/// Nobody needs credentials for them, so that they have a bound, and an end that needs no client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_is_bounded() {
    let (server, _db) = serve(|limits| limits.deadline = Duration::from_secs(2)).await;
    let path = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let mut streams = Vec::new();
    // Of each connection as many as one may have, and in the end of one more.
    for connection in 0..5 {
        let mut sender = unreading(server.address, 0).await;
        let before = streams.len();
        let refused = loop {
            let (answer, request) = sender.send_request(head(server.address, path), false).unwrap();
            let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
            if let Some(status) = answer.headers().get("grpc-status") {
                break status.clone();
            }
            streams.push((answer, request));
            assert!(streams.len() <= 64, "no bound");
        };
        let most = if connection < 4 { 16 } else { 0 };
        assert_eq!((streams.len() - before, refused.as_bytes()), (most, &b"8"[..]));
    }
    server.get(1).await;
    // They end, whether their client reads or not.
    let free = async {
        loop {
            let mut sender = unreading(server.address, 0).await;
            let (answer, _request) = sender.send_request(head(server.address, path), false).unwrap();
            if answer.await.unwrap().headers().get("grpc-status").is_none() {
                return;
            }
        }
    };
    timeout(PATIENCE, free).await.expect("their places are free");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_of_each_caller() {
    let house = House::new();
    house.admit(&[token("a", "1", "watch"), token("b", "2", "watch")]);
    let db = Db::sqlite();
    let mut setup = house.closed(Setup::new(&db));
    setup.doors.allowance.watches = 1;
    let server = setup.serve().await;
    let [mut a, mut again, mut b] = [
        plain(server.address, Some("1")).await,
        plain(server.address, Some("1")).await,
        plain(server.address, Some("2")).await,
    ];
    let first = a.watch_role_changes(WatchRoleChangesRequest::default()).await.unwrap();
    let second = again.watch_role_changes(WatchRoleChangesRequest::default()).await.map(drop);
    refused_for_now(second, Code::ResourceExhausted, "TOO_MANY_WATCHES");
    b.watch_role_changes(WatchRoleChangesRequest::default()).await.expect("another caller");
    drop(first);
    let free = async { while again.watch_role_changes(WatchRoleChangesRequest::default()).await.is_err() {} };
    timeout(PATIENCE, free).await.expect("its place is free");
}

/// A GetRole of so many bytes, as a message of the contract: a field that it lacks is passed over.
fn message_of(bytes: usize) -> Bytes {
    let mut message = BytesMut::from(&get(1).encode_to_vec()[..]);
    // Field 100, of a length that takes three bytes.
    let text = bytes - message.len() - 5;
    message.put_slice(&[0xa2, 0x06, text as u8 | 0x80, (text >> 7) as u8 | 0x80, (text >> 14) as u8]);
    message.resize(bytes, b'x');
    frame_bytes(&message)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_a_message() {
    let (server, _db) = serve(|limits| limits.message_bytes = 100_000).await;
    let mut raw = Raw::connect(server.address).await;
    let within = raw.send("GetRole", message_of(100_000)).await;
    assert_eq!(within.status.unwrap().code(), Code::Ok);
    let over = raw.send("GetRole", message_of(100_001)).await.status.unwrap();
    refused(Err::<(), _>(over), Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    // Announced, and never sent: refused by its length, before there is any memory for it.
    let mut announced = BytesMut::from(&[0_u8][..]);
    announced.put_u32(u32::MAX);
    let over = raw.send("GetRole", announced.freeze()).await.status.unwrap();
    refused(Err::<(), _>(over), Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    server.get(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_messages_are_not_unpacked() {
    let (server, _db) = serve(|_| {}).await;
    let mut raw = Raw::connect(server.address).await;
    let mut packed = BytesMut::from(&frame_bytes(&[0x1f, 0x8b, 8, 0])[..]);
    packed[0] = 1;
    for (headers, code) in [
        (&[("grpc-encoding", "gzip")][..], Code::Unimplemented),
        (&[("grpc-encoding", "zstd")], Code::Unimplemented),
        (&[], Code::InvalidArgument),
    ] {
        let answer = raw.send_to(&format!("/{SERVICE}/GetRole"), headers, packed.clone().freeze()).await;
        assert_eq!(answer.status.unwrap().code(), code, "{headers:?}");
    }
}

/// 200 MiB of zeros in fewer bytes than a message may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bomb_of_gzip_takes_no_memory() {
    let db = Db::sqlite();
    let server = ChildServer::serve(&db.url(), &[]).await;
    let packed = Command::new("/bin/sh").args(["-c", "head -c 209715200 /dev/zero | gzip -9"]).output().unwrap().stdout;
    assert!((100_000..256 << 10).contains(&packed.len()), "{} bytes", packed.len());
    let mut bomb = BytesMut::from(&frame_bytes(&packed)[..]);
    bomb[0] = 1;
    let before = server.memory("VmHWM");
    let mut raw = Raw::connect(server.address).await;
    let headers = [("grpc-encoding", "gzip")];
    let answer = raw.send_to(&format!("/{SERVICE}/GetRole"), &headers, bomb.freeze()).await;
    assert_eq!(answer.status.unwrap().code(), Code::Unimplemented);
    let grown = server.memory("VmHWM") - before;
    assert!(grown < 16.0, "{grown} MiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_headers() {
    let (server, _db) = serve(|_| {}).await;
    let mut raw = Raw::connect(server.address).await;
    let keys: Vec<String> = (0..1_000).map(|key| format!("x-key-{key:04}")).collect();
    let long = "x".repeat(20_000);
    let many: Vec<(&str, &str)> = keys.iter().map(|key| (&**key, "some value")).collect();
    for headers in [&many[..], &[("x-long", &*long)]] {
        let answer = raw.send_to(&format!("/{SERVICE}/GetRole"), headers, frame(&get(1))).await;
        assert_eq!(answer.http, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    }
    let answer = raw.send_to(&format!("/{SERVICE}/GetRole"), &many[..100], frame(&get(1))).await;
    assert_eq!(answer.status.unwrap().code(), Code::Ok, "the connection goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_headers_to_the_last() {
    const LIMIT: usize = 4_096;
    let (server, _db) = serve(|limits| limits.header_bytes = LIMIT as u32).await;
    let mut raw = Raw::connect(server.address).await;
    let path = format!("/{SERVICE}/GetRole");
    let body = frame(&get(1));
    let (authority, length) = (server.address.to_string(), body.len().to_string());
    let sent = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", &*authority),
        (":path", &path),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("content-length", &length),
        ("x-long", ""),
    ];
    // As HTTP/2 counts them (RFC 9113, 6.5.2): 32 more for each.
    let rest: usize = sent.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
    for (bytes, http) in [(LIMIT, StatusCode::OK), (LIMIT + 1, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)] {
        let long = "x".repeat(bytes - rest);
        let answer = raw.send_to(&path, &[("x-long", &*long)], body.clone()).await;
        assert_eq!(answer.http, http, "{bytes} bytes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_beginning_of_a_connection() {
    let limit = Duration::from_millis(700);
    let (server, _db) = serve(|limits| limits.handshake = limit).await;
    for said in [&b""[..], &PREFACE[..23]] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(said).await.unwrap();
        in_time(until_closed(&mut stream).await, limit);
    }
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    assert!(until_closed(&mut stream).await < limit + SLACK, "what is no HTTP/2 is closed");

    let house = House::new();
    house.admit(&[token("bot", "sesame", "read")]);
    let db = Db::sqlite();
    let mut setup = house.tls(Setup::new(&db), false);
    setup.limits.handshake = limit;
    let server = setup.start().await;
    for said in [&b""[..], &[22, 3, 1, 2, 0, 1]] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(said).await.unwrap();
        in_time(until_closed(&mut stream).await, limit);
    }
    // Both are one limit: TLS is there, and the rest does not follow.
    let mut stream = house.handshake(server.address).await.unwrap();
    stream.write_all(&PREFACE[..10]).await.unwrap();
    assert!(until_closed(&mut stream).await < limit + SLACK);
}

/// A client that begins and then says nothing more, answers no ping, and holds no stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_are_silent() {
    let (server, _db) = serve(|limits| limits.keepalive = Duration::from_secs(1)).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(&[PREFACE, &SETTINGS].concat()).await.unwrap();
    in_time(until_closed(&mut stream).await, Duration::from_secs(1) + PING);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_of_clients_that_are_gone_without_a_word() {
    let (server, _db) = serve(|limits| limits.keepalive = Duration::from_secs(1)).await;
    let wire = Wire::default();
    let mut raw = Raw::connect_over(server.address, &wire).await;
    let path = format!("/{SERVICE}/WatchRoleChanges");
    let watch = tokio::spawn(async move { raw.send_to(&path, &[], frame(&every(SELDOM))).await });
    server.until_stats("the watch is open", |stats| stats.event_handlers == 1).await;
    wire.deafen(true);
    let begun = Instant::now();
    server.until_stats("the watch is closed", |stats| stats.event_handlers == 0).await;
    assert!(begun.elapsed() < Duration::from_secs(1) + PING + SLACK, "{:?}", begun.elapsed());
    watch.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_nothing_goes_over() {
    let (server, _db) = serve(|limits| limits.idle = Duration::from_secs(1)).await;
    let mut busy = server.watch(every(Duration::from_millis(300))).await;
    // A client as they are answers the goodbye at once.
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (sender, connection) = client::handshake(stream).await.unwrap();
    let begun = Instant::now();
    timeout(PATIENCE, connection).await.expect("it is closed").expect("by a goodbye");
    in_time(begun.elapsed(), Duration::from_secs(1));
    drop(sender);
    // A watch is something that goes over one.
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        busy.next().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_of_a_call() {
    let (db, gates) = (Db::sqlite(), Gates::default());
    let mut setup = Setup::new(&db).wrap(gates.guard());
    setup.limits.deadline = Duration::from_millis(700);
    setup.limits.calls = 1;
    let server = setup.serve().await;
    gates.roles.close();
    let begun = Instant::now();
    let mut raw = Raw::connect(server.address).await;
    let status = raw.within(Duration::from_secs(600), "GetRole", &get(1)).await;
    refused(Err::<(), _>(status), Code::DeadlineExceeded, "DEADLINE");
    in_time(begun.elapsed(), Duration::from_millis(700));
    gates.roles.open();

    // A body that does not end has its place for as long, too.
    let answer = endless_body(server.address).await;
    let begun = Instant::now();
    let status = timeout(PATIENCE, answer).await.expect("it is answered");
    refused(Err::<(), _>(status), Code::DeadlineExceeded, "DEADLINE");
    assert!(begun.elapsed() < Duration::from_millis(700) + SLACK);
    let free = async { while server.try_get(get(1)).await.is_err() {} };
    timeout(PATIENCE, free).await.expect("its place is free");
    // A watch is no call: it is open for as long as it likes.
    let mut watch = server.watch(every(Duration::from_millis(200))).await;
    for _ in 0..6 {
        watch.next().await;
    }
}

/// Sends half a message, and answers with the status that comes.
async fn endless_body(address: SocketAddr) -> impl Future<Output = Status> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let head = Request::post(format!("http://{address}/{SERVICE}/GetRole"));
    let head = head.header("content-type", "application/grpc").header("te", "trailers").body(()).unwrap();
    let (answer, mut body) = sender.send_request(head, false).unwrap();
    body.send_data(frame(&get(1)).slice(..6), false).unwrap();
    async move {
        let answer = answer.await.unwrap();
        drop((body, sender));
        Status::from_header_map(answer.headers()).expect("a status at once")
    }
}
