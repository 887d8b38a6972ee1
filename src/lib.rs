//! rolecache answers which role a user of a bot has, over gRPC and from memory.
//!
//! The modules stand in the order in which to read them: each imports only from those above it.

mod failpoint; // where tests break the process; nothing without the feature of that name

mod panics; // counted, and put into words
mod sync; // what tasks share: the standard library's, or shuttle's

mod descriptors; // how many connections there is room for

pub mod role; // the words of the domain, as checked types

pub mod store; // the truth: one trait, PostgreSQL and SQLite

pub mod step; // how far this replica has applied the log, and the proof of it

pub mod cache; // who has which role: entries, fills, reads

pub mod feed; // the log in memory: tailer, ring, cursors

pub mod writer; // all writes, group by group

pub mod access; // who may ask, and for what

pub mod reload; // files that are read again when they change

pub mod proto; // the contract, compiled

pub mod grpc; // services, statuses, connections

pub mod server; // builds, runs and drains it all

pub mod logging; // what the process says about itself

pub mod config; // flags and environment, checked

pub mod cli; // subcommands
