//! An answer on its way out, and what it holds until it is sent; and the end of both bodies of a stream with the server.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Status, body::Body};

use super::{fault::Fault, peer::Active};

/// The body of an answer.
pub(super) struct Answer {
    body: Body,
    /// Ends it with SHUTTING_DOWN: of streams that know nothing of the end themselves.
    end: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// Its place among the calls in flight: what nobody reads stays in memory.
    _place: Option<OwnedSemaphorePermit>,
    _active: Active,
}

impl Answer {
    pub(super) fn new(body: Body, place: Option<OwnedSemaphorePermit>, active: Active) -> Self {
        if place.is_some() {
            // All of it is there: from now on it is the client who is waited for.
            active.is_answered();
        }
        Self { body, end: None, _place: place, _active: active }
    }

    pub(super) fn ended_by(self, end: WaitForCancellationFutureOwned) -> Self {
        Self { end: Some(Box::pin(end)), ..self }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
            self.end = None;
            self.body = Body::empty();
            let mut trailers = HeaderMap::new();
            Status::from(Fault::ShuttingDown).add_header(&mut trailers)?;
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

/// The body of a request that ends with the server: who reads it would wait for as long as its client likes, and the
/// connection with it.
pub(super) struct Asking<B> {
    body: B,
    end: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<B> Asking<B> {
    pub(super) fn until(end: WaitForCancellationFutureOwned, body: B) -> Self {
        Self { body, end: Box::pin(end) }
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
