//! The days that the original system told, replayed through gRPC figure by figure.

use std::collections::BTreeMap;

use rolecache::proto::v1::{
    GetMailboxRequest, GetRoleRequest, GetRoleResponse, RegisterMailboxRequest, RoleChange, SetRoleRequest, Source,
    StatsRequest, StatsResponse, TransferAdminRequest, role_cache_service_client::RoleCacheServiceClient,
};
use serde_json::Value;
use tonic::transport::Channel;

use crate::{
    resume::Random,
    support::{
        child::ChildServer,
        server::{Db, Setup, TestServer},
    },
};

on_both! {
    the_day_goes_as_told_step_by_step,
    a_whole_day_has_the_hits_that_it_can_have,
    a_whole_day_in_complete_mode_has_no_miss,
    the_cache_grows_as_told,
    the_checks_of_the_day_hold,
    a_role_that_the_cache_cannot_keep_is_read_from_the_store,
}

type Client = RoleCacheServiceClient<Channel>;

fn read(file: &str) -> Value {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios").join(file);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn int(value: &Value) -> i64 {
    value.as_i64().unwrap_or_else(|| panic!("{value} is no integer"))
}

async fn get(client: &Client, user_id: i64) -> GetRoleResponse {
    client.clone().get_role(GetRoleRequest { user_id, ..Default::default() }).await.unwrap().into_inner()
}

async fn set(client: &Client, user_id: i64, role: &str) {
    let request = SetRoleRequest { user_id, role: role.into(), ..Default::default() };
    assert!(client.clone().set_role(request).await.unwrap().into_inner().change.is_some());
}

fn check_stats(at: &str, expected: &Value, stats: &StatsResponse) {
    for (name, expected) in expected.as_object().unwrap() {
        let found = match &**name {
            "hits" => stats.hits,
            "misses" => stats.misses,
            "cache_size" => stats.cache_size,
            "events_processed" => stats.events_processed,
            "event_handlers" => stats.event_handlers,
            "hit_rate_percent" => {
                let found = (stats.hit_rate_percent * 100.0).round() / 100.0;
                assert_eq!(found, expected.as_f64().unwrap(), "{at}: hit_rate_percent");
                continue;
            }
            other => panic!("{at}: no figure {other}"),
        };
        assert_eq!(found, int(expected), "{at}: {name}");
    }
}

fn check_change(at: &str, expected: &Value, change: &RoleChange) {
    for (name, expected) in expected.as_object().unwrap() {
        let found: Value = match &**name {
            "kind" => change.kind().as_str_name().into(),
            "user_id" => change.user_id.into(),
            "old_role" => change.old_role.clone().into(),
            "new_role" => change.new_role.clone().into(),
            "username" => change.username.clone().into(),
            "transfer" => {
                let transfer = change.transfer.as_ref().unwrap();
                serde_json::json!({
                    "from_user_id": transfer.from_user_id,
                    "to_user_id": transfer.to_user_id,
                    "mailbox_id": transfer.mailbox_id,
                })
            }
            other => panic!("{at}: no field {other}"),
        };
        assert_eq!(&found, expected, "{at}: {name}");
    }
}

fn check_answer(at: &str, expected: &Value, answer: &GetRoleResponse) {
    if let Some(role) = expected.get("role") {
        assert_eq!(role, &answer.role, "{at}");
    }
    if let Some(source) = expected.get("source") {
        assert_eq!(source, answer.source().as_str_name(), "{at}");
    }
}

