//! gRPC: the services, what every call passes on its way to them, and the connections.
//!
//! `tonic` and `prost` are known here and in the client only.

mod convert;
mod core;
mod deadline;
mod edge;
mod roles;
mod snapshot;
mod status;
mod token;
mod transport;
mod watch;

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use self::{core::Core, edge::Edge, roles::RoleService, transport::Ends, watch::Watches};
use crate::{
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

/// Of a request.
const MESSAGE_LIMIT: usize = 256 * 1024;

/// How long a read waits for a revision, or for anything else.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// Who asks, where the server asks nobody who they are.
const ANONYMOUS: &str = "anonymous";

/// How much is served at once; what is over it is refused.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub calls: usize,
    pub watches: usize,
}

/// The gRPC side of a server: bound and answering from the start, with a core as soon as the store is reached.
pub struct Grpc {
    core: Arc<OnceLock<Arc<Core>>>,
    health: HealthReporter,
    connections: TaskTracker,
    limits: Limits,
    started: Instant,
    ends: Ends,
}

impl Grpc {
    /// The services, of which writes may set `roles`, and a future that accepts connections for them until [`Grpc::drain`].
    pub async fn new(
        listener: TcpListener,
        limits: Limits,
        reflection: bool,
        roles: Vec<RoleName>,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (health, health_service) = tonic_health::server::health_reporter();
        let core = Arc::new(OnceLock::new());
        let service =
            RoleCacheServiceServer::new(RoleService::new(core.clone(), roles)).max_decoding_message_size(MESSAGE_LIMIT);
        let mut routes = Routes::new(service).add_service(health_service);
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
                .add_service(build().build_v1().expect(unreadable))
                .add_service(build().build_v1alpha().expect(unreadable));
        }
        let ends = Ends::default();
        let edge = Edge::new(routes.prepare(), limits.calls, ends.gently.clone());
        let connections = TaskTracker::new();
        let accept = transport::serve(listener, edge, connections.clone(), ends.clone());
        let grpc = Self { core, health, connections, limits, started: Instant::now(), ends };
        grpc.set_serving(false).await;
        (grpc, accept)
    }

    /// From now on calls are answered instead of refused.
    ///
    /// # Panics
    /// On a second call.
    pub fn open(&self, cache: Arc<RoleCache>, feed: Feed, writer: Writer, store: Arc<dyn Store>, step: Step) {
        let (watches, shutdown) = (Watches::new(self.limits.watches), self.ends.gently.clone());
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
