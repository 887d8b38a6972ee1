//! `serve`: the settings, what is risky about them, and the server until a signal ends it.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::{Exit, Failure, warn_of_arguments};
use crate::{
    cache,
    config::{ServeArgs, ServeConfig},
    descriptors, failpoint, feed,
    grpc::Limits,
    logging,
    server::{DoorOptions, Options, Server, ServerError},
    store,
};

/// Of the last commits in memory.
const RING_BYTES: usize = 16 << 20;

/// Reads from the store at once while the cache cannot answer as truth.
const FALLBACK_READS: usize = 64;

/// Of credentials and certificates. What was read counts once it was found twice: so a change counts within a second.
const REREAD_INTERVAL: Duration = Duration::from_millis(500);

const UPKEEP_INTERVAL: Duration = Duration::from_secs(60);

pub(super) async fn run(args: ServeArgs) -> Result<(), Failure> {
    let config = args.validate().map_err(|error| Failure::new(Exit::Usage, error))?;
    logging::init(&config.log);
    if let Some(danger) = config.doors.danger {
        tracing::warn!(listen = %config.listen, "{danger}");
    }
    warn_of_arguments();
    let refused = |error: ServerError| Failure::new(Exit::Refused, error);
    let stop = stop_signal().map_err(|error| Failure::new(Exit::Refused, error))?;
    let server = Server::bind(options(config)).await.map_err(refused)?;
    if let Ok(address) = server.address() {
        tracing::info!("listening on {address}");
    }
    server.run(stop).await.map_err(refused)
}

fn options(config: ServeConfig) -> Options {
    let store = config.store;
    Options {
        listen: config.listen,
        open_store: Box::new(move || {
            let store = store.clone();
            Box::pin(async move { store::open(&store).await })
        }),
        feed: feed::Options { poll_interval: config.poll_interval, ring_bytes: RING_BYTES },
        cache: cache::Options {
            mode: config.cache,
            max_staleness: config.max_staleness,
            fallback_reads: FALLBACK_READS,
            oversized: feed::OVERSIZED,
        },
        roles: config.roles,
        retain_changes: config.retain_changes,
        upkeep_interval: upkeep_interval(),
        self_check: config.self_check,
        reflection: config.reflection,
        doors: DoorOptions {
            credentials: config.doors.credentials,
            allowance: config.allowance,
            tls: config.doors.tls,
            reread: REREAD_INTERVAL,
        },
        limits: Limits { connections: descriptors::room_for(config.limits.connections), ..config.limits },
    }
}

fn upkeep_interval() -> Duration {
    let told = failpoint::told!("server::upkeep").and_then(|millis| millis.parse().ok());
    told.map_or(UPKEEP_INTERVAL, Duration::from_millis)
}

/// Resolves at the first SIGTERM or SIGINT. Taken over before anything is built: a signal during the start drains too.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!("{name} received");
    })
}
