//! `migrate`: brings the schema of a store up to date and says what it found.

use super::{Exit, Failure, output, warn_of_arguments};
use crate::{
    config::MigrateArgs,
    logging,
    store::{self, OpenError},
};

pub(super) async fn run(args: MigrateArgs) -> Result<(), Failure> {
    let config = args.validate().map_err(|error| Failure::new(Exit::Usage, error))?;
    logging::init(&config.log);
    warn_of_arguments();
    let store = store::open(&config.store).await.map_err(|error| match &error {
        OpenError::Unreachable(_) => Failure::new(Exit::Unavailable, error),
        OpenError::Refused(_) => Failure::new(Exit::Refused, error),
    })?;
    let facts = store.facts();
    // Two sentences, a line each.
    let said = output::line(format_args!("{}\n{}", facts.about, facts.adopted));
    store.close().await;
    said
}
