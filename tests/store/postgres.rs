//! What only the PostgreSQL store has: other people's SQL, adopted tables, and everything that SQL can do to a log.

mod adopt;
mod history;
mod outage;
mod privileges;
mod sql;
mod tls;
mod write;

use std::{fmt::Write, sync::Arc, time::Duration};

use rolecache::{
    role::{Change, Commit, Revision, RoleName, UserId},
    store::{Call, Grant, LogError, Op, OpenError, Options, Position, RequestId, Store, StoreError, postgres},
};
use tokio::{
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    task::JoinHandle,
    time::timeout,
};

use crate::support::{
    postgres::{Database, Postgres, psql},
    server::PATIENCE,
};

pub(crate) fn options(url: &str) -> Options {
    let (default_role, admin_role) = (RoleName::held("user"), RoleName::held("admin"));
    Options { url: url.to_owned(), default_role, admin_role, migrate: true }
}

pub(crate) async fn open(url: &str) -> Arc<dyn Store> {
    postgres::open(&options(url)).await.unwrap()
}

/// Why it cannot be opened.
pub(crate) async fn refusal(options: &Options) -> String {
    match postgres::open(options).await {
        Err(OpenError::Refused(sentence)) => sentence,
        Err(other) => panic!("not refused but {other}"),
        Ok(_) => panic!("not refused"),
    }
}

/// A database with the schema in it.
pub(crate) async fn fresh() -> (Database, Arc<dyn Store>) {
    let database = Postgres::shared().fresh_database().await;
    let store = open(&database.url).await;
    (database, store)
}

/// Listens to a store until it is dropped.
pub(crate) struct Bell {
    rings: UnboundedReceiver<()>,
    listening: JoinHandle<StoreError>,
}

impl Bell {
    pub(crate) fn of(store: &Arc<dyn Store>) -> Self {
        let (rung, rings) = unbounded_channel();
        let store = store.clone();
        // Who does not listen any more is not told.
        let listening = tokio::spawn(async move { store.listen(&move || rung.send(()).unwrap_or_default()).await });
        Self { rings, listening }
    }

    /// Waits for it to ring; a ring that nobody has waited for counts.
    pub(crate) async fn rings(&mut self) {
        timeout(PATIENCE, self.rings.recv()).await.expect("it should ring in time").unwrap();
    }

    /// Takes away what has rung so far.
    pub(crate) fn forget(&mut self) {
        while self.rings.try_recv().is_ok() {}
    }

    /// Waits until it has not rung for so long.
    pub(crate) async fn falls_silent(&mut self, time: Duration) {
        while timeout(time, self.rings.recv()).await.is_ok() {}
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// The whole log, read in pages of `limit`.
pub(crate) async fn log_in_pages(store: &dyn Store, limit: usize) -> Result<Vec<Commit>, LogError> {
    let mut at = Position::from(store.locate(Revision(0), None).await?);
    let mut commits: Vec<Commit> = Vec::new();
    loop {
        let page = store.read_log(&at, limit).await?;
        let read: usize = page.commits.iter().map(|commit| commit.changes.len()).sum();
        assert!(read <= limit.max(1), "{read} changes in a page of {limit}");
        let is_end = page.reaches_head();
        let inside = at.inside.is_some();
        at = page.next;
        for (place, commit) in page.commits.into_iter().enumerate() {
            match commits.last_mut() {
                Some(last) if inside && place == 0 => {
                    assert_eq!(last.anchor(), commit.anchor());
                    last.changes.extend(commit.changes);
                }
                _ => commits.push(commit),
            }
        }
        if is_end {
            break;
        }
    }
    assert!(commits.is_sorted_by(|a, b| a.revision < b.revision), "the log is in order");
    for commit in &commits {
        assert_eq!(commit.size, commit.changes.len() as u64);
        assert!(commit.changes.iter().enumerate().all(|(place, change)| change.index == place as u64));
    }
    Ok(commits)
}

pub(crate) async fn log(store: &dyn Store) -> Vec<Commit> {
    log_in_pages(store, 1_000).await.unwrap()
}

/// A commit per line: `1:-user 2:user-admin` for user 1 created and 2 made admin.
pub(crate) fn told(commits: &[Commit]) -> String {
    let name = |role: &Option<RoleName>| role.as_ref().map_or(String::new(), ToString::to_string);
    let one = |change: &Change| format!("{}:{}-{}", change.user, name(&change.old), name(&change.new));
    commits.iter().fold(String::new(), |mut text, commit| {
        let changes: Vec<String> = commit.changes.iter().map(one).collect();
        writeln!(text, "{}", changes.join(" ")).unwrap();
        text
    })
}

/// What SQL leaves in the log of a fresh database, which already has users 1 (user), 2 (admin) and 3 (no role).
pub(crate) async fn logged(sql: &str) -> String {
    let (database, store) = fresh().await;
    psql(&database.url, "insert into users values (1, 'user', null), (2, 'admin', 'bob'), (3, null, null)");
    psql(&database.url, sql);
    let commits = log(&*store).await;
    assert_eq!(told(&commits[..1]), "1:-user 2:-admin 3:-user\n");
    told(&commits[1..])
}

pub(crate) fn set(user: i64, role: &str) -> Call {
    let role = RoleName::held(role);
    call(Op::Set { user: UserId(user), role, username: None, expected: None, reason: None })
}

pub(crate) fn call(op: Op) -> Call {
    Call { actor: "tester".into(), grant: Grant::Any, request: None, op }
}

pub(crate) fn with_id(mut call: Call, id: &str) -> Call {
    call.request = Some(RequestId { id: id.into(), hash: [7; 32] });
    call
}

pub(crate) async fn role_of(store: &dyn Store, user: i64) -> String {
    store.roles(&[UserId(user)]).await.unwrap().roles[0].to_string()
}
