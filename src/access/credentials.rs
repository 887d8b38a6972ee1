//! The credentials file: who is known by which token or certificate, and what they may do.
//!
//! TOML, one `[[caller]]` each; the README has the format. Errors never repeat what stands in the file: somebody may have
//! put a secret there.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::{
    scope::{Scope, ScopeError, Scopes},
    secret::{Digest, PREFIX},
};

const NAME_BYTES: usize = 64;

/// What [`is_name`] asks for.
pub const NAME_RULE: &str =
    "a name has 1 to 64 letters, digits, dots, dashes and underscores, and is not \"anonymous\"";

/// What callers are called who need no credentials: nobody else may be.
pub const ANONYMOUS: &str = "anonymous";

/// One way in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Credential {
    /// The actor of its changes. Several credentials may share one: a token that replaces another.
    pub name: String,
    pub proof: Proof,
    pub scopes: Scopes,
}

/// By what a caller is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Proof {
    Token(Digest),
    /// A DNS name or URI among the subject alternative names of a certificate that the client CA has signed.
    Certificate(String),
}

/// Why a credentials file cannot be used, in a sentence.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("line {line}: {problem}")]
    Syntax { line: usize, problem: String },
    #[error("caller {number} ({name}): {problem}")]
    Caller { number: usize, name: String, problem: String },
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    caller: Vec<Row>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<String>,
    scopes: Vec<String>,
}

/// Reads a credentials file.
pub fn parse(text: &str) -> Result<Vec<Credential>, CredentialsError> {
    let file: File = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let line = 1 + text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count();
        CredentialsError::Syntax { line, problem: without_values(error.message()) }
    })?;
    let mut seen = HashSet::new();
    let mut credentials = Vec::with_capacity(file.caller.len());
    for (index, row) in file.caller.into_iter().enumerate() {
        let name = if is_name(&row.name) { row.name.clone() } else { "without a usable name".to_owned() };
        let problem = |problem: String| CredentialsError::Caller { number: index + 1, name: name.clone(), problem };
        let credential = row.check().map_err(problem)?;
        let proof = match &credential.proof {
            Proof::Token(digest) => digest.to_string(),
            Proof::Certificate(name) => name.clone(),
        };
        if !seen.insert(proof) {
            return Err(problem("another caller has the same token or certificate".into()));
        }
        credentials.push(credential);
    }
    Ok(credentials)
}

/// A block for one more credential, to be put at the end of a file.
pub fn block(credential: &Credential) -> Result<String, toml::ser::Error> {
    let (token_sha256, certificate) = match &credential.proof {
        Proof::Token(digest) => (Some(digest.to_string()), None),
        Proof::Certificate(name) => (None, Some(name.clone())),
    };
    let row = Row { name: credential.name.clone(), token_sha256, certificate, scopes: credential.scopes.words() };
    toml::to_string(&File { caller: vec![row] })
}

/// Whether a caller may be called so: it stands in logs and in the change log.
pub fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    // A token in the place of its name would be in every log.
    let is_secret = name.starts_with(PREFIX);
    !name.is_empty() && name.len() <= NAME_BYTES && name != ANONYMOUS && !is_secret && name.bytes().all(allowed)
}

/// toml quotes what it found; what it expected is enough.
fn without_values(message: &str) -> String {
    match message.split_once(": ") {
        Some(("invalid type" | "invalid value", rest)) => {
            let expected = rest.rsplit_once("expected ").map_or("something else", |(_, expected)| expected);
            format!("expected {expected}")
        }
        _ if message.starts_with("unknown field") => "there is a field that no caller has".to_owned(),
        _ if message.contains('`') && !message.starts_with("missing field") => "this is no TOML".to_owned(),
        _ => message.to_owned(),
    }
}

// === impl Row ===

