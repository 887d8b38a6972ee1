//! rolecache answers which role a user of a bot has, over gRPC and from memory.
//!
//! The modules in the order in which they import each other, so a good order to read them in:

pub mod role; // the words of the domain as types
pub mod store; // the truth: one trait, PostgreSQL and SQLite

pub mod proto; // the contract, compiled

pub mod config; // flags and environment, checked
pub mod logging; // what the process says about itself
pub mod server; // the composition root

pub mod cli; // subcommands
