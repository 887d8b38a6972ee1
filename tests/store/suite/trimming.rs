//! The log is trimmed from its old end, and says so.

use std::time::Duration;

use rolecache::{
    role::{Revision, Tag},
    store::{ListPosition, LogError, Trimmed},
};
use uuid::Uuid;

use super::*;
use crate::fixtures::Fixture;

const MONTH: Duration = Duration::from_secs(30 * 86_400);

/// Trims until nothing is left to trim.
async fn trim_all(store: &Arc<dyn Store>) -> Trimmed {
    let mut all = Trimmed::default();
    loop {
        let batch = store.trim(MONTH).await.unwrap();
        assert!(batch.commits <= 1_000 && batch.requests <= 1_000);
        if batch == Trimmed::default() {
            return all;
        }
        all.commits += batch.commits;
        all.requests += batch.requests;
    }
}

async fn revisions<F: Fixture>(database: &F, store: &Arc<dyn Store>, commits: i64) -> (Anchor, Vec<Commit>) {
    let start = store.head().await.unwrap();
    database.add_commits(1, commits);
    let all = read_from(store, start, 20_000).await;
    assert_eq!(all.len() as i64, commits);
    (start, all)
}

pub async fn only_old_commits_past_the_newest_10000_go<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let (start, all) = revisions(&database, &store, 10_050).await;
    assert_eq!(trim_all(&store).await, Trimmed::default(), "nothing is old");
    // Everything but the newest ten is old, and still 10,000 stay.
    database.backdate(all[0].revision.0, all[10_039].revision.0, 31);
    assert_eq!(trim_all(&store).await.commits, 50);
    assert_eq!(trim_all(&store).await, Trimmed::default());
    let rest = read_from(&store, all[49].anchor(), 20_000).await;
    assert_eq!(rest.len(), 10_000);
    assert_eq!(rest[0].anchor(), all[50].anchor());
    let gone = store.read_log(&start.into(), 10).await;
    assert!(matches!(gone, Err(LogError::Compacted { .. })), "{gone:?}");
    store.close().await;
}

pub async fn a_younger_commit_holds_what_follows<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let (_, all) = revisions(&database, &store, 10_050).await;
    database.backdate(all[0].revision.0, all[9].revision.0, 31);
    database.backdate(all[11].revision.0, all[49].revision.0, 31);
    assert_eq!(trim_all(&store).await.commits, 10, "a commit from the middle would leave a hole");
    assert_eq!(read_from(&store, all[9].anchor(), 20_000).await.len(), 10_040);
    store.close().await;
}

pub async fn a_trimmed_log_says_from_where_it_is_whole<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let (_, all) = revisions(&database, &store, 10_020).await;
    database.backdate(all[0].revision.0, all[19].revision.0, 31);
    assert_eq!(trim_all(&store).await.commits, 20);
    let [below, at, above] = [18, 19, 20].map(|index| all[index].anchor());
    let head = all[10_019].revision;

    match store.read_log(&below.into(), 10).await {
        Err(LogError::Compacted { requested, oldest, head: now }) => {
            assert_eq!((requested, oldest, now), (below.revision, at.revision, head));
        }
        other => panic!("{other:?}"),
    }
    for (anchor, first) in [(at, 20), (above, 21)] {
        let page = store.read_log(&anchor.into(), 10).await.unwrap();
        assert_eq!(page.commits[0], all[first]);
        assert_eq!(store.locate(anchor.revision, None).await.unwrap(), anchor);
        assert_eq!(store.locate(anchor.revision, Some(anchor.tag)).await.unwrap(), anchor);
    }
    let tag = Tag(Uuid::new_v4());
    let wrong = store.read_log(&Anchor { tag, ..at }.into(), 10).await;
    assert!(matches!(wrong, Err(LogError::HistoryChanged { .. })), "{wrong:?}");
    for tag in [None, Some(below.tag)] {
        let gone = store.locate(below.revision, tag).await;
        assert!(matches!(gone, Err(LogError::Compacted { .. })), "{gone:?}");
    }

    let from = |revision, kept_only| ListPosition { revision, inside: None, kept_only };
    let gone = store.list_changes(None, from(below.revision, false), 10).await;
    assert!(matches!(gone, Err(LogError::Compacted { .. })), "{gone:?}");
    for position in [from(at.revision, false), from(Revision(0), true), from(below.revision, true)] {
        let page = store.list_changes(None, position, 10).await.unwrap();
        assert_eq!(page.changes[0].revision, all[20].revision, "{position:?}");
    }
    store.close().await;

    let store = database.open().await;
    assert_eq!(read_from(&store, at, 20_000).await.len(), 10_000, "the trim point outlives a restart");
    store.close().await;
}

pub async fn request_ids_are_forgotten_after_a_day<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    write(&store, with_request(set(1, "admin"), "r", 1)).await.unwrap();
    assert_eq!(trim_all(&store).await, Trimmed::default());
    database.backdate_requests(2);
    write(&store, with_request(set(2, "admin"), "s", 1)).await.unwrap();
    assert_eq!(trim_all(&store).await, Trimmed { commits: 0, requests: 1 });
    let again = write(&store, with_request(set(3, "admin"), "r", 2)).await.unwrap();
    assert_eq!(said(&again.changes), "3: - > admin");
    // Whether the trimmer has come or not.
    database.backdate_requests(2);
    let again = write(&store, with_request(set(4, "admin"), "r", 3)).await.unwrap();
    assert_eq!(said(&again.changes), "4: - > admin");
    store.close().await;
}
