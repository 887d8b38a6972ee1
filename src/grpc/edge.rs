//! What every call of the service passes on its way in and its answer on its way out, outermost first:
//!
//! 1. a panic is answered as a bug, and counted in the log, instead of breaking the connection;
//! 2. what is no gRPC is answered as HTTP: tonic would take a body of any content type for a message;
//! 3. a server that shuts down refuses, so that clients go elsewhere at once;
//! 4. who may not make the call is denied, before it costs anything;
//! 5. statuses that tonic makes itself (broken and oversized messages) become those of the contract;
//! 6. calls in flight are bounded, each caller's and all, and so are the bytes of large ones, before they take memory; watches have bounds of their own, and so
//!    have the streams that are open to all;
//! 7. the caller's deadline is kept here: tonic has its server answer CANCELLED.

use std::{
    future::poll_fn,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures::FutureExt;
use http::{HeaderMap, Request, Response, StatusCode, header::CONTENT_TYPE};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body, service::Routes};
use tower::{Service, ServiceExt};

use super::{
    Limits,
    answer::{Answer, Asking, Held},
    deadline::Deadline,
    door::{Asker, Door},
    fault::Fault,
    head,
    meter::Metered,
    peer::{Active, Peer},
    roles::RoleService,
    weight::{self, Weight},
};
use crate::{
    access::Caller,
    failpoint,
    proto::{
        Method,
        v1::role_cache_service_server::{RoleCacheServiceServer, SERVICE_NAME},
    },
};

/// Where the paths of health begin, and those of both versions of reflection.
const HEALTH: &str = "/grpc.health.v1.Health/";
const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";
const REFLECTION: &str = "/grpc.reflection.";

/// Streams at once that need no credentials. One of health takes a few KB for as long as its client likes; one of
/// reflection may have three answers of 23 KB waiting, and ends soon.
const HEALTH_WATCHES: usize = 10_000;
const REFLECTIONS: usize = 64;

/// Checks of health at once, and how long the few bytes of a request for it may take to come: who sends half of them, and goes
/// on, can keep others out.
const HEALTH_CHECKS: usize = 1_024;
const HEALTH_LIMIT: Duration = Duration::from_secs(1);

/// Calls that are refused, whose requests are waited for at once, for how long, and how much of each: a message may be over
/// the limit.
const DRAINS: usize = 1_024;
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
const DRAINED_MESSAGES: usize = 4;

/// The way in.
#[derive(Clone)]
pub(super) struct Edge {
    service: RoleCacheServiceServer<RoleService>,
    /// Health and reflection, and what nobody serves.
    routes: Routes,
    door: Arc<Door>,
    calls: Arc<Semaphore>,
    /// Bytes of large requests.
    bytes: Arc<Semaphore>,
    health_checks: Arc<Semaphore>,
    health_watches: Arc<Semaphore>,
    reflections: Arc<Semaphore>,
    /// Of those whom nobody knows, and of the others.
    drains: [Arc<Semaphore>; 2],
    /// Of a call whose caller named no deadline, or a later one.
    deadline: Duration,
    message_bytes: usize,
    shutdown: CancellationToken,
}

impl Edge {
    pub(super) fn new(
        service: RoleCacheServiceServer<RoleService>,
        routes: Routes,
        door: Arc<Door>,
        limits: &Limits,
        shutdown: CancellationToken,
    ) -> Self {
        let [calls, bytes, health_checks, health_watches, reflections] =
            [limits.calls, weight::ALL, HEALTH_CHECKS, HEALTH_WATCHES, REFLECTIONS]
                .map(|places| Arc::new(Semaphore::new(places)));
        let drains = [DRAINS; 2].map(|places| Arc::new(Semaphore::new(places)));
        let (deadline, message_bytes) = (limits.deadline, limits.message_bytes);
        Self {
            service,
            routes,
            door,
            calls,
            bytes,
            health_checks,
            health_watches,
            reflections,
            drains,
            deadline,
            message_bytes,
            shutdown,
        }
    }

