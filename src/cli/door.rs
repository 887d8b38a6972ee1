//! The way in to a server: where it is, how it and we prove who we are.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use clap::{ArgAction, Args};
use http::Uri;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::Interceptor,
    transport::{Certificate, ClientTlsConfig, Identity},
};

use super::{Exit, Failure};

/// A token comes from here or from a file: the command line is there for everybody on the machine to read.
const TOKEN_VARIABLE: &str = "ROLECACHE_TOKEN";

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server and output")]
pub(super) struct DoorArgs {
    /// Where the server listens: HOST:PORT, http://HOST:PORT, or https://HOST:PORT for TLS
    #[arg(long, env = "ROLECACHE_ADDRESS", value_name = "ADDRESS", default_value = "http://127.0.0.1:50051",
          value_parser = parse_address)]
    pub(super) address: Uri,

    /// What signs the server's certificate, in PEM. Without it, whatever this system trusts
    #[arg(long, env = "ROLECACHE_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,

    /// Our certificate, and what signed it, in PEM, for a server that asks for one
    #[arg(long, env = "ROLECACHE_TLS_CLIENT_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert, in PEM
    #[arg(long, env = "ROLECACHE_TLS_CLIENT_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// The name in the server's certificate, where it is not the host of the address
    #[arg(long, env = "ROLECACHE_TLS_SERVER_NAME", value_name = "NAME")]
    tls_server_name: Option<String>,

    /// A file with our token in it. Without it, the variable ROLECACHE_TOKEN
    #[arg(long, env = "ROLECACHE_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Send the token over http:// to another machine too: whoever reads along can use it
    #[arg(long, action = ArgAction::SetTrue)]
    insecure_token: bool,
}

/// Adds our token to every call, where we have one.
#[derive(Clone)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

// === impl DoorArgs ===

impl DoorArgs {
    /// For a server with TLS; None for one without.
    pub(super) fn tls(&self) -> Result<Option<ClientTlsConfig>, Failure> {
        if !self.is_https() {
            return match self.tls_setting() {
                Some(setting) => Err(usage(format!("{setting} is for https:// addresses, not for {}", self.address))),
                None => Ok(None),
            };
        }
        let mut tls = match &self.tls_ca {
            Some(file) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("--tls-ca", file)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.tls_cert, &self.tls_key) {
            let (certificate, key) = (read("--tls-cert", certificate)?, read("--tls-key", key)?);
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let name = self.tls_server_name.as_deref().unwrap_or_else(|| self.host());
        Ok(Some(tls.domain_name(name)))
    }

    /// Our token; refused where others could read along.
    pub(super) fn bearer(&self) -> Result<Bearer, Failure> {
        let token = match &self.token_file {
            Some(file) => String::from_utf8(read("--token-file", file)?)
                .map_err(|_| usage(format!("--token-file: {} is no text", file.display())))?,
            // Set and empty, as a compose file leaves a variable, is not set.
            None => match std::env::var(TOKEN_VARIABLE) {
                Ok(token) if !token.trim().is_empty() => token,
                _ => return Ok(Bearer(None)),
            },
        };
        let from = if self.token_file.is_some() { "--token-file" } else { TOKEN_VARIABLE };
        let token = token.trim();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(usage(format!("{from}: a token is one line of letters, digits, dashes and underscores")));
        }
        if !self.is_https() && !self.is_loopback() && !self.insecure_token {
            return Err(usage(format!(
                "{from} would send the token in the clear to {}: use https://, or --insecure-token at your own risk",
                self.host()
            )));
        }
        let mut value = MetadataValue::try_from(format!("Bearer {token}"))
            .map_err(|_| usage(format!("{from}: there is no token in it")))?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }

    pub(super) fn is_https(&self) -> bool {
        self.address.scheme_str() == Some("https")
    }

