//! Closed doors: authorities that sign certificates, a credentials file, and clients that show what they have.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rolecache::{
    access::{
        Digest, Scopes,
        credentials::{self, Credential, Proof},
    },
    grpc::{ClientCa, TlsOptions},
    proto::v1::role_cache_service_client::RoleCacheServiceClient,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tempfile::TempDir;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Request, Status,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{self, Certificate, Channel, ClientTlsConfig, Endpoint},
};

use super::server::{PATIENCE, Setup};

pub type Rpc = RoleCacheServiceClient<InterceptedService<Channel, Shown>>;

/// The authorization metadata of each call, word for word.
#[derive(Clone, Default)]
pub struct Shown(pub Option<String>);

/// What signs certificates.
pub struct Ca {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

/// The files that a server's doors are made of.
pub struct House {
    pub directory: TempDir,
    /// What signs the server's certificate, and what signs those of clients.
    pub servers: Ca,
    pub clients: Ca,
    writes: AtomicUsize,
}

pub fn token(name: &str, secret: &str, scopes: &str) -> Credential {
    credential(name, Proof::Token(Digest::of(secret.as_bytes())), scopes)
}

pub fn certificate(name: &str, san: &str, scopes: &str) -> Credential {
    credential(name, Proof::Certificate(san.into()), scopes)
}

fn credential(name: &str, proof: Proof, scopes: &str) -> Credential {
    Credential { name: name.into(), proof, scopes: Scopes::parse(scopes.split(' ')).unwrap() }
}

pub fn rpc(channel: Channel, token: Option<&str>) -> Rpc {
    let shown = Shown(token.map(|token| format!("Bearer {token}")));
    RoleCacheServiceClient::with_interceptor(channel, shown)
}

/// A client of doors without TLS, over a connection of its own.
pub async fn plain(address: SocketAddr, token: Option<&str>) -> Rpc {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    rpc(endpoint.connect().await.unwrap(), token)
}

/// A connection of TLS to the server of a house, and nothing said on it.
pub async fn handshake(
    address: SocketAddr,
    client: Arc<rustls::ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(client).connect(name, stream).await
}

// === impl Shown ===

impl Interceptor for Shown {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(shown) = &self.0 {
            request.metadata_mut().insert("authorization", shown.parse().unwrap());
        }
        Ok(request)
    }
}

// === impl Ca ===

impl Ca {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// For DNS names and IP addresses.
    pub fn sign(&self, names: &[&str]) -> Identity {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        self.sign_as(CertificateParams::new(names).unwrap())
    }

    pub fn sign_as(&self, params: CertificateParams) -> Identity {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity { certificate, key: key.serialize_pem() }
    }
}

// === impl House ===

impl House {
    /// With a server's certificate, and nobody who may come in.
    pub fn new() -> Self {
        let (servers, clients) = (Ca::new("servers"), Ca::new("clients"));
        let house = Self { directory: tempfile::tempdir().unwrap(), servers, clients, writes: AtomicUsize::new(0) };
        house.certify();
        house.write("clients.pem", &house.clients.pem);
        house
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn path(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    /// In place, or by a new file that takes the name of the old one: both are ways in which files change.
    pub fn write(&self, name: &str, text: &str) {
        let turn = self.writes.fetch_add(1, Ordering::Relaxed);
        if turn.is_multiple_of(2) {
            fs::write(self.file(name), text).unwrap();
        } else {
            let new = self.file(&format!("{name}.new"));
            fs::write(&new, text).unwrap();
            fs::rename(&new, self.file(name)).unwrap();
        }
    }

    /// Gives the server a new certificate and key.
    pub fn certify(&self) -> Identity {
        let identity = self.servers.sign(&["localhost", "127.0.0.1"]);
        self.write("server.pem", &identity.certificate);
        self.write("server.key", &identity.key);
        identity
    }

    /// From now on these may come in, and nobody else.
    pub fn admit(&self, callers: &[Credential]) {
        let blocks: Vec<String> = callers.iter().map(|caller| credentials::block(caller).unwrap()).collect();
        self.write("credentials.toml", &blocks.join("\n"));
    }

    /// Doors that are closed to all but the callers, without TLS.
    pub fn closed(&self, mut setup: Setup) -> Setup {
        setup.doors.credentials = Some(self.file("credentials.toml"));
        setup
    }

    /// The same with TLS; whether a client has to have a certificate.
    pub fn tls(&self, setup: Setup, required: bool) -> Setup {
        let mut setup = self.closed(setup);
        setup.doors.tls = Some(TlsOptions {
            certificate: self.file("server.pem"),
            key: self.file("server.key"),
            client_ca: Some(ClientCa { file: self.file("clients.pem"), required }),
        });
        setup
    }

    pub async fn connect(&self, address: SocketAddr, client: Option<&Identity>) -> Result<Channel, transport::Error> {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.servers.pem));
        if let Some(Identity { certificate, key }) = client {
            tls = tls.identity(transport::Identity::from_pem(certificate, key));
        }
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
        timeout(PATIENCE, endpoint.tls_config(tls)?.connect()).await.expect("a handshake ends in time")
    }

    /// A client without a certificate, that would go on with a session of before.
    pub fn client(&self) -> Arc<rustls::ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.servers.pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }

    /// A connection of TLS, without a certificate of ours, and nothing said on it.
    pub async fn handshake(&self, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
        handshake(address, self.client()).await
    }

    /// Waits until new connections are shown this certificate.
    pub async fn until_shown(&self, address: SocketAddr, identity: &Identity) {
        let expected = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
        let shown = async {
            loop {
                let stream = self.handshake(address).await.expect("each handshake succeeds");
                if stream.get_ref().1.peer_certificates().unwrap().first() == Some(&expected) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, shown).await.expect("a new certificate is taken in time");
    }
}
