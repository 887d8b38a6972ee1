//! Latencies, in microseconds once they are told.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

const LONGEST: u64 = 60_000_000_000;
const DIGITS: u8 = 3;

pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_max(LONGEST, DIGITS).expect("the bounds are in order"))
    }

    pub(crate) fn count(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(LONGEST));
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len()
    }

    pub(crate) fn told(&self) -> Value {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1_000.0;
        json!({
            "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": self.0.max() as f64 / 1_000.0,
        })
    }
}