async fn the_day_goes_as_told_step_by_step(db: Db) {
    let day = read("day.json");
    let server = db.serve().await;
    let mut client = server.client.clone();
    let mut watch = server.watch(Default::default()).await;
    for step in day["steps"].as_array().unwrap() {
        let (at, expected) = (step["at"].as_str().unwrap(), &step["expect"]);
        let (what, with) = step["do"].as_object().unwrap().iter().next().unwrap();
        match &**what {
            "start" => {
                client.register_mailbox(RegisterMailboxRequest { mailbox_id: 1, creator_id: 123 }).await.unwrap();
            }
            "get" => check_answer(at, expected, &server.get(int(with)).await),
            "get_many" => {
                for asked in with.as_array().unwrap() {
                    for _ in 0..int(&asked["times"]) {
                        check_answer(at, expected, &server.get(int(&asked["user_id"])).await);
                    }
                }
            }
            "get_range" => {
                for user in int(&with["first"])..=int(&with["last"]) {
                    check_answer(at, expected, &server.get(user).await);
                }
            }
            "set" => {
                let request = SetRoleRequest {
                    user_id: int(&with["user_id"]),
                    role: with["role"].as_str().unwrap().into(),
                    username: with["username"].as_str().unwrap().into(),
                    ..Default::default()
                };
                server.try_set(request).await.unwrap();
            }
            "transfer" => {
                let request = TransferAdminRequest {
                    from_user_id: int(&with["from_user_id"]),
                    to_user_id: int(&with["to_user_id"]),
                    mailbox_id: Some(int(&with["mailbox_id"])),
                    ..Default::default()
                };
                client.transfer_admin(request).await.unwrap();
            }
            "stats" => {}
            other => panic!("{at}: nothing is known of {other}"),
        }
        if let Some(changes) = expected.get("watch") {
            let commit = watch.next_commit().await;
            assert_eq!(commit.changes.len(), changes.as_array().unwrap().len(), "{at}");
            for (expected, change) in changes.as_array().unwrap().iter().zip(&commit.changes) {
                check_change(at, expected, change);
            }
        }
        check_stats(at, &expected["stats"], &server.stats().await);
        // From the store itself: such reads are neither hits nor misses, and the figures that follow leave them out.
        for (user, role) in expected.get("roles_after").and_then(Value::as_object).into_iter().flatten() {
            let request =
                GetRoleRequest { user_id: user.parse().unwrap(), fully_consistent: true, ..Default::default() };
            assert_eq!(role, &server.try_get(request).await.unwrap().role, "{at}");
        }
        for (mailbox, creator) in expected.get("mailbox_creator_after").and_then(Value::as_object).into_iter().flatten()
        {
            let request = GetMailboxRequest { mailbox_id: mailbox.parse().unwrap() };
            assert_eq!(client.get_mailbox(request).await.unwrap().into_inner().creator_id, int(creator), "{at}");
        }
    }
    assert_eq!(watch.changes().len(), 3);
    watch.check();
}

