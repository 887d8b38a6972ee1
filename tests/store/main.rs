//! One contract, two stores: what the trait promises, and what is special to each.

#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod postgres;
