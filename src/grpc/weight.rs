//! What calls weigh: large requests that stop before their end, or wait for a slow store, stay in memory for as long as a
//! deadline lets them, and so do large answers that nobody reads.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, body::Body};

use super::fault::Fault;
use crate::access::Caller;

/// Of each request and answer, so many bytes weigh nothing: whatever is about one user has fewer.
const FREE: usize = 4 << 10;

/// Of all calls at once, past that.
pub(super) const ALL: usize = 64 << 20;

/// What one call weighs, kept for as long as somebody works at it.
#[derive(Clone)]
pub(super) struct Weight {
    caller: Arc<Caller>,
    all: Arc<Semaphore>,
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    places: Vec<OwnedSemaphorePermit>,
    /// Of a request that nobody has read to its end.
    rest: Option<Body>,
}

/// The body of a request, which ends as OVERLOADED where it is too much for its caller or for all.
pub(super) struct Weighed<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// There until it is dropped.
    body: Option<B>,
    bytes: usize,
    weight: Weight,
}

impl Weight {
    pub(super) fn new(caller: Arc<Caller>, all: Arc<Semaphore>) -> Self {
        Self { caller, all, held: Arc::default() }
    }

    pub(super) fn of<B>(&self, body: B) -> Weighed<B>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Weighed { body: Some(body), bytes: 0, weight: self.clone() }
    }

    /// Nobody works at the request any more. What may still come of it.
    pub(super) fn clear(&self) -> Option<Body> {
        let mut held = self.held();
        held.places.clear();
        held.rest.take()
    }

    /// What is there as a whole.
    pub(super) fn add_all_of(&self, bytes: usize) -> Result<(), Fault> {
        match bytes.saturating_sub(FREE) {
            0 => Ok(()),
            more => self.add(more),
        }
    }

    fn add(&self, bytes: usize) -> Result<(), Fault> {
        let bytes = u32::try_from(bytes).map_err(|_| Fault::Overloaded)?;
        let of_caller = self.caller.begin_bytes(bytes);
        let of_all = self.all.clone().try_acquire_many_owned(bytes).ok();
        self.held().places.extend([of_caller.ok_or(Fault::Overloaded)?, of_all.ok_or(Fault::Overloaded)?]);
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> http_body::Body for Weighed<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            let before = self.bytes.max(FREE);
            self.bytes += data.len();
            let more = self.bytes.saturating_sub(before);
            if more > 0
                && let Err(fault) = self.weight.add(more)
            {
                return Poll::Ready(Some(Err(Status::from(fault).into())));
            }
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(B::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(B::size_hint).unwrap_or_default()
    }
}

impl<B> Drop for Weighed<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Whoever refuses the call reads on, or its client's connection would break after many of those.
    fn drop(&mut self) {
        if let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) {
            self.weight.held().rest = Some(Body::new(body));
        }
    }
}
