//! Clients that mean harm, one at a time: they are cut off or change nothing, and their neighbours go on.
//!
//! Over loopback only, bounded in number and time. In full size and as released by `scripts/test-at-scale`.

use std::time::{Duration, Instant};

use futures::future::join_all;
use rolecache::proto::v1::{GetRoleRequest, SetRoleRequest};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    abuse::{
        Attack, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, Neighbour, PING, PREFACE, RST_STREAM, SETTINGS,
        WINDOW_UPDATE, begun, flood, frame, has_read, head,
    },
    child::{ChildServer, Start},
    doors::{House, plain, rpc, token},
    server::{Db, PATIENCE, try_client},
};

/// A tenth of the frames and of the sockets, where nothing is optimised.
const IN_FULL: bool = !cfg!(debug_assertions);
const FRAMES: usize = if IN_FULL { 100_000 } else { 10_000 };
/// In any build.
const MANY_FRAMES: usize = 400_000;
const SOCKETS: usize = if IN_FULL { 2_000 } else { 200 };
/// In MiB.
const MEMORY: f64 = 64.0;
/// Until everything is as it was.
const RECOVERY: Duration = Duration::from_secs(5);
/// Below which three times as slow is a matter of the clock.
const UNNOTICED: Duration = Duration::from_millis(10);

/// By which no window may grow: an error of its stream, which the server has to reset itself.
const OVERFLOW: [u8; 4] = i32::MAX.to_be_bytes();

#[track_caller]
fn goes_on(what: &str, neighbour: &Neighbour, attack: &str) {
    println!("{what}: {attack}; neighbour {neighbour}");
    assert!(neighbour.grown <= MEMORY, "{what}: {neighbour}");
    // Beside other tests and without optimisation, how slow is no news: each call was answered in time.
    if IN_FULL {
        let [before, during, after] = neighbour.p99s();
        let most = (3 * before).max(UNNOTICED);
        assert!(during <= most && after <= most, "{what}: {neighbour}");
    }
}

/// Somebody who was not there before is served.
async fn recovers(server: &ChildServer) {
    let begun = Instant::now();
    let served = async {
        loop {
            if let Some(mut client) = try_client(server.address).await
                && client.get_role(GetRoleRequest { user_id: 1, ..Default::default() }).await.is_ok()
            {
                return;
            }
        }
    };
    timeout(PATIENCE, served).await.expect("it recovers");
    assert!(begun.elapsed() < RECOVERY, "{:?}", begun.elapsed());
}

fn stream(n: usize) -> u32 {
    1 + 2 * n as u32
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_over_one_connection() {
    let db = Db::sqlite();
    let server = ChildServer::serve(&db.url(), &["--max-deadline", "2s"]).await;
    let get = head("GetRole");
    let whole = |n: usize| frame(HEADERS, END_HEADERS | END_STREAM, stream(n), &get);
    let open = |n: usize| frame(HEADERS, END_HEADERS, stream(n), &get);
    let rapid_reset = |n: usize| [whole(n), frame(RST_STREAM, 0, stream(n), &8_u32.to_be_bytes())].concat();
    let forced_reset = |n: usize| [open(n), frame(WINDOW_UPDATE, 0, stream(n), &OVERFLOW)].concat();
    let endless_headers = |n: usize| match n {
        0 => frame(HEADERS, 0, 1, &get),
        _ => frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b"),
    };
    let empty_data = |n: usize| if n == 0 { open(0) } else { frame(DATA, 0, 1, &[]) };
    let pings = |n: usize| frame(PING, 0, 0, &n.to_be_bytes());
    let settings = |_| frame(SETTINGS, 0, 0, &[]);
    let unknown = |n: usize| frame(0xfe, 0, 0, &n.to_be_bytes());
    let address = server.address;
    // A call now and then buys no flood.
    let pings_beside_calls = |n: usize| if n.is_multiple_of(400) { whole(n / 400) } else { pings(n) };
    let floods: [(&str, usize, _); 9] = [
        ("rapid reset", FRAMES, &rapid_reset as &dyn Fn(usize) -> Vec<u8>),
        ("resets that are forced", FRAMES, &forced_reset),
        ("CONTINUATION", FRAMES, &endless_headers),
        ("empty DATA", FRAMES, &empty_data),
        ("10,000 streams", 10_000, &open),
        // Few of these hurt nobody.
        ("PING", MANY_FRAMES, &pings),
        ("PING beside calls", MANY_FRAMES, &pings_beside_calls),
        ("SETTINGS", MANY_FRAMES, &settings),
        ("unknown frames", MANY_FRAMES, &unknown),
    ];
    for (what, count, nth) in floods {
        let (neighbour, attack) = Neighbour::beside(&server, flood(address, count, nth)).await;
        let Attack { sent, connections, cut } = attack;
        goes_on(what, &neighbour, &format!("{sent} sent, {cut} of {connections} connections cut"));
        assert!(cut > 0, "{what} is not cut");
        recovers(&server).await;
    }
}

/// Streams that have been let in, and that the server then has to reset for their client's fault (RUSTSEC-2024-0003): there is
/// an end to it, which is not the one for streams that were reset before anybody looked at them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_of_streams_that_were_let_in() {
    let db = Db::sqlite();
    let server = ChildServer::serve(&db.url(), &[]).await;
    let mut connection = begun(server.address).await;
    let get = head("GetRole");
    let mut resets = 0;
    'open: while resets < 5_000 {
        let streams = resets..resets + 200;
        for (kind, flags, payload) in [(HEADERS, END_HEADERS, &get[..]), (WINDOW_UPDATE, 0, &OVERFLOW)] {
            let frames: Vec<u8> = streams.clone().flat_map(|n| frame(kind, flags, stream(n), payload)).collect();
            if connection.write_all(&frames).await.is_err() || !has_read(&mut connection).await {
                break 'open;
            }
        }
        resets = streams.end;
    }
    println!("resets of streams that were let in: cut after {resets} to {}", resets + 200);
    assert!((800..2_000).contains(&resets), "{resets}");
    recovers(&server).await;
}

