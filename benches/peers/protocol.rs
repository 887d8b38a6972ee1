//! What a peer speaks, with no input and output of its own: all are driven by the same loops, so that what is compared is
//! servers.

use std::fmt;

use bytes::BytesMut;

/// One connection of a client.
pub(crate) trait Protocol {
    /// Writes what a connection begins with; [`Event::Ready`] follows once the server has agreed.
    fn begin(&mut self, out: &mut Vec<u8>);

    /// Writes one more call; `slot` names it in its answer.
    fn call(&mut self, slot: usize, out: &mut Vec<u8>);

    /// Takes all that is whole off the input. What has to be said to it goes into `out`.
    fn take(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, events: &mut Vec<Event>) -> Result<(), Broken>;
}

/// One connection of subscribers.
pub(crate) trait Subscription {
    /// Writes what a connection begins with, and what subscribes.
    fn begin(&mut self, out: &mut Vec<u8>);

    fn take(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, events: &mut Vec<Told>) -> Result<(), Broken>;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    Ready,
    /// `right` where it is what was asked for.
    Answered {
        slot: usize,
        right: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Told {
    /// One subscriber is told of every change from now on.
    Subscribed,
    /// One subscriber is told of a change.
    Change(u64),
}

/// A connection that is of no use any more.
#[derive(Debug)]
pub(crate) struct Broken(pub(crate) String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}
