//! WatchRoleChanges from its first message on: what is told, how, and when.

use std::time::{Duration, Instant, SystemTime};

use rolecache::proto::v1::{
    ChangeKind, DeleteUserRequest, FeedState, Origin, RegisterMailboxRequest, RoleChange, SetRoleRequest, Transfer,
    TransferAdminRequest, UserRole, WatchRoleChangesRequest, role_cache_service_client::RoleCacheServiceClient,
    watch_role_changes_response::Event,
};
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::support::{
    gates::Gates,
    server::{Db, PATIENCE, Setup, TestServer},
    watch::{Watching, atomic, progress_safe, reliable},
};

on_both! {
    a_watch_starts_once_and_tells_what_is_committed_from_now_on,
    every_change_comes_with_all_its_fields,
    a_filter_passes_what_it_names_and_nothing_else,
    a_snapshot_is_cut_by_users_and_roles_and_not_by_kinds,
    a_quiet_watch_has_heartbeats_at_the_interval_asked_for,
    a_busy_watch_has_heartbeats_too,
    a_change_of_the_feed_is_told_at_once,
    a_snapshot_is_the_store_at_the_revision_it_started_with,
    a_snapshot_of_an_empty_store_is_empty_and_ends,
    a_write_between_snapshot_and_live_comes_after_the_snapshot,
    a_snapshot_waits_until_the_cache_has_it,
    a_snapshot_says_what_it_is_as_of,
    long_names_come_in_messages_that_clients_take,
    who_hears_of_a_change_and_reads_gets_it_or_a_newer_one,
}

pub(crate) fn everything() -> WatchRoleChangesRequest {
    WatchRoleChangesRequest::default()
}

pub(crate) fn every(interval: Duration) -> WatchRoleChangesRequest {
    WatchRoleChangesRequest { heartbeat_interval: Some(interval.try_into().unwrap()), ..Default::default() }
}

const OFTEN: Duration = Duration::from_millis(100);

async fn a_watch_starts_once_and_tells_what_is_committed_from_now_on(db: Db) {
    let server = db.serve().await;
    let before = server.set(1, "admin").await.revision;
    let mut watch = server.watch(everything()).await;
    assert_eq!((watch.started.revision, watch.started.resumed), (before, false));
    assert_eq!(watch.started.default_role, "user");
    assert_eq!(watch.started.store_id, server.stats().await.store_id);
    let mut last = 0;
    for user in 2..40 {
        last = server.set(user, "admin").await.revision;
    }
    watch.until(last).await;
    watch.check();
    let started = watch.transcript.iter().filter(|event| matches!(event, Event::Started(_))).count();
    assert_eq!(started, 1);
    reliable(&watch.transcript, &server.log().await, before);
    assert_eq!(watch.changes().len(), 38);
    assert_eq!(server.stats().await.event_handlers, 1);
}

