//! Many watchers and large commits: nobody waits for a watcher, memory stays bounded, and nothing is lost.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use rolecache::proto::v1::{
    DeleteUserRequest, SetRoleRequest, StatsRequest, WatchRoleChangesRequest, WatchRoleChangesResponse,
    role_cache_service_client::RoleCacheServiceClient, watch_role_changes_response::Event,
};
use tokio::time::timeout;
use tonic::{Streaming, transport::Channel};

use crate::{
    support::{
        calls::logged,
        child::ChildServer,
        crowd::Crowd,
        gates::Gates,
        server::{Db, PATIENCE, Setup, Shell},
        watch::{Watching, reliable},
    },
    watch::{every, narrow, snapshot},
};

on_both! {
    a_thousand_watchers_that_do_not_read_hold_nobody_up_and_then_read_it_all,
    watchers_that_stop_reading_in_a_page_of_the_log_leave_it_to_others,
    watchers_that_do_not_read_what_is_not_in_memory_hold_little_of_it,
    snapshots_that_nobody_reads_leave_their_turn_to_others,
}

const WATCHERS: usize = 1_000;
/// What a stranger commits while they do not read, with so many writes of ours beside each block: 10,000 commits in all.
/// An unoptimised server would take minutes to tell them to everybody.
const BLOCKS: usize = if cfg!(debug_assertions) { 10 } else { 100 };
const BLOCK: usize = 100;
const WRITES: usize = if cfg!(debug_assertions) { 20 } else { 6 };
/// What two busy processors may add to how long a write takes; a wait for a watcher would have no end.
const SLACK: Duration = Duration::from_millis(20);
/// Of all.
const LONGEST: Duration = Duration::from_secs(1);
/// In MiB: what the connections hold for 1,000 streams that are not read, at 64 KiB each, and the ring.
const MEMORY: f64 = 80.0;
const USERS: i64 = 100;
/// Watchers that page the log, and in KiB what each may add at the worst moment: a page and what waits for its client, at
/// 64 KiB each, what holds those, and what is read again. With whole pages of long reasons it is 800 to 900.
const PAGING: usize = if cfg!(debug_assertions) { 200 } else { 1_000 };
const PAGED: f64 = 600.0;

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

/// How long writes took, the quickest first.
struct Times(Vec<Duration>);

impl Times {
    fn percentile(&self, percent: usize) -> Duration {
        self.0[(self.0.len() - 1) * percent / 100]
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [half, most, all] = [50, 99, 100].map(|percent| self.percentile(percent));
        write!(f, "{} writes, p50 {half:.1?}, p99 {most:.1?}, max {all:.1?}", self.0.len())
    }
}

/// Calls SetRole time and again while a stranger commits blocks, some calls beside each. Then deletes its user: all that
/// was committed is applied when that is, at the revision that comes with the times.
async fn write_beside(server: &ChildServer, shell: &Shell, blocks: Range<usize>) -> (Times, i64) {
    let mut client = server.client.clone();
    let mut took = Vec::new();
    for block in blocks {
        let stranger = tokio::spawn({
            let (shell, sql) = (shell.clone(), commits(shell, block * BLOCK, (block + 1) * BLOCK));
            async move { shell.go(sql).await }
        });
        for role in ["admin", "user"].into_iter().cycle().take(WRITES) {
            let request = SetRoleRequest { user_id: 1_000, role: role.into(), ..Default::default() };
            let begun = Instant::now();
            client.set_role(request).await.unwrap();
            took.push(begun.elapsed());
        }
        stranger.await.unwrap();
    }
    took.sort();
    let last = client.delete_user(DeleteUserRequest { user_id: 1_000, ..Default::default() }).await.unwrap();
    (Times(took), last.into_inner().revision)
}

