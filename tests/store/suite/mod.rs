//! The suite: every function takes a kind of store and proves one promise on a fresh one.

pub mod adoption;
pub mod grants;
pub mod log;
pub mod order;
pub mod plain_sql;
pub mod reads;
pub mod trimming;
pub mod writes;

use std::sync::Arc;

use rolecache::{
    role::{Anchor, Change, Commit, MailboxId, RoleName, UserId},
    store::{Call, Grant, Op, Position, Refusal, RequestId, Store, WriteError, Written},
};

/// Every test of the suite on one kind of store.
macro_rules! for_store {
    ($name:ident, $fixture:ty) => {
        mod $name {
            suite! { $fixture;
                adoption: a_fresh_database_gets_its_tables, existing_tables_are_adopted, a_table_without_username_is_adopted,
                    tables_that_cannot_be_served_are_refused_untouched, settings_that_differ_are_refused,
                    no_migrate_only_checks, a_restart_keeps_the_store_and_its_revisions, a_missing_trigger_is_reported,
                    what_was_missed_without_a_trigger_is_not_passed_over, what_was_missed_is_not_passed_over_after_a_trim;
                grants: a_role_within_the_grant_is_given_and_taken, a_role_outside_the_grant_is_neither_given_nor_taken,
                    a_username_is_set_within_the_grant, only_those_within_the_grant_are_deleted,
                    a_transfer_needs_every_role_that_comes_or_goes, mailboxes_are_no_matter_of_grants,
                    a_call_outside_its_grant_fails_alone, the_role_that_counts_is_the_one_at_the_write,
                    no_order_of_writes_takes_what_is_not_granted,
                    a_repeat_gets_its_first_answer_whatever_is_granted_now,
                    what_the_table_does_to_others_is_the_callers_doing;
                log: an_anchor_is_found_or_the_reason_told, a_log_is_read_in_whole_commits,
                    a_large_commit_is_read_in_parts, a_revision_is_located, a_log_with_a_hole_is_broken,
                    changes_are_listed_in_pages;
                order: concurrent_writers_are_read_in_order_and_nothing_is_missed, a_snapshot_is_of_one_revision;
                plain_sql: every_kind_of_statement_is_logged, unlogged_statements_make_no_commit,
                    a_role_of_null_or_nothing_is_the_default, a_rolled_back_statement_leaves_nothing,
                    a_changed_key_is_a_deletion_and_an_insertion, the_bots_own_triggers_have_the_last_word,
                    columns_of_any_name_are_not_taken_for_ours;
                reads: roles_are_answered_in_order_with_the_head, extremes_are_kept, users_are_listed_in_pages,
                    roles_outside_the_list_are_passed_on, a_snapshot_has_everybody_but_the_default;
                trimming: only_old_commits_past_the_newest_10000_go, a_younger_commit_holds_what_follows,
                    a_trimmed_log_says_from_where_it_is_whole, request_ids_are_forgotten_after_a_day;
                writes: a_set_creates_and_changes, an_expected_role_is_checked, a_write_with_nothing_to_do_answers_the_head,
                    a_username_is_kept_without_a_commit, one_bad_call_fails_alone, a_batch_shares_one_revision,
                    a_request_id_gets_its_first_answer, a_reused_request_id_is_refused, only_successes_are_remembered,
                    transfers_hand_over, transfers_are_refused, a_transfer_to_an_admin_is_logged, deletes_delete,
                    mailboxes_are_registered_once, a_half_done_call_is_undone, a_swallowed_write_is_rejected,
                    a_call_that_breaks_the_whole_transaction_fails_alone, a_mailbox_of_nobody_is_nobodys,
                    a_repeat_whose_commit_is_gone_is_in_doubt;
            }
        }
    };
}

macro_rules! suite {
    ($fixture:ty; $($area:ident: $($test:ident),+ $(,)?;)+) => {
        $(mod $area {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                crate::suite::$area::$test::<$fixture>().await;
            })+
        })+
    };
}

pub fn role(name: &str) -> RoleName {
    RoleName::held(name)
}

pub fn call(op: Op) -> Call {
    Call { actor: "bot".into(), grant: Grant::Any, request: None, op }
}

