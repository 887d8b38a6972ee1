//! Certificates and credentials that change while the server runs: nobody who may stay notices, and the others leave.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use h2::client;
use http::Request;
use rolecache::{
    access::credentials::Credential,
    proto::v1::{GetRoleRequest, SetRoleRequest, StatsRequest, WatchRoleChangesRequest},
};
use rustls::HandshakeKind;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Code;

use crate::{
    support::{
        abuse::PREFACE,
        doors::{Ca, House, certificate, handshake, plain, rpc, token},
        raw::{SERVICE, frame},
        server::{Db, PATIENCE, Setup},
        watch::reason,
    },
    watch::every,
};

/// As promised: from the change of a file to the end of what it allowed no more.
const REVOKED_WITHIN: Duration = Duration::from_secs(5);
const ROTATIONS: usize = 100;
const SELDOM: Duration = Duration::from_secs(3_600);

fn get() -> GetRoleRequest {
    GetRoleRequest { user_id: 1, ..Default::default() }
}

/// Each rotation brings a certificate, a key, a client CA beside the old one, and a token beside the one before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_rotations_under_load_cost_no_call() {
    let house = Arc::new(House::new());
    let callers = |n: usize| -> Vec<Credential> {
        let secret = |n: usize| format!("secret-{n}");
        let mut callers =
            vec![token("bot", &secret(n), "read watch write"), certificate("workload", "bot.test", "read watch")];
        // A call that has begun may take a rotation's time.
        callers.extend((n.saturating_sub(2)..n).map(|before| token("bot", &secret(before), "read watch write")));
        callers
    };
    house.admit(&callers(0));
    let db = Db::sqlite();
    let server = house.tls(Setup::new(&db), false).start().await;
    let address = server.address;
    let (stop, load) = (CancellationToken::new(), TaskTracker::new());
    let (calls, newest) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let client = Arc::new(house.clients.sign(&["bot.test"]));
    let mut first = rpc(house.connect(address, None).await.unwrap(), Some("secret-0"));
    let wait = async { while first.get_role(get()).await.is_err() {} };
    timeout(PATIENCE, wait).await.expect("it serves");
    // One keeps its connection and changes its token, one has a certificate, one connects for each call, and one writes.
    for way in 0..4 {
        let (house, stop, calls, newest, client) =
            (house.clone(), stop.clone(), calls.clone(), newest.clone(), client.clone());
        load.spawn(async move {
            let identity = Some(&*client).filter(|_| way == 1);
            let mut channel = house.connect(address, identity).await.expect("connect");
            while !stop.is_cancelled() {
                if way == 2 {
                    channel = house.connect(address, identity).await.expect("connect");
                }
                let secret = format!("secret-{}", newest.load(Ordering::SeqCst));
                let mut rpc = rpc(channel.clone(), Some(&*secret).filter(|_| way != 1));
                let answer = match way {
                    3 => {
                        let role = if calls.load(Ordering::SeqCst).is_multiple_of(2) { "admin" } else { "user" };
                        let set = SetRoleRequest { user_id: 2, role: role.into(), ..Default::default() };
                        rpc.set_role(set).await.map(drop)
                    }
                    _ => rpc.get_role(get()).await.map(drop),
                };
                answer.unwrap_or_else(|status| panic!("way {way}, {secret}: {status:?}"));
                calls.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    // And one watches all the while.
    let mut watching = rpc(house.connect(address, Some(&client)).await.unwrap(), None);
    let mut watch = watching.watch_role_changes(every(Duration::from_millis(100))).await.unwrap().into_inner();
    for n in 1..=ROTATIONS {
        let shown = house.certify();
        house.write("clients.pem", &(Ca::new(&format!("clients-{n}")).pem + &house.clients.pem));
        house.admit(&callers(n));
        house.until_shown(address, &shown).await;
        let secret = format!("secret-{n}");
        let mut rpc = rpc(house.connect(address, None).await.unwrap(), Some(&secret));
        let taken = async { while rpc.get_role(get()).await.is_err() {} };
        timeout(PATIENCE, taken).await.expect("a new token is taken in time");
        newest.store(n, Ordering::SeqCst);
        let before = calls.load(Ordering::SeqCst);
        let went_on = async {
            while calls.load(Ordering::SeqCst) < before + 3 {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, went_on).await.expect("the load goes on");
        let told = timeout(PATIENCE, watch.message()).await.expect("a message in time");
        assert!(told.expect("the watch goes on").is_some());
    }
    stop.cancel();
    load.close();
    timeout(PATIENCE, load.wait()).await.expect("the load ends");
    println!("rotations: {ROTATIONS}, beside {} calls, none failed", calls.load(Ordering::SeqCst));
    drop(watch);
    server.stop().await.expect("no task of the load or of the server broke");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_callers_watch_ends_and_nobody_elses() {
    let house = House::new();
    let stays = token("stays", "stays", "watch");
    house.admit(&[token("goes", "goes", "watch"), token("narrows", "narrows", "watch read"), stays.clone()]);
    let db = Db::sqlite();
    let mut setup = house.closed(Setup::new(&db));
    // As `serve` has it.
    setup.doors.reread = Duration::from_millis(500);
    let server = setup.serve().await;
    let mut watches = Vec::new();
    for secret in ["goes", "narrows", "stays"] {
        let mut client = plain(server.address, Some(secret)).await;
        let mut stream = client.watch_role_changes(every(SELDOM)).await.unwrap().into_inner();
        stream.message().await.unwrap();
        watches.push(stream);
    }
    house.admit(&[stays, token("narrows", "narrows", "read")]);
    let begun = Instant::now();
    for watch in &mut watches[..2] {
        let ended = timeout(PATIENCE, watch.message()).await.expect("a revoked watch ends").unwrap_err();
        assert_eq!((ended.code(), &*reason(&ended).1), (Code::Unauthenticated, "BAD_CREDENTIALS"));
    }
    assert!(begun.elapsed() < REVOKED_WITHIN, "{:?}", begun.elapsed());
    println!("revoked watches ended in {:.1?}", begun.elapsed());
    db.put(&[(5, "admin")]);
    let told = timeout(PATIENCE, watches[2].message()).await.unwrap().expect("the other goes on");
    assert!(told.is_some());
}

/// A client that does not read is not told, and has what it opened all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_callers_watch_ends_though_nobody_reads_it() {
    let house = House::new();
    house.admit(&[token("goes", "goes", "watch"), token("stays", "stays", "stats")]);
    let db = Db::sqlite();
    let mut setup = house.closed(Setup::new(&db));
    // As `serve` has it.
    setup.doors.reread = Duration::from_millis(500);
    let server = setup.serve().await;
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (mut sender, connection) = client::Builder::new().initial_window_size(0).handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let (answer, mut request) = sender.send_request(head(server.address, "WatchRoleChanges", "goes"), false).unwrap();
    request.send_data(frame(&every(SELDOM)), true).unwrap();
    let _unread = timeout(PATIENCE, answer).await.unwrap().unwrap().into_body();
    let mut stats = plain(server.address, Some("stays")).await;
    assert_eq!(stats.stats(StatsRequest {}).await.unwrap().into_inner().event_handlers, 1);
    house.admit(&[token("stays", "stays", "stats")]);
    let _ = timeout(REVOKED_WITHIN, connection).await.expect("its connection is cut");
    let gone = async { while stats.stats(StatsRequest {}).await.unwrap().into_inner().event_handlers > 0 {} };
    timeout(PATIENCE, gone).await.expect("its place is free");
}

/// Let in by its headers, and what it wants comes later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_revoked_caller_had_begun_to_ask_is_not_done() {
    let house = House::new();
    let stays = token("stays", "stays", "read");
    house.admit(&[token("goes", "goes", "read write"), stays.clone()]);
    let db = Db::sqlite();
    let server = house.closed(Setup::new(&db)).serve().await;
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (mut sender, connection) = client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut begun = Vec::new();
    for method in ["SetRole", "GetRole"] {
        begun.push(sender.send_request(head(server.address, method, "goes"), false).unwrap());
    }
    // Over the same connection, and so behind them.
    let (answer, mut request) = sender.send_request(head(server.address, "GetRole", "goes"), false).unwrap();
    request.send_data(frame(&get()), true).unwrap();
    assert!(timeout(PATIENCE, answer).await.unwrap().is_ok());
    house.admit(std::slice::from_ref(&stays));
    let mut goes = plain(server.address, Some("goes")).await;
    let revoked = async { while goes.get_role(get()).await.is_ok() {} };
    timeout(PATIENCE, revoked).await.expect("it is revoked");
    let (answer, mut write) = begun.remove(0);
    let role = SetRoleRequest { user_id: 1, role: "admin".into(), ..Default::default() };
    // The connection may be gone by now, which will do as well.
    let _ = write.send_data(frame(&role), true);
    if let Ok(Ok(answer)) = timeout(PATIENCE, answer).await {
        assert_eq!(answer.headers()["grpc-status"], "16", "{answer:?}");
    }
    let mut stays = plain(server.address, Some("stays")).await;
    assert_eq!(stays.get_role(get()).await.unwrap().into_inner().role, "user");
    assert_eq!(db.sql("select count(*) from users"), "0");
}

fn head(address: SocketAddr, method: &str, secret: &str) -> Request<()> {
    let head = Request::post(format!("http://{address}/{SERVICE}/{method}"));
    let head = head.header("content-type", "application/grpc").header("te", "trailers");
    head.header("authorization", format!("Bearer {secret}")).body(()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_another_client_ca_old_connections_end() {
    let house = House::new();
    house.admit(&[certificate("bot", "bot.test", "read watch"), token("other", "sesame", "watch")]);
    let db = Db::sqlite();
    let server = house.tls(Setup::new(&db), false).start().await;
    let client = house.clients.sign(&["bot.test"]);
    let mut old = rpc(house.connect(server.address, Some(&client)).await.unwrap(), None);
    let wait = async { while old.get_role(get()).await.is_err() {} };
    timeout(PATIENCE, wait).await.expect("it serves");
    let mut watch = old.watch_role_changes(every(SELDOM)).await.unwrap().into_inner();
    watch.message().await.unwrap();
    // Nothing that this one has shown was signed by the CA.
    let mut without = rpc(house.connect(server.address, None).await.unwrap(), Some("sesame"));
    let mut other = without.watch_role_changes(every(SELDOM)).await.unwrap().into_inner();
    other.message().await.unwrap();

    let next = Ca::new("clients, next");
    house.write("clients.pem", &next.pem);
    let begun = Instant::now();
    let ended = timeout(PATIENCE, watch.message()).await.expect("the watch ends");
    assert!(ended.is_err(), "{ended:?}");
    assert!(begun.elapsed() < REVOKED_WITHIN, "{:?}", begun.elapsed());
    // The old certificate is none any more, and one of the new CA is.
    if let Ok(channel) = house.connect(server.address, Some(&client)).await {
        assert!(rpc(channel, None).get_role(get()).await.is_err());
    }
    let client = next.sign(&["bot.test"]);
    let mut new = rpc(house.connect(server.address, Some(&client)).await.unwrap(), None);
    new.get_role(get()).await.expect("the new certificate");
    db.put(&[(5, "admin")]);
    assert!(timeout(PATIENCE, other.message()).await.unwrap().expect("the other goes on").is_some());
}

/// A session brings its certificate along, however long ago that ran out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_certificates_are_asked_for_no_session_is_resumed() {
    let house = House::new();
    house.admit(&[token("bot", "sesame", "read")]);
    let db = Db::sqlite();
    let server = house.tls(Setup::new(&db), false).start().await;
    let client = house.client();
    for turn in 0..3 {
        let mut stream = handshake(server.address, client.clone()).await.unwrap();
        stream.write_all(&[PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat()).await.unwrap();
        // With the first bytes of an answer tickets would have come.
        stream.read_u8().await.unwrap();
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full), "{turn}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_file_leaves_in_use_what_was_there() {
    let house = House::new();
    house.admit(&[token("bot", "sesame", "read")]);
    let db = Db::sqlite();
    let server = house.tls(Setup::new(&db), false).start().await;
    let mut client = rpc(house.connect(server.address, None).await.unwrap(), Some("sesame"));
    let wait = async { while client.get_role(get()).await.is_err() {} };
    timeout(PATIENCE, wait).await.expect("it serves");
    let certificate = std::fs::read_to_string(house.file("server.pem")).unwrap();
    house.write("server.pem", "");
    house.write("credentials.toml", "[[caller]]\nname = \"bot\"");
    std::fs::remove_file(house.file("clients.pem")).unwrap();
    // Long enough for each to have been looked at, several times.
    for _ in 0..50 {
        let mut client = rpc(house.connect(server.address, None).await.expect("the old certificate"), Some("sesame"));
        client.get_role(get()).await.expect("the old credentials");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    house.write("clients.pem", &house.clients.pem);
    house.write("server.pem", &certificate);
    house.admit(&[token("bot", "another", "read")]);
    let mut client = rpc(house.connect(server.address, None).await.unwrap(), Some("another"));
    let taken = async { while client.get_role(get()).await.is_err() {} };
    timeout(PATIENCE, taken).await.expect("what is whole again is taken");
}

/// Nobody is revoked by a file in which only the order has changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stands_in_the_new_file_too_goes_on() {
    let house = House::new();
    house.admit(&[token("a", "1", "watch"), token("b", "2", "watch")]);
    let db = Db::sqlite();
    let server = house.closed(Setup::new(&db)).serve().await;
    let mut watch = plain(server.address, Some("1")).await;
    let mut watch = watch.watch_role_changes(every(Duration::from_millis(100))).await.unwrap().into_inner();
    house.admit(&[token("c", "3", "watch"), token("b", "2", "read"), token("a", "1", "watch")]);
    let mut third = plain(server.address, Some("3")).await;
    let taken = async { while third.watch_role_changes(WatchRoleChangesRequest::default()).await.is_err() {} };
    timeout(PATIENCE, taken).await.expect("the file is taken");
    for _ in 0..5 {
        assert!(timeout(PATIENCE, watch.message()).await.unwrap().expect("it goes on").is_some());
    }
}