/// A client that is told no before it has sent its request does nothing wrong: it goes on, however often.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_do_not_break_a_connection() {
    let (house, db) = (House::new(), Db::sqlite());
    house.admit(&[token("bot", "sesame", "read")]);
    let server = ChildServer::serve(&db.url(), &["--credentials", &house.path("credentials.toml")]).await;
    let mut connection = begun(server.address).await;
    let get = head("GetRole");
    for round in 0..30 {
        let streams = round * 100..(round + 1) * 100;
        let heads: Vec<u8> = streams.clone().flat_map(|n| frame(HEADERS, END_HEADERS, stream(n), &get)).collect();
        connection.write_all(&heads).await.unwrap();
        assert!(has_read(&mut connection).await, "{round}: it is cut");
        // An empty message, later than its head.
        let bodies: Vec<u8> = streams.flat_map(|n| frame(DATA, END_STREAM, stream(n), &[0; 5])).collect();
        connection.write_all(&bodies).await.unwrap();
        assert!(has_read(&mut connection).await, "{round}: it is cut");
    }
}

/// The same of one that is told no by the first bytes of its message, of which the others come later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_refused_do_not_break_a_connection() {
    let db = Db::sqlite();
    let server = ChildServer::serve(&db.url(), &["--max-message-bytes", "1024"]).await;
    let get = head("GetRole");
    // Longer than it may be, and packed though it does not say how.
    for (begin, rest) in [([0, 0, 0, 4, 1], 1_025), ([1, 0, 0, 0, 100], 100)] {
        let mut connection = begun(server.address).await;
        for round in 0..30 {
            let streams = round * 100..(round + 1) * 100;
            let begins: Vec<u8> = streams
                .clone()
                .flat_map(|n| {
                    [frame(HEADERS, END_HEADERS, stream(n), &get), frame(DATA, 0, stream(n), &begin)].concat()
                })
                .collect();
            connection.write_all(&begins).await.unwrap();
            assert!(has_read(&mut connection).await, "{round}: it is cut");
            let rests: Vec<u8> = streams.flat_map(|n| frame(DATA, END_STREAM, stream(n), &vec![0; rest])).collect();
            connection.write_all(&rests).await.unwrap();
            assert!(has_read(&mut connection).await, "{round}: it is cut");
        }
    }
}

