//! What a connection sends beyond what its calls need.
//!
//! A PING, a SETTINGS or a frame of an unknown kind costs a server little, but HTTP/2 bounds no number of them, and neither does
//! h2 (resets and CONTINUATIONs it does bound). So bytes are counted, and who sends too many for nothing is cut.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Limits;

/// What all streams of a connection may send before any of it is read, and at least so much.
const WINDOW: u32 = 1 << 20;

/// And so many go on for ever: 960 pings.
const PER_SECOND: i64 = 16 << 10;

/// What a call may bring beside its head and its messages: window updates, and the pings of a client that measures its bandwidth.
/// One that nobody lets in brings little.
const PER_CALL: i64 = 2 << 10;
const PER_STRANGER: i64 = 1 << 10;

/// Of a head, so much counts before it is known whose it is: by references to headers of before a large one takes few bytes.
const STRANGE_HEAD: usize = 1 << 10;

/// Heads may come for all streams before anybody looks at one: so much of each.
const EARLY_HEAD: u32 = 2 << 10;

/// How often what may still come of a message is let pass that nobody reads to its end.
const FORGIVEN_EVERY: Duration = Duration::from_millis(50);

/// What calls may bring later, together.
const MOST_IN_ADVANCE: i64 = 4 << 20;

/// A part of an answer may be answered with its own length of window updates, and with so much: two of those, and a ping.
const PER_PART: i64 = 64;

/// The account of one connection.
pub(super) struct Meter {
    /// At once these are nobody's ill will: a window and heads, which may come before anybody knows which calls they are of.
    burst: i64,
    /// Of a whole message.
    message: i64,
    /// Bytes read, less what they were good for. Those who add and those who take away do not wait for each other: a clamp may
    /// forget what one of them did in that moment, which is less than the burst.
    beyond: AtomicI64,
    /// Until when `PER_SECOND` has been taken off.
    since: Mutex<Instant>,
    forgiven: Mutex<Option<Instant>>,
    exceeded: CancellationToken,
}

impl Meter {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            burst: i64::from(window(limits))
                + i64::from(limits.streams) * i64::from(limits.header_bytes.min(EARLY_HEAD)),
            message: count(limits.message_bytes.max(LEAST_WINDOW as usize)),
            beyond: AtomicI64::new(0),
            since: Mutex::new(Instant::now()),
            forgiven: Mutex::new(None),
            exceeded: CancellationToken::new(),
        }
    }

    pub(super) fn read(&self, bytes: usize) {
        self.read_at(bytes, Instant::now);
    }

    fn read_at(&self, bytes: usize, now: impl FnOnce() -> Instant) {
        let bytes = count(bytes);
        let beyond = self.beyond.fetch_add(bytes, Relaxed) + bytes;
        if beyond > self.burst {
            self.settle(beyond, now());
        } else {
            let most = self.message.max(MOST_IN_ADVANCE);
            if beyond < -most {
                self.beyond.store(-most, Relaxed);
            }
        }
    }

    /// A part of an answer goes out.
    pub(super) fn sent(&self, bytes: usize) {
        self.beyond.fetch_sub(PER_PART + count(bytes), Relaxed);
    }

    /// Of a call that may not be let in, with a head of so many bytes.
    pub(super) fn begin_call(&self, head: usize) {
        self.beyond.fetch_sub(PER_STRANGER + count(head.min(STRANGE_HEAD)), Relaxed);
    }

    /// It is of somebody who is known.
    pub(super) fn admit(&self, head: usize) {
        self.beyond.fetch_sub(PER_CALL + count(head.saturating_sub(STRANGE_HEAD)), Relaxed);
    }

    /// The rest of a message is on its way, perhaps: that cannot be told from a client who ends its call, so not every time.
    fn forgive(&self, rest: i64) {
        let mut forgiven = self.forgiven.lock().unwrap_or_else(PoisonError::into_inner);
        if forgiven.is_none_or(|forgiven| forgiven.elapsed() >= FORGIVEN_EVERY) {
            *forgiven = Some(Instant::now());
            self.beyond.fetch_sub(rest, Relaxed);
        }
    }

    /// Resolves once the connection has sent too much for nothing.
    pub(super) async fn exceeded(&self) {
        self.exceeded.cancelled().await;
    }

    fn settle(&self, beyond: i64, now: Instant) {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        let leaked = leaked(now - *since);
        *since = now;
        let left = (beyond - leaked).max(0);
        self.beyond.fetch_sub(beyond - left, Relaxed);
        if left > self.burst {
            self.exceeded.cancel();
        }
    }
}

