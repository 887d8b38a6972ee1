//! What several test binaries share.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod abuse;
pub mod calls;
pub mod child;
pub mod crowd;
pub mod documented;
pub mod doors;
pub mod gates;
pub mod logs;
pub mod postgres;
pub mod proxy;
pub mod raw;
pub mod server;
pub mod watch;
