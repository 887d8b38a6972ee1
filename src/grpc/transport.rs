//! Connections: accepted, served over HTTP/2, drained.
//!
//! The loop is our own because tonic's leaves the limits below off and cannot set the last one: a client that opens
//! streams and does not read would have it buffer 400 KiB for each.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::edge::Edge;

/// Streams of one connection at once.
const STREAMS: u32 = 1_024;

/// Streams of one connection that may have been reset for a client's fault (RUSTSEC-2024-0003).
const LOCAL_RESETS: usize = 1_024;

/// Bytes that wait in memory for one client that does not read.
const SEND_BUFFER: usize = 64 * 1024;

const HEADER_BYTES: u32 = 16 * 1024;

/// A client that is gone without a word is noticed after both.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections at once; further ones wait to be accepted.
const CONNECTIONS: usize = 16_384;

/// How long a new connection may take to begin HTTP/2.
const PREFACE_LIMIT: Duration = Duration::from_secs(10);

/// Before the next accept where the process is out of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// When connections end.
#[derive(Clone, Default)]
pub(super) struct Ends {
    /// With their last call; no call is begun any more.
    pub(super) gently: CancellationToken,
    /// At once.
    pub(super) hard: CancellationToken,
}

/// Accepts connections until they are to end.
pub(super) async fn serve(listener: TcpListener, edge: Edge, connections: TaskTracker, ends: Ends) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = ends.gently.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, place)) => {
                let (edge, ends) = (edge.clone(), ends.clone());
                connections.spawn(async move {
                    connection(stream, edge, ends).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
    connections.close();
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let Ok(place) = places.clone().acquire_owned().await else { unreachable!("the semaphore is never closed") };
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

/// Waits for the first bytes of HTTP/2. Whoever says nothing would keep its connection for ever: hyper asks whether a
/// client is still there only once that has begun.
async fn has_begun(stream: &TcpStream) -> bool {
    matches!(timeout(PREFACE_LIMIT, stream.peek(&mut [0])).await, Ok(Ok(1)))
}

async fn connection(stream: TcpStream, edge: Edge, ends: Ends) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let has_begun = tokio::select! {
        has_begun = has_begun(&stream) => has_begun,
        () = ends.gently.cancelled() => false,
    };
    if !has_begun {
        return;
    }
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let edge = edge.clone();
        async move { Ok::<_, Infallible>(edge.call(request).await) }
    });
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_local_error_reset_streams(LOCAL_RESETS)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(HEADER_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let connection = http2.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = ends.hard.cancelled() => return,
        () = ends.gently.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = ends.hard.cancelled() => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}
