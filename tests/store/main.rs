//! What a store promises, checked against every store: one suite, and beside it what only one of them has.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

mod fixtures;
mod postgres;
mod sqlite;
#[macro_use]
mod suite;
#[path = "../support/mod.rs"]
mod support;

for_store!(on_postgres, crate::fixtures::postgres::PostgresDatabase);
for_store!(on_sqlite, crate::fixtures::SqliteFile);
