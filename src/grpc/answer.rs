//! An answer on its way out, and what it holds until it is sent; and the end of both bodies of a stream with the server.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
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

/// Of an answer, so many bytes may be on their way that hold nothing: what HTTP/2 keeps for each stream is more.
const SMALL: usize = 256;

/// What a call holds until its answer is sent: what nobody reads stays in memory.
#[derive(Default)]
pub(super) struct Held {
    /// Among what is in flight: of its caller, or of its connection where nobody says who calls, and of all.
    places: Option<[OwnedSemaphorePermit; 2]>,
    /// Of what it asked, and of what it is answered.
    weight: Option<Weight>,
    active: Option<Active>,
}

/// A part of an answer. HTTP/2 takes it as soon as its client reads one byte, and keeps it until all of it is sent.
struct Chunk {
    bytes: Bytes,
    _held: Arc<Held>,
}

/// The body of an answer.
pub(super) struct Answer {
    body: Body,
    /// Of streams that know nothing of an end themselves.
    end: Option<Pin<Box<dyn Future<Output = Fault> + Send>>>,
    held: Held,
    /// The same, once parts of it are on their way.
    shared: Option<Arc<Held>>,
}

impl Answer {
    /// One that holds nothing.
    pub(super) fn last(body: Body) -> Self {
        Self { body, end: None, held: Held::default(), shared: None }
    }

    pub(super) fn new(body: Body, held: Held, active: Active) -> Self {
        Self { body, end: None, held: Held { active: Some(active), ..held }, shared: None }
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
    /// A part that holds what its call holds, however long it takes to be sent.
    fn chunk(&mut self, bytes: Bytes) -> Result<Frame<Bytes>, Status> {
        let held = self.shared.get_or_insert_with(|| Arc::new(std::mem::take(&mut self.held)));
        match held.weight.as_ref().map_or(Ok(()), |weight| weight.add_all_of(bytes.len())) {
            Ok(()) => Ok(Frame::data(Bytes::from_owner(Chunk { bytes, _held: held.clone() }))),
            Err(fault) => self.give_up(fault),
        }
    }

    /// Ends it with a status in place of what was to come.
    fn give_up(&mut self, fault: Fault) -> Result<Frame<Bytes>, Status> {
        self.end = None;
        self.body = Body::empty();
        let mut trailers = HeaderMap::new();
        Status::from(fault).add_header(&mut trailers)?;
        Ok(Frame::trailers(trailers))
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Held {
    pub(super) fn of(places: [OwnedSemaphorePermit; 2], weight: Option<Weight>) -> Self {
        Self { places: Some(places), weight, active: None }
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
        let polled = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let Some(Ok(frame)) = polled else { return Poll::Ready(polled) };
        if let Some(data) = frame.data_ref()
            && let Some(active) = &self.shared.as_deref().unwrap_or(&self.held).active
        {
            active.sent(data.len());
        }
        Poll::Ready(Some(match frame.into_data() {
            Ok(bytes) if bytes.len() > SMALL => self.chunk(bytes),
            // A copy, or it keeps the 8 KiB that tonic has written it into.
            Ok(bytes) => Ok(Frame::data(Bytes::copy_from_slice(&bytes))),
            Err(frame) => Ok(frame),
        }))
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
