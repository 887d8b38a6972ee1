//! `token`: the credentials file of a server, one caller more, and who is in it. Talks to no server: a running one reads
//! the file again by itself.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};

use super::{
    Exit, Failure,
    output::{self, Format, Pages},
};
use crate::access::{
    Digest, Scopes, Secret,
    credentials::{self, Credential, Proof},
};

/// Of a hash, enough to tell tokens apart.
const SHOWN_DIGITS: usize = 8;

#[derive(Subcommand, Debug)]
pub(super) enum Token {
    /// Add a caller to a credentials file, and print its token: once, for only its hash is kept
    #[command(after_help = NEW)]
    New(NewArgs),
    /// List the callers of a credentials file
    List(ListArgs),
}

const NEW: &str = "\
Examples:
  rolecache token new shop-bot --scope read --scope watch --credentials credentials.toml >shop-bot.token
  rolecache token new mod-bot --scope read,write:moderator --credentials credentials.toml
  rolecache token new shop-bot --scope read --certificate shop-bot.internal --credentials credentials.toml

A second token of a name replaces the first once its block is taken out of the file. A running server notices.";

#[derive(Args, Debug)]
pub(super) struct NewArgs {
    /// What the caller is called: the actor of its changes. Letters, digits, dots, dashes and underscores
    #[arg(value_name = "NAME")]
    name: String,
    /// What it may do: read, watch, list, write, write:ROLE, mailbox, transfer, stats. Repeat it for several
    #[arg(long = "scope", value_name = "SCOPE", required = true, value_delimiter = ',')]
    scopes: Vec<String>,
    /// Known by a client certificate with this DNS name or URI as an alternative name, instead of a token
    #[arg(long, value_name = "NAME")]
    certificate: Option<String>,
    #[command(flatten)]
    file: FileArgs,
}

#[derive(Args, Debug)]
pub(super) struct ListArgs {
    #[command(flatten)]
    file: FileArgs,
    /// How the list looks; as JSON, a caller a line
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value = "text")]
    output: Format,
}

#[derive(Args, Debug)]
struct FileArgs {
    /// The file that `serve --credentials` reads; `token new` makes it where it is absent
    #[arg(long, env = "ROLECACHE_CREDENTIALS", value_name = "FILE")]
    credentials: PathBuf,
}

pub(super) fn run(command: Token) -> Result<(), Failure> {
    match command {
        Token::New(args) => new(&args),
        Token::List(args) => list(&args),
    }
}

fn new(args: &NewArgs) -> Result<(), Failure> {
    let usage = |problem: String| Failure::new(Exit::Usage, problem);
    if !credentials::is_name(&args.name) {
        return Err(usage(format!("NAME: {}", credentials::NAME_RULE)));
    }
    let scopes =
        Scopes::parse(args.scopes.iter().map(String::as_str)).map_err(|error| usage(format!("--scope: {error}")))?;
    let refused = |problem: String| Failure::new(Exit::Refused, problem);
    let (proof, secret) = match &args.certificate {
        Some(name) => (Proof::Certificate(name.clone()), None),
        None => {
            let secret =
                Secret::generate().map_err(|error| refused(format!("the system has no random numbers: {error}")))?;
            (Proof::Token(Digest::of(secret.expose().as_bytes())), Some(secret))
        }
    };
    let credential = Credential { name: args.name.clone(), proof, scopes };
    let path = &args.file.credentials;
    add(path, &credential)?;
    let (name, file) = (&credential.name, path.display());
    let scopes = credential.scopes.words().join(", ");
    match secret {
        Some(secret) => {
            output::talk(format_args!("{name} is in {file} now, for {scopes}. Its token, which is kept nowhere else:"));
            output::line(secret.expose())
        }
        None => {
            output::talk(format_args!("{name} is in {file} now, for {scopes}, known by its certificate."));
            Ok(())
        }
    }
}

/// Puts a credential at the end of a file, unless the file could not be read with it.
fn add(path: &Path, credential: &Credential) -> Result<(), Failure> {
    let refused = |problem: String| Failure::new(Exit::Refused, format!("{}: {problem}", path.display()));
    let before = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read.map_err(|error| refused(format!("it cannot be read: {error}")))?,
    };
    let block = credentials::block(credential).map_err(|error| refused(error.to_string()))?;
    let between = match before.as_bytes() {
        [] => "",
        [.., b'\n'] => "\n",
        _ => "\n\n",
    };
    let more = format!("{between}{block}");
    credentials::parse(&format!("{before}{more}")).map_err(|error| refused(error.to_string()))?;
    // Appended in one write: what a server reads is a file without the block, or with it.
    let written = OpenOptions::new().append(true).create(true).mode(0o600).open(path).and_then(|mut file| {
        file.write_all(more.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| refused(format!("it cannot be written: {error}")))
}

fn list(args: &ListArgs) -> Result<(), Failure> {
    let path = &args.file.credentials;
    let refused = |problem: String| Failure::new(Exit::Refused, format!("{}: {problem}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| refused(format!("it cannot be read: {error}")))?;
    let known = credentials::parse(&text).map_err(|error| refused(error.to_string()))?;
    match args.output {
        Format::Text => {
            let row = |credential: &Credential| {
                let (kind, proof) = shown(&credential.proof);
                vec![credential.name.clone(), kind.to_owned(), proof, credential.scopes.words().join(", ")]
            };
            Pages::new(&["NAME", "KIND", "KNOWN BY", "SCOPES"]).print(known.iter().map(row).collect())
        }
        Format::Json => known.iter().try_for_each(|credential| {
            let (kind, proof) = shown(&credential.proof);
            let scopes = credential.scopes.words();
            let name = &credential.name;
            output::line(serde_json::json!({ "name": name, "kind": kind, "knownBy": proof, "scopes": scopes }))
        }),
    }
}

fn shown(proof: &Proof) -> (&'static str, String) {
    match proof {
        Proof::Token(digest) => ("token", digest.to_string().chars().take(SHOWN_DIGITS).collect()),
        Proof::Certificate(name) => ("certificate", output::plain(name).into_owned()),
    }
}
