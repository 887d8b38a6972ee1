//! Who may make which call: the table of RPCs and scopes, and the log of what was denied.

use std::sync::Arc;

use http::{HeaderMap, header::AUTHORIZATION};
use tokio::sync::watch;

use super::{fault::Fault, peer::Peer};
use crate::{
    access::{Access, Caller, Denials, Denied, Scope},
    proto::Method,
};

/// Where it is decided who comes in.
pub(super) struct Door {
    access: Arc<Access>,
    /// Of those who are nobody's. Each caller has its own, so that nobody hides what another one tries.
    strangers: Denials,
}

/// Who makes a call, and from where; in the extensions of a request that was let in.
#[derive(Clone)]
pub(super) struct Asker {
    pub(super) caller: Arc<Caller>,
    pub(super) peer: Arc<Peer>,
}

/// What a call asks for. An RPC of the contract that is not in here does not compile.
fn scope(method: Method) -> Scope {
    match method {
        Method::GetRole | Method::BatchGetRoles => Scope::Read,
        Method::WatchRoleChanges => Scope::Watch,
        Method::ListUsers | Method::ListRoleChanges | Method::GetMailbox => Scope::List,
        Method::SetRole | Method::DeleteUser => Scope::Write,
        Method::RegisterMailbox => Scope::Mailbox,
        Method::TransferAdmin => Scope::Transfer,
        Method::Stats => Scope::Stats,
    }
}

impl Door {
    pub(super) fn new(access: Arc<Access>) -> Self {
        Self { access, strangers: Denials::default() }
    }

    /// Tells whenever callers may have been revoked, from now on.
    pub(super) fn replaced(&self) -> watch::Receiver<()> {
        self.access.replaced()
    }

    /// Whether the call changes something.
    pub(super) fn writes(method: Method) -> bool {
        matches!(scope(method), Scope::Write | Scope::Mailbox | Scope::Transfer)
    }

    /// Who makes this call, if they may make it now.
    pub(super) fn admit(&self, headers: &HeaderMap, peer: &Peer, method: Method) -> Result<Arc<Caller>, Fault> {
        let deny = |caller: Option<&Caller>, fault: Fault| {
            self.log(caller, peer, method, &fault);
            Err(fault)
        };
        let admitted = token(headers).and_then(|token| self.access.admit(token, &peer.names));
        let caller = match admitted {
            Ok(caller) => caller,
            Err(Denied::NoCredentials) => return deny(None, Fault::NoCredentials),
            Err(Denied::BadCredentials) => return deny(None, Fault::BadCredentials),
        };
        // Denied calls count as well.
        if let Err(after) = caller.count_call() {
            return deny(Some(&caller), Fault::RateLimited { after });
        }
        let scope = scope(method);
        if !caller.scopes.contains(scope) {
            return deny(Some(&caller), Fault::ScopeMissing { scope: scope.to_string() });
        }
        Ok(caller)
    }

    /// Says that a call was denied.
    pub(super) fn log(&self, caller: Option<&Caller>, peer: &Peer, method: Method, fault: &Fault) {
        let Some(unlogged) = caller.map_or(&self.strangers, Caller::denials).count() else { return };
        let caller = caller.map_or("unknown", |caller| &*caller.name);
        tracing::warn!(
            target: "rolecache::audit",
            caller,
            peer = %peer.address,
            method = method.as_str(),
            reason = %fault.denial(),
            unlogged,
            "denied"
        );
    }
}

/// Says that something which a caller had open has ended with its credential.
pub(super) fn log_ended(caller: &Caller, method: Method) {
    let Some(unlogged) = caller.denials().count() else { return };
    tracing::warn!(
        target: "rolecache::audit",
        caller = &*caller.name,
        method = method.as_str(),
        reason = %Fault::BadCredentials.denial(),
        unlogged,
        "denied from now on"
    );
}

/// The bearer token of a call, if it has one.
fn token(headers: &HeaderMap) -> Result<Option<&[u8]>, Denied> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let (scheme, token) = value.as_bytes().split_at_checked("bearer ".len()).ok_or(Denied::BadCredentials)?;
    let is_alone = values.next().is_none();
    if is_alone && scheme.eq_ignore_ascii_case(b"bearer ") { Ok(Some(token)) } else { Err(Denied::BadCredentials) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token_of(values: &[&str]) -> Result<Option<Vec<u8>>, Denied> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        token(&headers).map(|token| token.map(<[u8]>::to_vec))
    }

    #[test]
    fn a_bearer_token_comes_alone_and_in_its_form() {
        assert_eq!(token_of(&[]), Ok(None));
        assert_eq!(token_of(&["Bearer abc"]), Ok(Some(b"abc".to_vec())));
        assert_eq!(token_of(&["bearer "]), Ok(Some(Vec::new())));
        for values in [&["Basic abc"][..], &["Bearer"], &["abc"], &[""], &["Bearer a", "Bearer a"]] {
            assert_eq!(token_of(values), Err(Denied::BadCredentials), "{values:?}");
        }
    }
}
