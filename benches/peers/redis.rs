//! Redis: GET, MGET, SET and PUBLISH, and subscribers, each with a connection of its own.

use std::{collections::VecDeque, io::Write};

use bytes::{Buf, BytesMut};

use crate::{
    protocol::{Broken, Event, Protocol, Subscription, Told},
    users::{Users, Writes},
};

const CHANNEL: &str = "roles";

pub(crate) enum Command {
    Get(Users),
    /// Of so many keys.
    Mget(Users, usize),
    Set(Writes),
    Publish(Writes),
}

pub(crate) struct Redis {
    command: Command,
    is_ready: bool,
    /// Answers come in the order of calls.
    calls: VecDeque<usize>,
    text: Vec<u8>,
}

impl Redis {
    pub(crate) fn new(command: Command) -> Self {
        Self { command, is_ready: false, calls: VecDeque::new(), text: Vec::new() }
    }

    fn arguments(&mut self, out: &mut Vec<u8>) {
        match &mut self.command {
            Command::Get(users) => {
                array(2, out);
                bulk(b"GET", out);
                key(users.next(), &mut self.text, out);
            }
            Command::Mget(users, count) => {
                array(*count + 1, out);
                bulk(b"MGET", out);
                for _ in 0..*count {
                    key(users.next(), &mut self.text, out);
                }
            }
            Command::Set(writes) => {
                let (_, user, role) = writes.next();
                array(3, out);
                bulk(b"SET", out);
                key(user, &mut self.text, out);
                bulk(role.as_bytes(), out);
            }
            Command::Publish(writes) => {
                let (number, ..) = writes.next();
                array(3, out);
                bulk(b"PUBLISH", out);
                bulk(CHANNEL.as_bytes(), out);
                // As much as a watcher is told of a change: who, from which role to which.
                bulk(format!("{number}:user:admin").as_bytes(), out);
            }
        }
    }
}

impl Protocol for Redis {
    fn begin(&mut self, out: &mut Vec<u8>) {
        array(1, out);
        bulk(b"PING", out);
    }

    fn call(&mut self, slot: usize, out: &mut Vec<u8>) {
        self.arguments(out);
        self.calls.push_back(slot);
    }

    fn take(&mut self, input: &mut BytesMut, _: &mut Vec<u8>, events: &mut Vec<Event>) -> Result<(), Broken> {
        while let Some(length) = reply(input)? {
            if !self.is_ready {
                self.is_ready = true;
                events.push(Event::Ready);
            } else if let Some(slot) = self.calls.pop_front() {
                // Nobody is left out: there is a role for each.
                let right = match input[0] {
                    b'*' => !input[..length].windows(4).any(|part| part == b"$-1\r"),
                    kind => kind != b'-' && !input.starts_with(b"$-1"),
                };
                events.push(Event::Answered { slot, right });
            }
            input.advance(length);
        }
        Ok(())
    }
}

#[derive(Default)]
pub(crate) struct Subscriber {
    is_subscribed: bool,
}

impl Subscription for Subscriber {
    fn begin(&mut self, out: &mut Vec<u8>) {
        array(2, out);
        bulk(b"SUBSCRIBE", out);
        bulk(CHANNEL.as_bytes(), out);
    }

    fn take(&mut self, input: &mut BytesMut, _: &mut Vec<u8>, told: &mut Vec<Told>) -> Result<(), Broken> {
        while let Some(length) = reply(input)? {
            let message = input.split_to(length);
            if self.is_subscribed {
                let text = message[..length - 2].rsplit(|&byte| byte == b'\n').next().unwrap_or_default();
                let number = std::str::from_utf8(text).ok().and_then(|text| text.split(':').next()?.parse().ok());
                told.push(Told::Change(number.ok_or_else(|| Broken("a message that nobody published".to_owned()))?));
            } else {
                self.is_subscribed = true;
                told.push(Told::Subscribed);
            }
        }
        Ok(())
    }
}

fn key(user: i64, text: &mut Vec<u8>, out: &mut Vec<u8>) {
    text.clear();
    let _ = write!(text, "role:{user}");
    bulk(text, out);
}

fn array(count: usize, out: &mut Vec<u8>) {
    let _ = write!(out, "*{count}\r\n");
}

fn bulk(text: &[u8], out: &mut Vec<u8>) {
    let _ = write!(out, "${}\r\n", text.len());
    out.extend_from_slice(text);
    out.extend_from_slice(b"\r\n");
}

/// How long the reply is that the input begins with; None where it is not whole.
fn reply(input: &[u8]) -> Result<Option<usize>, Broken> {
    let mut at = 0;
    let mut left = 1_i64;
    while left > 0 {
        let Some(end) = input[at..].iter().position(|&byte| byte == b'\n') else { return Ok(None) };
        let line = &input[at..at + end];
        let number = || std::str::from_utf8(&line[1..]).ok().and_then(|text| text.trim_end().parse::<i64>().ok());
        at += end + 1;
        left -= 1;
        match line.first() {
            Some(b'+' | b'-' | b':') => {}
            Some(b'$') => {
                let length = number().ok_or_else(|| Broken("a length that is none".to_owned()))?;
                if length >= 0 {
                    at += length as usize + 2;
                }
            }
            Some(b'*') => left += number().ok_or_else(|| Broken("a count that is none".to_owned()))?.max(0),
            _ => return Err(Broken(format!("no reply of Redis: {}", line.escape_ascii()))),
        }
        if at > input.len() {
            return Ok(None);
        }
    }
    Ok(Some(at))
}
