//! Thousands of statements that nobody thought of: the log must always lead to the table.

use super::replace::assert_log_ends_at_table;
use crate::{
    fixtures::{Fixture, SqliteFile},
    suite::*,
};

/// A small generator of numbers, the same ones for a seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len() as u64) as usize]
    }

    fn statement(&mut self) -> String {
        let clause = self.pick(&["", "", "or replace", "or replace", "or ignore", "or fail", "or rollback"]);
        let user = self.below(6);
        let other = self.below(6);
        let role = self.pick(&["null", "''", "'user'", "'admin'", "'x'", "'boss'"]);
        let name = self.pick(&["null", "'eve'", "'EVE'", "'bob'", "'ann'", "'dan'"]);
        match self.below(10) {
            0 | 1 => format!("insert {clause} into users (user_id, role, username) values ({user}, {role}, {name})"),
            2 => format!(
                "insert {clause} into users (user_id, role, username)
                 select user_id + 1, {role}, {name} from users where user_id = {user}"
            ),
            3 => format!("update {clause} users set role = {role} where user_id = {user}"),
            4 => format!("update {clause} users set username = {name} where user_id = {user}"),
            5 => format!("update {clause} users set user_id = {other}, role = {role} where user_id = {user}"),
            6 => format!("update {clause} users set user_id = user_id + 1, username = {name} where user_id >= {user}"),
            7 => format!("delete from users where user_id = {user}"),
            8 => format!("insert {clause} into users (role, username) values ({role}, {name})"),
            _ => format!(
                "insert into users (user_id, role, username) values ({user}, {role}, {name})
                 on conflict do update set role = excluded.role, username = {name}"
            ),
        }
    }
}

#[tokio::test]
async fn the_log_always_leads_to_the_table() {
    let bots_own = "
        create trigger own_1 after insert on users when new.role = 'boss' begin
          update users set role = 'admin' where user_id = new.user_id; end;
        create trigger own_2 before insert on users when new.role = 'x' begin
          update or replace users set role = 'admin', username = 'dan' where user_id = (new.user_id + 1) % 6; end;
        create trigger own_3 after delete on users begin
          update users set role = 'user' where user_id = (old.user_id + 2) % 6; end;";
    for (index, (table, triggers)) in [
        ("create table users (user_id integer primary key, role text, username text unique)", ""),
        ("create table users (user_id integer primary key, role text, username text unique collate nocase)", bots_own),
        ("create table users (user_id bigint primary key, role text, username text unique) without rowid", ""),
        ("create table users (username text unique, role text, user_id int unique not null)", bots_own),
        ("create table users (user_id bigint primary key, role text, username text)", ""),
        ("create table users (username text primary key, role text, user_id bigint unique)", ""),
    ]
    .into_iter()
    .enumerate()
    {
        for recursive in ["off", "on"] {
            let database = SqliteFile::fresh().await;
            // Of two triggers the one that was made last runs first: ours are among the bot's own in both orders.
            let [before, after] = if recursive == "off" { [triggers, ""] } else { ["", triggers] };
            database.sql(&format!("{table}; {before}"));
            let store = database.open().await;
            database.sql(after);
            let mut numbers = Numbers(index as u64 + 1);
            for _ in 0..4 {
                let statements: Vec<_> = (0..150).map(|_| numbers.statement()).collect();
                // Many fail, as they should; the shell goes on.
                let script = format!("pragma recursive_triggers = {recursive};\n{};", statements.join(";\n"));
                database.run_script(&script);
                for _ in 0..3 {
                    let user = numbers.below(6) as i64;
                    let _ = write(&store, set(user, "helper")).await;
                    let _ = write(&store, set_named(user, "admin", "eve")).await;
                }
                // A bot's trigger that changes the row which a statement is about to change leaves SQLite itself with an OLD of
                // before: then the log says from which role it thinks that it went, and still to which it did.
                let chained = triggers.is_empty() || recursive == "off";
                assert_log_ends_at_table(&database, &store, chained).await;
            }
            let head = store.head().await.unwrap().revision.0;
            assert!(head > 150, "only {head} commits: the statements do nothing");
            store.close().await;
        }
    }
}