async fn every_change_comes_with_all_its_fields(db: Db) {
    let begun = SystemTime::now() - Duration::from_millis(1);
    let server = db.serve().await;
    let mut client = server.client.clone();
    let mut watch = server.watch(everything()).await;
    let set = |user_id, role: &str, username: &str, reason: &str| SetRoleRequest {
        user_id,
        role: role.into(),
        username: username.into(),
        reason: reason.into(),
        ..Default::default()
    };
    client.register_mailbox(RegisterMailboxRequest { mailbox_id: 5, creator_id: 10 }).await.unwrap();
    server.try_set(set(10, "user", "ann", "welcome")).await.unwrap();
    server.try_set(set(10, "admin", "", "")).await.unwrap();
    server.try_set(set(11, "admin", "", "at once")).await.unwrap();
    server.try_set(set(11, "moderator", "bob", "")).await.unwrap();
    server.try_set(set(11, "user", "", "")).await.unwrap();
    let hand_over = TransferAdminRequest {
        from_user_id: 10,
        to_user_id: 12,
        mailbox_id: Some(5),
        demote_from: true,
        to_username: "cleo".into(),
        reason: "leaves".into(),
        ..Default::default()
    };
    client.transfer_admin(hand_over).await.unwrap();
    client.delete_user(DeleteUserRequest { user_id: 12, reason: "gone".into(), ..Default::default() }).await.unwrap();
    db.sql("insert into users (user_id, role, username) values (20, 'owner', 'dan')");
    db.sql("update users set role = 'admin' where user_id = 20");
    db.sql("delete from users where user_id = 20");

    let transfer = Some(Transfer { from_user_id: 10, to_user_id: 12, mailbox_id: Some(5) });
    let stranger = if db.is_postgres() { "postgres" } else { "sqlite" };
    let of = |user_id, old: &str, new: &str, kind: ChangeKind, username: &str, reason: &str| RoleChange {
        user_id,
        old_role: old.into(),
        new_role: new.into(),
        kind: kind.into(),
        username: username.into(),
        reason: reason.into(),
        origin: Origin::Rpc.into(),
        actor: "anonymous".into(),
        ..Default::default()
    };
    let sql = |change: RoleChange| RoleChange { origin: Origin::Sql.into(), actor: stranger.into(), ..change };
    let with_transfer = |change: RoleChange| RoleChange { transfer, ..change };
    let commits = [
        vec![of(10, "", "user", ChangeKind::UserCreated, "ann", "welcome")],
        vec![of(10, "user", "admin", ChangeKind::AdminAdded, "ann", "")],
        vec![of(11, "", "admin", ChangeKind::AdminAdded, "", "at once")],
        vec![of(11, "admin", "moderator", ChangeKind::AdminRemoved, "bob", "")],
        vec![of(11, "moderator", "user", ChangeKind::RoleChanged, "bob", "")],
        vec![
            with_transfer(of(12, "", "admin", ChangeKind::AdminTransferred, "cleo", "leaves")),
            with_transfer(of(10, "admin", "user", ChangeKind::AdminRemoved, "ann", "leaves")),
        ],
        vec![of(12, "admin", "", ChangeKind::UserDeleted, "cleo", "gone")],
        vec![sql(of(20, "", "owner", ChangeKind::UserCreated, "dan", ""))],
        vec![sql(of(20, "owner", "admin", ChangeKind::AdminAdded, "dan", ""))],
        vec![sql(of(20, "admin", "", ChangeKind::UserDeleted, "dan", ""))],
    ];
    for expected in &commits {
        let mut told = watch.next_commit().await;
        for (index, change) in told.changes.iter_mut().enumerate() {
            assert_eq!((change.revision, change.index), (told.revision, index as i32));
            let at: SystemTime = change.changed_at.take().unwrap().try_into().unwrap();
            assert!((begun..=SystemTime::now()).contains(&at), "changed at {at:?}");
            (change.revision, change.index) = (0, 0);
        }
        // Which side of a transfer comes first in the log is the store's own affair.
        told.changes.sort_by_key(|change| -change.user_id);
        assert_eq!(&told.changes, expected);
    }
    watch.check();
    reliable(&watch.transcript, &server.log().await, 0);
}

async fn a_filter_passes_what_it_names_and_nothing_else(db: Db) {
    let server = db.serve().await;
    let kinds = |kinds: &[ChangeKind]| kinds.iter().map(|kind| (*kind).into()).collect::<Vec<i32>>();
    let filters = [
        (vec![], vec![], vec![]),
        (vec![1, 3, 77], vec![], vec![]),
        (vec![], vec!["moderator".to_owned()], vec![]),
        (vec![], vec!["Nobody".to_owned()], vec![]),
        (vec![], vec![], kinds(&[ChangeKind::AdminAdded, ChangeKind::UserDeleted])),
        (vec![2], vec!["admin".to_owned()], vec![]),
        (vec![1, 2], vec!["admin".to_owned(), "user".to_owned()], kinds(&[ChangeKind::AdminRemoved])),
    ];
    let mut watches = Vec::new();
    for (user_ids, roles, kinds) in &filters {
        let request = WatchRoleChangesRequest {
            user_ids: user_ids.clone(),
            roles: roles.clone(),
            kinds: kinds.clone(),
            ..every(OFTEN)
        };
        watches.push(server.watch(request).await);
    }
    for role in ["admin", "moderator", "user", "admin", "user"] {
        for user in 1..=4 {
            server.set(user, role).await;
        }
    }
    let request = DeleteUserRequest { user_id: 2, ..Default::default() };
    let last = server.client.clone().delete_user(request).await.unwrap().into_inner().revision;
    let log = server.log().await;
    for (mut watch, (users, roles, kinds)) in watches.into_iter().zip(filters) {
        // A heartbeat says that all has been sent, where the last commit does not pass.
        watch.until(last).await;
        watch.check();
        let passes = |change: &&RoleChange| {
            (users.is_empty() || users.contains(&change.user_id))
                && (roles.is_empty() || roles.contains(&change.old_role) || roles.contains(&change.new_role))
                && (kinds.is_empty() || kinds.contains(&change.kind))
        };
        let expected: Vec<RoleChange> = log.iter().filter(passes).cloned().collect();
        reliable(&watch.transcript, &expected, 0);
        assert!(watch.transcript.iter().all(|event| !matches!(event, Event::Commit(it) if it.changes.is_empty())));
    }
}

