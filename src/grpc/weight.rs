//! What calls weigh: large requests that stop before their end, or wait for a slow store, stay in memory for as long as a
//! deadline lets them, and so do large answers that nobody reads.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tonic::Status;

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
    held: Arc<Mutex<Vec<OwnedSemaphorePermit>>>,
}

/// How long the rest of what is too much may take: a call that is answered before would break its connection after many others.
const REST_LIMIT: Duration = Duration::from_secs(1);

/// The body of a request, which ends as OVERLOADED where it is too much for its caller or for all.
pub(super) struct Weighed<B> {
    body: B,
    bytes: usize,
    weight: Weight,
    /// Why it is too much, and until when its rest is read and thrown away.
    refused: Option<(Fault, Pin<Box<Sleep>>)>,
}

impl Weight {
    pub(super) fn new(caller: Arc<Caller>, all: Arc<Semaphore>) -> Self {
        Self { caller, all, held: Arc::default() }
    }

    pub(super) fn of<B>(&self, body: B) -> Weighed<B> {
        Weighed { body, bytes: 0, weight: self.clone(), refused: None }
    }

    /// Nobody works at the request any more.
    pub(super) fn clear(&self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
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
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.extend([of_caller.ok_or(Fault::Overloaded)?, of_all.ok_or(Fault::Overloaded)?]);
        Ok(())
    }
}

impl<B> http_body::Body for Weighed<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        loop {
            let polled = Pin::new(&mut self.body).poll_frame(cx);
            if let Some((fault, limit)) = &mut self.refused {
                let is_over = match polled {
                    Poll::Ready(Some(Ok(_))) => continue,
                    Poll::Ready(_) => true,
                    Poll::Pending => limit.as_mut().poll(cx).is_ready(),
                };
                return if is_over {
                    Poll::Ready(Some(Err(Status::from(fault.clone()).into())))
                } else {
                    Poll::Pending
                };
            }
            let frame = ready!(polled);
            if let Some(Ok(frame)) = &frame
                && let Some(data) = frame.data_ref()
            {
                let before = self.bytes.max(FREE);
                self.bytes += data.len();
                let more = self.bytes.saturating_sub(before);
                if more > 0
                    && let Err(fault) = self.weight.add(more)
                {
                    self.refused = Some((fault, Box::pin(sleep(REST_LIMIT))));
                    continue;
                }
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
