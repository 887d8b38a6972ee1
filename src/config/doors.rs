//! Who may come in, and how: TLS, credentials, and what is refused off the loopback addresses.

use std::{net::SocketAddr, path::PathBuf};

use clap::{ArgAction, Args, ValueEnum, builder::BoolishValueParser};

use super::ConfigError;
use crate::grpc::{ClientCa, TlsOptions};

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Doors")]
pub struct DoorArgs {
    /// The callers and what each may do; without it everybody may do everything. `rolecache token new` adds to it. Read
    /// again when it changes.
    #[arg(long, env = "ROLECACHE_CREDENTIALS", value_name = "FILE")]
    pub credentials: Option<PathBuf>,

    /// The server's certificate, and what signed it, in PEM. Read again when it changes, like the two that follow.
    #[arg(long, env = "ROLECACHE_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert, in PEM.
    #[arg(long, env = "ROLECACHE_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// What signs the certificates of clients, in PEM. The names in a client's certificate are credentials.
    #[arg(long, env = "ROLECACHE_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert", requires = "credentials")]
    pub tls_client_ca: Option<PathBuf>,

    /// With --tls-client-ca, whether a client without a certificate may connect, and show a token instead.
    #[arg(long, env = "ROLECACHE_TLS_CLIENT_AUTH", value_enum, value_name = "WHEN", default_value = "required")]
    pub tls_client_auth: ClientAuth,

    /// Listen off the loopback addresses without TLS, or without credentials. Whoever reaches the port, or what lies
    /// between, then reads and writes roles.
    #[arg(long, env = "ROLECACHE_INSECURE", action = ArgAction::SetTrue, value_parser = BoolishValueParser::new())]
    pub insecure: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ClientAuth {
    Required,
    Optional,
}

/// The doors that `serve` is built with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DoorConfig {
    pub credentials: Option<PathBuf>,
    pub tls: Option<TlsOptions>,
    /// What anybody who reaches the port can do, where that is more than it should be: for a warning at each start.
    pub danger: Option<&'static str>,
}

// === impl DoorArgs ===

impl DoorArgs {
    pub(super) fn validate(self, listen: SocketAddr) -> Result<DoorConfig, ConfigError> {
        let required = self.tls_client_auth == ClientAuth::Required;
        let client_ca = self.tls_client_ca.map(|file| ClientCa { file, required });
        let tls = match (self.tls_cert, self.tls_key) {
            (Some(certificate), Some(key)) => Some(TlsOptions { certificate, key, client_ca }),
            // clap lets nobody name one without the other.
            _ => None,
        };
        let danger = match (&tls, &self.credentials) {
            _ if listen.ip().is_loopback() => None,
            (Some(_), Some(_)) => None,
            (None, Some(_)) => Some("tokens and roles travel in the clear: whoever reads along can use them"),
            (_, None) => Some("everybody who reaches this address may read and write roles"),
        };
        if danger.is_some() && !self.insecure {
            let missing = match (&tls, &self.credentials) {
                (None, None) => "--tls-cert, --tls-key and --credentials",
                (None, Some(_)) => "--tls-cert and --tls-key",
                _ => "--credentials",
            };
            let problem = format!(
                "is {listen}, which others can reach, and so needs {missing}; --insecure does without, at your own risk"
            );
            return Err(ConfigError::new("--listen", problem));
        }
        Ok(DoorConfig { credentials: self.credentials, tls, danger })
    }
}