async fn a_snapshot_is_cut_by_users_and_roles_and_not_by_kinds(db: Db) {
    let server = db.serve().await;
    for (user, role) in [(1, "admin"), (2, "moderator"), (3, "user"), (4, "admin"), (5, "moderator")] {
        server.set(user, role).await;
    }
    let cases: [(&[i64], &[&str], &[i64]); 5] = [
        (&[], &[], &[1, 2, 4, 5]),
        (&[1, 2, 3], &[], &[1, 2]),
        (&[], &["admin"], &[1, 4]),
        (&[4, 5], &["moderator"], &[5]),
        (&[3], &["user"], &[]),
    ];
    for (users, roles, expected) in cases {
        let request = WatchRoleChangesRequest {
            initial_snapshot: true,
            user_ids: users.to_vec(),
            roles: roles.iter().map(|role| (*role).to_owned()).collect(),
            kinds: vec![ChangeKind::UserDeleted.into()],
            ..Default::default()
        };
        let mut watch = server.watch(request).await;
        let told: Vec<i64> = watch.snapshot().await.iter().map(|user| user.user_id).collect();
        assert_eq!(told, expected, "{users:?} {roles:?}");
    }
}

async fn a_quiet_watch_has_heartbeats_at_the_interval_asked_for(db: Db) {
    let server = db.serve().await;
    let revision = server.set(1, "admin").await.revision;
    let begun = Instant::now();
    let mut watch = server.watch(every(OFTEN)).await;
    for _ in 0..5 {
        match watch.next().await {
            Event::Heartbeat(heartbeat) => {
                assert_eq!((heartbeat.revision, heartbeat.feed_state()), (revision, FeedState::Live));
                assert!(!heartbeat.resume_token.is_empty() && heartbeat.sent_at.is_some());
            }
            other => panic!("{other:?} on a quiet watch"),
        }
    }
    assert!(begun.elapsed() >= 5 * OFTEN, "more often than asked for");
    // And none where none was asked for, while a neighbour gets five.
    let mut seldom = server.watch(every(Duration::from_secs(3_600))).await;
    for _ in 0..5 {
        watch.next().await;
    }
    let last = server.set(2, "admin").await.revision;
    assert!(matches!(seldom.next().await, Event::Commit(commit) if commit.revision == last));
}

async fn a_busy_watch_has_heartbeats_too(db: Db) {
    let server = db.serve().await;
    let mut watch = server.watch(every(5 * OFTEN)).await;
    // Several at once: a pause of one must not be one of the stream.
    let stop = tokio_util::sync::CancellationToken::new();
    let writers: Vec<_> = (1..=8)
        .map(|user_id| {
            let (mut client, stop) = (server.client.clone(), stop.clone());
            tokio::spawn(async move {
                for role in ["admin", "user"].iter().cycle().take_while(|_| !stop.is_cancelled()) {
                    let request = SetRoleRequest { user_id, role: (*role).into(), ..Default::default() };
                    client.set_role(request).await.unwrap();
                }
            })
        })
        .collect();
    let mut heartbeats = Vec::new();
    let begun = Instant::now();
    while heartbeats.len() < 6 {
        assert!(begun.elapsed() < PATIENCE, "commits keep the heartbeats back: {heartbeats:?}");
        if let Event::Heartbeat(heartbeat) = watch.next().await {
            heartbeats.push(heartbeat.revision);
        }
    }
    stop.cancel();
    for writer in writers {
        writer.await.unwrap();
    }
    assert!(heartbeats.windows(2).any(|pair| pair[0] < pair[1]), "the stream was not busy: {heartbeats:?}");
    watch.check();
}

