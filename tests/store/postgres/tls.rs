//! PostgreSQL on another host, over a network that nobody trusts: TLS that checks who answers.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rolecache::store::{Options, postgres};
use tempfile::TempDir;

use super::{Bell, log, options, refusal, role_of, set, told};
use crate::support::postgres::{Postgres, try_psql};

const PASSWORD: &str = "never-in-a-message";

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A server whose certificate this authority has signed for `localhost`, and an URL of a database with that name.
async fn server(authority: &Authority) -> (Postgres, String) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["localhost".to_owned()]).unwrap().signed_by(&key, authority).unwrap();
    let (certificate, key) = (certificate.pem(), key.serialize_pem());
    let server = tokio::task::spawn_blocking(move || Postgres::start_with_tls(&certificate, &key)).await.unwrap();
    let url = server.fresh_database().await.url;
    let url = url.replace("postgres@127.0.0.1", &format!("postgres:{PASSWORD}@localhost"));
    (server, url)
}

fn root(directory: &TempDir, name: &str, authority: &Authority) -> PathBuf {
    let file = directory.path().join(name);
    std::fs::write(&file, authority.pem()).unwrap();
    file
}

fn verified(url: &str, root: &Path) -> Options {
    options(&format!("{url}?sslmode=verify-full&sslrootcert={}", root.display()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_proves_who_it_is_is_served_from() {
    let authority = authority();
    let (_server, url) = server(&authority).await;
    let directory = tempfile::tempdir().unwrap();
    let options = verified(&url, &root(&directory, "ca.pem", &authority));
    let store = postgres::open(&options).await.unwrap();
    let mut bell = Bell::of(&store);
    bell.rings().await;
    bell.forget();
    // Another replica, with sessions of its own, so that the bell hears of it from PostgreSQL.
    let other = postgres::open(&options).await.unwrap();
    other.write(&[set(1, "admin")]).await.remove(0).unwrap();
    bell.rings().await;
    assert_eq!(role_of(&*store, 1).await, "admin");
    assert_eq!(told(&log(&*store).await), "1:-admin\n");
    assert_eq!(store.snapshot().await.unwrap().next().await.unwrap().len(), 1);
    assert!(try_psql(&format!("{url}?sslmode=disable"), "select").is_err(), "nothing goes without TLS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_prove_who_it_is_is_refused() {
    let authority = authority();
    let (_server, url) = server(&authority).await;
    let directory = tempfile::tempdir().unwrap();
    let (ours, other) = (root(&directory, "ca.pem", &authority), root(&directory, "other.pem", &self::authority()));
    let elsewhere = url.replace("@localhost", "@127.0.0.1");
    let unknown = options(&format!("{url}?sslmode=verify-full"));
    for (options, cause) in [
        (verified(&url, &other), "invalid peer certificate"),
        (unknown, "invalid peer certificate"),
        (verified(&elsewhere, &ours), "not valid for name"),
    ] {
        let sentence = refusal(&options).await;
        assert!(sentence.contains("no trusted connection") && sentence.contains(cause), "{sentence}");
        assert!(!sentence.contains(PASSWORD), "{sentence}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_refused() {
    let server = tokio::task::spawn_blocking(Postgres::start_own).await.unwrap();
    let url = server.fresh_database().await.url;
    let sentence = refusal(&options(&format!("{url}?sslmode=verify-full"))).await;
    assert!(sentence.contains("does not support TLS"), "{sentence}");
}
