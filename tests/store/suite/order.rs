//! One sequence: whatever writers do at the same time, readers see it in one order and whole.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::*;
use crate::fixtures::Fixture;

/// Follows the log from `from` until `stop` is set and its end is reached.
async fn follow(store: Arc<dyn Store>, from: Anchor, stop: Arc<AtomicBool>) -> Vec<Commit> {
    let mut commits: Vec<Commit> = Vec::new();
    let mut position = Position::from(from);
    loop {
        let stopping = stop.load(Ordering::SeqCst);
        let page = store.read_log(&position, 50).await.expect("read the log");
        let is_at_end = page.reaches_head();
        commits.extend(page.commits);
        position = page.next;
        if stopping && is_at_end {
            return commits;
        }
        tokio::task::yield_now().await;
    }
}

pub async fn concurrent_writers_are_read_in_order_and_nothing_is_missed<F: Fixture>() {
    let database = Arc::new(F::fresh().await);
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..2).map(|_| tokio::spawn(follow(store.clone(), start, stop.clone()))).collect();

    let mut writers = tokio::task::JoinSet::new();
    for shell in 0..2 {
        let database = database.clone();
        writers.spawn_blocking(move || {
            for round in 0..15 {
                database.sql(&format!(
                    "insert into users (user_id, role) values ({shell}, 's{round}') on conflict (user_id)
                       do update set role = excluded.role;
                     update users set role = 'c{shell}{round}' where user_id between 10 and 12;
                     begin; update users set role = 'never' where user_id = {shell}; rollback;"
                ));
            }
        });
    }
    for caller in 0..3_i64 {
        let store = store.clone();
        writers.spawn(async move {
            let mut last = 0;
            for round in 0..40 {
                let calls = [set(100 + caller, &format!("r{round}")), set(10 + caller, &format!("p{round}"))];
                for answer in write_until_free(&store, &calls).await {
                    assert!(answer.revision.0 >= last, "revisions grow for a caller");
                    last = answer.revision.0;
                }
            }
        });
    }
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    stop.store(true, Ordering::SeqCst);

    let all = read_from(&store, start, 1_000).await;
    assert!(all.is_sorted_by(|a, b| a.revision < b.revision));
    let mut held: HashMap<UserId, Option<RoleName>> = HashMap::new();
    for change in all.iter().flat_map(|commit| &commit.changes) {
        let before = held.insert(change.user, change.new.clone()).flatten();
        assert_eq!(before, change.old, "each change starts where the one before it ended: {change:?}");
        assert_ne!(change.new.as_ref().map(RoleName::as_str), Some("never"));
    }
    for row in store.list_users(None, None, 100).await.unwrap().users {
        assert_eq!(held[&row.user], Some(row.role));
    }
    for reader in readers {
        let commits = reader.await.unwrap();
        assert_eq!(commits.len(), all.len());
        assert!(commits == all, "a reader that followed saw something else than one that came later");
    }
    store.close().await;
}

/// Writes again what somebody else's transaction was in the way of.
async fn write_until_free(store: &Arc<dyn Store>, calls: &[Call]) -> Vec<Written> {
    let mut written = Vec::new();
    let mut left = calls.to_vec();
    for _ in 0..10_000 {
        let answers = store.write(&left).await;
        let mut busy = Vec::new();
        for (call, answer) in left.into_iter().zip(answers) {
            match answer {
                Ok(answer) => written.push(answer),
                Err(WriteError::Busy | WriteError::AllHeld) => busy.push(call),
                Err(error) => panic!("{call:?}: {error}"),
            }
        }
        left = busy;
        if left.is_empty() {
            return written;
        }
    }
    panic!("busy for ever: {left:?}");
}

pub async fn a_snapshot_is_of_one_revision<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let users: Vec<i64> = (0..2_500).collect();
    for part in users.chunks(500) {
        store.write(&part.iter().map(|user| set(*user, "v0")).collect::<Vec<_>>()).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (store, stop) = (store.clone(), stop.clone());
        async move {
            let mut round = 0;
            while !stop.load(Ordering::SeqCst) {
                round += 1;
                let calls: Vec<_> = (0..2_500).step_by(50).map(|user| set(user, &format!("v{round}"))).collect();
                store.write(&calls).await;
            }
        }
    });
    for _ in 0..5 {
        let mut snapshot = store.snapshot().await.unwrap();
        let anchor = snapshot.anchor();
        let mut seen: HashMap<UserId, RoleName> = HashMap::new();
        loop {
            let chunk = snapshot.next().await.unwrap();
            if chunk.is_empty() {
                break;
            }
            let before = store.head().await.unwrap();
            while store.head().await.unwrap() == before {
                tokio::task::yield_now().await;
            }
            seen.extend(chunk.into_iter().map(|row| (row.user, row.role)));
        }
        let mut held: HashMap<UserId, RoleName> = HashMap::new();
        for commit in read_from(&store, start, 1_000).await {
            if commit.revision <= anchor.revision {
                held.extend(commit.changes.into_iter().filter_map(|change| Some((change.user, change.new?))));
            }
        }
        assert!(seen == held, "the snapshot is not what the log says of revision {}", anchor.revision);
    }
    stop.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    store.close().await;
}