async fn a_change_of_the_feed_is_told_at_once(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let mut watch = server.watch(every(Duration::from_secs(3_600))).await;
    gates.read_log.close();
    for expected in [FeedState::Disconnected, FeedState::Live] {
        let Event::Heartbeat(heartbeat) = watch.next().await else { panic!("no heartbeat: {:?}", watch.transcript) };
        assert_eq!(heartbeat.feed_state(), expected);
        gates.read_log.open();
    }
    // A watch that is opened while the store is out of reach hears of it first.
    gates.read_log.close();
    assert!(matches!(watch.next().await, Event::Heartbeat(it) if it.feed_state() == FeedState::Disconnected));
    let mut late = server.watch(every(Duration::from_secs(3_600))).await;
    assert!(matches!(late.next().await, Event::Heartbeat(it) if it.feed_state() == FeedState::Disconnected));
    gates.read_log.open();
}

/// Rows of `users` that a snapshot has, as the database's own shell says.
fn rows(db: &Db) -> Vec<(i64, String)> {
    let printed = db.sql("select user_id, role from users where role <> 'user' order by user_id");
    let row = |line: &str| {
        let (id, role) = line.split_once('|').unwrap();
        (id.parse().unwrap(), role.to_owned())
    };
    printed.lines().filter(|line| !line.is_empty()).map(row).collect()
}

fn pairs(users: &[UserRole]) -> Vec<(i64, String)> {
    users.iter().map(|user| (user.user_id, user.role.clone())).collect()
}

pub(crate) fn snapshot() -> WatchRoleChangesRequest {
    WatchRoleChangesRequest { initial_snapshot: true, ..Default::default() }
}

async fn a_snapshot_is_the_store_at_the_revision_it_started_with(db: Db) {
    let server = db.serve().await;
    // More than a chunk, so that writers get in between.
    db.sql(
        "with recursive n(id) as (select 1 union all select id + 1 from n where id < 2500)
         insert into users (user_id, role, username) select id, case when id % 3 = 0 then 'user' else 'admin' end, 'u' from n",
    );
    let (mut client, stop) = (server.client.clone(), tokio_util::sync::CancellationToken::new());
    let writing = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut n = 0;
            while !stop.is_cancelled() {
                n += 1;
                let role = ["user", "admin", "moderator"][n as usize % 3];
                let request = SetRoleRequest { user_id: 1 + n * 7 % 2_600, role: role.into(), ..Default::default() };
                client.set_role(request).await.unwrap();
            }
        }
    });
    for _ in 0..5 {
        let mut watch = server.watch(snapshot()).await;
        let mut state: std::collections::BTreeMap<i64, String> =
            watch.snapshot().await.into_iter().map(|user| (user.user_id, user.role)).collect();
        let mut until = server.stats().await.revision;
        if until <= watch.started.revision {
            until = server.set(999_999, "moderator").await.revision;
        }
        watch.until(until).await;
        watch.check();
        for change in watch.changes() {
            assert!(change.revision > watch.started.revision);
            let held = state.get(&change.user_id).map_or("user", String::as_str);
            let before = if change.old_role.is_empty() { "user" } else { &change.old_role };
            assert_eq!(held, before, "the snapshot of {} and {change:?}", watch.started.revision);
            match &*change.new_role {
                "" | "user" => state.remove(&change.user_id),
                role => state.insert(change.user_id, role.to_owned()),
            };
        }
    }
    stop.cancel();
    writing.await.unwrap();
    let mut watch = server.watch(snapshot()).await;
    assert_eq!(pairs(&watch.snapshot().await), rows(&db));
}

async fn a_snapshot_of_an_empty_store_is_empty_and_ends(db: Db) {
    let server = db.serve().await;
    let mut watch = server.watch(snapshot()).await;
    assert_eq!((watch.started.revision, watch.started.resumed), (0, false));
    assert_eq!(watch.snapshot().await, []);
    server.set(1, "admin").await;
    assert_eq!(watch.next_commit().await.changes[0].user_id, 1);
}

async fn a_write_between_snapshot_and_live_comes_after_the_snapshot(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let old = server.set(1, "admin").await.revision;
    gates.snapshot.close();
    let mut watch = server.watch(snapshot()).await;
    gates.snapshot.arrived().await;
    assert_eq!(watch.started.revision, old);
    server.set(1, "user").await;
    server.set(2, "admin").await;
    gates.snapshot.open();
    assert_eq!(pairs(&watch.snapshot().await), [(1, "admin".to_owned())]);
    assert_eq!(watch.next_commit().await.changes[0].new_role, "user");
    assert_eq!(watch.next_commit().await.changes[0].user_id, 2);
    watch.check();
    reliable(&watch.transcript, &server.log().await, old);
}

