//! `healthcheck`: for containers and supervisors, over grpc.health.v1.

use clap::Args;
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{
    Exit, Failure,
    client::{self, ClientArgs},
    output::{self, Format},
};

#[derive(Args, Debug)]
pub(super) struct HealthArgs {
    /// Which service, such as rolecache.v1.RoleCacheService; without it the server as a whole
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    service: String,
    #[command(flatten)]
    client: ClientArgs,
}

pub(super) async fn run(args: HealthArgs) -> Result<(), Failure> {
    let mut health = HealthClient::new(args.client.channel().await?);
    let mut request = Request::new(HealthCheckRequest { service: args.service.clone() });
    request.set_timeout(args.client.timeout);
    let status = match tokio::time::timeout(args.client.timeout, health.check(request)).await {
        Ok(Ok(answer)) => answer.into_inner().status(),
        Ok(Err(status)) if status.code() == Code::NotFound => ServingStatus::ServiceUnknown,
        Ok(Err(status)) => {
            let failure = client::failure(&status, None);
            return Err(Failure { exit: Exit::Unavailable, ..failure });
        }
        Err(_) => return Err(Failure::new(Exit::Unavailable, "no answer in time")),
    };
    match args.client.output {
        Format::Text => output::line(status.as_str_name())?,
        Format::Json => output::line(serde_json::json!({ "status": status.as_str_name() }))?,
    }
    if status == ServingStatus::Serving { Ok(()) } else { Err(Failure::new(Exit::Unavailable, "")) }
}
