//! What every call of the service passes on its way in and its answer on its way out, outermost first:
//!
//! 1. a panic is answered as a bug, and counted in the log, instead of breaking the connection;
//! 2. what is no gRPC is answered as HTTP: tonic would take a body of any content type for a message;
//! 3. a server that shuts down refuses, so that clients go elsewhere at once;
//! 4. who may not make the call is denied, before it costs anything;
//! 5. statuses that tonic makes itself (broken and oversized messages) become those of the contract;
//! 6. calls in flight are bounded, before they take memory; watches have bounds of their own;
//! 7. the caller's deadline is kept here: tonic has its server answer CANCELLED.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use http::{HeaderMap, Request, Response, StatusCode, header::CONTENT_TYPE};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body, service::Routes};
use tower::ServiceExt;

use super::{
    Limits,
    answer::{Answer, Asking},
    deadline::Deadline,
    door::{Asker, Door},
    fault::Fault,
    peer::{Active, Peer},
};
use crate::{
    failpoint,
    proto::{Method, v1::role_cache_service_server::SERVICE_NAME},
};

/// Where the paths of health begin.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// The way in.
#[derive(Clone)]
pub(super) struct Edge {
    routes: Routes,
    door: Arc<Door>,
    calls: Arc<Semaphore>,
    /// Of a call whose caller named no deadline, or a later one.
    deadline: Duration,
    message_bytes: usize,
    shutdown: CancellationToken,
}

impl Edge {
    pub(super) fn new(routes: Routes, door: Arc<Door>, limits: &Limits, shutdown: CancellationToken) -> Self {
        let calls = Arc::new(Semaphore::new(limits.calls));
        let (deadline, message_bytes) = (limits.deadline, limits.message_bytes);
        Self { routes, door, calls, deadline, message_bytes, shutdown }
    }

    pub(super) async fn call<B>(&self, request: Request<B>, peer: &Arc<Peer>) -> Response<Answer>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let active = peer.begin();
        // Health and reflection are answered without a store and without credentials, and have no part in its limits.
        if is_grpc(request.headers()) && !is_ours(&request) {
            let answer = |response: Response<Body>| response.map(|body| Answer::new(body, None, active));
            // Health ends its streams itself, with a last word. Reflection's would go on for as long as a client likes.
            let limit = Instant::now() + self.deadline;
            if request.uri().path().starts_with(HEALTH) {
                return answer(
                    timeout_at(limit, self.route(request)).await.unwrap_or_else(|_| refuse(Fault::Deadline)),
                );
            }
            let end = || self.shutdown.clone().cancelled_owned();
            let request = request.map(|body| Asking::until(end(), body));
            let response = timeout_at(limit, self.route(request)).await.unwrap_or_else(|_| refuse(Fault::Deadline));
            return answer(response).map(|answer| answer.ended_by(end()));
        }
        let answered = AssertUnwindSafe(self.answer(request, peer, &active)).catch_unwind().await;
        let (response, place) = answered.unwrap_or_else(|panic| (refuse(Fault::panic(&*panic)), None));
        response.map(|body| Answer::new(body, place, active))
    }

    /// The answer, and the place among the calls in flight that it keeps until it is sent.
    async fn answer<B>(
        &self,
        mut request: Request<B>,
        peer: &Arc<Peer>,
        active: &Active,
    ) -> (Response<Body>, Option<OwnedSemaphorePermit>)
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if !is_grpc(request.headers()) {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return (response, None);
        }
        if self.shutdown.is_cancelled() {
            return (refuse(Fault::ShuttingDown), None);
        }
        let method = request.uri().path().rsplit('/').next().and_then(Method::of);
        // tonic answers that it is not implemented.
        let Some(method) = method else { return (self.route(request).await, None) };
        let caller = match self.door.admit(request.headers(), peer, method) {
            Ok(caller) => caller,
            Err(fault) => return (refuse(fault), None),
        };
        active.is_of(&caller);
        request.extensions_mut().insert(Asker { caller: caller.clone(), peer: peer.clone() });
        let is_watch = method == Method::WatchRoleChanges;
        let Ok(place) = self.calls.clone().try_acquire_owned() else { return (refuse(Fault::Overloaded), None) };
        let deadline = Deadline::of(request.headers());
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(deadline);
        }
        // Of a watch, until it is open: its stream keeps the deadline itself.
        let limit = Instant::now() + self.deadline;
        let until = deadline.map_or(limit, |deadline| deadline.0.min(limit));
        let answer = async {
            if !is_watch {
                failpoint::kill!("grpc::handler");
            }
            self.route(request).await
        };
        let answer = async {
            tokio::select! {
                response = answer => response,
                // A write that the writer has is told what became of it; one that comes later is refused there.
                () = caller.revoked(), if !Door::writes(method) => refuse(Fault::BadCredentials),
            }
        };
        match timeout_at(until, answer).await {
            Ok(response) => (self.in_our_words(response), Some(place).filter(|_| !is_watch)),
            // Nobody set a limit but us, and only the store can have taken so long.
            Err(_) if is_watch && until == limit => (refuse(Fault::StoreUnreachable), None),
            Err(_) => (refuse(Fault::Deadline), None),
        }
    }

    async fn route<B>(&self, request: Request<B>) -> Response<Body>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Ok(response) = self.routes.clone().oneshot(request).await;
        response
    }

    /// Every status of ours carries details; one without was made by tonic, which could not read the request.
    fn in_our_words(&self, response: Response<Body>) -> Response<Body> {
        let headers = response.headers();
        if headers.contains_key("grpc-status-details-bin") {
            return response;
        }
        let code = headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
        match code {
            Some(Code::OutOfRange) => refuse(Fault::MessageTooLarge { limit: self.message_bytes }),
            Some(Code::Internal | Code::InvalidArgument | Code::Unknown) => {
                refuse(Fault::field("(message)", "the request is no message of this method"))
            }
            _ => response,
        }
    }
}

fn is_ours<B>(request: &Request<B>) -> bool {
    let path = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/'));
    path.is_some_and(|(service, _)| service == SERVICE_NAME)
}

/// `application/grpc`, bare, with a parameter, or as `application/grpc+proto`.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    matches!(kind.split(';').next().unwrap_or_default().trim_end(), "application/grpc" | "application/grpc+proto")
}

fn refuse(fault: Fault) -> Response<Body> {
    Status::from(fault).into_http()
}
