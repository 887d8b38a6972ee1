//! A server that is killed in the middle of its writes: whatever it acknowledged is there.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

use rolecache::{
    role::{RoleName, UserId},
    store::{self, Options},
};

use crate::{
    fixtures::{Fixture, SqliteFile},
    suite::*,
};

const URL: &str = "KILLED_WRITER_URL";

/// Acknowledged before the first kill, the second and the third.
const ROUNDS: [usize; 3] = [1, 40, 150];

/// What the process does that gets killed: writes one user after another and prints what was acknowledged.
async fn write_until_killed(url: String) {
    let options =
        Options { url, default_role: RoleName::held("user"), admin_role: RoleName::held("admin"), migrate: true };
    let store = store::sqlite::open(&options).await.unwrap();
    let first = store.head().await.unwrap().revision.0 * 10;
    for user in (first..first + 1_000_000).step_by(2) {
        let answers = store.write(&[set(user, "kept"), set(user + 1, "kept")]).await;
        let revision = answers[1].as_ref().unwrap().revision;
        let mut out = std::io::stdout().lock();
        writeln!(out, "acknowledged {user} {revision}").unwrap();
        out.flush().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_write_outlives_a_kill() {
    // This program runs itself as the one that gets killed.
    if let Ok(url) = std::env::var(URL) {
        return write_until_killed(url).await;
    }
    let database = SqliteFile::fresh().await;
    let mut acknowledged: Vec<(i64, i64)> = Vec::new();
    for enough in ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sqlite::kill::an_acknowledged_write_outlives_a_kill", "--nocapture"])
            .env(URL, database.url())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        // After the kill the pipe still holds what was printed before it.
        for line in lines.map_while(Result::ok) {
            // The first one may stand behind what the harness prints.
            let Some((_, said)) = line.split_once("acknowledged ") else { continue };
            let Some((user, revision)) = said.split_once(' ') else { continue };
            acknowledged.push((user.parse().unwrap(), revision.parse().unwrap()));
            seen += 1;
            if seen == enough {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= enough, "the writer ended by itself after {seen}");

        let store = database.open().await;
        let users: Vec<_> = acknowledged.iter().flat_map(|(user, _)| [UserId(*user), UserId(user + 1)]).collect();
        let roles = store.roles(&users).await.unwrap().roles;
        assert!(roles.iter().all(|role| role.as_str() == "kept"), "{roles:?}");
        let newest = acknowledged.iter().map(|(_, revision)| *revision).max().unwrap();
        assert!(store.head().await.unwrap().revision.0 >= newest);
        super::replace::assert_log_leads_to_table(&database, &store).await;
        store.close().await;
        assert_eq!(database.sql("pragma integrity_check"), "ok");
        assert_eq!(database.sql("select count(*) from rolecache_feed where open_commit is not null"), "0");
    }
    assert_eq!(database.files(), ["bot.db"]);
}