    fn tls_setting(&self) -> Option<&'static str> {
        let named = [
            (self.tls_ca.is_some(), "--tls-ca"),
            (self.tls_cert.is_some(), "--tls-cert"),
            (self.tls_server_name.is_some(), "--tls-server-name"),
        ];
        named.into_iter().find_map(|(is_set, setting)| is_set.then_some(setting))
    }

    /// Without the brackets of an IPv6 address.
    fn host(&self) -> &str {
        self.address.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
    }

    fn is_loopback(&self) -> bool {
        let host = self.host();
        host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    }
}

// === impl Bearer ===

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

fn read(setting: &str, file: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(file).map_err(|error| usage(format!("{setting}: {} cannot be read: {error}", file.display())))
}

fn usage(problem: String) -> Failure {
    Failure::new(Exit::Usage, problem)
}

fn parse_address(text: &str) -> Result<Uri, String> {
    const FORMS: &str = "write HOST:PORT, http://HOST:PORT or https://HOST:PORT";
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let uri: Uri = full.parse().map_err(|error| format!("{error}: {FORMS}"))?;
    match uri.scheme_str() {
        Some("http" | "https") if uri.port().is_none() => Err(format!("the port is missing: write {text}:50051")),
        Some("http" | "https") if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) => {
            Err(format!("a server knows no user in its address: {FORMS}"))
        }
        Some("http" | "https") if uri.path().len() <= 1 && uri.query().is_none() => Ok(uri),
        Some("http" | "https") => Err(format!("a server has no path: {FORMS}")),
        Some(scheme) => Err(format!("{scheme}:// is not spoken here: {FORMS}")),
        None => Err(FORMS.into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Way {
        #[command(flatten)]
        door: DoorArgs,
    }

    fn door(line: &str) -> DoorArgs {
        Way::try_parse_from(["way"].into_iter().chain(line.split_whitespace())).unwrap().door
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for text in ["127.0.0.1:50051", "http://localhost:1", "[::1]:50051", "http://h:1/", "https://h:1"] {
            assert!(parse_address(text).is_ok(), "{text}");
        }
        for text in ["localhost", "ftp://h:1", "http://h:1/path", "https://h", "http://", "", "a b:1", "http://u:p@h:1"]
        {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_token_is_not_sent_where_others_read_along() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        fs::write(&file, "sesame\n").unwrap();
        let token = format!("--token-file {}", file.display());
        for address in ["127.0.0.2:1", "[::1]:1", "localhost:1", "https://example.com:1", "h:1 --insecure-token"] {
            let bearer = door(&format!("--address {address} {token}")).bearer().unwrap();
            let mut sent = Request::new(());
            sent = bearer.clone().call(sent).unwrap();
            let value = sent.metadata().get("authorization").unwrap();
            assert!(value.is_sensitive() && value == "Bearer sesame", "{address}");
        }
        for address in ["h:1", "10.0.0.1:1", "localhost.example.com:1", "[2001:db8::1]:1"] {
            let refused = door(&format!("--address {address} {token}")).bearer().err().unwrap();
            assert!(refused.message.contains("in the clear") && !refused.message.contains("sesame"), "{refused:?}");
        }
        for broken in ["", "\n", "two words", "two\nlines", "ü"] {
            fs::write(&file, broken).unwrap();
            let refused = door(&format!("--address localhost:1 {token}")).bearer().err().unwrap();
            assert!(refused.message.starts_with("--token-file: a token is one line"), "{refused:?}");
        }
    }

    #[test]
    fn settings_of_tls_are_for_tls() {
        for setting in ["--tls-ca a", "--tls-cert a --tls-key a", "--tls-server-name a"] {
            let refused = door(&format!("--address h:1 {setting}")).tls().err().unwrap();
            assert!(refused.message.contains("is for https:// addresses"), "{refused:?}");
        }
        assert!(door("--address h:1").tls().unwrap().is_none());
        let refused = door("--address https://h:1 --tls-ca /nowhere").tls().err().unwrap();
        assert!(refused.message.contains("--tls-ca: /nowhere cannot be read"), "{refused:?}");
        assert!(Way::try_parse_from(["way", "--tls-cert", "a"]).is_err());
    }
}
