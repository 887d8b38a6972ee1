//! Asks for every user once, so that a lazy cache has them all.

use std::{net::SocketAddr, time::Instant};

use serde_json::{Value, json};

use crate::{fanout::Publisher, grpc::Unary, protocol::Broken, rolecache::Fill};

const AT_ONCE: usize = 4;

pub(crate) fn run(address: SocketAddr, first: i64, users: u64, batch: usize) -> Result<Value, Broken> {
    let begun = Instant::now();
    let method = Fill { next: first, end: first + users as i64, batch };
    let mut caller = Publisher::open(address, Box::new(Unary::new(address.to_string(), method)))?;
    let mut left = users.div_ceil(batch as u64) as usize;
    while left > 0 {
        left -= caller.publish(AT_ONCE.min(left))?.len();
    }
    Ok(json!({ "users": users, "seconds": begun.elapsed().as_secs_f64() }))
}
