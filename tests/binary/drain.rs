//! SIGTERM and SIGINT end it in time, with a word for everybody who listens, whatever hangs.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rolecache::proto::v1::{
    SetRoleRequest, WatchRoleChangesRequest, role_cache_service_client::RoleCacheServiceClient,
    watch_role_changes_response::Event,
};
use tonic::{Code, transport::Channel};

use crate::{
    process::{Process, answer},
    support::{
        proxy::Proxy,
        server::{Db, PATIENCE, client},
        watch::{Watching, reason},
    },
};

on_both! {
    sigterm_ends_it_in_time_with_a_thousand_watches_one_stuck_and_the_store_frozen,
    sigint_ends_it_in_time_with_a_thousand_watches_one_stuck_and_the_store_frozen,
}

async fn sigterm_ends_it_in_time_with_a_thousand_watches_one_stuck_and_the_store_frozen(db: Db) {
    ends_in_time(db, "TERM").await;
}

async fn sigint_ends_it_in_time_with_a_thousand_watches_one_stuck_and_the_store_frozen(db: Db) {
    ends_in_time(db, "INT").await;
}

/// What stands before the store, until it is frozen.
enum Ice {
    Proxy(Proxy),
    /// The shell that will hold the file.
    Shell(Child),
}

const CHANGES: usize = 5_000;

async fn ends_in_time(db: Db, signal: &str) {
    let mut ice = Ice::before(&db).await;
    let mut server = Process::serve(&ice.url(&db), &[]);
    let address = server.ready();
    db.sql(&format!(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < {CHANGES})
         insert into users (user_id, role, username) select i, 'admin', '{}' from n",
        "x".repeat(60)
    ));
    answer(&["get", "1", "--min-revision", &db.head().to_string(), "--address", &address]);

    // Has more to be sent than fits.
    let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
    let narrow = endpoint.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    let mut deaf = RoleCacheServiceClient::new(narrow.connect().await.unwrap());
    let request = WatchRoleChangesRequest { after: "0".into(), ..Default::default() };
    let mut never_read = deaf.watch_role_changes(request).await.unwrap().into_inner();

    let mut watches = Vec::new();
    for _ in 0..10 {
        let client = client(address.parse().unwrap()).await;
        for _ in 0..100 {
            watches.push(Watching::open(client.clone(), WatchRoleChangesRequest::default()).await.unwrap());
        }
    }
    answer(&["set", "7", "user", "--address", &address]);
    for watch in &mut watches {
        assert_eq!(watch.next_commit().await.changes.len(), 1);
    }
    ice.freeze();
    let write = tokio::spawn({
        let mut client = client(address.parse().unwrap()).await;
        async move { client.set_role(SetRoleRequest { user_id: 1, role: "user".into(), ..Default::default() }).await }
    });
    let begun = Instant::now();
    server.signal(signal);
    for watch in &mut watches {
        assert_eq!(reason(&watch.until_end().await).1, "SHUTTING_DOWN");
    }
    let told = begun.elapsed();
    let status = server.ended_within(Duration::from_secs(10));
    let ended = begun.elapsed();
    println!("SIG{signal}: {} watches were told after {told:?}, the end came after {ended:?}", watches.len());
    assert!(told < Duration::from_secs(3), "who reads is told at once, and it took {told:?}");
    assert!(ended < Duration::from_secs(10), "it took {ended:?}");
    assert_eq!(status.code(), Some(0), "{}", server.err.text());
    let written = write.await.unwrap().expect_err("nobody can know of this write");
    assert_ne!(written.code(), Code::Ok);

    let mut taken = 0;
    while let Ok(Ok(Some(message))) = tokio::time::timeout(PATIENCE, never_read.message()).await {
        if let Some(Event::Commit(commit)) = message.event {
            taken += commit.changes.len();
        }
    }
    assert!(taken < CHANGES, "it was stuck");
}

// === impl Ice ===

impl Ice {
    async fn before(db: &Db) -> Self {
        match db {
            Db::Postgres { url } => Self::Proxy(Proxy::before(url).await),
            Db::Sqlite { .. } => Self::Shell(
                Command::new("sqlite3")
                    .args(["-batch", "-bail", "-cmd", ".timeout 20000"])
                    .arg(db.file())
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap(),
            ),
        }
    }

    /// What the server is to be given.
    fn url(&self, db: &Db) -> String {
        match self {
            Self::Proxy(proxy) => proxy.url.clone(),
            Self::Shell(_) => db.url(),
        }
    }

    /// From now on PostgreSQL says nothing any more, and the file cannot be written to.
    fn freeze(&mut self) {
        match self {
            Self::Proxy(proxy) => proxy.freeze(),
            Self::Shell(shell) => {
                writeln!(shell.stdin.as_mut().unwrap(), "begin immediate; select 'held';").unwrap();
                let mut line = String::new();
                BufReader::new(shell.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
                assert_eq!(line, "held\n");
            }
        }
    }
}

impl Drop for Ice {
    fn drop(&mut self) {
        if let Self::Shell(shell) = self {
            let _ = shell.kill();
            let _ = shell.wait();
        }
    }
}
