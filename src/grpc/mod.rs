//! gRPC: the services, what every call passes on its way to them, and the connections.
//!
//! `tonic` and `prost` are known here and in the client only.

mod answer;
mod convert;
mod core;
mod deadline;
mod door;
mod edge;
mod fault;
mod filter;
mod head;
mod meter;
mod peer;
mod roles;
mod snapshot;
mod start;
mod status;
mod stream;
mod tls;
mod token;
mod transport;
mod watch;
mod weight;

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tokio::{net::TcpListener, sync::watch as latest};
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

pub use self::tls::{ClientCa, Tls, TlsOptions};
use self::{
    core::Core,
    door::Door,
    edge::Edge,
    roles::RoleService,
    transport::{Ends, Wire},
    watch::Watches,
};
use crate::{
    access::Access,
    cache::RoleCache,
    feed::Feed,
    proto::{
        FILE_DESCRIPTOR_SET,
        v1::role_cache_service_server::{RoleCacheServiceServer, SERVICE_NAME},
    },
    role::RoleName,
    step::Step,
    store::Store,
    writer::Writer,
};

/// How long a read waits for a revision, or for anything else.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// Of requests for health and reflection, which name a service or a symbol and come without credentials.
const SMALL_MESSAGE: usize = 4 * 1024;

/// How much is served at once, and how long anybody is waited for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Connections; further ones wait to be accepted.
    pub connections: usize,
    /// Calls and watches of one connection; a client waits with further ones.
    pub streams: u32,
    /// Calls in flight; further ones are refused.
    pub calls: usize,
    /// Watches; further ones are refused.
    pub watches: usize,
    /// Of a request.
    pub message_bytes: usize,
    pub header_bytes: u32,
    /// Of a call, whatever later deadline its caller names.
    pub deadline: Duration,
    /// Of TLS and the beginning of HTTP/2, together.
    pub handshake: Duration,
    /// How often a client is asked whether it is still there.
    pub keepalive: Duration,
    /// After which a connection is closed that nothing goes over.
    pub idle: Duration,
}

/// What the doors are.
pub struct Doors {
    pub access: Arc<Access>,
    /// The newest; None where there is no TLS.
    pub tls: Option<latest::Receiver<Arc<Tls>>>,
}

/// The gRPC side of a server: bound and answering from the start, with a core as soon as the store is reached.
pub struct Grpc {
    core: Arc<OnceLock<Arc<Core>>>,
    health: HealthReporter,
    connections: TaskTracker,
    watches: usize,
    started: Instant,
    ends: Ends,
}

impl Grpc {
    /// The services, of which writes may set `roles`, and a future that accepts connections for them until [`Grpc::drain`].
    pub async fn new(
        listener: TcpListener,
        doors: Doors,
        limits: Limits,
        reflection: bool,
        roles: Vec<RoleName>,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (health, health_service) = tonic_health::server::health_reporter();
        let core = Arc::new(OnceLock::new());
        let door = Arc::new(Door::new(doors.access));
        let service = RoleService::new(core.clone(), roles, door.clone());
        let service = RoleCacheServiceServer::new(service).max_decoding_message_size(limits.message_bytes);
        let mut routes = Routes::new(health_service.max_decoding_message_size(SMALL_MESSAGE));
        if reflection {
            let build = || {
                tonic_reflection::server::Builder::configure()
                    .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                    .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                    // So that grpcurl prints the details of an error, too.
                    .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
            };
            let unreadable = "descriptors that the build made";
            routes = routes
                .add_service(build().build_v1().expect(unreadable).max_decoding_message_size(SMALL_MESSAGE))
                .add_service(build().build_v1alpha().expect(unreadable).max_decoding_message_size(SMALL_MESSAGE));
        }
        let ends = Ends::default();
        let replaced = door.replaced();
        let edge = Edge::new(service, routes.prepare(), door, &limits, ends.gently.clone());
        let connections = TaskTracker::new();
        let watches = limits.watches;
        let wire = Wire {
            edge,
            limits: Arc::new(limits),
            tls: doors.tls,
            replaced,
            refused: Arc::default(),
            ends: ends.clone(),
        };
        let accept = transport::serve(listener, wire, connections.clone());
        let grpc = Self { core, health, connections, watches, started: Instant::now(), ends };
        grpc.set_serving(false).await;
        (grpc, accept)
    }

    /// From now on calls are answered instead of refused.
    ///
    /// # Panics
    /// On a second call.
    pub fn open(&self, cache: Arc<RoleCache>, feed: Feed, writer: Writer, store: Arc<dyn Store>, step: Step) {
        let (watches, shutdown) = (Watches::new(self.watches), self.ends.gently.clone());
        let core = Core::new(cache, feed, writer, store, step, watches, self.started, shutdown);
        assert!(self.core.set(Arc::new(core)).is_ok(), "a server has one core");
    }

    /// What health checks are told, of the server as a whole and of its service. Never again that it serves once it drains.
    pub async fn set_serving(&self, serving: bool) {
        let serving = serving && !self.ends.gently.is_cancelled();
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.health.set_service_status("", status).await;
        self.health.set_service_status(SERVICE_NAME, status).await;
    }

    /// Refuses new calls, tells watches to end, and waits for those in flight.
    pub async fn drain(&self) {
        self.ends.gently.cancel();
        self.set_serving(false).await;
        // Ends the health streams: they would be in flight for ever.
        let mut health = self.health.clone();
        health.clear_service_status("").await;
        health.clear_service_status(SERVICE_NAME).await;
        self.connections.close();
        self.connections.wait().await;
    }

    /// Breaks every connection that is left.
    pub fn cut(&self) {
        self.ends.hard.cancel();
    }
}
