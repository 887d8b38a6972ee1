//! What the cache holds, whatever the order of what happens to it.

mod check;
mod footing;
mod load_end;
mod model;
#[cfg(feature = "shuttle")]
mod schedules;
mod truth;
