//! A TCP proxy in front of PostgreSQL that goes silent, breaks, strands, slows or slices connections, or swallows
//! notifications and what a session asks for at its start, on command.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
    time::sleep,
};

/// What becomes of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Open,
    /// Ended in order, by FIN.
    Cut,
    /// Broken, by RST.
    Reset,
    /// Not a byte passes, and it never breaks: nobody even reads.
    Stranded,
    /// What the server sends is lost, and nobody is told.
    DeafClient,
    /// What the client sends is lost, and nobody is told.
    DeafServer,
    /// Both are lost.
    Hole,
    /// Whatever passes is late by so much.
    Slow(Duration),
    /// Whatever passes comes in pieces of a few bytes.
    Sliced,
}

/// Of the connections that are open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    All,
    /// Those that have sent LISTEN.
    Listening,
    /// Those that have been sent a notification.
    Hearing,
}

/// Serves until it is dropped.
pub struct Proxy {
    /// The database, through the proxy.
    pub url: String,
    frozen: watch::Sender<bool>,
    rules: Arc<Rules>,
    serving: tokio::task::JoinHandle<()>,
}

/// What holds for all connections, and which there are.
#[derive(Default)]
struct Rules {
    is_mute: AtomicBool,
    drops_options: AtomicBool,
    is_refusing: AtomicBool,
    lines: Mutex<Vec<Arc<Line>>>,
}

/// One connection.
struct Line {
    fate: watch::Sender<Fate>,
    listens: AtomicBool,
    hears: AtomicBool,
}

#[derive(Clone, Copy)]
enum Toward {
    Client,
    Server,
}

// === impl Proxy ===

impl Proxy {
    /// In front of the database at `url`, without TLS so that messages can be told apart.
    pub async fn before(url: &str) -> Self {
        let mut parts = url::Url::parse(url).unwrap();
        let target = (parts.host_str().unwrap().to_owned(), parts.port().unwrap_or(5432));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        parts.set_host(Some("127.0.0.1")).unwrap();
        parts.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
        parts.set_query(Some("sslmode=disable"));
        let (frozen, is_frozen) = watch::channel(false);
        let rules = Arc::new(Rules::default());
        let serving = tokio::spawn({
            let rules = rules.clone();
            async move {
                let mut pairs = tokio::task::JoinSet::new();
                loop {
                    let (client, _) = listener.accept().await.unwrap();
                    if rules.is_refusing.load(Ordering::Relaxed) {
                        let _ = client.set_zero_linger();
                        continue;
                    }
                    let line = rules.open_line();
                    let (target, is_frozen, rules) = (target.clone(), is_frozen.clone(), rules.clone());
                    pairs.spawn(async move {
                        if let Ok(server) = TcpStream::connect(&target).await {
                            line.carry(client, server, is_frozen, &rules).await;
                        }
                        rules.lines.lock().unwrap().retain(|other| !Arc::ptr_eq(other, &line));
                    });
                }
            }
        });
        Self { url: parts.to_string(), frozen, rules, serving }
    }

    /// From now on not a byte passes, and no connection breaks.
    pub fn freeze(&self) {
        self.frozen.send_replace(true);
    }

    pub fn thaw(&self) {
        self.frozen.send_replace(false);
    }

    /// Breaks every open connection. New ones are served.
    pub fn cut(&self) {
        self.strike(Which::All, Fate::Cut);
    }

    /// From now on not a byte passes on any open connection, and none of them breaks. New ones are served.
    pub fn strand(&self) {
        self.strike(Which::All, Fate::Stranded);
    }

    /// What becomes from now on of those that are open now; how many these are. New ones are served.
    pub fn strike(&self, which: Which, fate: Fate) -> usize {
        let lines = self.rules.lines.lock().unwrap();
        let struck: Vec<_> = lines.iter().filter(|line| line.is(which)).collect();
        for line in &struck {
            line.fate.send_replace(fate);
        }
        struck.len()
    }

    /// How many are open and as they should be.
    pub fn open(&self, which: Which) -> usize {
        let lines = self.rules.lines.lock().unwrap();
        lines.iter().filter(|line| line.is(which) && *line.fate.borrow() == Fate::Open).count()
    }

    /// Whether new connections are reset at once.
    pub fn refuse(&self, is_refusing: bool) {
        self.rules.is_refusing.store(is_refusing, Ordering::Relaxed);
    }

    /// From now on no notification passes, as behind a pooler in transaction mode.
    pub fn mute(&self) {
        self.rules.is_mute.store(true, Ordering::Relaxed);
    }

