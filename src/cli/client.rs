//! Talking to a running server: how long to wait, and what its errors mean for the caller.

use std::{error::Error, future::Future, time::Duration};

use clap::Args;
use tonic::{
    Code, Request, Response, Status,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

use super::{
    Exit, Failure,
    door::{Bearer, DoorArgs},
    output::{Format, plain},
};
use crate::proto::v1::role_cache_service_client::RoleCacheServiceClient;

/// A page of 1,000 changes with the longest of reasons stays far below.
const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// How long past the deadline, which the server was told, to wait for its typed answer.
const GRACE: Duration = Duration::from_millis(200);

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server and output")]
pub(super) struct ClientArgs {
    #[command(flatten)]
    door: DoorArgs,

    /// How long to wait for an answer. Too small a time ends writes of which nobody knows whether they happened.
    #[arg(long, env = "ROLECACHE_TIMEOUT", value_name = "DURATION", default_value = "10s", value_parser = parse_timeout)]
    pub(super) timeout: Duration,

    /// How answers look
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(super) output: Format,
}

pub(super) type Rpc = RoleCacheServiceClient<InterceptedService<Channel, Bearer>>;

/// A connection, and the deadline of each call over it.
#[derive(Clone)]
pub(super) struct Client {
    rpc: Rpc,
    timeout: Duration,
}

// === impl ClientArgs ===

impl ClientArgs {
    pub(super) async fn channel(&self) -> Result<Channel, Failure> {
        let usage = |error: tonic::transport::Error| Failure::new(Exit::Usage, root_cause(&error));
        let mut endpoint = Endpoint::from(self.door.address.clone())
            .user_agent(concat!("rolecache/", env!("CARGO_PKG_VERSION")))
            .map_err(usage)?
            // A watch on a dead network would otherwise wait for ever.
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5));
        if let Some(tls) = self.door.tls()? {
            endpoint = endpoint.tls_config(tls).map_err(usage)?;
        }
        let (why, is_tls) = match tokio::time::timeout(self.timeout, endpoint.connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(error)) => (root_cause(&error), is_of_tls(&error)),
            Err(_) => (format!("no answer within {}", humantime::format_duration(self.timeout)), false),
        };
        let address = self.door.address.to_string();
        let address = address.trim_end_matches('/');
        let hint = match is_tls {
            true => "--tls-ca names a file of who signed the server's certificate, --tls-server-name the name in it",
            false => "is `rolecache serve` running there? --address says where else",
        };
        Err(Failure::new(Exit::Unavailable, format!("cannot connect to {address}: {why}\nhint: {hint}")))
    }

    pub(super) async fn connect(&self) -> Result<Client, Failure> {
        let bearer = self.door.bearer()?;
        let rpc = RoleCacheServiceClient::with_interceptor(self.channel().await?, bearer)
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Client { rpc, timeout: self.timeout })
    }
}

// === impl Client ===

impl Client {
    pub(super) fn rpc(&self) -> Rpc {
        self.rpc.clone()
    }

    /// A request with our deadline, which the server reads too.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// Waits for an answer, at most until the deadline.
    pub(super) async fn answer<R>(
        &self,
        call: impl Future<Output = Result<Response<R>, Status>>,
    ) -> Result<R, Failure> {
        self.try_answer(call).await.map_err(|status| failure(&status, None))
    }

    /// The same of a write that came with this request id, by which it can be repeated without a second effect.
    pub(super) async fn written<R>(
        &self,
        request_id: &str,
        call: impl Future<Output = Result<Response<R>, Status>>,
    ) -> Result<R, Failure> {
        self.try_answer(call).await.map_err(|status| failure(&status, Some(request_id)))
    }

    pub(super) async fn try_answer<R>(
        &self,
        call: impl Future<Output = Result<Response<R>, Status>>,
    ) -> Result<R, Status> {
        match tokio::time::timeout(self.timeout + GRACE, call).await {
            // tonic's own word for a passed deadline is CANCELLED.
            Ok(Err(status)) if status.code() != Code::Cancelled || reason(&status).is_some() => Err(status),
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(_)) | Err(_) => {
                let timeout = humantime::format_duration(self.timeout);
                Err(Status::deadline_exceeded(format!("no answer within {timeout}")))
            }
        }
    }
}

/// The reason of the contract's table of errors; none where the error is not the service's own.
pub(super) fn reason(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

/// The server's wish of how long to wait before asking again.
pub(super) fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_details_retry_info().and_then(|info| info.retry_delay)
}

