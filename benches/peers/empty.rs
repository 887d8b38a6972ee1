//! An empty RPC of stock tonic: GetRole's messages, and nothing behind them.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use rolecache::proto::v1::{GetRoleRequest, GetRoleResponse, Source};
use tokio::net::TcpListener;
use tonic::{
    Status,
    body::Body,
    codegen::Service,
    server::{Grpc, NamedService, UnaryService},
    transport::{Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;

use crate::{protocol::Broken, rolecache::GET_ROLE};

/// What tonic generates for a service of one method.
#[derive(Clone)]
struct Empty;

struct GetRole;

impl UnaryService<GetRoleRequest> for GetRole {
    type Response = GetRoleResponse;
    type Future = Ready<Result<tonic::Response<GetRoleResponse>, Status>>;

    fn call(&mut self, request: tonic::Request<GetRoleRequest>) -> Self::Future {
        let user_id = request.into_inner().user_id;
        let source = Source::Cache.into();
        ready(Ok(tonic::Response::new(GetRoleResponse {
            user_id,
            role: "user".to_owned(),
            revision: 1,
            source,
            stale: false,
        })))
    }
}

impl NamedService for Empty {
    const NAME: &'static str = "rolecache.v1.RoleCacheService";
}

impl Service<Request<Body>> for Empty {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match request.uri().path() {
            GET_ROLE => Box::pin(async move {
                let mut grpc = Grpc::new(ProstCodec::default());
                Ok(grpc.unary(GetRole, request).await)
            }),
            _ => Box::pin(async { Ok(Response::new(Body::empty())) }),
        }
    }
}

/// Serves until it is killed; says where on standard output.
pub(crate) fn serve(listen: SocketAddr) -> Result<(), Broken> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(listen).await?;
        println!("{}", listener.local_addr()?);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let served = Server::builder().add_service(Empty).serve_with_incoming(incoming).await;
        served.map_err(|error| Broken(error.to_string()))
    })
}