/// One request of a day.
#[derive(Clone, Copy)]
enum Asked {
    Get(i64),
    /// Another role than the one it has.
    Change(i64, &'static str),
}

/// `requests` reads of `users` users, each at least once and in random order, and `events` role changes of users that
/// have been read.
fn trace(random: &mut Random, requests: usize, users: i64, events: usize) -> Vec<Asked> {
    let mut reads: Vec<i64> = (1..=users).collect();
    reads.extend((users as usize..requests).map(|_| 1 + random.below(users as u64) as i64));
    for at in (1..reads.len()).rev() {
        reads.swap(at, random.below(at as u64 + 1) as usize);
    }
    let mut trace: Vec<Asked> = reads.into_iter().map(Asked::Get).collect();
    for event in 0..events {
        let at = trace.len() / events * event + 1 + random.below(trace.len() as u64 / events as u64 / 2) as usize;
        let read: Vec<i64> = trace[..at]
            .iter()
            .filter_map(|asked| if let Asked::Get(user) = asked { Some(*user) } else { None })
            .collect();
        let user = read[random.below(read.len() as u64) as usize];
        let changed = trace.iter().filter(|asked| matches!(asked, Asked::Change(it, _) if *it == user)).count();
        trace.insert(at, Asked::Change(user, if changed == 0 { "admin" } else { "moderator" }));
    }
    trace
}

/// Replays a trace: users beside one another, what one user is asked in its order.
async fn replay(client: &Client, trace: &[Asked]) {
    const LANES: usize = 8;
    let mut lanes: Vec<Vec<Asked>> = vec![Vec::new(); LANES];
    for asked in trace {
        let (Asked::Get(user) | Asked::Change(user, _)) = asked;
        lanes[*user as usize % LANES].push(*asked);
    }
    let lanes = lanes.into_iter().map(|lane| {
        let client = client.clone();
        tokio::spawn(async move {
            let mut roles: BTreeMap<i64, &str> = BTreeMap::new();
            for asked in lane {
                match asked {
                    Asked::Get(user) => {
                        let expected = roles.get(&user).copied().unwrap_or("user");
                        assert_eq!(get(&client, user).await.role, expected);
                    }
                    Asked::Change(user, role) => {
                        set(&client, user, role).await;
                        roles.insert(user, role);
                    }
                }
            }
        })
    });
    for lane in lanes.collect::<Vec<_>>() {
        lane.await.unwrap();
    }
}

async fn whole_day(server: &TestServer, expected: &str) {
    let day = read("day.json");
    let day = &day["whole_day"];
    let number = |name: &str| int(&day[name]);
    let mut random = Random::from_seed(20_240_314);
    let trace = trace(&mut random, number("requests") as usize, number("users"), number("changes") as usize);
    replay(&server.client, &trace).await;
    let stats = server.stats().await;
    check_stats(expected, &day[expected], &stats);
    assert_eq!(stats.events_processed, number("changes"));
}

async fn a_whole_day_has_the_hits_that_it_can_have(db: Db) {
    let server = db.serve().await;
    whole_day(&server, "lazy").await;
    assert_eq!(server.stats().await.cache_size, 1_050);
}

async fn a_whole_day_in_complete_mode_has_no_miss(db: Db) {
    whole_day(&Setup::new(&db).complete().serve().await, "complete").await;
}

async fn the_cache_grows_as_told(db: Db) {
    let kind = db.is_postgres();
    for day in read("growth.json")["days"].as_array().unwrap() {
        let db = if kind { Db::postgres().await } else { Db::sqlite() };
        let server = db.serve().await;
        let at = format!("day {}", day["day"]);
        let known: Vec<Asked> = (1..=int(&day["known_before"])).map(Asked::Get).collect();
        replay(&server.client, &known).await;
        let before = server.stats().await;
        let mut random = Random::from_seed(int(&day["day"]) as u64);
        let trace =
            trace(&mut random, int(&day["requests"]) as usize, int(&day["users"]), int(&day["events"]) as usize);
        replay(&server.client, &trace).await;
        let mut stats = server.stats().await;
        stats.hits -= before.hits;
        stats.misses -= before.misses;
        stats.hit_rate_percent = stats.hits as f64 / (stats.hits + stats.misses) as f64 * 100.0;
        let figures = ["hits", "misses", "hit_rate_percent", "cache_size"];
        let expected: Value = figures.iter().map(|figure| ((*figure).to_owned(), day[*figure].clone())).collect();
        check_stats(&at, &expected, &stats);
        assert_eq!(stats.events_processed, int(&day["events"]), "{at}");
    }
}

async fn the_checks_of_the_day_hold(db: Db) {
    let server = db.serve().await;
    let new = server.get(9_999).await;
    assert_eq!((&*new.role, new.source()), ("user", Source::Store));
    assert_eq!(server.get(9_999).await.source(), Source::Cache);

    assert_eq!(server.get(8_888).await.role, "user");
    server.set(8_888, "admin").await;
    let changed = server.get(8_888).await;
    assert_eq!((&*changed.role, changed.source()), ("admin", Source::Cache));

    let before = server.stats().await;
    for _ in 0..100 {
        server.get(7_777).await;
    }
    let after = server.stats().await;
    assert_eq!((after.misses - before.misses, after.hits - before.hits), (1, 99));
}

/// "Failed cache update": a warning in the log, and the next read is a miss with the right role.
async fn a_role_that_the_cache_cannot_keep_is_read_from_the_store(db: Db) {
    let server = ChildServer::serve(&db.url(), &[]).await;
    let mut client = server.client.clone();
    set(&client, 5, "admin").await;
    assert_eq!(get(&client, 5).await.source(), Source::Cache);
    let long = "x".repeat(300);
    db.sql(&format!("update users set role = '{long}' where user_id = 5"));
    let (head, table) =
        if db.is_postgres() { ("max(revision)", "rolecache.commits") } else { ("max(id)", "rolecache_commits") };
    let head = db.sql(&format!("select {head} from {table}")).parse().unwrap();
    let request = GetRoleRequest { user_id: 6, min_revision: head, ..Default::default() };
    client.get_role(request).await.unwrap();
    assert!(server.logged("WARN") && server.logged("a role is not kept in memory"));
    let misses = client.stats(StatsRequest {}).await.unwrap().into_inner().misses;
    let read = get(&client, 5).await;
    assert_eq!((read.role, read.stale), (long, false));
    assert_eq!(client.stats(StatsRequest {}).await.unwrap().into_inner().misses, misses + 1);
    // And it is kept again as soon as it can be.
    set(&client, 5, "admin").await;
    let read = get(&client, 5).await;
    assert_eq!((&*read.role, read.source()), ("admin", Source::Cache));
}
