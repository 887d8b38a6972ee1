//! TLS: certificate, key and client CA from files, and who a client certificate is of.

use std::{path::PathBuf, sync::Arc};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use x509_parser::{extensions::GeneralName, prelude::FromDer};

use crate::reload::{Contents, Files};

/// Where the certificates are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsOptions {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub client_ca: Option<ClientCa>,
}

/// Who may connect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientCa {
    pub file: PathBuf,
    /// Whether a client without a certificate is turned away.
    pub required: bool,
}

/// What handshakes are made with.
pub struct Tls {
    pub(super) config: Arc<ServerConfig>,
    /// Of client certificates, where they are asked for.
    verifier: Option<Arc<dyn ClientCertVerifier>>,
}

// === impl TlsOptions ===

impl TlsOptions {
    pub fn files(&self) -> Files {
        let client_ca = self.client_ca.as_ref().map(|client_ca| client_ca.file.clone());
        Files {
            what: "TLS",
            paths: [self.certificate.clone(), self.key.clone()].into_iter().chain(client_ca).collect(),
        }
    }

    /// From the contents of [`TlsOptions::files`]. The problem is a sentence, without a word of the key's.
    pub fn load(&self, contents: &Contents) -> Result<Tls, String> {
        let [certificate, key, rest @ ..] = &contents[..] else { return Err("files are missing".into()) };
        let chain =
            certificates(certificate).map_err(|problem| format!("{}: {problem}", self.certificate.display()))?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| format!("{}: there is no private key in it, in PEM", self.key.display()))?;
        let provider = Arc::new(ring::default_provider());
        let verifier = match (&self.client_ca, rest) {
            (Some(client_ca), [roots]) => Some(verifier(client_ca, roots, &provider)?),
            _ => None,
        };
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = match &verifier {
            Some(verifier) => builder.with_client_cert_verifier(verifier.clone()),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| {
            format!("{} and {} do not belong together: {error}", self.certificate.display(), self.key.display())
        })?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        if verifier.is_some() {
            // A resumed session brings its client's certificate along without a look at it: one that has run out meanwhile
            // would go on.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        Ok(Tls { config: Arc::new(config), verifier })
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err("there is no certificate in it, in PEM".into()),
        Err(error) => Err(format!("it is no PEM: {error}")),
    }
}

fn verifier(
    client_ca: &ClientCa,
    roots: &[u8],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let problem = |problem: String| format!("{}: {problem}", client_ca.file.display());
    let mut store = RootCertStore::empty();
    for root in certificates(roots).map_err(problem)? {
        store.add(root).map_err(|error| problem(error.to_string()))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider.clone());
    let builder = if client_ca.required { builder } else { builder.allow_unauthenticated() };
    builder.build().map_err(|error| problem(error.to_string()))
}

// === impl Tls ===

impl Tls {
    /// Whether a client with this chain would be let in now: a connection that was opened under another CA may not stay.
    pub(super) fn accepts(&self, chain: &[CertificateDer<'_>]) -> bool {
        let Some((end, between)) = chain.split_first() else { return true };
        let Some(verifier) = &self.verifier else { return true };
        verifier.verify_client_cert(end, between, UnixTime::now()).is_ok()
    }
}

/// The DNS names and URIs that a certificate is for. Its common name counts for nothing. A name with a colon is a URI's and no other:
/// an authority that is held to certain DNS names could write them as URIs otherwise.
pub(super) fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, parsed)) = x509_parser::certificate::X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = parsed.subject_alternative_name() else { return Vec::new() };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) if !name.contains(':') => Some((*name).to_owned()),
        GeneralName::URI(name) if name.contains(':') => Some((*name).to_owned()),
        _ => None,
    };
    names.value.general_names.iter().filter_map(name).collect()
}
