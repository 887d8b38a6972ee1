//! Calls of one method, each with one message and one answer, and streams of answers.

use std::collections::HashMap;

use bytes::BytesMut;

use crate::{
    http2::{Frame, Http2},
    protocol::{Broken, Event, Protocol, Subscription, Told},
};

/// The calls of one method.
pub(crate) trait Method {
    fn path(&self) -> &'static str;

    fn request(&mut self, message: &mut Vec<u8>);

    /// Whether this is what was asked for.
    fn is_right(&self, answer: &[u8]) -> bool;
}

/// What a stream brings.
pub(crate) trait Stream {
    fn path(&self) -> &'static str;

    fn request(&self) -> Vec<u8>;

    /// Whether the client may say more later, and does not.
    fn goes_on(&self) -> bool;

    fn read(&self, message: &[u8], told: &mut Vec<Told>) -> Result<(), Broken>;
}

pub(crate) struct Unary<M> {
    http2: Http2,
    method: M,
    calls: HashMap<u32, Call>,
    message: Vec<u8>,
}

struct Call {
    slot: usize,
    answer: Vec<u8>,
}

impl<M: Method> Unary<M> {
    pub(crate) fn new(authority: String, method: M) -> Self {
        let http2 = Http2::new(method.path(), authority);
        Self { http2, method, calls: HashMap::new(), message: Vec::new() }
    }

    /// An answer without a message is a refusal; one with more than one is none.
    fn end(&mut self, stream: u32) -> Option<Event> {
        let Call { slot, answer } = self.calls.remove(&stream)?;
        let right = messages(&answer).is_ok_and(
            |(messages, rest)| matches!(messages[..], [message] if rest.is_empty() && self.method.is_right(message)),
        );
        Some(Event::Answered { slot, right })
    }
}

impl<M: Method> Protocol for Unary<M> {
    fn begin(&mut self, out: &mut Vec<u8>) {
        self.http2.begin(Http2::WINDOW, out);
    }

    fn call(&mut self, slot: usize, out: &mut Vec<u8>) {
        self.message.clear();
        self.method.request(&mut self.message);
        let stream = self.http2.open(&self.message, false, out);
        self.calls.insert(stream, Call { slot, answer: Vec::new() });
    }

    fn take(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, events: &mut Vec<Event>) -> Result<(), Broken> {
        while let Some(frame) = self.http2.frame(input, out)? {
            match frame {
                Frame::Settings => events.push(Event::Ready),
                Frame::Data { stream, bytes, ends } => {
                    if let Some(call) = self.calls.get_mut(&stream) {
                        call.answer.extend_from_slice(&bytes);
                    }
                    events.extend(ends.then(|| self.end(stream)).flatten());
                }
                Frame::Headers { stream, ends } => events.extend(ends.then(|| self.end(stream)).flatten()),
                Frame::Reset { stream } => events.extend(self.end(stream)),
            }
        }
        self.http2.check()
    }
}

/// Streams of one connection. Of those that are stuck nothing is ever read: their window is closed.
pub(crate) struct Streams<S> {
    http2: Http2,
    stream: S,
    count: usize,
    stuck: bool,
    parts: HashMap<u32, BytesMut>,
}

impl<S: Stream> Streams<S> {
    pub(crate) fn new(authority: String, stream: S, count: usize, stuck: bool) -> Self {
        let http2 = Http2::new(stream.path(), authority);
        Self { http2, stream, count, stuck, parts: HashMap::new() }
    }
}

impl<S: Stream> Subscription for Streams<S> {
    fn begin(&mut self, out: &mut Vec<u8>) {
        self.http2.begin(if self.stuck { 0 } else { Http2::WINDOW }, out);
        for _ in 0..self.count {
            self.http2.open(&self.stream.request(), self.stream.goes_on(), out);
        }
    }

    fn take(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, told: &mut Vec<Told>) -> Result<(), Broken> {
        while let Some(frame) = self.http2.frame(input, out)? {
            match frame {
                Frame::Data { stream, bytes, ends: false } => {
                    let mut part = self.parts.remove(&stream).unwrap_or_default();
                    part.extend_from_slice(&bytes);
                    let (messages, rest) = messages(&part)?;
                    for message in messages {
                        self.stream.read(message, told)?;
                    }
                    if !rest.is_empty() {
                        self.parts.insert(stream, rest.into());
                    }
                }
                // All that is ever heard of a stuck one.
                Frame::Headers { ends: false, .. } if self.stuck => told.push(Told::Subscribed),
                Frame::Headers { ends: false, .. } | Frame::Settings => {}
                Frame::Data { .. } | Frame::Headers { .. } | Frame::Reset { .. } => {
                    return Err(Broken("the server ended a stream".to_owned()));
                }
            }
        }
        self.http2.check()
    }
}

/// The messages of a body, and what is not whole yet.
fn messages(mut body: &[u8]) -> Result<(Vec<&[u8]>, &[u8]), Broken> {
    let mut messages = Vec::new();
    while let Some((&[compressed, a, b, c, d], rest)) = body.split_first_chunk::<5>() {
        if compressed != 0 {
            return Err(Broken("a compressed message that nobody asked for".to_owned()));
        }
        let Some((message, rest)) = rest.split_at_checked(u32::from_be_bytes([a, b, c, d]) as usize) else { break };
        messages.push(message);
        body = rest;
    }
    Ok((messages, body))
}