pub fn set(user: i64, to: &str) -> Call {
    call(Op::Set { user: UserId(user), role: role(to), username: None, expected: None, reason: None })
}

pub fn set_expecting(user: i64, to: &str, expected: &str) -> Call {
    let expected = Some(expected.into());
    call(Op::Set { user: UserId(user), role: role(to), username: None, expected, reason: None })
}

pub fn set_named(user: i64, to: &str, username: &str) -> Call {
    let username = Some(username.into());
    call(Op::Set { user: UserId(user), role: role(to), username, expected: None, reason: None })
}

pub fn delete(user: i64) -> Call {
    call(Op::Delete { user: UserId(user), reason: None })
}

/// What a caller is told: not by what tag it is known.
pub fn answer(written: Written) -> Written {
    Written { tag: None, ..written }
}

pub fn register(mailbox: i64, creator: i64) -> Call {
    call(Op::Register { mailbox: MailboxId(mailbox), creator: UserId(creator) })
}

pub fn transfer(from: i64, to: i64, mailbox: Option<i64>, demote_from: bool) -> Call {
    let (from, to, mailbox) = (UserId(from), UserId(to), mailbox.map(MailboxId));
    call(Op::Transfer { from, to, mailbox, demote_from, to_username: None, reason: Some("hand-over".into()) })
}

pub fn with_request(call: Call, id: &str, hash: u8) -> Call {
    Call { request: Some(RequestId { id: id.into(), hash: [hash; 32] }), ..call }
}

pub async fn write(store: &Arc<dyn Store>, call: Call) -> Result<Written, WriteError> {
    let mut answers = store.write(&[call]).await;
    assert_eq!(answers.len(), 1);
    answers.remove(0)
}

#[track_caller]
pub fn refusal(answer: Result<Written, WriteError>) -> Refusal {
    match answer {
        Err(WriteError::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// Everything after `from`, page by page, and that pages are what they should be.
pub async fn read_from(store: &Arc<dyn Store>, from: Anchor, limit: usize) -> Vec<Commit> {
    let mut commits: Vec<Commit> = Vec::new();
    let mut position = Position::from(from);
    loop {
        let page = store.read_log(&position, limit).await.expect("read the log");
        let changes: usize = page.commits.iter().map(|commit| commit.changes.len()).sum();
        assert!(changes <= limit.max(1), "a page of {changes} for {limit}");
        assert!(
            page.commits.len() <= 1 || page.commits.iter().all(|commit| commit.changes.len() as u64 == commit.size)
        );
        for commit in page.commits {
            match (position.inside, commits.last_mut()) {
                (Some(inside), Some(last)) if inside.index > 0 => {
                    assert_eq!((last.revision, last.tag), (commit.revision, commit.tag));
                    last.changes.extend(commit.changes);
                }
                _ => {
                    assert!(commits.last().is_none_or(|last| last.revision < commit.revision));
                    commits.push(commit);
                }
            }
        }
        if page.next == position {
            assert!(page.next.anchor == page.head && page.next.inside.is_none(), "stuck at {position:?}");
            break;
        }
        position = page.next;
    }
    for commit in &commits {
        assert_eq!(commit.size, commit.changes.len() as u64, "{commit:?}");
        for (index, change) in (0..).zip(&commit.changes) {
            assert_eq!(change.index, index, "{commit:?}");
        }
    }
    commits
}

/// `1: - > admin, 2: admin > -` and so on: who, from which role, to which.
pub fn said<'a>(changes: impl IntoIterator<Item = &'a Change>) -> String {
    let name = |role: &Option<RoleName>| role.as_ref().map_or("-".to_owned(), ToString::to_string);
    let one = |change: &Change| format!("{}: {} > {}", change.user, name(&change.old), name(&change.new));
    changes.into_iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The changes of all commits after `from`.
pub async fn said_from(store: &Arc<dyn Store>, from: Anchor) -> String {
    let commits = read_from(store, from, 100).await;
    said(commits.iter().flat_map(|commit| &commit.changes))
}

pub async fn role_of(store: &Arc<dyn Store>, user: i64) -> String {
    store.roles(&[UserId(user)]).await.unwrap().roles[0].to_string()
}
