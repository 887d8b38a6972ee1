//! The composition root.

use crate::config::ServeConfig;

#[derive(Debug, thiserror::Error)]
#[error("not built yet")]
pub struct ServeError;

/// Serves until a signal ends it.
pub async fn serve(config: ServeConfig) -> Result<(), ServeError> {
    drop(config);
    Err(ServeError)
}