impl Row {
    fn check(self) -> Result<Credential, String> {
        if !is_name(&self.name) {
            return Err(NAME_RULE.into());
        }
        let proof = match (self.token_sha256, self.certificate) {
            (Some(digest), None) => {
                Proof::Token(Digest::parse(&digest).map_err(|error| format!("token_sha256: {error}"))?)
            }
            (None, Some(name)) if !name.is_empty() && name.is_ascii() => Proof::Certificate(name),
            (None, Some(_)) => return Err("certificate: it must be a DNS name or a URI".into()),
            (Some(_), Some(_)) => return Err("it has both token_sha256 and certificate: write two callers".into()),
            (None, None) => return Err("it needs token_sha256 or certificate".into()),
        };
        let scopes = Scopes::parse(self.scopes.iter().map(String::as_str)).map_err(|error| match error {
            ScopeError::None => error.to_string(),
            // What stands there may be a secret.
            _ => format!("scopes: one of them is none; there are {}, and write:ROLE", Scope::names()),
        })?;
        Ok(Credential { name: self.name, proof, scopes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn caller(fields: &str) -> String {
        format!("[[caller]]\n{fields}\n")
    }

    fn sentence(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_file_is_read_as_it_is_written() {
        let scopes = Scopes::parse(["read", "write:moderator"]).unwrap();
        let token = Credential {
            name: "shop-bot".into(),
            proof: Proof::Token(Digest::parse(HASH).unwrap()),
            scopes: scopes.clone(),
        };
        let certificate = Credential { proof: Proof::Certificate("spiffe://corp/bot".into()), ..token.clone() };
        let file = format!("# ours\n{}\n{}", block(&token).unwrap(), block(&certificate).unwrap());
        assert_eq!(parse(&file).unwrap(), [token, certificate]);
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_named_and_never_repeated() {
        for (text, said) in [
            (caller(&format!("name = \"a\"\ntoken_sha256 = \"{HASH}\"")), "line 1: missing field `scopes`"),
            (caller("name = \"a\"\nscopes = [\"read\"]"), "caller 1 (a): it needs token_sha256 or certificate"),
            (
                caller("name = \"a\"\ntoken_sha256 = \"hidden\"\nscopes = [\"read\"]"),
                "caller 1 (a): token_sha256: it must",
            ),
            (caller("name = \"hidden one\"\nscopes = []"), "caller 1 (without a usable name): a name has"),
            (caller("name = \"anonymous\"\ncertificate = \"a\"\nscopes = [\"read\"]"), "and is not \"anonymous\""),
            (caller("name = \"a\"\ncertificate = \"\"\nscopes = [\"read\"]"), "must be a DNS name or a URI"),
            (caller("name = \"a\"\ncertificate = \"a\"\nscopes = []"), "at least one scope"),
            (
                caller("name = \"a\"\ncertificate = \"a\"\nscopes = [\"reed\"]"),
                "scopes: one of them is none; there are read, watch",
            ),
            (
                caller("name = \"rolecache_hidden\"\ncertificate = \"a\"\nscopes = [\"read\"]"),
                "(without a usable name)",
            ),
            (caller("name = \"a\"\ncertificate = \"a\"\nscopes = [\"hidden\"]"), "one of them is none"),
            (caller("name = \"a\"\ncertificate = \"a\"\nscopes = [\"write:Hidden hidden\"]"), "one of them is none"),
            (caller("name = \"a\"\ntoken = \"hidden\"\nscopes = []"), "there is a field that no caller has"),
            (caller("name = \"a\"\ntoken_sha256 = \"hidden"), "line 3: "),
            (caller("name = \"a\"\nscopes = \"hidden\""), "line 3: expected a sequence"),
            ("hidden\n".to_owned(), "line 1: "),
            ("[[caler]]\nname = \"a\"".to_owned(), "there is a field"),
        ] {
            let sentence = sentence(&text);
            assert!(sentence.contains(said), "{said} is not in: {sentence}");
            assert!(!sentence.contains("hidden"), "{sentence}");
        }
    }

    #[test]
    fn a_token_or_certificate_is_one_callers() {
        let row = caller(&format!("name = \"a\"\ntoken_sha256 = \"{HASH}\"\nscopes = [\"read\"]"));
        let other = row.replace("\"a\"", "\"b\"").replace(HASH, &HASH.to_uppercase());
        assert!(sentence(&format!("{row}{other}")).contains("caller 2 (b): another caller has the same token"));
    }
}
