//! Many watchers and large commits: nobody waits for a watcher, memory stays bounded, and nothing is lost.

use std::time::{Duration, Instant};

use rolecache::proto::v1::{
    SetRoleRequest, StatsRequest, WatchRoleChangesRequest, WatchRoleChangesResponse,
    role_cache_service_client::RoleCacheServiceClient, watch_role_changes_response::Event,
};
use tokio::time::timeout;
use tonic::{Streaming, transport::Channel};

use crate::{
    support::{
        child::ChildServer,
        gates::Gates,
        server::{Db, PATIENCE, Setup, Shell},
        watch::Watching,
    },
    watch::{every, narrow, snapshot},
};

on_both! {
    a_thousand_watchers_that_do_not_read_hold_nobody_up_and_then_read_it_all,
    watchers_that_stop_reading_in_a_page_of_the_log_leave_it_to_others,
    snapshots_that_nobody_reads_leave_their_turn_to_others,
}

const WATCHERS: usize = 1_000;
/// How many of them ask for every change; the others for a fiftieth of the users. Both are more than their window holds.
const UNFILTERED: usize = 10;
const CONNECTIONS: usize = 10;
const COMMITS: usize = 10_000;
const USERS: i64 = 100;

/// Makes commits `from..to`, each of one change.
fn commits(shell: &Shell, from: usize, to: usize) -> String {
    match shell {
        Shell::Psql(_) => format!(
            "do $$ begin for i in {from}..{to} - 1 loop
               insert into users (user_id, role) values (1 + i % {USERS}, case i / {USERS} % 2 when 0 then 'admin' else 'user' end)
               on conflict (user_id) do update set role = excluded.role;
               commit;
             end loop; end $$"
        ),
        // A row of a stranger's statement is a commit of its own.
        Shell::Sqlite(_) => format!(
            "with recursive n(i) as (select {from} union all select i + 1 from n where i + 1 < {to})
             insert into users (user_id, role)
             select 1 + i % {USERS}, case i / {USERS} % 2 when 0 then 'admin' else 'user' end from n where true
             on conflict (user_id) do update set role = excluded.role"
        ),
    }
}

async fn started(stream: &mut Streaming<WatchRoleChangesResponse>) {
    let first = timeout(PATIENCE, stream.message()).await.unwrap().unwrap().unwrap();
    assert!(matches!(first.event, Some(Event::Started(_))));
}

