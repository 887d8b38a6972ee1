//! The caller's deadline, from the `grpc-timeout` header.

use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;

/// When the caller stops waiting; in the extensions of a request whose caller said so.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(pub(super) Instant);

impl Deadline {
    /// None without a header, or with one that is not of the form that gRPC gives it: up to 8 digits and a unit.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get("grpc-timeout")?.to_str().ok()?;
        let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if number.len() > 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let number: u64 = number.parse().ok()?;
        let timeout = match unit {
            "H" => Duration::from_secs(number * 60 * 60),
            "M" => Duration::from_secs(number * 60),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        };
        Instant::now().checked_add(timeout).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_form_of_grpc_is_a_deadline() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            Deadline::of(&headers)
        };
        for text in ["1H", "30S", "250m", "99999999n"] {
            assert!(of(text).is_some(), "{text}");
        }
        for text in ["", "S", "1", "123456789S", "-1S", "1x", "1 S"] {
            assert!(of(text).is_none(), "{text}");
        }
    }
}
