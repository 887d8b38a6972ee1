//! The end of a server: in time whatever hangs, and with a word for everybody who listens.

use std::time::{Duration, Instant};

use futures::StreamExt;
use rolecache::proto::v1::{
    GetRoleRequest, SetRoleRequest, WatchRoleChangesRequest, role_cache_service_client::RoleCacheServiceClient,
    watch_role_changes_response::Event,
};
use tokio::time::timeout;
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::{
    support::{
        gates::Gates,
        proxy::Proxy,
        raw::{Raw, Wire, frame},
        server::{Db, PATIENCE, Setup},
        watch::{Watching, reason},
    },
    watch::every,
};

on_both! {
    calls_in_flight_finish_and_watches_are_told,
    calls_that_cross_the_goodbye_are_refused_by_a_word,
    with_nobody_in_flight_it_ends_at_once,
}

const SELDOM: Duration = Duration::from_secs(3_600);
/// As promised: from the signal to the end.
const LIMIT: Duration = Duration::from_secs(10);

#[track_caller]
fn says_shutting_down(status: &Status) {
    let (code, name, _) = reason(status);
    assert_eq!((code, &*name), (Code::Unavailable, "SHUTTING_DOWN"));
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
}

async fn calls_in_flight_finish_and_watches_are_told(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let revision = server.set(1, "admin").await.revision;
    let mut watch = server.watch(every(SELDOM)).await;
    let mut watches = Vec::new();
    for _ in 0..20 {
        watches.push(server.watch(every(SELDOM)).await);
    }
    gates.write.close();
    gates.roles.close();
    let mut client = server.client.clone();
    let writing = tokio::spawn({
        let mut client = client.clone();
        async move { client.set_role(SetRoleRequest { user_id: 2, role: "admin".into(), ..Default::default() }).await }
    });
    let reading = tokio::spawn({
        let mut client = client.clone();
        async move { client.get_role(GetRoleRequest { user_id: 3, ..Default::default() }).await }
    });
    gates.write.arrived().await;
    gates.roles.arrived().await;
    let stopping = tokio::spawn(server.stop());
    // Watches end at once, whatever calls are in flight.
    match watch.next().await {
        Event::Heartbeat(last) => {
            assert_eq!(last.revision, revision);
            assert!(!last.resume_token.is_empty());
        }
        other => panic!("{other:?} where the last heartbeat was due"),
    }
    says_shutting_down(&watch.until_end().await);
    for watch in &mut watches {
        assert!(matches!(watch.next().await, Event::Heartbeat(_)));
        says_shutting_down(&watch.until_end().await);
    }
    // A new call is refused, by a word or by a closed door, which the client calls CANCELLED.
    let refused = client.get_role(GetRoleRequest { user_id: 1, ..Default::default() }).await.unwrap_err();
    assert!(matches!(refused.code(), Code::Unavailable | Code::Cancelled), "{refused:?}");
    assert!(!writing.is_finished() && !reading.is_finished() && !stopping.is_finished());
    gates.write.open();
    gates.roles.open();
    let written = timeout(PATIENCE, writing).await.unwrap().unwrap().unwrap().into_inner();
    assert!(written.change.is_some());
    assert_eq!(timeout(PATIENCE, reading).await.unwrap().unwrap().unwrap().into_inner().role, "user");
    timeout(PATIENCE, stopping).await.unwrap().unwrap().unwrap();
    // The token of the last heartbeat leads on, at the next server.
    let server = db.serve().await;
    let mut next = server.watch(WatchRoleChangesRequest { after: watch.resume_token(), ..Default::default() }).await;
    assert!(next.started.resumed);
    assert_eq!(next.next_commit().await.changes[0].user_id, 2);
}

/// Their clients have not heard yet that the server stops, and send them on the connections that they have.
async fn calls_that_cross_the_goodbye_are_refused_by_a_word(db: Db) {
    let server = db.serve().await;
    let mut watch = server.watch(every(SELDOM)).await;
    let get = frame(&GetRoleRequest { user_id: 1, ..Default::default() });
    let set = frame(&SetRoleRequest { user_id: 1, role: "admin".into(), ..Default::default() });
    let mut clients = Vec::new();
    for (method, body) in [("GetRole", get.clone()), ("SetRole", set)] {
        let wire = Wire::default();
        let mut client = Raw::connect_over(server.address, &wire).await;
        // After which all is said that is said at the start of a connection.
        assert_eq!(client.send("GetRole", get.clone()).await.status.unwrap().code(), Code::Ok);
        wire.deafen(true);
        clients.push((wire, client, method, body));
    }
    let stopping = tokio::spawn(server.stop());
    says_shutting_down(&watch.until_end().await);
    for (wire, mut client, method, body) in clients {
        let call = wire.sends(|| tokio::spawn(async move { client.send(method, body).await })).await;
        // A server that says goodbye waits until that has been heard.
        assert!(!stopping.is_finished() && !call.is_finished());
        wire.deafen(false);
        says_shutting_down(&call.await.unwrap().status.unwrap());
    }
    timeout(PATIENCE, stopping).await.unwrap().unwrap().unwrap();
    assert_eq!(db.sql("select count(*) from users"), "0", "a call that is refused changes nothing");
}

