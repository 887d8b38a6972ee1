//! Requests as no client of ours would send them, over one HTTP/2 connection, and whatever comes back.

use std::{net::SocketAddr, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    time::timeout,
};
use tonic::Status;

use super::server::PATIENCE;

pub const SERVICE: &str = "rolecache.v1.RoleCacheService";

pub struct Raw {
    address: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
}

/// What lies between a client and its server.
#[derive(Default)]
pub struct Wire {
    is_deaf: watch::Sender<bool>,
    /// Bytes that have gone out.
    sent: watch::Sender<usize>,
}

pub struct Answer {
    pub http: StatusCode,
    /// None where the answer is none of gRPC.
    pub status: Option<Status>,
    pub body: Bytes,
}

impl Raw {
    pub async fn connect(address: SocketAddr) -> Self {
        Self::over(address, stream(address).await).await
    }

    /// A connection whose bytes pass a wire.
    pub async fn connect_over(address: SocketAddr, wire: &Wire) -> Self {
        let (from_server, to_server) = stream(address).await.into_split();
        let (arriving, arrive) = tokio::io::simplex(1 << 16);
        let (leave, leaving) = tokio::io::simplex(1 << 16);
        tokio::spawn(carry(from_server, arrive, wire.is_deaf.clone(), watch::Sender::default()));
        tokio::spawn(carry(leave, to_server, watch::Sender::default(), wire.sent.clone()));
        Self::over(address, tokio::io::join(arriving, leaving)).await
    }

    async fn over(address: SocketAddr, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
        tokio::spawn(connection);
        Self { address, sender }
    }

    /// Sends a body to a method of our service, as gRPC.
    pub async fn send(&mut self, method: &str, body: impl Into<Bytes>) -> Answer {
        self.send_to(&format!("/{SERVICE}/{method}"), &[], body).await
    }

    /// A call with a deadline that the server is told of, and the client does not keep.
    pub async fn within(&mut self, deadline: Duration, method: &str, message: &impl Message) -> Status {
        let deadline = format!("{}m", deadline.as_millis());
        let headers = [("grpc-timeout", &*deadline)];
        let answer = self.send_to(&format!("/{SERVICE}/{method}"), &headers, frame(message)).await;
        answer.status.expect("an answer of gRPC")
    }

    /// The later of two headers of one name counts.
    pub async fn send_to(&mut self, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answer {
        let mut request =
            Request::post(format!("http://{}{path}", self.address)).body(Full::new(body.into())).expect("a request");
        for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")].iter().chain(headers) {
            let name: http::HeaderName = name.parse().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        let all = async {
            self.sender.ready().await.expect("an open connection");
            let (head, body) = self.sender.send_request(request).await.expect("an answer").into_parts();
            let body = body.collect().await.expect("an answer to its end");
            let trailers = body.trailers().cloned().unwrap_or_default();
            let status = |map: &HeaderMap| Status::from_header_map(map);
            Answer {
                http: head.status,
                status: status(&trailers).or_else(|| status(&head.headers)),
                body: body.to_bytes(),
            }
        };
        timeout(PATIENCE, all).await.expect("an answer in time")
    }
}

/// From one end to the other what comes, unless it is held up, and counts it.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    held: watch::Sender<bool>,
    carried: watch::Sender<usize>,
) {
    let mut bytes = [0; 1 << 12];
    while let Ok(n @ 1..) = from.read(&mut bytes).await {
        let _ = held.subscribe().wait_for(|held| !held).await;
        if to.write_all(&bytes[..n]).await.is_err() {
            return;
        }
        carried.send_modify(|carried| *carried += n);
    }
}

// === impl Wire ===

impl Wire {
    /// From now on nothing arrives at the client, while what it sends goes out as ever; or everything does again.
    pub fn deafen(&self, is_deaf: bool) {
        self.is_deaf.send_replace(is_deaf);
    }

    /// Does something, and waits until something is sent that was not before.
    pub async fn sends<T>(&self, begin: impl FnOnce() -> T) -> T {
        let before = *self.sent.borrow();
        let begun = begin();
        timeout(PATIENCE, self.sent.subscribe().wait_for(|sent| *sent > before)).await.expect("sent in time").unwrap();
        begun
    }
}

async fn stream(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).await.unwrap();
    // The head and the body of a request are two writes.
    stream.set_nodelay(true).unwrap();
    stream
}

/// A message as gRPC frames it.
pub fn frame(message: &impl Message) -> Bytes {
    frame_bytes(&message.encode_to_vec())
}

/// Any bytes, framed as a message.
pub fn frame_bytes(message: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(5 + message.len());
    bytes.put_u8(0);
    bytes.put_u32(message.len() as u32);
    bytes.put_slice(message);
    bytes.freeze()
}
