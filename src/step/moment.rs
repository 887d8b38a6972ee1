//! The clock that staleness is counted on.

use std::time::Duration;

#[cfg(feature = "failpoints")]
use crate::failpoint;

/// A moment on a clock that runs through suspend.
#[derive(Clone, Copy, Debug)]
pub struct Moment(pub(super) u64);

impl Moment {
    pub fn now() -> Self {
        #[cfg(feature = "failpoints")]
        if let Some(shift) = failpoint::told!("bug::wall_clock") {
            return Self::on_the_wall(&shift);
        }
        #[cfg(target_os = "linux")]
        let clock = rustix::time::ClockId::Boottime;
        #[cfg(not(target_os = "linux"))]
        let clock = rustix::time::ClockId::Monotonic;
        let time = rustix::time::clock_gettime(clock);
        // Both are not negative on a clock that starts at boot.
        Self(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    /// A bug for tests: a clock that can be set, here by so many seconds.
    #[cfg(feature = "failpoints")]
    fn on_the_wall(shift: &str) -> Self {
        let time = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let shift = shift.parse::<i64>().unwrap_or(0) * 1_000_000_000;
        Self((time.as_nanos() as u64).saturating_add_signed(shift))
    }

    #[cfg(test)]
    pub(crate) fn before(self, age: Duration) -> Self {
        Self(self.0 - age.as_nanos() as u64)
    }

    pub(super) fn elapsed(self) -> Duration {
        Duration::from_nanos(Self::now().0.saturating_sub(self.0))
    }
}
