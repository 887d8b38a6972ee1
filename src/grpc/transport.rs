//! Connections: accepted, served over HTTP/2, with or without TLS, drained.
//!
//! The loop is our own because tonic's leaves the limits below off and cannot set the last one: a client that opens
//! streams and does not read would have it buffer 400 KiB for each.

use std::{
    convert::Infallible, future::pending, io, net::SocketAddr, panic::AssertUnwindSafe, sync::Arc, time::Duration,
};

use futures::FutureExt;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{io::InspectReader, sync::CancellationToken, task::TaskTracker};

use super::{
    Limits,
    edge::Edge,
    fault::Fault,
    meter,
    peer::Peer,
    stream::Begun,
    tls::{self, Tls},
};
use crate::access::Denials;

/// Streams of one connection that may have been reset for a client's fault (RUSTSEC-2024-0003).
const LOCAL_RESETS: usize = 1_024;

/// Bytes that wait in memory for one client that does not read.
const SEND_BUFFER: usize = 64 * 1024;

/// How long a client has to answer a keepalive ping.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// With how many bytes HTTP/2 begins.
const PREFACE_BYTES: usize = 24;

/// How long a client may go on whose certificate the client CA has not signed any more, or whose credential is gone: calls
/// in flight finish.
const DISTRUSTED_LIMIT: Duration = Duration::from_secs(3);

/// Before the next accept where the process is out of file descriptors, and before that is told again.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
const ACCEPT_TOLD: Duration = Duration::from_secs(5);

/// When connections end.
#[derive(Clone, Default)]
pub(super) struct Ends {
    /// With their last call; no call is begun any more.
    pub(super) gently: CancellationToken,
    /// At once.
    pub(super) hard: CancellationToken,
}

/// What a connection is served with.
#[derive(Clone)]
pub(super) struct Wire {
    pub(super) edge: Edge,
    pub(super) limits: Arc<Limits>,
    /// The newest; None where there is no TLS.
    pub(super) tls: Option<watch::Receiver<Arc<Tls>>>,
    /// Tells whenever callers may have been revoked.
    pub(super) replaced: watch::Receiver<()>,
    /// Connections that came to nothing, or to too much, and are logged.
    pub(super) refused: Arc<Denials>,
    pub(super) ends: Ends,
}

/// Accepts connections until they are to end.
pub(super) async fn serve(listener: TcpListener, wire: Wire, connections: TaskTracker) {
    let places = Arc::new(Semaphore::new(wire.limits.connections));
    let mut told: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            () = wire.ends.gently.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, address, place)) => {
                let wire = wire.clone();
                connections.spawn(async move {
                    let served = AssertUnwindSafe(connection(stream, address, wire)).catch_unwind().await;
                    if let Err(panic) = served {
                        // Nobody is left to be told the incident; the log is.
                        drop(Fault::panic(&*panic));
                    }
                    drop(place);
                });
            }
            Err(error) => {
                if told.is_none_or(|told| told.elapsed() >= ACCEPT_TOLD) {
                    told = Some(Instant::now());
                    tracing::warn!(%error, "connections cannot be accepted");
                }
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
    connections.close();
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let Ok(place) = places.clone().acquire_owned().await else { unreachable!("the semaphore is never closed") };
    let (stream, address) = listener.accept().await?;
    Ok((stream, address, place))
}

async fn connection(stream: TcpStream, address: SocketAddr, wire: Wire) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    match wire.tls.clone() {
        None => {
            let begun = begin(&wire, address, preface(stream)).await;
            if let Some(stream) = begun {
                http2(stream, Peer::new(address, Vec::new(), &wire.limits), &wire, pending()).await;
            }
        }
        Some(mut newest) => {
            let tls = newest.borrow_and_update().clone();
            let acceptor = TlsAcceptor::from(tls.config.clone());
            let shaken = async {
                let stream = acceptor.accept(stream).await?;
                let chain: Vec<CertificateDer<'static>> = stream
                    .get_ref()
                    .1
                    .peer_certificates()
                    .unwrap_or_default()
                    .iter()
                    .map(|it| it.clone().into_owned())
                    .collect();
                Ok((chain, preface(stream).await?))
            };
            if let Some((chain, stream)) = begin(&wire, address, shaken).await {
                let names = chain.first().map(tls::names).unwrap_or_default();
                http2(stream, Peer::new(address, names, &wire.limits), &wire, distrusted(newest, chain)).await;
            }
        }
    }
}

