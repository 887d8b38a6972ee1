//! Whom calls are about.

/// Users at random, each as often as the others.
#[derive(Clone)]
pub(crate) struct Users {
    pub(crate) first: i64,
    pub(crate) count: u64,
    pub(crate) random: fastrand::Rng,
}

/// One user after the other, each in turn to one role and back: every write changes something, if nobody of them is an
/// admin at first.
#[derive(Clone)]
pub(crate) struct Writes {
    pub(crate) first: i64,
    pub(crate) count: u64,
    /// Of all connections, which one this is.
    pub(crate) connection: u64,
    pub(crate) connections: u64,
    pub(crate) done: u64,
}

impl Users {
    pub(crate) fn next(&mut self) -> i64 {
        self.first + self.random.u64(..self.count) as i64
    }
}

impl Writes {
    /// The write's number, its user, and the role that it gives.
    pub(crate) fn next(&mut self) -> (u64, i64, &'static str) {
        let number = self.connection + self.connections * self.done;
        self.done += 1;
        let role = if (number / self.count).is_multiple_of(2) { "admin" } else { "user" };
        (number, self.first + (number % self.count) as i64, role)
    }
}
