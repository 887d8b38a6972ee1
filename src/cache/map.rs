//! The table that many tasks use at once; under the feature `shuttle`, in an order that a test decides.

#[cfg(not(feature = "shuttle"))]
pub(super) use dashmap::{DashMap, Entry, mapref::multiple::RefMulti};

#[cfg(feature = "shuttle")]
pub(super) use shuttle_dashmap::{DashMap, Entry, mapref::multiple::RefMulti};