/// A handshake, in time.
async fn begin<T>(wire: &Wire, address: SocketAddr, handshake: impl Future<Output = io::Result<T>>) -> Option<T> {
    let begun = tokio::select! {
        begun = timeout(wire.limits.handshake, handshake) => begun,
        () = wire.ends.gently.cancelled() => return None,
    };
    match begun {
        Ok(Ok(begun)) => return Some(begun),
        // What rustls refuses, a certificate among it.
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
            if let Some(unlogged) = wire.refused.count() {
                tracing::warn!(target: "rolecache::audit", peer = %address, reason = %error, unlogged, "denied: no TLS");
            }
        }
        Ok(Err(error)) => tracing::debug!(%error, "a connection did not come about"),
        Err(_) => tracing::debug!("a connection did not come about in time"),
    }
    None
}

/// Takes the first bytes of HTTP/2 from a new connection, all of them: whoever says less would keep it for ever, for hyper
/// asks whether a client is still there only once that has begun.
async fn preface<S: AsyncRead + Unpin>(mut stream: S) -> io::Result<Begun<S>> {
    let mut preface = vec![0; PREFACE_BYTES];
    stream.read_exact(&mut preface).await?;
    Ok(Begun::new(preface, stream))
}

/// Resolves once the client CA in use is none of this chain's.
async fn distrusted(mut newest: watch::Receiver<Arc<Tls>>, chain: Vec<CertificateDer<'static>>) {
    while newest.changed().await.is_ok() {
        if !newest.borrow_and_update().accepts(&chain) {
            return;
        }
    }
    pending().await
}

async fn http2<S>(stream: S, peer: Peer, wire: &Wire, distrusted: impl Future<Output = ()>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Wire { edge, limits, ends, .. } = wire;
    let peer = Arc::new(peer);
    let served = peer.clone();
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (edge, peer) = (edge.clone(), served.clone());
        // Boxed: hyper and tokio move what they are given from one place to the next.
        Box::pin(async move { Ok::<_, Infallible>(edge.call(request, &peer).await) })
    });
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_local_error_reset_streams(LOCAL_RESETS)
        .max_send_buf_size(SEND_BUFFER)
        .initial_stream_window_size(meter::stream_window(limits))
        .initial_connection_window_size(meter::window(limits))
        // h2 takes what is less than this.
        .max_header_list_size(limits.header_bytes + 1)
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let meter = peer.meter.clone();
    let stream = InspectReader::new(stream, move |bytes: &[u8]| meter.read(bytes.len()));
    let connection = http2.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let (ended, limit) = tokio::select! {
        ended = &mut connection => (Some(ended), None),
        () = ends.hard.cancelled() => return,
        () = ends.gently.cancelled() => (None, None),
        () = idle(&peer, limits) => (None, Some(KEEPALIVE_TIMEOUT)),
        () = revoked(&peer, wire.replaced.clone()) => return revoked_is_cut(&peer),
        () = peer.meter.exceeded() => return flood_is_cut(&peer, wire),
        () = distrusted => (None, Some(DISTRUSTED_LIMIT)),
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = ends.hard.cancelled() => return,
                () = after(limit) => return,
                () = revoked(&peer, wire.replaced.clone()) => return revoked_is_cut(&peer),
                () = peer.meter.exceeded() => return flood_is_cut(&peer, wire),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

/// Resolves once nothing has gone over the connection for too long, or its client has not read an answer for too long.
async fn idle(peer: &Peer, limits: &Limits) {
    loop {
        let since = peer.idle_since().unwrap_or_else(Instant::now);
        if since.elapsed() >= limits.idle || peer.leaves_unread(limits.deadline) {
            return;
        }
        sleep_until((since + limits.idle).min(Instant::now() + limits.deadline)).await;
    }
}

/// Resolves once a caller whose credential is gone still has something open here: a stream that its client does not read
/// cannot end by itself.
async fn revoked(peer: &Peer, mut replaced: watch::Receiver<()>) {
    while replaced.changed().await.is_ok() {
        if peer.is_revoked() {
            sleep(DISTRUSTED_LIMIT).await;
            if peer.is_revoked() {
                return;
            }
        }
    }
    pending().await
}

/// Says that a connection ends on which something of a revoked caller would not.
fn revoked_is_cut(peer: &Peer) {
    tracing::warn!(target: "rolecache::audit", peer = %peer.address, "a connection is cut: its caller is revoked");
}

/// Says that a connection ends whose client sends too much for nothing.
fn flood_is_cut(peer: &Peer, wire: &Wire) {
    if let Some(unlogged) = wire.refused.count() {
        tracing::warn!(
            target: "rolecache::audit",
            peer = %peer.address,
            unlogged,
            "a connection is cut: it sends far more than its calls need"
        );
    }
}

async fn after(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => pending().await,
    }
}