async fn a_thousand_watchers_that_do_not_read_hold_nobody_up_and_then_read_it_all(db: Db) {
    let server = ChildServer::serve(&db.url(), &["--log-level", "warn,rolecache=info,rolecache::audit=off"]).await;
    let mut watches = Vec::new();
    let filter: Vec<i64> = (1..=USERS / 50).collect();
    for connection in 0..CONNECTIONS {
        // A stream takes a few commits before its reader does; the connection never is what stops it.
        let endpoint = Channel::from_shared(format!("http://{}", server.address)).unwrap();
        let endpoint = endpoint.initial_stream_window_size(300).initial_connection_window_size(1 << 20);
        let mut client = RoleCacheServiceClient::new(endpoint.connect().await.unwrap());
        for n in 0..WATCHERS / CONNECTIONS {
            let all = (connection + n * CONNECTIONS) < UNFILTERED;
            let user_ids = if all { Vec::new() } else { filter.clone() };
            let request = WatchRoleChangesRequest { user_ids, ..every(Duration::from_secs(3_600)) };
            let mut stream = client.watch_role_changes(request).await.unwrap().into_inner();
            started(&mut stream).await;
            watches.push((all, stream));
        }
    }
    let before = server.memory("VmRSS");
    let writing = tokio::spawn({
        let shell = db.shell();
        async move {
            for from in (0..COMMITS).step_by(500) {
                shell.go(commits(&shell, from, from + 500)).await;
            }
        }
    });
    let (mut writes, mut slowest) = (0, Duration::ZERO);
    let mut client = server.client.clone();
    while !writing.is_finished() {
        let role = if writes % 2 == 0 { "admin" } else { "user" };
        let begun = Instant::now();
        client.set_role(SetRoleRequest { user_id: 1_000, role: role.into(), ..Default::default() }).await.unwrap();
        slowest = slowest.max(begun.elapsed());
        writes += 1;
    }
    writing.await.unwrap();
    // One that passes every filter, and is applied: all before it is in memory, and has been told as far as it goes.
    let last = SetRoleRequest { user_id: 1, role: "admin".into(), ..Default::default() };
    let last = client.set_role(last).await.unwrap().into_inner().revision;
    let stats = client.stats(StatsRequest {}).await.unwrap().into_inner();
    assert_eq!(stats.event_handlers, WATCHERS as i64);
    let grown = server.memory("VmHWM") - before;
    println!(
        "{writes} writes beside {COMMITS} commits, the slowest in {slowest:?}; RSS {before:.0} MiB, grown by {grown:.0} MiB"
    );
    assert!(slowest < Duration::from_secs(5), "a write took {slowest:?}");
    assert!(grown < 300.0, "memory grew by {grown} MiB");

    let begun = Instant::now();
    let readers = watches.into_iter().map(|(all, mut stream)| {
        tokio::spawn(async move {
            let (mut told, mut newest) = (0, 0);
            while newest < last {
                let message = timeout(3 * PATIENCE, stream.message()).await.unwrap().unwrap().unwrap();
                if let Some(Event::Commit(commit)) = message.event {
                    assert!(commit.revision > newest && !commit.partial);
                    newest = commit.revision;
                    told += commit.changes.len();
                }
            }
            (all, told)
        })
    });
    // The last write comes on top; it changes user 1 from the role of the last round to admin.
    let of_all = COMMITS + writes + 1;
    let of_some = COMMITS / 50 + 1;
    for reader in readers.collect::<Vec<_>>() {
        let (all, told) = reader.await.unwrap();
        assert_eq!(told, if all { of_all } else { of_some });
    }
    let grown = server.memory("VmHWM") - before;
    println!("all read in {:?}; grown by {grown:.0} MiB at most", begun.elapsed());
    assert!(grown < 300.0, "memory grew by {grown} MiB");
}

async fn watchers_that_stop_reading_in_a_page_of_the_log_leave_it_to_others(db: Db) {
    let gates = Gates::default();
    let server = Setup { ring_bytes: 1, ..Setup::new(&db) }.wrap(gates.guard()).serve().await;
    db.shell().go(commits(&db.shell(), 0, 4_000)).await;
    let last = server.set(1, "moderator").await.revision;
    // As many as may page at once, each with room for its start and little more, and stopped while its page is read.
    let endpoint = Channel::from_shared(format!("http://{}", server.address)).unwrap();
    let endpoint = endpoint.initial_stream_window_size(300).initial_connection_window_size(1 << 20);
    let mut client = RoleCacheServiceClient::new(endpoint.connect().await.unwrap());
    let mut stuck = Vec::new();
    gates.read_log.close();
    for _ in 0..8 {
        let request = WatchRoleChangesRequest { after: "0".into(), ..every(Duration::from_millis(100)) };
        stuck.push(client.watch_role_changes(request).await.unwrap().into_inner());
    }
    for _ in 0..4 {
        gates.read_log.arrived().await;
    }
    // Heartbeats fill what room there is, while the pages are still on their way.
    let mut other = server.watch(every(Duration::from_millis(100))).await;
    for _ in 0..5 {
        other.next().await;
    }
    gates.read_log.open();
    let mut reading = server.watch(WatchRoleChangesRequest { after: "0".into(), ..Default::default() }).await;
    reading.until(last).await;
    reading.check();
    assert_eq!(reading.changes().len(), 4_001);
}

