//! Bearer tokens: 256 random bits, of which only the hash is kept. With that many a slow hash protects nothing.

use std::fmt;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

/// What scanners for leaked secrets find a token by.
pub(super) const PREFIX: &str = "rolecache_";

/// A token as its caller sends it. Printed once, when it is made.
pub struct Secret(String);

/// The hash of a token.
#[derive(Clone, Copy, Debug)]
pub struct Digest([u8; 32]);

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("it must be a SHA-256: 64 hexadecimal digits")]
pub struct DigestError;

// === impl Secret ===

impl Secret {
    /// # Errors
    /// Where the system has no random numbers.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bits = [0; 32];
        getrandom::fill(&mut bits)?;
        Ok(Self(format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bits))))
    }

    /// To be shown to the one who asked for it, and to nobody else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a secret")
    }
}

// === impl Digest ===

impl Digest {
    pub fn of(secret: &[u8]) -> Self {
        Self(Sha256::digest(secret).into())
    }

    pub fn parse(text: &str) -> Result<Self, DigestError> {
        if text.len() != 64 || !text.is_ascii() {
            return Err(DigestError);
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| DigestError)?;
            // `+f` is a number to the standard library.
            if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(DigestError);
            }
            *byte = u8::from_str_radix(digits, 16).map_err(|_| DigestError)?;
        }
        Ok(Self(bytes))
    }
}

/// In constant time.
impl PartialEq for Digest {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Digest {}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_it_is_written() {
        let digest = Digest::of(b"abc");
        let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), text);
        assert_eq!(Digest::parse(text), Ok(digest));
        assert_eq!(Digest::parse(&text.to_uppercase()), Ok(digest));
        for broken in ["", &text[1..], &format!("{text}0"), &text.replace('b', "g"), &format!("+{}", &text[1..])] {
            assert_eq!(Digest::parse(broken), Err(DigestError), "{broken}");
        }
        assert_ne!(Digest::of(b"abd"), digest);
    }

    #[test]
    fn secrets_differ_and_do_not_show() {
        let [one, other] = [(); 2].map(|()| Secret::generate().unwrap());
        assert_ne!(one.expose(), other.expose());
        assert_eq!(one.expose().len(), PREFIX.len() + 43);
        assert!(!format!("{one:?}").contains(one.expose()));
    }
}
