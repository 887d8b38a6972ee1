//! What was measured, as it is counted and as it is told.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tonic::Status;

use super::{BenchArgs, Mode};
use crate::cli::{
    Exit, Failure,
    client::reason,
    output::{self, Format},
};

/// Of latencies: a nanosecond to a minute, three digits of each.
const LONGEST: u64 = 60_000_000_000;
const DIGITS: u8 = 3;

/// Latencies, and what failed calls were told.
pub(super) struct Samples {
    latencies: Histogram<u64>,
    failures: BTreeMap<String, u64>,
}

/// A load that is over.
pub(super) struct Done {
    pub(super) samples: Samples,
    /// For how long it was measured.
    pub(super) took: Duration,
    /// The same with the warm-up, in which the server works as well.
    pub(super) whole: Duration,
    /// Users that one call was for.
    pub(super) each: u64,
}

/// Times in microseconds.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    mode: String,
    connections: u16,
    in_flight: u16,
    rate: u32,
    seconds: f64,
    /// Answers; of a watch, messages.
    count: u64,
    per_second: f64,
    /// Of `batch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    users_per_second: Option<f64>,
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
    /// Of the server, for each of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    server_cpu: Option<f64>,
    failures: BTreeMap<String, u64>,
}

/// How far it is, on a terminal.
pub(super) struct Bar {
    bar: ProgressBar,
    ticking: tokio::task::JoinHandle<()>,
}

// === impl Samples ===

impl Samples {
    pub(super) fn new() -> Self {
        let latencies = Histogram::new_with_max(LONGEST, DIGITS).expect("the bounds are in order");
        Self { latencies, failures: BTreeMap::new() }
    }

    pub(super) fn count(&mut self, latency: Duration, failed: Option<&Status>) {
        match failed {
            None => self.latencies.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(LONGEST)),
            Some(status) => {
                let told = reason(status).unwrap_or_else(|| format!("{:?}", status.code()));
                *self.failures.entry(told).or_default() += 1;
            }
        }
    }

    pub(super) fn add(&mut self, others: &Self) {
        self.latencies.add(&others.latencies).expect("both have the same bounds");
        for (told, count) in &others.failures {
            *self.failures.entry(told.clone()).or_default() += count;
        }
    }

    fn quantile(&self, quantile: f64) -> f64 {
        self.latencies.value_at_quantile(quantile) as f64 / 1_000.0
    }
}

// === impl Report ===

impl Report {
    pub(super) fn new(args: &BenchArgs, done: &Done, worked: Option<Duration>) -> Self {
        let Done { samples, took, whole, each } = done;
        let (count, seconds) = (samples.latencies.len(), took.as_secs_f64());
        let per_second = count as f64 / seconds;
        // As many in the warm-up as in the rest, for its time.
        let calls = per_second * whole.as_secs_f64();
        Self {
            mode: format!("{:?}", args.mode).to_lowercase(),
            connections: args.connections,
            in_flight: args.in_flight,
            rate: args.rate,
            seconds,
            count,
            per_second,
            users_per_second: (args.mode == Mode::Batch).then_some(per_second * *each as f64),
            p50: samples.quantile(0.5),
            p99: samples.quantile(0.99),
            p999: samples.quantile(0.999),
            max: samples.latencies.max() as f64 / 1_000.0,
            server_cpu: worked.filter(|_| count > 0).map(|worked| worked.as_secs_f64() * 1e6 / calls),
            failures: samples.failures.clone(),
        }
    }

    pub(super) fn print(&self, format: Format) -> Result<(), Failure> {
        if matches!(format, Format::Json) {
            let text = serde_json::to_string(self).map_err(|error| Failure::new(Exit::Refused, error))?;
            return output::line(text);
        }
        let what = if self.mode == "watch" { "messages" } else { "calls" };
        output::line(format_args!("{what:<12}{} ({:.0} a second)", self.count, self.per_second))?;
        if let Some(users) = self.users_per_second {
            output::line(format_args!("{:<12}{users:.0} a second", "users"))?;
        }
        let [p50, p99, p999, max] = [self.p50, self.p99, self.p999, self.max].map(|micros| micros / 1_000.0);
        let latency = format_args!("p50 {p50:.2} ms, p99 {p99:.2} ms, p99.9 {p999:.2} ms, max {max:.2} ms").to_string();
        output::line(format_args!("{:<12}{latency}", "latency"))?;
        if let Some(micros) = self.server_cpu {
            output::line(format_args!("{:<12}{micros:.1} us of the server for each", "processor"))?;
        }
        for (told, count) in &self.failures {
            output::line(format_args!("{:<12}{count} {told}", "failed"))?;
        }
        Ok(())
    }
}

/// How long processors have worked for a process on this machine.
pub(super) fn server_time(pid: u32) -> Result<Duration, Failure> {
    let file = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&file);
    let stat =
        stat.map_err(|error| Failure::new(Exit::Usage, format!("--server-pid: {file} cannot be read: {error}")))?;
    // After the name, which may hold anything: its own time, and the kernel's for it (proc_pid_stat(5)).
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = fields.get(11..13).and_then(|times| times.iter().map(|it| it.parse::<u64>().ok()).sum::<Option<u64>>());
    let ticks = ticks.ok_or_else(|| Failure::new(Exit::Refused, format!("{file} is not as expected")))?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

// === impl Bar ===

impl Bar {
    pub(super) fn of(duration: Duration) -> Self {
        let bar = ProgressBar::new(duration.as_millis() as u64);
        let style = ProgressStyle::with_template("{bar:40} {percent} %");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let (ticks, begun) = (bar.clone(), std::time::Instant::now());
        let ticking = tokio::spawn(async move {
            loop {
                ticks.set_position(begun.elapsed().as_millis() as u64);
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
        Self { bar, ticking }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.ticking.abort();
        self.bar.finish_and_clear();
    }
}