/// Streams of health that anybody may begin, each with as many headers as one may have, and no request after them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_heads_and_nothing_after_them() {
    let db = Db::sqlite();
    let server = ChildServer::serve(&db.url(), &[]).await;
    let before = server.memory("VmHWM");
    let path = "/grpc.health.v1.Health/Watch";
    // POST, http, a path, a content type, and short names that are nobody's.
    let mut head =
        [&[0x83, 0x86, 0x04, path.len() as u8], path.as_bytes(), &[0x0f, 0x10, 16], b"application/grpc"].concat();
    head.extend((0..400).flat_map(|n| [vec![0, 4], format!("x{n:03}").into_bytes(), vec![0]].concat()));
    let heads: Vec<u8> = (0..16).flat_map(|n| frame(HEADERS, END_HEADERS, stream(n), &head)).collect();
    let mut connections = Vec::new();
    for _ in 0..200 {
        let mut connection = begun(server.address).await;
        connection.write_all(&heads).await.unwrap();
        assert!(has_read(&mut connection).await, "it takes them");
        connections.push(connection);
    }
    let grown = server.memory("VmHWM") - before;
    println!("3,200 heads of 400 headers: {grown:+.1} MiB");
    assert!(grown <= MEMORY, "{grown} MiB");
    recovers(&server).await;
}

/// Answers of which their client takes a byte: HTTP/2 has the rest of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_which_one_byte_is_read() {
    let db = Db::sqlite();
    let server = ChildServer::serve(&db.url(), &[]).await;
    server.client.clone().get_role(GetRoleRequest { user_id: 1, ..Default::default() }).await.unwrap();
    let before = server.memory("VmHWM");
    // SETTINGS_INITIAL_WINDOW_SIZE.
    let narrow = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 1]);
    let get = head("GetRole");
    let calls = (0..250).flat_map(|n| {
        let message = frame(DATA, END_STREAM, stream(n), &[0, 0, 0, 0, 2, 8, 1]);
        [frame(HEADERS, END_HEADERS, stream(n), &get), message].concat()
    });
    let all: Vec<u8> = narrow.into_iter().chain(calls).collect();
    let mut connections = Vec::new();
    for _ in 0..80 {
        let mut connection = begun(server.address).await;
        connection.write_all(&all).await.unwrap();
        assert!(has_read(&mut connection).await, "it takes them");
        connections.push(connection);
    }
    let grown = server.memory("VmHWM") - before;
    println!("20,000 answers of which one byte is read: {grown:+.1} MiB");
    assert!(grown <= MEMORY, "{grown} MiB");
    recovers(&server).await;
}

/// Ways of beginning and not going on.
async fn slow(address: std::net::SocketAddr, said: &[u8]) -> Vec<TcpStream> {
    let mut sockets = Vec::new();
    for _ in 0..SOCKETS {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let _ = stream.write_all(said).await;
        sockets.push(stream);
    }
    sockets
}