/// What a stream may send before any of it is read, by HTTP/2 unless it is said otherwise.
const LEAST_WINDOW: u32 = 65_535;

/// The same, of which no more is on its way of a message over the limit than of one that is not.
pub(super) fn stream_window(limits: &Limits) -> u32 {
    LEAST_WINDOW.max(limits.message_bytes as u32)
}

/// What the streams of a connection may send together.
pub(super) fn window(limits: &Limits) -> u32 {
    WINDOW.max(limits.message_bytes as u32)
}

/// The body of a request, which is what a connection is for.
pub(super) struct Metered<B: Body> {
    body: B,
    meter: Arc<Meter>,
    /// What may still come where nobody reads it to its end.
    rest: i64,
}

impl<B: Body> Metered<B> {
    pub(super) fn new(body: B, meter: Arc<Meter>) -> Self {
        Self { body, rest: meter.message, meter }
    }

    pub(super) fn of_stranger(body: B, meter: Arc<Meter>) -> Self {
        Self { body, rest: 0, meter }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Metered<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.meter.beyond.fetch_sub(count(data.len()), Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B: Body> Drop for Metered<B> {
    fn drop(&mut self) {
        // Of a call that is refused the rest may be on its way.
        if !self.body.is_end_stream() {
            self.meter.forgive(self.rest);
        }
    }
}

fn count(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn leaked(elapsed: Duration) -> i64 {
    i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX).saturating_mul(PER_SECOND) / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    const PING: usize = 17;
    const MESSAGE: usize = 256 << 10;

    fn meter() -> Meter {
        Meter::new(&Limits {
            connections: 1,
            streams: 256,
            calls: 1,
            watches: 1,
            message_bytes: MESSAGE,
            header_bytes: 16 << 10,
            deadline: Duration::ZERO,
            handshake: Duration::ZERO,
            keepalive: Duration::ZERO,
            idle: Duration::ZERO,
        })
    }

    fn is_cut(meter: &Meter) -> bool {
        meter.exceeded.is_cancelled()
    }

    /// All in one moment.
    fn pings(meter: &Meter, count: usize, now: Instant) {
        for _ in 0..count {
            meter.read_at(PING, || now);
        }
    }

    #[test]
    fn pings_in_a_flood_are_cut() {
        let meter = meter();
        let now = Instant::now();
        pings(&meter, 92_000, now);
        assert!(!is_cut(&meter));
        pings(&meter, 1_000, now);
        assert!(is_cut(&meter));
    }

    #[test]
    fn pings_that_go_on_for_a_day_are_not() {
        let meter = meter();
        let begun = Instant::now();
        for second in 0..24 * 60 * 60 {
            pings(&meter, 900, begun + Duration::from_secs(second));
        }
        assert!(!is_cut(&meter));
    }

    #[test]
    fn calls_are_not_however_many() {
        let meter = meter();
        for _ in 0..100_000 {
            meter.read(200);
            meter.begin_call(100);
            meter.admit(100);
            meter.read(8 << 10);
            meter.beyond.fetch_sub(8 << 10, Relaxed);
            meter.sent(20);
        }
        for _ in 0..1_000 {
            for _ in 0..256 {
                meter.read(200);
                meter.begin_call(100);
                meter.admit(100);
            }
            for _ in 0..256 * MESSAGE / (16 << 10) {
                meter.read(16 << 10);
                meter.beyond.fetch_sub(16 << 10, Relaxed);
            }
        }
        assert!(!is_cut(&meter));
    }

    #[test]
    fn calls_do_not_pay_for_a_flood() {
        let meter = meter();
        for _ in 0..1_000_000 {
            meter.read(100);
            meter.begin_call(100);
            meter.admit(100);
        }
        pings(&meter, 1_000_000, Instant::now());
        assert!(is_cut(&meter));
    }

    #[test]
    fn calls_that_nobody_lets_in_pay_for_little() {
        let meter = meter();
        let now = Instant::now();
        for _ in 0..1_000 {
            meter.read_at(100, || now);
            meter.begin_call(100);
            pings(&meter, 300, now);
        }
        assert!(is_cut(&meter));
    }

    #[test]
    fn what_is_sent_with_every_message_of_a_watch_is_not_a_flood() {
        let meter = meter();
        let begun = Instant::now();
        for message in 0..1_000_000 {
            meter.sent(40);
            meter.read_at(PING + 26, || begun + message * Duration::from_micros(200));
        }
        assert!(!is_cut(&meter));
    }
}
