//! Reading the log: anchors, pages, parts of a commit, and lists.

use rolecache::{
    role::{Revision, Tag, UserId},
    store::{ListPosition, LogError, Position, StoreError},
};
use uuid::Uuid;

use super::*;
use crate::fixtures::Fixture;

pub async fn an_anchor_is_found_or_the_reason_told<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let empty = store.head().await.unwrap();
    assert_eq!(empty.revision, Revision(0));
    assert!(store.read_log(&empty.into(), 10).await.unwrap().reaches_head());
    write(&store, set(1, "admin")).await.unwrap();
    let head = store.head().await.unwrap();

    assert_eq!(read_from(&store, empty, 10).await.len(), 1);
    assert!(store.read_log(&head.into(), 10).await.unwrap().reaches_head());
    let tag = Tag(Uuid::new_v4());
    for wrong in [
        Anchor { tag, ..empty },
        Anchor { tag, ..head },
        Anchor { tag: empty.tag, ..head },
        Anchor { revision: Revision(head.revision.0 + 1), ..head },
        Anchor { revision: Revision(i64::MAX), tag },
    ] {
        match store.read_log(&wrong.into(), 10).await {
            Err(LogError::HistoryChanged { at, head: now }) => assert_eq!((at, now), (wrong, head.revision)),
            other => panic!("{wrong:?}: {other:?}"),
        }
    }
    store.close().await;
}

pub async fn a_log_is_read_in_whole_commits<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    for first in [10, 20, 30, 40] {
        let calls: Vec<_> = (first..first + 3).map(|user| set(user, "helper")).collect();
        store.write(&calls).await;
    }
    let all = read_from(&store, start, 100).await;
    assert_eq!(all.len(), 4);
    for (limit, sizes) in
        [(3, &[3][..]), (5, &[3]), (6, &[3, 3]), (8, &[3, 3]), (12, &[3, 3, 3, 3]), (100, &[3, 3, 3, 3])]
    {
        let page = store.read_log(&start.into(), limit).await.unwrap();
        assert_eq!(page.commits.iter().map(|commit| commit.changes.len()).collect::<Vec<_>>(), sizes, "{limit}");
        assert_eq!(page.next, Position::from(page.commits.last().unwrap().anchor()));
        assert_eq!(page.head, all[3].anchor());
        assert_eq!(page.reaches_head(), sizes.len() == 4);
    }
    for limit in 1..14 {
        assert_eq!(read_from(&store, start, limit).await, all, "{limit}");
    }
    store.close().await;
}

pub async fn a_large_commit_is_read_in_parts<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    write(&store, set(1_000, "x")).await.unwrap();
    let calls: Vec<_> = (0..25).map(|user| set(user, "helper")).collect();
    let answers = store.write(&calls).await;
    write(&store, set(1_000, "y")).await.unwrap();
    let all = read_from(&store, start, 1_000).await;

    let first = store.read_log(&start.into(), 10).await.unwrap();
    assert_eq!(first.commits.len(), 1, "the small one alone: the large one does not fit");
    let mut position = first.next;
    let mut indexes = Vec::new();
    for part in [10, 10, 5] {
        let page = store.read_log(&position, 10).await.unwrap();
        assert_eq!(page.commits.len(), 1);
        let commit = &page.commits[0];
        assert_eq!((commit.size, commit.changes.len(), commit.ends_here()), (25, part, part == 5));
        assert_eq!(page.next.inside.is_none(), part == 5);
        assert!(!page.reaches_head());
        indexes.extend(commit.changes.iter().map(|change| change.index));
        // Asked again, it answers the same.
        assert_eq!(store.read_log(&position, 10).await.unwrap(), page);
        position = page.next;
    }
    assert_eq!(indexes, (0..25).collect::<Vec<_>>());
    assert_eq!(position, Position::from(all[1].anchor()));
    for (answer, change) in answers.iter().zip(&all[1].changes) {
        assert_eq!(&answer.as_ref().unwrap().changes[0], change);
    }
    for limit in [1, 2, 7, 24, 25, 26, 27, 28] {
        assert_eq!(read_from(&store, start, limit).await, all, "{limit}");
    }

    let mut page = store.read_log(&all[0].anchor().into(), 10).await.unwrap();
    let inside = page.next.inside.as_mut().unwrap();
    inside.commit.tag = Tag(Uuid::new_v4());
    let gone = store.read_log(&page.next, 10).await;
    assert!(matches!(gone, Err(LogError::HistoryChanged { .. })), "{gone:?}");
    store.close().await;
}