/// A byte each now and then, until the server has closed them all; how long that took.
async fn dribble(mut sockets: Vec<TcpStream>, byte: &[u8]) -> Duration {
    let begun = Instant::now();
    while !sockets.is_empty() {
        assert!(begun.elapsed() < 2 * PATIENCE, "{} sockets are still open", sockets.len());
        let mut open = Vec::new();
        for mut socket in sockets {
            let mut bytes = [0; 4_096];
            let is_open = match timeout(Duration::from_micros(100), socket.read(&mut bytes)).await {
                Ok(Ok(1..)) | Err(_) => socket.write_all(byte).await.is_ok(),
                Ok(_) => false,
            };
            if is_open {
                open.push(socket);
            }
        }
        sockets = open;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_say_little() {
    let db = Db::sqlite();
    let args = ["--handshake-timeout", "3s", "--keepalive-interval", "1s", "--max-deadline", "3s"];
    let server = ChildServer::serve(&db.url(), &args).await;
    let address = server.address;
    let begin = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    let half_headers = [&begin[..], &[0, 63, 255, HEADERS, 0, 0, 0, 0, 1, 0x83]].concat();
    let endless_headers = [&begin[..], &frame(HEADERS, 0, 1, &head("GetRole"))].concat();
    let half_body = [&begin[..], &frame(HEADERS, END_HEADERS, 1, &head("GetRole")), &[0, 0, 9, DATA, 0, 0, 0, 0, 1, 0]];
    let half_body = half_body.concat();
    let one_more = frame(CONTINUATION, 0, 1, &[]);
    for (what, said, byte) in [
        ("nothing", &b""[..], &b""[..]),
        ("the preface", &PREFACE[..3], b"\0"),
        ("headers in one frame", &half_headers, b"\0"),
        ("headers in many frames", &endless_headers, &one_more),
        ("a body", &half_body, b""),
    ] {
        let attack = Box::pin(async { dribble(slow(address, said).await, byte).await });
        let (neighbour, took) = Neighbour::beside(&server, attack).await;
        goes_on(&format!("slow with {what}"), &neighbour, &format!("{SOCKETS} sockets closed within {took:.1?}"));
        recovers(&server).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_say_little_of_tls() {
    let (house, db) = (House::new(), Db::sqlite());
    house.admit(&[token("bot", "sesame", "read")]);
    let [cert, key, credentials] = ["server.pem", "server.key", "credentials.toml"].map(|name| house.path(name));
    let args = ["--handshake-timeout", "3s", "--tls-cert", &cert, "--tls-key", &key, "--credentials", &credentials];
    let server = ChildServer::serve(&db.url(), &args).await;
    for (what, said) in [("nothing", &b""[..]), ("half a hello", &[22, 3, 1, 2, 0, 1]), ("no TLS", PREFACE)] {
        let memory = server.memory("VmHWM");
        let sockets = slow(server.address, said).await;
        let mut neighbour = rpc(house.connect(server.address, None).await.unwrap(), Some("sesame"));
        let mut calls = 0;
        let mut longest = Duration::ZERO;
        let closed = dribble(sockets, b"");
        tokio::pin!(closed);
        let took = loop {
            let begun = Instant::now();
            tokio::select! {
                biased;
                answer = neighbour.get_role(GetRoleRequest { user_id: 1, ..Default::default() }) => {
                    answer.expect("a neighbour is answered");
                    calls += 1;
                    longest = longest.max(begun.elapsed());
                }
                took = &mut closed => break took,
            }
        };
        let grown = server.memory("VmHWM") - memory;
        println!(
            "slow with {what} of TLS: {SOCKETS} sockets closed within {took:.1?}; neighbour {calls} calls, \
                  max {longest:.1?}; {grown:+.1} MiB"
        );
        assert!(grown <= MEMORY && calls > 0 && longest < Duration::from_secs(1));
        let mut new = rpc(house.connect(server.address, None).await.unwrap(), Some("sesame"));
        new.get_role(GetRoleRequest { user_id: 1, ..Default::default() }).await.expect("it recovers");
    }
}

/// More clients than the process has files for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn out_of_file_descriptors() {
    let db = Db::sqlite();
    let start = Start { url: &db.url(), files: Some(256), ..Start::default() };
    let server = start.spawn().ready().await;
    let address = server.address;
    assert!(server.logged("as many connections as leave files for everything else: 56"));
    let attack = async {
        let mut sockets = Vec::new();
        for _ in 0..2_000 {
            // Beyond the backlog of the listener nobody is let in at all.
            match timeout(Duration::from_millis(500), begun(address)).await {
                Ok(socket) => sockets.push(socket),
                Err(_) => break,
            }
        }
        let busy = server.processor_time();
        tokio::time::sleep(Duration::from_secs(2)).await;
        (sockets.len(), server.processor_time() - busy, sockets)
    };
    let (neighbour, (clients, _, sockets)) = Neighbour::beside(&server, attack).await;
    // Nobody calls now: what the server does is to wait for a file descriptor.
    let before = server.processor_time();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let spent = server.processor_time() - before;
    goes_on("256 files", &neighbour, &format!("{clients} clients, {spent:.0?} of processor time in 2 s"));
    assert!(clients > 56, "{clients}: all of them are in");
    assert!(spent < Duration::from_secs(1), "it spins: {spent:?} in 2 s");
    // Who is in is served, from the store too.
    let mut client = server.client.clone();
    let set = SetRoleRequest { user_id: 7, role: "admin".into(), ..Default::default() };
    client.set_role(set).await.expect("a write");
    client.get_role(GetRoleRequest { user_id: 8, ..Default::default() }).await.expect("a miss");
    drop(sockets);
    recovers(&server).await;

    // Where none is left all the same, it waits for one.
    server.limit_files(16, 256);
    let more: Vec<TcpStream> =
        join_all((0..10).map(|_| TcpStream::connect(address))).await.into_iter().flatten().collect();
    let told = async {
        while !server.logged("connections cannot be accepted") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, told).await.expect("it says so");
    let before = server.processor_time();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let spent = server.processor_time() - before;
    assert!(spent < Duration::from_secs(1), "it spins: {spent:?} in 2 s");
    server.limit_files(256, 256);
    drop(more);
    plain(address, None).await.get_role(GetRoleRequest { user_id: 1, ..Default::default() }).await.unwrap();
}