async fn a_thousand_watchers_that_do_not_read_hold_nobody_up_and_then_read_it_all(db: Db) {
    let server = ChildServer::serve(&db.url(), &["--log-level", "warn,rolecache=info,rolecache::audit=off"]).await;
    let (shell, mut client) = (db.shell(), server.client.clone());
    let (alone, from) = write_beside(&server, &shell, 0..BLOCKS).await;
    let mut crowd = Crowd::open(server.address, 10, WATCHERS / 10, &every(Duration::from_secs(3_600))).await;
    let stats = client.stats(StatsRequest {}).await.unwrap().into_inner();
    assert_eq!(stats.event_handlers, WATCHERS as i64);
    let before = server.memory("VmRSS");
    let (beside, last) = write_beside(&server, &shell, BLOCKS..2 * BLOCKS).await;
    let grown = server.memory("VmHWM") - before;
    println!("nobody watches: {alone}\n{WATCHERS} do not read: {beside}; RSS {before:.0} MiB grew by {grown:.0} MiB");
    assert!(grown < MEMORY, "memory grew by {grown} MiB");
    // An unoptimised server is busy for seconds with telling everybody what fits into the windows. Each write is answered
    // all the same: one that took longer than its limit would have an unknown outcome.
    if !cfg!(debug_assertions) {
        assert!(beside.percentile(50) < 2 * alone.percentile(50) + SLACK);
        assert!(beside.percentile(99) < 2 * alone.percentile(99) + 5 * SLACK);
        assert!(beside.percentile(100) < LONGEST);
    }

    let begun = Instant::now();
    crowd.read();
    // One tells what is in the log; all others tell the same, byte for byte.
    let mut first = crowd.watchers.pop().unwrap();
    let (mut transcript, mut messages) = (Vec::new(), Vec::new());
    let mut revision = from;
    while revision < last {
        let message = first.commit().await;
        let event = WatchRoleChangesResponse::decode(&*message).unwrap().event.unwrap();
        if let Event::Commit(commit) = &event {
            revision = commit.revision;
        }
        transcript.push(event);
        messages.push(message);
    }
    assert_eq!(messages.len(), BLOCKS * (BLOCK + WRITES) + 1);
    let messages = Arc::new(messages);
    let readers = crowd.watchers.into_iter().map(|mut watcher| {
        let messages = messages.clone();
        tokio::spawn(async move {
            for message in &*messages {
                assert!(watcher.commit().await == message);
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    let grown = server.memory("VmHWM") - before;
    println!("{} of {} each read in {:?}; RSS grew by {grown:.0} MiB", WATCHERS, messages.len(), begun.elapsed());
    assert!(grown < MEMORY, "memory grew by {grown} MiB");
    reliable(&transcript, &logged(client, None).await, from);
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

/// What was committed before the server began is paged from the store, for each of them.
async fn watchers_that_do_not_read_what_is_not_in_memory_hold_little_of_it(db: Db) {
    let first = db.serve().await;
    // With as long a reason as there may be, so that little of a page goes into the buffer of a stream.
    let write = |user_id| {
        let mut client = first.client.clone();
        let request = SetRoleRequest { user_id, role: "admin".into(), reason: "x".repeat(500), ..Default::default() };
        async move { client.set_role(request).await.unwrap() }
    };
    for block in 0..10 {
        futures::future::join_all((1..=300).map(|user| write(300 * block + user))).await;
    }
    first.stop().await.unwrap();
    let server = ChildServer::serve(&db.url(), &["--log-level", "warn,rolecache=info"]).await;
    let before = server.memory("VmRSS");
    let from_the_start = WatchRoleChangesRequest { after: "0".into(), ..every(Duration::from_secs(3_600)) };
    let crowd = Crowd::open(server.address, 10, PAGING / 10, &from_the_start).await;
    // Pages are read in turn: all of theirs come before its last one.
    let mut reading = server.client.clone().watch_role_changes(from_the_start).await.unwrap().into_inner();
    let mut commits = 0;
    while commits < 3_000 {
        let message = timeout(PATIENCE, reading.message()).await.unwrap().unwrap().unwrap();
        if let Some(Event::Commit(commit)) = message.event {
            commits += commit.changes.len();
        }
    }
    let grown = server.memory("VmHWM") - before;
    let each = grown * 1024.0 / PAGING as f64;
    println!(
        "{PAGING} do not read what is not in memory: RSS {before:.0} MiB grew by {grown:.0} MiB, {each:.0} KiB each"
    );
    assert!(each < PAGED, "{each} KiB each");
    drop(crowd);
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

/// Many times what is held in memory of one commit. An unoptimised server would take minutes for a million.
const BULK_ROWS: i64 = if cfg!(debug_assertions) { 200_000 } else { 1_000_000 };

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
    let cost = cost_of_an_update(&db, BULK_ROWS, "lazy").await;
    assert!(cost <= 64.0, "{cost} MiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_of_very_many_rows_adds_at_most_64_mib_to_a_complete_cache() {
    let db = Db::postgres().await;
    let cost = cost_of_an_update(&db, BULK_ROWS, "complete").await;
    assert!(cost <= 64.0, "{cost} MiB");
}

/// Each row is a commit of its own here, and goes through the ring one by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_of_many_rows_adds_at_most_64_mib_on_sqlite() {
    for mode in ["lazy", "complete"] {
        let cost = cost_of_an_update(&Db::sqlite(), BULK_ROWS, mode).await;
        assert!(cost <= 64.0, "{mode}: {cost} MiB");
    }
}