pub async fn a_revision_is_located<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let empty = store.head().await.unwrap();
    assert_eq!(store.locate(Revision(0), None).await.unwrap(), empty);
    let mut anchors = vec![empty];
    for user in 1..=3 {
        write(&store, set(user, "admin")).await.unwrap();
        anchors.push(store.head().await.unwrap());
    }
    for anchor in &anchors {
        assert_eq!(store.locate(anchor.revision, None).await.unwrap(), *anchor);
        assert_eq!(store.locate(anchor.revision, Some(anchor.tag)).await.unwrap(), *anchor);
        let wrong = store.locate(anchor.revision, Some(Tag(Uuid::new_v4()))).await;
        assert!(matches!(wrong, Err(LogError::HistoryChanged { .. })), "{wrong:?}");
    }
    let above = Revision(anchors[3].revision.0 + 1);
    match store.locate(above, None).await {
        Err(LogError::Unknown { requested, head }) => assert_eq!((requested, head), (above, anchors[3].revision)),
        other => panic!("{other:?}"),
    }
    let wrong = store.locate(above, Some(anchors[3].tag)).await;
    assert!(matches!(wrong, Err(LogError::HistoryChanged { .. })), "{wrong:?}");
    store.close().await;
}

pub async fn a_log_with_a_hole_is_broken<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    let calls: Vec<_> = (0..5).map(|user| set(user, "helper")).collect();
    store.write(&calls).await;
    let head = store.head().await.unwrap();
    database.damage_log(head.revision.0);
    let whole = store.read_log(&start.into(), 10).await;
    assert!(matches!(whole, Err(LogError::Store(StoreError::Broken(_)))), "{whole:?}");
    let part = store.read_log(&start.into(), 3).await.unwrap();
    let rest = store.read_log(&part.next, 3).await;
    assert!(matches!(rest, Err(LogError::Store(StoreError::Broken(_)))), "{rest:?}");
    store.close().await;
}

pub async fn changes_are_listed_in_pages<F: Fixture>() {
    let database = F::fresh().await;
    let store = database.open().await;
    let start = store.head().await.unwrap();
    for round in ["x", "y", "z"] {
        let calls: Vec<_> = (0..7).map(|user| set(user, round)).collect();
        store.write(&calls).await;
    }
    let all = read_from(&store, start, 1_000).await;
    for user in [None, Some(UserId(4))] {
        let wanted: Vec<_> = all
            .iter()
            .flat_map(|commit| commit.changes.iter().map(|change| (commit.revision, commit.at, change.clone())))
            .filter(|(_, _, change)| user.is_none_or(|user| user == change.user))
            .collect();
        for limit in [1, 2, 3, 7, 8, 100] {
            let mut from = ListPosition { revision: start.revision, inside: None, kept_only: false };
            let mut listed = Vec::new();
            loop {
                // One more than the page, as a caller does who wants to know where the next one starts.
                let page = store.list_changes(user, from, limit + 1).await.unwrap();
                assert_eq!(page.head, all[2].anchor());
                let has_more = page.changes.len() > limit;
                listed.extend(page.changes.iter().take(limit).map(|one| (one.revision, one.at, one.change.clone())));
                let Some(next) = page.changes.get(limit) else { break };
                assert!(has_more);
                from = ListPosition {
                    revision: next.revision,
                    inside: Some((next.change.index, next.row)),
                    kept_only: false,
                };
            }
            assert_eq!(listed, wanted, "{user:?} by {limit}");
        }
    }
    let after = ListPosition { revision: all[1].revision, inside: None, kept_only: false };
    assert_eq!(store.list_changes(None, after, 100).await.unwrap().changes.len(), 7);
    let at_head = ListPosition { revision: all[2].revision, ..after };
    assert_eq!(store.list_changes(None, at_head, 100).await.unwrap().changes.len(), 0);
    let above = ListPosition { revision: Revision(all[2].revision.0 + 1), ..after };
    let unknown = store.list_changes(None, above, 100).await;
    assert!(matches!(unknown, Err(LogError::Unknown { .. })), "{unknown:?}");
    store.close().await;
}