    /// From now on no session is told the options that it should begin with, as by PgBouncer's `ignore_startup_parameters`.
    pub fn drop_options(&self) {
        self.rules.drops_options.store(true, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

// === impl Rules ===

impl Rules {
    fn open_line(&self) -> Arc<Line> {
        let line = Arc::new(Line { fate: watch::Sender::new(Fate::Open), listens: false.into(), hears: false.into() });
        self.lines.lock().unwrap().push(line.clone());
        line
    }
}

// === impl Line ===

impl Line {
    fn is(&self, which: Which) -> bool {
        match which {
            Which::All => true,
            Which::Listening => self.listens.load(Ordering::Relaxed),
            Which::Hearing => self.hears.load(Ordering::Relaxed),
        }
    }

    async fn carry(
        &self,
        mut client: TcpStream,
        mut server: TcpStream,
        is_frozen: watch::Receiver<bool>,
        rules: &Rules,
    ) {
        let mut fate = self.fate.subscribe();
        {
            let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
            let forward = self.forward(from_client, to_server, is_frozen.clone(), rules);
            let answer = self.answer(from_server, to_client, is_frozen, rules);
            // Fate first: a frozen pair that is cut and then thawed must not pass a byte more.
            tokio::select! {
                biased;
                _ = fate.wait_for(|fate| matches!(fate, Fate::Cut | Fate::Reset | Fate::Stranded)) => {}
                _ = futures::future::join(forward, answer) => {}
            }
        }
        if *self.fate.borrow() == Fate::Stranded {
            let _ = fate.wait_for(|fate| matches!(fate, Fate::Cut | Fate::Reset)).await;
        }
        if *self.fate.borrow() == Fate::Reset {
            let _ = (client.set_zero_linger(), server.set_zero_linger());
        }
    }

    async fn forward(
        &self,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        mut frozen: watch::Receiver<bool>,
        rules: &Rules,
    ) {
        let mut bytes = vec![0; 16 * 1024];
        if rules.drops_options.load(Ordering::Relaxed) {
            let n = from.read(&mut bytes).await.unwrap_or(0);
            let _ = to.write_all(&without_options(&bytes[..n])).await;
        }
        while let Ok(n @ 1..) = from.read(&mut bytes).await {
            // A query of its own: a byte that says so, a length, a text.
            if bytes[0] == b'Q' && bytes[5..n.max(5)].starts_with(b"LISTEN ") {
                self.listens.store(true, Ordering::Relaxed);
            }
            if frozen.wait_for(|it| !it).await.is_err() || !self.pass(Toward::Server, &bytes[..n], &mut to).await {
                break;
            }
        }
        let _ = to.shutdown().await;
    }

    /// Message by message: a byte that says what it is, and a length.
    async fn answer(
        &self,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        mut frozen: watch::Receiver<bool>,
        rules: &Rules,
    ) {
        const NOTIFICATION: u8 = b'A';
        let mut head = [0; 5];
        while from.read_exact(&mut head).await.is_ok() {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize - 4;
            let mut message = head.to_vec();
            message.resize(5 + length, 0);
            if from.read_exact(&mut message[5..]).await.is_err() || frozen.wait_for(|it| !it).await.is_err() {
                break;
            }
            if head[0] == NOTIFICATION && rules.is_mute.load(Ordering::Relaxed) {
                continue;
            }
            if !self.pass(Toward::Client, &message, &mut to).await {
                break;
            }
            if head[0] == NOTIFICATION {
                self.hears.store(true, Ordering::Relaxed);
            }
        }
        let _ = to.shutdown().await;
    }

    /// Whether the other side still takes what comes.
    async fn pass(&self, toward: Toward, bytes: &[u8], to: &mut WriteHalf<'_>) -> bool {
        let fate = *self.fate.borrow();
        match (fate, toward) {
            (Fate::Hole, _) | (Fate::DeafClient, Toward::Client) | (Fate::DeafServer, Toward::Server) => true,
            (Fate::Slow(late), _) => {
                sleep(late).await;
                to.write_all(bytes).await.is_ok()
            }
            (Fate::Sliced, _) => {
                for piece in bytes.chunks(3) {
                    if to.write_all(piece).await.is_err() {
                        return false;
                    }
                    tokio::task::yield_now().await;
                }
                true
            }
            _ => to.write_all(bytes).await.is_ok(),
        }
    }
}

/// A start-up message: its length, a version, names and values that end with a zero each, and another zero.
fn without_options(message: &[u8]) -> Vec<u8> {
    let mut rest = message[4..8].to_vec();
    let fields: Vec<&[u8]> = message[8..].split(|byte| *byte == 0).collect();
    for field in fields.chunks_exact(2).filter(|field| !field[0].is_empty() && field[0] != b"options") {
        rest.extend([field[0], b"\0", field[1], b"\0"].concat());
    }
    rest.push(0);
    [&(rest.len() as u32 + 4).to_be_bytes()[..], &rest].concat()
}
