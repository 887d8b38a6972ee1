//! What every call of the service passes on its way in and its answer on its way out, outermost first:
//!
//! 1. what is no gRPC is answered as HTTP: tonic would take a body of any content type for a message;
//! 2. a server that shuts down refuses, so that clients go elsewhere at once;
//! 3. a panic is answered as a bug, and counted in the log, instead of breaking the connection;
//! 4. statuses that tonic makes itself (broken and oversized messages) become those of the contract;
//! 5. calls in flight are bounded, before they take memory; watches have a bound of their own;
//! 6. the caller's deadline is kept here: tonic has its server answer CANCELLED.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use http::{HeaderMap, Request, Response, StatusCode, header::CONTENT_TYPE};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body, service::Routes};
use tower::ServiceExt;

use super::{MESSAGE_LIMIT, deadline::Deadline, status::Fault};
use crate::proto::v1::role_cache_service_server::SERVICE_NAME;

/// Of a call whose caller named none.
const DEADLINE: Duration = Duration::from_secs(20);

/// The way in.
#[derive(Clone)]
pub(super) struct Edge {
    routes: Routes,
    calls: Arc<Semaphore>,
    shutdown: CancellationToken,
}

impl Edge {
    pub(super) fn new(routes: Routes, calls: usize, shutdown: CancellationToken) -> Self {
        Self { routes, calls: Arc::new(Semaphore::new(calls)), shutdown }
    }

    pub(super) async fn call<B>(&self, mut request: Request<B>) -> Response<Body>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if !is_grpc(request.headers()) {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return response;
        }
        let method = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/'));
        let Some((SERVICE_NAME, method)) = method else {
            // Health and reflection are answered without a store, and have no part in its limits.
            return self.route(request).await;
        };
        if self.shutdown.is_cancelled() {
            return refuse(Fault::ShuttingDown);
        }
        let is_watch = method == "WatchRoleChanges";
        let Ok(_call) = self.calls.try_acquire() else { return refuse(Fault::Overloaded) };
        let deadline = Deadline::of(request.headers());
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(deadline);
        }
        // Of a watch, until it is open: its stream keeps the deadline itself.
        let limit = deadline.map_or_else(|| Instant::now() + DEADLINE, |deadline| deadline.0);
        let answer = timeout_at(limit, AssertUnwindSafe(self.route(request)).catch_unwind()).await;
        match answer {
            Ok(Ok(response)) => in_our_words(response),
            Ok(Err(panic)) => refuse(Fault::bug(&panic_message(&*panic))),
            // Nobody set a limit but us, and only the store can have taken so long.
            Err(_) if is_watch && deadline.is_none() => refuse(Fault::StoreUnreachable),
            Err(_) => refuse(Fault::Deadline),
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
}

/// `application/grpc`, bare, with a parameter, or as `application/grpc+proto`.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    matches!(kind.split(';').next().unwrap_or_default().trim_end(), "application/grpc" | "application/grpc+proto")
}

fn refuse(fault: Fault) -> Response<Body> {
    Status::from(fault).into_http()
}

/// Every status of ours carries details; one without was made by tonic, which could not read the request.
fn in_our_words(response: Response<Body>) -> Response<Body> {
    let headers = response.headers();
    if headers.contains_key("grpc-status-details-bin") {
        return response;
    }
    let code = headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
    match code {
        Some(Code::OutOfRange) => refuse(Fault::MessageTooLarge { limit: MESSAGE_LIMIT }),
        Some(Code::Internal | Code::InvalidArgument | Code::Unknown) => {
            refuse(Fault::field("(message)", "the request is no message of this method"))
        }
        _ => response,
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}