/// What an error means for the caller, in the server's sentence, with its reason and what to do.
pub(super) fn failure(status: &Status, request_id: Option<&str>) -> Failure {
    let reason = reason(status);
    let exit = match (status.code(), reason.as_deref()) {
        // Asked again as it is, it would be too large again.
        (_, Some("MESSAGE_TOO_LARGE")) => Exit::Refused,
        (_, Some("OUTCOME_UNKNOWN")) => Exit::Unavailable,
        // The transport's own: a reset connection, or tonic's word for a passed deadline.
        (Code::Cancelled | Code::Unknown, None) => Exit::Unavailable,
        (Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted, _) => Exit::Unavailable,
        _ => Exit::Refused,
    };
    let mut message = match plain(status.message()) {
        said if said.is_empty() => status.code().description().to_owned(),
        said => said.into_owned(),
    };
    match &reason {
        Some(reason) => message += &format!(" ({})", plain(reason)),
        None => message += &status.source().map(|error| format!(": {}", root_cause(error))).unwrap_or_default(),
    }
    if let Some(hint) = hint(status, reason.as_deref(), request_id) {
        message += &format!("\nhint: {hint}");
    }
    Failure { exit, message }
}

fn hint(status: &Status, reason: Option<&str>, request_id: Option<&str>) -> Option<String> {
    let doubtful = matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled | Code::Unknown)
        || (status.code() == Code::Unavailable && reason.is_none());
    if let (true, Some(id)) = (doubtful, request_id) {
        return Some(format!("it may have happened; the same command with --request-id {id} makes it happen once"));
    }
    if let Some(delay) = retry_delay(status) {
        return Some(format!("worth another try in {}", humantime::format_duration(delay)));
    }
    if reason == Some("REVISION_COMPACTED") {
        let oldest = status.get_details_error_info().and_then(|info| info.metadata.get("oldest").cloned());
        let oldest = oldest.map_or_else(String::new, |oldest| format!("--after {} still works; ", plain(&oldest)));
        return Some(format!("{oldest}a watch starts over with --snapshot"));
    }
    let hint = match (status.code(), reason) {
        (_, Some("NO_CREDENTIALS")) => "--token-file, or ROLECACHE_TOKEN in the environment, shows who you are",
        (_, Some("BAD_CREDENTIALS")) => {
            "the server does not know the token, or not any more; it may have another by now"
        }
        (_, Some("SCOPE_MISSING")) => "who keeps the server's credentials file can add a scope to the caller",
        (_, Some("USER_BUSY")) => "nothing was changed; worth another try",
        (_, Some("MESSAGE_TOO_LARGE")) => "ask for fewer at once",
        (_, Some("HISTORY_CHANGED")) => "a watch starts over with --snapshot",
        (Code::DeadlineExceeded, _) => "--timeout gives it longer",
        (Code::Unimplemented, None) => "is it a rolecache server of this version?",
        (Code::Unavailable | Code::ResourceExhausted, _) => "worth another try",
        _ => return None,
    };
    Some(hint.to_owned())
}

/// The innermost error: the outer ones say "transport error".
fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Whether TLS is what a connection failed at.
fn is_of_tls(error: &(dyn Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |error| (*error).source());
    let mut inner =
        causes.filter_map(|cause| cause.downcast_ref::<std::io::Error>()).filter_map(|cause| cause.get_ref());
    inner.any(|cause| cause.is::<rustls::Error>())
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("must be more than 0".into()),
        Ok(timeout) if timeout > Duration::from_secs(3_600) => Err("must be at most 1h".into()),
        Ok(timeout) => Ok(timeout),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn status(code: Code, reason: &str) -> Status {
        let details = ErrorDetails::with_error_info(reason, "rolecache", HashMap::<String, String>::new());
        Status::with_error_details(code, "a sentence", details)
    }

    #[test]
    fn an_error_becomes_an_exit_code_and_a_sentence() {
        for (status, exit, said) in [
            (status(Code::FailedPrecondition, "ROLE_MISMATCH"), Exit::Refused, "a sentence (ROLE_MISMATCH)"),
            (status(Code::InvalidArgument, "INVALID_FIELD"), Exit::Refused, "a sentence (INVALID_FIELD)"),
            (status(Code::Unavailable, "STORE_UNREACHABLE"), Exit::Unavailable, "worth another try"),
            (status(Code::ResourceExhausted, "OVERLOADED"), Exit::Unavailable, "(OVERLOADED)"),
            (status(Code::ResourceExhausted, "MESSAGE_TOO_LARGE"), Exit::Refused, "ask for fewer"),
            (status(Code::DeadlineExceeded, "DEADLINE"), Exit::Unavailable, "--request-id r1"),
            (status(Code::Unknown, "OUTCOME_UNKNOWN"), Exit::Unavailable, "--request-id r1"),
            (status(Code::Internal, "BUG"), Exit::Refused, "a sentence (BUG)"),
            (Status::unavailable(""), Exit::Unavailable, "--request-id r1"),
            (Status::cancelled("Timeout expired"), Exit::Unavailable, "--request-id r1"),
        ] {
            let failure = failure(&status, Some("r1"));
            assert_eq!(failure.exit, exit, "{status}");
            assert!(failure.message.contains(said), "{said} is not in: {}", failure.message);
        }
    }

    #[test]
    fn a_retry_delay_is_passed_on() {
        let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(1500)));
        let status = Status::with_error_details(Code::Unavailable, "down", details);
        assert!(failure(&status, None).message.ends_with("hint: worth another try in 1s 500ms"));
    }
}
