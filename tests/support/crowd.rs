//! Watchers that do not read until they are told to: the windows of their streams stay as good as shut, and are opened
//! all at once. No client of gRPC can do that.

use std::net::SocketAddr;

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, client};
use http::Request;
use rolecache::proto::v1::WatchRoleChangesRequest;
use tokio::{net::TcpStream, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    raw::{SERVICE, frame},
    server::PATIENCE,
};

/// Of a stream that nobody reads: its start fits, and a commit or two.
const SHUT: u32 = 300;
const OPEN: u32 = 64 << 10;

/// The first byte of a message with a commit in it.
const COMMIT: u8 = 3 << 3 | 2;

pub struct Crowd {
    pub watchers: Vec<Watcher>,
    reading: CancellationToken,
}

pub struct Watcher {
    body: RecvStream,
    bytes: BytesMut,
}

impl Crowd {
    /// So many connections of so many watches each, all of them begun.
    pub async fn open(
        address: SocketAddr,
        connections: usize,
        watches: usize,
        request: &WatchRoleChangesRequest,
    ) -> Self {
        let reading = CancellationToken::new();
        let mut watchers = Vec::new();
        for _ in 0..connections {
            let stream = TcpStream::connect(address).await.unwrap();
            stream.set_nodelay(true).unwrap();
            // The connection's own window never is what stops a stream.
            let mut settings = client::Builder::new();
            settings.initial_window_size(SHUT).initial_connection_window_size(watches as u32 * OPEN);
            let (mut sender, mut connection) = settings.handshake(stream).await.unwrap();
            let read = reading.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = &mut connection => return,
                    () = read.cancelled() => connection.set_initial_window_size(OPEN).unwrap(),
                }
                let _ = connection.await;
            });
            for _ in 0..watches {
                let head = Request::post(format!("http://{address}/{SERVICE}/WatchRoleChanges"))
                    .header("content-type", "application/grpc")
                    .header("te", "trailers")
                    .body(())
                    .unwrap();
                sender = sender.ready().await.unwrap();
                let (response, mut body) = sender.send_request(head, false).unwrap();
                body.send_data(frame(request), true).unwrap();
                let body = timeout(PATIENCE, response).await.expect("a watch opens in time").unwrap().into_body();
                let mut watcher = Watcher { body, bytes: BytesMut::new() };
                watcher.message().await;
                watchers.push(watcher);
            }
        }
        Self { watchers, reading }
    }

    /// From now on they take what they are sent.
    pub fn read(&self) {
        self.reading.cancel();
    }
}

impl Watcher {
    /// The next message, as it was sent.
    pub async fn message(&mut self) -> Bytes {
        loop {
            if let Some(mut length) = self.bytes.get(1..5) {
                let end = 5 + length.get_u32() as usize;
                if self.bytes.len() >= end {
                    return self.bytes.split_to(end).freeze().slice(5..);
                }
            }
            let more = timeout(PATIENCE, self.body.data()).await.expect("a watch is not silent for so long");
            let more = more.expect("a watch goes on").unwrap();
            self.body.flow_control().release_capacity(more.len()).unwrap();
            self.bytes.extend_from_slice(&more);
        }
    }

    /// The next message that tells of a commit.
    pub async fn commit(&mut self) -> Bytes {
        loop {
            let message = self.message().await;
            if message.first() == Some(&COMMIT) {
                return message;
            }
        }
    }
}