    pub(super) async fn call<B>(&self, request: Request<B>, peer: &Arc<Peer>) -> Response<Answer>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let head = head::bytes(&request);
        let active = peer.begin(head);
        if is_grpc(request.headers()) && !is_ours(&request) {
            let answered = AssertUnwindSafe(self.answer_all(request, peer, active)).catch_unwind().await;
            return answered.unwrap_or_else(|panic| refuse(Fault::panic(&*panic)).map(Answer::last));
        }
        let answered = AssertUnwindSafe(self.answer(request, head, peer, &active)).catch_unwind().await;
        let (response, held) = answered.unwrap_or_else(|panic| (refuse(Fault::panic(&*panic)), Held::default()));
        if held.is_some() {
            // All of it is there: from now on it is the client who is waited for.
            active.is_answered();
        }
        response.map(|body| Answer::new(body, held, active))
    }

    /// Health and reflection, which are answered without a store and without credentials, and have limits of their own.
    async fn answer_all<B>(&self, mut request: Request<B>, peer: &Peer, active: Active) -> Response<Answer>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let path = request.uri().path();
        let is_health = path.starts_with(HEALTH);
        let goes_on = path == HEALTH_WATCH;
        let (places, limit) = match path {
            HEALTH_CHECK => (Some(&self.health_checks), HEALTH_LIMIT.min(self.deadline)),
            HEALTH_WATCH => (Some(&self.health_watches), HEALTH_LIMIT.min(self.deadline)),
            path if path.starts_with(REFLECTION) => (Some(&self.reflections), self.deadline),
            // tonic answers that it is not implemented.
            _ => (None, self.deadline),
        };
        let place =
            |places: &Arc<Semaphore>| Some([peer.begin_open_to_all()?, places.clone().try_acquire_owned().ok()?]);
        let held = match places {
            None => Held::default(),
            Some(places) => match place(places) {
                Some(places) => Held::of(places, None),
                None => return refuse(Fault::Overloaded).map(|body| Answer::new(body, Held::default(), active)),
            },
        };
        head::lighten(&mut request);
        let request = request.map(|body| Metered::of_stranger(body, peer.meter.clone()));
        if !goes_on {
            // One that its client does not read is found by its connection.
            active.is_answered();
        }
        let limit = Instant::now() + limit;
        let late = |_| refuse(Fault::Deadline);
        if is_health {
            // It ends its streams itself, with a last word.
            let response = timeout_at(limit, self.route(request)).await.unwrap_or_else(late);
            return response.map(|body| Answer::new(body, held, active));
        }
        // Streams of reflection would go on for as long as a client likes.
        let end = || self.shutdown.clone().cancelled_owned();
        let request = request.map(|body| Asking::until(end(), self.deadline / 2, body));
        let response = timeout_at(limit, self.route(request)).await.unwrap_or_else(late);
        response.map(|body| Answer::new(body, held, active).ended(end(), self.deadline / 2))
    }

    /// The answer, and what it holds until it is sent: its places among the calls in flight, its caller's and all.
    async fn answer<B>(
        &self,
        request: Request<B>,
        head: usize,
        peer: &Arc<Peer>,
        active: &Active,
    ) -> (Response<Body>, Held)
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let deadline = Deadline::of(request.headers());
        // Of a watch, until it is open: its stream keeps the deadline itself.
        let limit = Instant::now() + self.deadline;
        let until = deadline.map_or(limit, |deadline| deadline.0.min(limit));
        if !is_grpc(request.headers()) {
            self.drain_stranger(request.into_body(), peer, until).await;
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return (response, Held::default());
        }
        if self.shutdown.is_cancelled() {
            self.drain_stranger(request.into_body(), peer, until).await;
            return (refuse(Fault::ShuttingDown), Held::default());
        }
        let method = request.uri().path().rsplit('/').next().and_then(Method::of);
        let Some(method) = method else {
            let (parts, body) = request.into_parts();
            self.drain_stranger(body, peer, until).await;
            // tonic answers that it is not implemented.
            return (self.route(Request::from_parts(parts, Body::empty())).await, Held::default());
        };
        let caller = match self.door.admit(request.headers(), peer, method) {
            Ok(caller) => caller,
            Err(fault @ (Fault::NoCredentials | Fault::BadCredentials)) => {
                self.drain_stranger(request.into_body(), peer, until).await;
                return (refuse(fault), Held::default());
            }
            Err(fault) => {
                peer.meter.admit(head);
                self.drain(&self.drains[1], Metered::new(request.into_body(), peer.meter.clone()), until).await;
                return (refuse(fault), Held::default());
            }
        };
        peer.meter.admit(head);
        let mut request = request.map(|body| Metered::new(body, peer.meter.clone()));
        active.is_of(&caller);
        if caller.is_revoked() {
            // In between. Whoever ends what is open of the revoked may not have seen this one.
            self.drain(&self.drains[1], request.into_body(), until).await;
            return (self.deny(&caller, peer, method, Fault::BadCredentials), Held::default());
        }
        request.extensions_mut().insert(Asker { caller: caller.clone(), peer: peer.clone() });
        let is_watch = method == Method::WatchRoleChanges;
        let place = || Some([caller.begin_call()?, self.calls.clone().try_acquire_owned().ok()?]);
        let Some(places) = place() else {
            self.drain(&self.drains[1], request.into_body(), until).await;
            return (refuse(Fault::Overloaded), Held::default());
        };
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(deadline);
        }
        head::lighten(&mut request);
        let weight = Weight::new(caller.clone(), self.bytes.clone());
        let request = request.map(|body| weight.of(body));
        let answer = async {
            if !is_watch {
                failpoint::kill!("grpc::handler");
            }
            // Not by a router: that takes a tenth of the instructions of a call.
            let Ok(response) = self.service.clone().call(request).await;
            response
        };
        let answer = async {
            tokio::select! {
                response = answer => response,
                // A write that the writer has is told what became of it; one that comes later is refused there.
                () = caller.revoked(), if !Door::writes(method) => self.deny(&caller, peer, method, Fault::BadCredentials),
            }
        };
        // Pinned, or the timeout would move all of it into itself.
        let answered = timeout_at(until, pin!(answer)).await;
        if let Some(rest) = weight.clear()
            && answered.as_ref().is_ok_and(is_refusal)
        {
            self.drain(&self.drains[1], rest, until).await;
        }
        match answered {
            Ok(response) if is_watch => (self.in_our_words(response), Held::default()),
            Ok(response) => {
                // What a write has done is told in any case.
                (self.in_our_words(response), Held::of(places, (!Door::writes(method)).then_some(weight)))
            }
            // Nobody set a limit but us, and only the store can have taken so long.
            Err(_) if is_watch && until == limit => (refuse(Fault::StoreUnreachable), Held::default()),
            Err(_) => (refuse(Fault::Deadline), Held::default()),
        }
    }

    async fn drain_stranger<B>(&self, body: B, peer: &Peer, until: Instant)
    where
        B: http_body::Body<Data = bytes::Bytes> + Unpin,
    {
        self.drain(&self.drains[0], Metered::of_stranger(body, peer.meter.clone()), until).await;
    }

    /// Reads what comes of a call that is refused, before it is: HTTP/2 takes what comes after the answer for a fault of its client's,
    /// and breaks the connection after many of those.
    async fn drain<B>(&self, places: &Semaphore, mut body: B, until: Instant)
    where
        B: http_body::Body<Data = bytes::Bytes> + Unpin,
    {
        let Ok(_place) = places.try_acquire() else { return };
        let mut left = DRAINED_MESSAGES * self.message_bytes;
        let all = async {
            while !body.is_end_stream()
                && let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
            {
                let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, bytes::Bytes::len)) else { return };
                left = rest;
            }
        };
        // Who does not send it is refused all the same.
        let _ = timeout_at(until.min(Instant::now() + DRAIN_LIMIT), all).await;
    }

    fn deny(&self, caller: &Caller, peer: &Peer, method: Method, fault: Fault) -> Response<Body> {
        self.door.log(Some(caller), peer, method, &fault);
        refuse(fault)
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

/// Its status is in its head: nothing comes after that.
fn is_refusal(response: &Response<Body>) -> bool {
    response.headers().contains_key("grpc-status")
}

fn refuse(fault: Fault) -> Response<Body> {
    Status::from(fault).into_http()
}
