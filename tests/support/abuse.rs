//! Frames of HTTP/2 as no client of ours would send them, and a neighbour who calls meanwhile.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rolecache::proto::v1::GetRoleRequest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{child::ChildServer, raw::SERVICE, server::PATIENCE};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
/// Of settings and pings.
const ACK: u8 = 1;

/// After which a server has nothing more to say.
const SILENCE: Duration = Duration::from_millis(500);

/// The calls of a neighbour before, while and after somebody misbehaves.
pub struct Neighbour {
    before: Times,
    during: Times,
    after: Times,
    /// In MiB.
    pub grown: f64,
}

struct Times(Vec<Duration>);

/// What became of an attack.
#[derive(Default)]
pub struct Attack {
    pub sent: usize,
    pub connections: usize,
    /// Of these, so many were closed by the server.
    pub cut: usize,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u32;
    let mut bytes = length.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The headers of a call, as literals that nobody has to remember.
pub fn head(method: &str) -> Vec<u8> {
    let path = format!("/{SERVICE}/{method}");
    let kind = "application/grpc";
    // POST, http, a path, and a content type.
    let mut block = vec![0x83, 0x86, 0x04, path.len() as u8];
    block.extend(path.as_bytes());
    block.extend([0x0f, 0x10, kind.len() as u8]);
    block.extend(kind.as_bytes());
    block
}

/// A connection on which HTTP/2 has begun.
pub async fn begun(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
    stream
}

/// Waits until the server has read all that was sent before, and has had time for it. False where it has closed the connection.
pub async fn has_read(stream: &mut TcpStream) -> bool {
    for ping in 0..2_u64 {
        if stream.write_all(&frame(PING, 0, 0, &ping.to_be_bytes())).await.is_err() {
            return false;
        }
        loop {
            match timeout(PATIENCE, next_frame(stream)).await.expect("an answer to a ping") {
                Some((PING, ACK)) => break,
                Some(_) => {}
                None => return false,
            }
        }
    }
    true
}

/// Kind and flags of the next frame from the server; none at the end of the connection.
async fn next_frame(stream: &mut TcpStream) -> Option<(u8, u8)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    stream.read_exact(&mut vec![0; length as usize]).await.ok()?;
    Some((head[3], head[4]))
}

/// Sends what `nth` makes of 0, 1, 2, ... up to `count`, and reads whatever comes back. Where the server has had enough, it
/// goes on over a new connection, from 0.
pub async fn flood(address: SocketAddr, count: usize, nth: impl Fn(usize) -> Vec<u8>) -> Attack {
    let mut attack = Attack::default();
    while attack.sent < count {
        attack.connections += 1;
        let (mut from, mut to) = begun(address).await.into_split();
        // Until the server closes it, or all is sent and nothing comes back any more.
        let all_sent = Arc::new(AtomicBool::new(false));
        let reading = tokio::spawn({
            let all_sent = all_sent.clone();
            async move {
                let mut bytes = vec![0; 1 << 16];
                loop {
                    match timeout(SILENCE, from.read(&mut bytes)).await {
                        Ok(Ok(1..)) => {}
                        Ok(_) => return true,
                        Err(_) if all_sent.load(Ordering::Relaxed) => return false,
                        Err(_) => {}
                    }
                }
            }
        });
        let most = count - attack.sent;
        let mut sent = 0;
        while sent < most {
            let next = most.min(sent + 100);
            let some: Vec<u8> = (sent..next).flat_map(&nth).collect();
            let written = timeout(PATIENCE, to.write_all(&some)).await.expect("a server that reads, or cuts");
            if written.is_err() || reading.is_finished() {
                break;
            }
            sent = next;
        }
        // What is sent while the server closes counts, or a server that closes at once would have to be asked for ever.
        attack.sent += sent.max(1);
        // The last of it may be too much, too.
        all_sent.store(true, Ordering::Relaxed);
        attack.cut += usize::from(timeout(PATIENCE, reading).await.expect("an end of what comes back").unwrap());
    }
    attack
}

// === impl Neighbour ===

impl Neighbour {
    /// Calls before, while and after `attack` runs, which must not take for ever. Each call is answered.
    pub async fn beside<T>(server: &ChildServer, attack: impl Future<Output = T>) -> (Self, T) {
        let before = Times::of(server, 200).await;
        let memory = server.memory("VmRSS");
        let mut during = Vec::new();
        let mut most = memory;
        tokio::pin!(attack);
        let outcome = loop {
            let begun = Instant::now();
            most = server.memory("VmRSS").max(most);
            tokio::select! {
                biased;
                times = Times::of(server, 1) => during.extend(times.0),
                // The call that is on its way is not one of those that were slow.
                outcome = &mut attack => break outcome,
            }
            assert!(begun.elapsed() < PATIENCE, "a neighbour's call takes {:?}", begun.elapsed());
        };
        let grown = server.memory("VmRSS").max(most) - memory;
        let after = Times::of(server, 200).await;
        (Self { before, during: Times(during), after, grown }, outcome)
    }

    /// The slowest of a hundred calls, and how much slower that became.
    pub fn p99s(&self) -> [Duration; 3] {
        [&self.before, &self.during, &self.after].map(|times| times.percentile(99))
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, during, after] = self.p99s();
        let (calls, most) = (self.during.0.len(), self.during.percentile(100));
        let grown = self.grown;
        write!(
            f,
            "p99 {before:.1?} before, {during:.1?} during ({calls} calls, max {most:.1?}), {after:.1?} after; {grown:+.1} MiB"
        )
    }
}

impl Times {
    async fn of(server: &ChildServer, calls: usize) -> Self {
        let mut client = server.client.clone();
        let mut times = Vec::new();
        for _ in 0..calls {
            let begun = Instant::now();
            let request = GetRoleRequest { user_id: 1, ..Default::default() };
            if let Err(status) = client.get_role(request).await {
                panic!("a neighbour is answered {status:?}; the server's log: {:#?}", server.log());
            }
            times.push(begun.elapsed());
        }
        times.sort();
        Self(times)
    }

    fn percentile(&self, percent: usize) -> Duration {
        let mut times = self.0.clone();
        times.sort();
        times.get(times.len().saturating_sub(1) * percent / 100).copied().unwrap_or_default()
    }
}
