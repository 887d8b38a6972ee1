//! A TCP proxy in front of PostgreSQL that goes silent, breaks or strands connections, or swallows notifications, on
//! command.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// Of all connections that were opened before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Open,
    Cut,
    Stranded,
}

/// Serves until it is dropped.
pub struct Proxy {
    /// The database, through the proxy.
    pub url: String,
    frozen: watch::Sender<bool>,
    is_mute: Arc<AtomicBool>,
    /// What becomes of the connections that are open at this moment.
    fate: watch::Sender<Fate>,
    serving: tokio::task::JoinHandle<()>,
}

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
        let is_mute = Arc::new(AtomicBool::new(false));
        let fate = watch::Sender::new(Fate::Open);
        let serving = tokio::spawn({
            let (is_mute, fate) = (is_mute.clone(), fate.clone());
            async move {
                let mut pairs = tokio::task::JoinSet::new();
                loop {
                    let (client, _) = listener.accept().await.unwrap();
                    let Ok(server) = TcpStream::connect(&target).await else { continue };
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    let forward = forward(from_client, to_server, is_frozen.clone());
                    let answer = answer(from_server, to_client, is_frozen.clone(), is_mute.clone());
                    let mut fate = fate.subscribe();
                    fate.mark_unchanged();
                    pairs.spawn(async move {
                        let pair = async { tokio::join!(forward, answer) };
                        tokio::pin!(pair);
                        // Fate first: a frozen pair that is cut and then thawed must not pass a byte more.
                        let stranded = tokio::select! {
                            biased;
                            _ = fate.changed() => *fate.borrow() == Fate::Stranded,
                            _ = &mut pair => false,
                        };
                        if stranded {
                            std::future::pending().await
                        }
                    });
                }
            }
        });
        Self { url: parts.to_string(), frozen, is_mute, fate, serving }
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
        self.fate.send_replace(Fate::Cut);
    }

    /// From now on not a byte passes on any open connection, and none of them breaks. New ones are served.
    pub fn strand(&self) {
        self.fate.send_replace(Fate::Stranded);
    }

    /// From now on no notification passes, as behind a pooler in transaction mode.
    pub fn mute(&self) {
        self.is_mute.store(true, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut frozen: watch::Receiver<bool>) {
    let mut bytes = [0; 16 * 1024];
    while let Ok(n @ 1..) = from.read(&mut bytes).await {
        if frozen.wait_for(|it| !it).await.is_err() || to.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}

/// Message by message: a byte that says what it is, and a length.
async fn answer(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut frozen: watch::Receiver<bool>,
    is_mute: Arc<AtomicBool>,
) {
    const NOTIFICATION: u8 = b'A';
    let mut head = [0; 5];
    while from.read_exact(&mut head).await.is_ok() {
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize - 4;
        let mut message = head.to_vec();
        message.resize(5 + length, 0);
        if from.read_exact(&mut message[5..]).await.is_err() || frozen.wait_for(|it| !it).await.is_err() {
            return;
        }
        if head[0] == NOTIFICATION && is_mute.load(Ordering::Relaxed) {
            continue;
        }
        if to.write_all(&message).await.is_err() {
            return;
        }
    }
}
