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

use super::{fault::Fault, peer::Active, weight::Weight};

/// What a call holds until its answer is sent: what nobody reads stays in memory.
#[derive(Default)]
pub(super) struct Held {
    /// Among what is in flight: of its caller, or of its connection where nobody says who calls, and of all.
    places: Option<[OwnedSemaphorePermit; 2]>,
    /// Of what it asked, and of what it is answered.
    weight: Option<Weight>,
}

/// The body of an answer.
pub(super) struct Answer {
    body: Body,
    /// Of streams that know nothing of an end themselves.
    end: Option<Pin<Box<dyn Future<Output = Fault> + Send>>>,
    held: Held,
    _active: Option<Active>,
}

impl Answer {
    /// One that holds nothing.
    pub(super) fn last(body: Body) -> Self {
        Self { body, end: None, held: Held::default(), _active: None }
    }

    pub(super) fn new(body: Body, held: Held, active: Active) -> Self {
        Self { body, end: None, held, _active: Some(active) }
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

impl Answer {
    /// Ends it with a status in place of what was to come.
    fn give_up(&mut self, fault: Fault) -> Result<Frame<Bytes>, Status> {
        self.end = None;
        self.body = Body::empty();
        let mut trailers = HeaderMap::new();
        Status::from(fault).add_header(&mut trailers)?;
        Ok(Frame::trailers(trailers))
    }
}

impl Held {
    pub(super) fn of(places: [OwnedSemaphorePermit; 2], weight: Option<Weight>) -> Self {
        Self { places: Some(places), weight }
    }

    pub(super) fn is_some(&self) -> bool {
        self.places.is_some()
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(end) = &mut self.end
            && let Poll::Ready(fault) = end.as_mut().poll(cx)
        {
            return Poll::Ready(Some(self.give_up(fault)));
        }
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(data) = frame.data_ref()
            && let Some(weight) = &self.held.weight
            && let Err(fault) = weight.add_all_of(data.len())
        {
            return Poll::Ready(Some(self.give_up(fault)));
        }
        frame
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
