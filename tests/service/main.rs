//! The service over real gRPC, on both stores, one file per behaviour.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

#[path = "../support/mod.rs"]
mod support;

/// Runs each of these tests on both stores: `on_both! { name, ... }` for functions `async fn name(db: Db)`.
#[macro_export]
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name($crate::support::server::Db::postgres().await).await })*
        }
        mod on_sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name($crate::support::server::Db::sqlite()).await })*
        }
    };
}

mod abuse;
mod bad_input;
mod capacity;
mod complete;
mod crowd;
mod doors;
mod errors;
mod fuzz;
mod limits;
mod ordering;
mod plain_sql;
mod races;
mod reads;
mod reload;
mod resume;
mod scenarios;
mod shutdown;
mod staleness;
mod standard;
mod stats;
mod trim;
mod watch;
mod writes;
