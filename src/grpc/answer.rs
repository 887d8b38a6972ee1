//! An answer on its way out, and what it holds until it is sent; and the end of both bodies of a stream with the server.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Timeout, timeout},
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Status, body::Body};

use super::{fault::Fault, peer::Active};

/// Of the caller, or of the connection where nobody says who calls, and of all.
pub(super) type Places = [Option<OwnedSemaphorePermit>; 2];

/// The body of an answer.
pub(super) struct Answer {
    body: Body,
    /// Of streams that know nothing of an end themselves.
    end: Option<Pin<Box<dyn Future<Output = Fault> + Send>>>,
    /// Its places among what is in flight: what nobody reads stays in memory.
    _places: Places,
    _active: Option<Active>,
}

impl Answer {
    /// One that holds nothing.
    pub(super) fn last(body: Body) -> Self {
        Self { body, end: None, _places: [None, None], _active: None }
    }

    pub(super) fn new(body: Body, places: Places, active: Active) -> Self {
        Self { body, end: None, _places: places, _active: Some(active) }
    }

    /// Ends it with the server, and after so long.
    pub(super) fn ended(self, end: WaitForCancellationFutureOwned, limit: Duration) -> Self {
        let end = async move {
            match timeout(limit, end).await {
                Ok(()) => Fault::ShuttingDown,
                Err(_) => Fault::Deadline,
            }
        };
        Self { end: Some(Box::pin(end)), ..self }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(end) = &mut self.end
            && let Poll::Ready(fault) = end.as_mut().poll(cx)
        {
            self.end = None;
            self.body = Body::empty();
            let mut trailers = HeaderMap::new();
            Status::from(fault).add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a request that ends with the server, and after so long: who reads it would wait for as long as its client likes, and the
/// connection with it.
pub(super) struct Asking<B> {
    body: B,
    end: Pin<Box<Timeout<WaitForCancellationFutureOwned>>>,
}

impl<B> Asking<B> {
    pub(super) fn until(end: WaitForCancellationFutureOwned, limit: Duration, body: B) -> Self {
        Self { body, end: Box::pin(timeout(limit, end)) }
    }
}

impl<B: http_body::Body + Unpin> http_body::Body for Asking<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