async fn snapshots_that_nobody_reads_leave_their_turn_to_others(db: Db) {
    let server = db.serve().await;
    db.shell()
        .go("with recursive n(id) as (select 1 union all select id + 1 from n where id < 20000)
             insert into users (user_id, role, username) select id, 'admin', 'somebody' from n")
        .await;
    let mut stuck = Vec::new();
    for _ in 0..6 {
        stuck.push(Watching::open(narrow(&server).await, snapshot()).await);
    }
    let begun = Instant::now();
    let mut watch = server.watch(snapshot()).await;
    assert_eq!(watch.snapshot().await.len(), 20_000);
    println!("a snapshot beside {} that nobody reads took {:?}", stuck.len(), begun.elapsed());
}

/// Twenty times what is held in memory of one commit. `ROLECACHE_TEST_BULK_ROWS=1000000` takes minutes in a debug build.
fn bulk_rows() -> i64 {
    std::env::var("ROLECACHE_TEST_BULK_ROWS").map_or(200_000, |rows| rows.parse().unwrap())
}

/// What an UPDATE of `rows` rows costs a server beyond the entries of its cache, in MiB, with one watcher who reads it
/// all and some who do not.
async fn cost_of_an_update(db: &Db, rows: i64, mode: &str) -> f64 {
    let shell = db.shell();
    shell.go("create table users (user_id integer primary key, role text, username text)").await;
    let numbers = format!("with recursive n(id) as (select 1 union all select id + 1 from n where id < {rows})");
    shell.go(format!("{numbers} insert into users (user_id, role) select id, 'user' from n")).await;
    let server =
        ChildServer::serve(&db.url(), &["--cache", mode, "--log-level", "warn,rolecache=info,rolecache::audit=off"])
            .await;
    let mut client = server.client.clone();
    for user in 1..=1_000 {
        let request = rolecache::proto::v1::GetRoleRequest { user_id: user, ..Default::default() };
        client.get_role(request).await.unwrap();
    }
    let mut reading = client.watch_role_changes(WatchRoleChangesRequest::default()).await.unwrap().into_inner();
    started(&mut reading).await;
    let mut stuck = Vec::new();
    for _ in 0..20 {
        let endpoint = Channel::from_shared(format!("http://{}", server.address)).unwrap();
        let mut client = RoleCacheServiceClient::new(endpoint.connect().await.unwrap());
        let mut stream = client.watch_role_changes(WatchRoleChangesRequest::default()).await.unwrap().into_inner();
        started(&mut stream).await;
        stuck.push(stream);
    }
    let held = client.stats(StatsRequest {}).await.unwrap().into_inner().cache_bytes;
    let before = server.memory("VmRSS");
    let begun = Instant::now();
    shell.go("update users set role = 'admin'").await;
    println!("{rows} rows updated in {:?}", begun.elapsed());
    let mut told = 0;
    while told < rows {
        let message = timeout(3 * PATIENCE, reading.message()).await.unwrap().unwrap().unwrap();
        if let Some(Event::Commit(commit)) = message.event {
            told += commit.changes.len() as i64;
        }
    }
    let stats = client.stats(StatsRequest {}).await.unwrap().into_inner();
    assert_eq!(stats.cache_size, if db.is_postgres() && mode == "lazy" { 1_000 } else { rows });
    let entries = (stats.cache_bytes - held) as f64 / (1 << 20) as f64;
    let grown = server.memory("VmHWM") - before;
    println!(
        "{mode}: told in {:?}; RSS {before:.0} MiB grew by {grown:.0} MiB, {entries:.0} of them entries",
        begun.elapsed()
    );
    grown - entries
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_of_very_many_rows_adds_at_most_64_mib() {
    let db = Db::postgres().await;
    let cost = cost_of_an_update(&db, bulk_rows(), "lazy").await;
    assert!(cost <= 64.0, "{cost} MiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_of_very_many_rows_adds_at_most_64_mib_to_a_complete_cache() {
    let db = Db::postgres().await;
    let cost = cost_of_an_update(&db, bulk_rows(), "complete").await;
    assert!(cost <= 64.0, "{cost} MiB");
}

/// Fewer rows: each is a commit of its own here, and goes through the ring one by one, so that more would
/// need no more memory and only take longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_of_many_rows_adds_at_most_64_mib_on_sqlite() {
    for mode in ["lazy", "complete"] {
        let cost = cost_of_an_update(&Db::sqlite(), 20_000, mode).await;
        assert!(cost <= 64.0, "{mode}: {cost} MiB");
    }
}
