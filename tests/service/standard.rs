//! The standard services: health checking, and reflection in both versions.

use std::collections::BTreeSet;

use futures::{StreamExt, stream};
use prost::Message;
use prost_types::{DescriptorProto, FileDescriptorProto};
use tokio::time::timeout;
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::support::{
    gates::Gates,
    raw::SERVICE,
    server::{Db, PATIENCE, Setup, TestServer},
    watch::Watching,
};

on_both! { health_says_whether_reads_are_answered }

async fn channel(server: &TestServer) -> Channel {
    Channel::from_shared(format!("http://{}", server.address)).unwrap().connect().await.unwrap()
}

async fn check(health: &mut HealthClient<Channel>, service: &str) -> Result<ServingStatus, Status> {
    let request = HealthCheckRequest { service: service.into() };
    Ok(health.check(request).await?.into_inner().status())
}

async fn health_says_whether_reads_are_answered(db: Db) {
    let gates = Gates::default();
    let mut setup = Setup::new(&db).wrap(gates.guard());
    setup.max_staleness = std::time::Duration::from_secs(2);
    gates.head.close();
    let server = setup.start().await;
    gates.head.arrived().await;
    let mut health = HealthClient::new(channel(&server).await);
    for service in ["", SERVICE] {
        assert_eq!(check(&mut health, service).await.unwrap(), ServingStatus::NotServing, "before the first step");
    }
    assert_eq!(check(&mut health, "bot.v1.Nobody").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(check(&mut health, "grpc.health.v1.health").await.unwrap_err().code(), Code::NotFound);

    let request = HealthCheckRequest { service: SERVICE.into() };
    let mut watch = health.watch(request).await.unwrap().into_inner();
    let mut next = async || timeout(PATIENCE, watch.message()).await.unwrap().unwrap().map(|it| it.status());
    assert_eq!(next().await, Some(ServingStatus::NotServing));
    gates.head.open();
    assert_eq!(next().await, Some(ServingStatus::Serving));
    for service in ["", SERVICE] {
        assert_eq!(check(&mut health, service).await.unwrap(), ServingStatus::Serving);
    }
    gates.read_log.close();
    assert_eq!(next().await, Some(ServingStatus::NotServing), "past max_staleness");
    gates.read_log.open();
    assert_eq!(next().await, Some(ServingStatus::Serving));
    let stopping = tokio::spawn(server.stop());
    assert_eq!(next().await, Some(ServingStatus::NotServing), "it shuts down");
    stopping.await.unwrap().unwrap();
}

/// What a reflection service answers: the services, and the files by the names of what is in them.
macro_rules! reflect {
    ($version:ident, $server:expr) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let mut client = ServerReflectionClient::new(channel($server).await);
        let mut ask = async |question: MessageRequest| {
            let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
            let mut answers = client.server_reflection_info(stream::iter([request])).await?.into_inner();
            let answer = timeout(PATIENCE, answers.next()).await.unwrap().unwrap()?;
            Ok::<_, Status>(answer.message_response.unwrap())
        };
        let services = match ask(MessageRequest::ListServices(String::new())).await {
            Ok(MessageResponse::ListServicesResponse(list)) => {
                list.service.into_iter().map(|service| service.name).collect::<BTreeSet<_>>()
            }
            Ok(other) => panic!("{other:?}"),
            Err(status) => return assert_eq!(status.code(), Code::Unimplemented),
        };
        let mut files = Vec::new();
        for service in services.iter().cloned().chain(["rolecache.v1.RoleChange".to_owned()]) {
            match ask(MessageRequest::FileContainingSymbol(service)).await.unwrap() {
                MessageResponse::FileDescriptorResponse(found) => files.extend(found.file_descriptor_proto),
                other => panic!("{other:?}"),
            }
        }
        let question = MessageRequest::FileByFilename("rolecache/v1/rolecache.proto".into());
        assert!(matches!(ask(question).await.unwrap(), MessageResponse::FileDescriptorResponse(_)));
        let nobody = ask(MessageRequest::FileContainingSymbol("bot.v1.Nobody".into())).await;
        assert!(
            matches!(nobody, Err(ref status) if status.code() == Code::NotFound)
                || matches!(nobody, Ok(MessageResponse::ErrorResponse(_)))
        );
        (services, files)
    }};
}

/// Both versions list our service, health and themselves, and describe every message and method of the contract.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_describes_everything() {
    let db = Db::sqlite();
    let server = db.serve().await;
    let contract = prost_types::FileDescriptorSet::decode(rolecache::proto::FILE_DESCRIPTOR_SET).unwrap();
    let ours = contract.file.iter().find(|file| file.package() == "rolecache.v1").unwrap();
    let check = |version: &str, (services, files): (BTreeSet<String>, Vec<Vec<u8>>)| {
        for service in [SERVICE, "grpc.health.v1.Health", &format!("grpc.reflection.{version}.ServerReflection")] {
            assert!(services.contains(service), "{service} is not in {services:?}");
        }
        let files: Vec<_> = files.iter().map(|file| FileDescriptorProto::decode(&file[..]).unwrap()).collect();
        let told = files.iter().find(|file| file.package() == "rolecache.v1").expect("the file of our service");
        let names =
            |messages: &[DescriptorProto]| messages.iter().map(|message| message.name().to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&told.message_type), names(&ours.message_type));
        assert_eq!(told.service[0].method.len(), 11);
        assert!(files.iter().any(|file| file.package() == "grpc.health.v1"));
    };
    check("v1", reflect!(v1, &server));
    check("v1alpha", reflect!(v1alpha, &server));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_reflection_there_is_none() {
    let db = Db::sqlite();
    let mut setup = Setup::new(&db);
    setup.reflection = false;
    let server = setup.serve().await;
    async fn v1(server: &TestServer) {
        let answer = reflect!(v1, server);
        panic!("reflection answers: {answer:?}");
    }
    async fn v1alpha(server: &TestServer) {
        let answer = reflect!(v1alpha, server);
        panic!("reflection answers: {answer:?}");
    }
    v1(&server).await;
    v1alpha(&server).await;
    Watching::open(server.client.clone(), Default::default()).await.expect("the rest is there");
}
