//! `serve`: the settings, one warning, and the server.

use super::{Exit, Failure};
use crate::{config::ServeArgs, logging, server};

pub(super) async fn run(args: ServeArgs) -> Result<(), Failure> {
    let config = args.validate().map_err(|error| Failure::new(Exit::Usage, error))?;
    logging::init(&config.log);
    if !config.listen.ip().is_loopback() {
        tracing::warn!(listen = %config.listen, "everybody who reaches this address may read and write roles");
    }
    server::serve(config).await.map_err(|error| Failure::new(Exit::Refused, format!("{error:#}")))
}
