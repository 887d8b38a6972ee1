//! Writers of every kind at once, some that pause before COMMIT and some that roll back: nobody misses a commit, nobody
//! hears one twice, and in the end every cache is the table.

use std::collections::BTreeMap;

use rolecache::proto::v1::{BatchGetRolesRequest, RoleChange, SetRoleRequest};
use tonic::Code;

use crate::{
    resume::Random,
    support::{
        server::{Db, Setup, Shell, TestServer},
        watch::reliable,
    },
};

const USERS: i64 = 60;
const ROLES: [&str; 3] = ["admin", "user", "moderator"];

/// Transactions of one SQL writer, as a script.
fn script(random: &mut Random, transactions: usize, postgres: bool) -> String {
    let begin = if postgres { "begin;" } else { "begin immediate;" };
    let mut script = String::new();
    for _ in 0..transactions {
        script += begin;
        // In order of id, so that nobody waits in a circle.
        let mut users: Vec<u64> = (0..1 + random.below(3)).map(|_| 1 + random.below(USERS as u64)).collect();
        users.sort_unstable();
        for user in users {
            let role = ["admin", "user", "moderator", "owner"][random.below(4) as usize];
            script += &match random.below(6) {
                0 => format!("delete from users where user_id = {user};"),
                1 => format!("savepoint s; delete from users where user_id = {user}; rollback to s;"),
                _ => format!(
                    "insert into users (user_id, role) values ({user}, '{role}')
                     on conflict (user_id) do update set role = excluded.role;"
                ),
            };
        }
        if postgres && random.below(2) == 0 {
            script += &format!("select pg_sleep(0.0{:02});", 1 + random.below(20));
        }
        script += if random.below(5) == 0 { "rollback;" } else { "commit;" };
        script += "\n";
    }
    script
}

/// Writes until it has written `writes` times; whose row is held is asked for again.
async fn rpc_writer(server: &TestServer, seed: u64, writes: usize) -> tokio::task::JoinHandle<()> {
    let mut client = server.client.clone();
    tokio::spawn(async move {
        let mut random = Random::from_seed(seed);
        for _ in 0..writes {
            let (user_id, role) = (1 + random.below(USERS as u64) as i64, ROLES[random.below(3) as usize]);
            loop {
                let request = SetRoleRequest { user_id, role: role.into(), ..Default::default() };
                match client.set_role(request).await {
                    Ok(_) => break,
                    Err(status) => assert_eq!(status.code(), Code::Aborted, "{status:?}"),
                }
            }
        }
    })
}

fn replay(log: &[RoleChange]) -> BTreeMap<i64, String> {
    let mut state = BTreeMap::new();
    for change in log {
        let held = state.get(&change.user_id).map_or("", String::as_str);
        assert_eq!(held, change.old_role, "{change:?}");
        match &*change.new_role {
            "" => state.remove(&change.user_id),
            role => state.insert(change.user_id, role.to_owned()),
        };
    }
    state
}

fn table(shell: &Shell) -> BTreeMap<i64, String> {
    let printed = shell.run("select user_id, role from users");
    printed
        .lines()
        .map(|line| line.split_once('|').unwrap())
        .map(|(id, role)| (id.parse().unwrap(), role.to_owned()))
        .collect()
}

async fn race(
    db: &Db,
    servers: &[TestServer],
    random: &mut Random,
    sql_writers: usize,
    rpc_writers: usize,
    each: usize,
) {
    let mut watches = Vec::new();
    for server in servers {
        watches.push(server.watch(Default::default()).await);
    }
    let mut writers = Vec::new();
    for _ in 0..sql_writers {
        let (shell, script) = (db.shell(), script(random, each, db.is_postgres()));
        writers.push(tokio::spawn(async move {
            shell.go(script).await;
        }));
    }
    for n in 0..rpc_writers {
        writers.push(rpc_writer(&servers[n % servers.len()], random.below(u64::MAX >> 1), each * 3).await);
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let end = servers[0].set(1_000, "admin").await.revision;
    let log = servers[0].log().await;
    let table = table(&db.shell());
    assert_eq!(replay(&log), table);
    for (server, watch) in servers.iter().zip(&mut watches) {
        watch.until(end).await;
        watch.check();
        reliable(&watch.transcript, &log, 0);
        server.reach(end).await;
        let request = BatchGetRolesRequest { user_ids: (1..=USERS).collect(), ..Default::default() };
        let answer = server.client.clone().batch_get_roles(request).await.unwrap().into_inner();
        assert!(!answer.stale);
        for (user, index) in (1..=USERS).zip(&answer.role_indexes) {
            let held = table.get(&user).map_or("user", String::as_str);
            assert_eq!(answer.roles[*index as usize], held, "user {user}");
        }
    }
    let mut revisions: Vec<i64> = log.iter().map(|change| change.revision).collect();
    revisions.dedup();
    println!("{} changes in {} commits, up to revision {end}", log.len(), revisions.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_misses_or_doubles_a_commit_of_any_writer_on_two_servers() {
    let mut random = Random::new("ordering on PostgreSQL");
    let db = Db::postgres().await;
    // One looks into its ring, the other pages the log; one is lazy, the other complete.
    let servers = [db.serve().await, Setup { ring_bytes: 2_000, ..Setup::new(&db).complete() }.serve().await];
    race(&db, &servers, &mut random, 12, 4, 80).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_misses_or_doubles_a_commit_beside_shells() {
    let mut random = Random::new("ordering on SQLite");
    let db = Db::sqlite();
    let servers = [db.serve().await];
    race(&db, &servers, &mut random, 4, 4, 60).await;
}
