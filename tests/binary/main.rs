//! The binary itself, as operators and bots meet it: its commands, its words, its life and death.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

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

mod commands;
mod doors;
mod drain;
#[cfg(feature = "failpoints")]
mod failpoints;
mod life;
mod process;
mod refusals;
#[path = "../support/mod.rs"]
mod support;
mod watching;
