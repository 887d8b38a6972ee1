//! rolecache answers which role a user of a bot has, over gRPC and from memory.
//!
//! The modules in the order in which they import each other, so a good order to read them in:

pub mod cache; // who has which role: entries, fills, reads
pub mod feed; // the log in memory: tailer, ring, cursors
pub mod grpc; // services, statuses, connections
pub mod proto; // the contract as Rust
pub mod role; // the words of the domain as types
pub mod server;
pub mod step; // how far a replica has applied the log, and the proof of it
pub mod store; // the truth: one trait, PostgreSQL and SQLite
pub mod writer; // all writes, group by group // builds, runs and drains it all