/// A client of reflection keeps its stream open for as long as it likes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_reflection_stream_does_not_hold_it_up() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest,
    };
    let db = Db::sqlite();
    let server = db.serve().await;
    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
    let question = MessageRequest::ListServices(String::new());
    let question = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
    let questions = futures::stream::iter([question]).chain(futures::stream::pending());
    let mut reflection = ServerReflectionClient::new(channel);
    let mut answers = reflection.server_reflection_info(questions).await.unwrap().into_inner();
    assert!(timeout(PATIENCE, answers.message()).await.unwrap().unwrap().is_some());
    timeout(AT_ONCE, server.stop()).await.expect("reflection does not hold it up").unwrap();
    says_shutting_down(&answers.message().await.unwrap_err());
}

/// Half of what calls in flight are given.
const AT_ONCE: Duration = Duration::from_secs(4);

async fn with_nobody_in_flight_it_ends_at_once(db: Db) {
    let server = db.serve().await;
    let idle = crate::support::server::client(server.address).await;
    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    let mut told = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(told.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    timeout(AT_ONCE, server.stop()).await.expect("neither an idle client nor one of health holds it up").unwrap();
    let mut last = None;
    while let Ok(Some(status)) = told.message().await {
        last = Some(status.status());
    }
    assert_eq!(last, Some(ServingStatus::NotServing));
    drop(idle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_ends_in_time_with_a_thousand_watches_one_stuck_and_the_store_frozen() {
    let db = Db::postgres().await;
    let proxy = Proxy::before(&db.url()).await;
    let server = Setup { url: proxy.url.clone(), ..Setup::new(&db) }.serve().await;
    let mut watches = Vec::new();
    for _ in 0..10 {
        let client = crate::support::server::client(server.address).await;
        for _ in 0..100 {
            watches.push(Watching::open(client.clone(), every(SELDOM)).await.unwrap());
        }
    }
    // One that never reads, and has more to be sent than fits.
    let endpoint = Channel::from_shared(format!("http://{}", server.address)).unwrap();
    let endpoint = endpoint.initial_stream_window_size(1_000).initial_connection_window_size(65_535);
    let mut client = RoleCacheServiceClient::new(endpoint.connect().await.unwrap());
    let mut stuck = client.watch_role_changes(every(SELDOM)).await.unwrap().into_inner();
    let mut last = 0;
    for n in 0..50 {
        last = server.set(7, if n % 2 == 0 { "admin" } else { "user" }).await.revision;
    }
    for watch in &mut watches {
        watch.until(last).await;
    }
    proxy.freeze();
    // A call that hangs on the frozen store.
    let hanging = tokio::spawn({
        let mut client = server.client.clone();
        async move { client.set_role(SetRoleRequest { user_id: 8, role: "admin".into(), ..Default::default() }).await }
    });
    // The server notices that its store is out of reach.
    for watch in &mut watches {
        assert!(matches!(watch.next().await, Event::Heartbeat(_)));
    }
    let begun = Instant::now();
    let stopping = tokio::spawn(server.stop());
    for watch in &mut watches {
        assert!(matches!(watch.next().await, Event::Heartbeat(it) if it.revision == last));
        says_shutting_down(&watch.until_end().await);
    }
    println!("1,000 watches ended after {:?}", begun.elapsed());
    timeout(PATIENCE, stopping).await.unwrap().unwrap().unwrap();
    let took = begun.elapsed();
    println!("the server ended after {took:?}");
    assert!(took <= LIMIT, "it took {took:?}");
    timeout(PATIENCE, hanging).await.unwrap().unwrap().unwrap_err();
    // Nobody could tell the stuck one: its connection was cut.
    let cut = async {
        loop {
            match stuck.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a watch that ends well"),
                Err(status) => return status,
            }
        }
    };
    let cut = timeout(PATIENCE, cut).await.unwrap();
    assert!(cut.get_details_error_info().is_none(), "{cut:?}");
}