async fn a_snapshot_waits_until_the_cache_has_it(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    server.set(1, "admin").await;
    gates.read_log.close();
    gates.read_log.arrived().await;
    db.sql("update users set role = 'moderator' where user_id = 1");
    gates.snapshot_begun.close();
    let (client, request) = (server.client.clone(), snapshot());
    let opening = tokio::spawn(Watching::open(client, request));
    gates.snapshot_begun.arrived().await;
    gates.snapshot_begun.open();
    // The cache is behind the store, and answers with the old role: a snapshot must not tell the new one yet.
    let mut read = server.get(1).await;
    for _ in 0..20 {
        read = server.get(1).await;
        assert_eq!(read.role, "admin");
    }
    assert!(!opening.is_finished());
    gates.read_log.open();
    let mut watch = timeout(PATIENCE, opening).await.unwrap().unwrap().unwrap();
    let users = watch.snapshot().await;
    assert_eq!(pairs(&users), [(1, "moderator".to_owned())]);
    assert!(watch.started.revision > read.revision);
    assert_eq!(server.get(1).await.role, "moderator");
}

async fn a_snapshot_says_what_it_is_as_of(db: Db) {
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    let before = server.set(1, "admin").await.revision;
    gates.snapshot_begun.close();
    let opening = tokio::spawn(Watching::open(server.client.clone(), snapshot()));
    gates.snapshot_begun.arrived().await;
    let later = server.set(2, "admin").await.revision;
    gates.snapshot_begun.open();
    let mut watch = timeout(PATIENCE, opening).await.unwrap().unwrap().unwrap();
    assert_eq!(watch.started.revision, before);
    assert_eq!(pairs(&watch.snapshot().await), [(1, "admin".to_owned())]);
    assert_eq!(watch.next_commit().await.revision, later);
    watch.check();
}

async fn long_names_come_in_messages_that_clients_take(db: Db) {
    // 5 MB in one chunk, where a client takes 4 MiB in one message.
    let name = if db.is_postgres() { "repeat('x', 5000)" } else { "hex(zeroblob(2500))" };
    let server = db.serve().await;
    let last = db.sql(&format!(
        "with recursive n(id) as (select 1 union all select id + 1 from n where id < 1000)
         insert into users (user_id, role, username) select id, 'admin', {name} from n"
    ));
    assert_eq!(last, "");
    let mut watch = Watching::open(narrow(&server).await, snapshot()).await.unwrap();
    let users = watch.snapshot().await;
    assert_eq!(users.iter().map(|user| user.user_id).collect::<Vec<_>>(), (1..=1_000).collect::<Vec<_>>());
    assert!(users.iter().all(|user| user.username.len() == 5_000));
    db.sql("update users set role = 'moderator'");
    watch.until(db.head()).await;
    assert_eq!(watch.changes().len(), 1_000);
    watch.check();
}

async fn who_hears_of_a_change_and_reads_gets_it_or_a_newer_one(db: Db) {
    let server = db.serve().await;
    let mut watch = server.watch(everything()).await;
    let shell = db.shell();
    let writing = tokio::spawn({
        let mut client = server.client.clone();
        async move {
            for n in 0..150 {
                let role = ["admin", "user", "moderator"][n % 3];
                let request = SetRoleRequest { user_id: 1 + n as i64 % 5, role: role.into(), ..Default::default() };
                client.set_role(request).await.unwrap();
                if n % 30 == 0 {
                    shell.go("update users set role = 'owner' where user_id = 3").await;
                }
            }
            client.set_role(SetRoleRequest { user_id: 6, role: "admin".into(), ..Default::default() }).await.unwrap();
        }
    });
    loop {
        let commit = watch.next_commit().await;
        for change in &commit.changes {
            watch.cache_first(change, "user").await;
        }
        if commit.changes.iter().any(|change| change.user_id == 6) {
            break;
        }
    }
    writing.await.unwrap();
    watch.check();
    reliable(&watch.transcript, &server.log().await, 0);
}

// === commits in parts: only PostgreSQL lets a stranger change many users at once ===

/// A client that takes in about 64 KiB before it reads.
pub(crate) async fn narrow(server: &TestServer) -> RoleCacheServiceClient<Channel> {
    let endpoint = Channel::from_shared(format!("http://{}", server.address)).unwrap();
    let endpoint = endpoint.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    RoleCacheServiceClient::new(endpoint.connect().await.unwrap())
}

async fn with_users(users: u32) -> (Db, TestServer) {
    let db = Db::postgres().await;
    let server = db.serve().await;
    db.sql(&format!("insert into users (user_id, role) select n, 'user' from generate_series(1, {users}) n"));
    let head = db.sql("select max(revision) from rolecache.commits");
    server.reach(head.parse().unwrap()).await;
    (db, server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_of_over_1000_changes_comes_in_parts() {
    // Under and over what a replica holds in memory.
    for users in [2_500, 12_000] {
        let (db, server) = with_users(users).await;
        let before = server.stats().await.revision;
        let mut watch = server.watch(every(OFTEN)).await;
        let last = users.to_string();
        let filtered = |user_ids: &[i64]| WatchRoleChangesRequest { user_ids: user_ids.to_vec(), ..every(OFTEN) };
        let mut of_first = server.watch(filtered(&[5, 6])).await;
        let mut of_both = server.watch(filtered(&[5, users.into()])).await;
        let mut of_nobody = server.watch(filtered(&[1_000_000])).await;
        db.sql("update users set role = 'admin'");
        db.sql(&format!("update users set role = 'moderator' where user_id = {last}"));
        let end = server.stats().await.store_revision.max(before + 2);

        let (mut parts, mut told) = (0, 0);
        loop {
            let part = watch.next_commit_message().await;
            assert!(part.changes.len() <= 1_000);
            parts += 1;
            told += part.changes.len();
            if !part.partial {
                break;
            }
        }
        assert_eq!(told, users as usize);
        assert!(parts >= told.div_ceil(1_000), "{parts} parts of {told} changes");
        watch.next_commit().await;
        watch.check();
        let log = server.log().await;
        reliable(&watch.transcript, &log, before);

        for (watch, users) in [(&mut of_first, vec![5, 6]), (&mut of_both, vec![5, users.into()])] {
            let whole = watch.next_commit().await;
            assert_eq!(whole.changes.iter().map(|change| change.user_id).collect::<Vec<_>>(), users);
            watch.until(end).await;
            watch.check();
            let expected: Vec<_> = log.iter().filter(|change| users.contains(&change.user_id)).cloned().collect();
            reliable(&watch.transcript, &expected, before);
        }
        of_nobody.until(end).await;
        assert!(of_nobody.changes().is_empty());
        of_nobody.check();
        if users > 10_000 {
            // What comes after the first run is not known when that is sent: the end has to be told with nothing in it.
            let commits = of_first.transcript.iter().filter_map(|event| match event {
                Event::Commit(commit) => Some((commit.changes.len(), commit.partial)),
                _ => None,
            });
            assert_eq!(commits.collect::<Vec<_>>(), [(2, true), (0, false)]);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_comes_between_the_parts_of_a_commit() {
    let db = Db::postgres().await;
    let gates = Gates::default();
    let server = Setup::new(&db).wrap(gates.guard()).serve().await;
    db.sql("insert into users (user_id, role) select n, 'user' from generate_series(1, 12000) n");
    server.reach(1).await;
    let mut watch = Watching::open(narrow(&server).await, every(OFTEN)).await.unwrap();
    let of_nobody = WatchRoleChangesRequest { user_ids: vec![-1], ..every(Duration::from_secs(3_600)) };
    let mut other = server.watch(of_nobody).await;
    let begun = watch.started.revision;
    db.sql("update users set role = 'admin'");
    assert!(watch.next_commit_message().await.partial);
    // In the middle of the commit the store is lost, and twenty heartbeats are due.
    gates.read_log.close();
    loop {
        match other.next().await {
            Event::Heartbeat(it) if it.feed_state() == FeedState::Disconnected => break,
            _ => {}
        }
    }
    gates.read_log.open();
    watch.until(begun + 1).await;
    atomic(&watch.transcript);
    progress_safe(&watch.transcript);
    assert_eq!(watch.changes().len(), 12_000);
    assert!(matches!(watch.next().await, Event::Heartbeat(_)));
}
