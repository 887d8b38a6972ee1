//! PostgreSQL: one prepared statement, executed again and again, each time in a transaction of its own.

use bytes::{Buf, BytesMut};

use crate::{
    protocol::{Broken, Event, Protocol},
    users::{Users, Writes},
};

const VERSION: i32 = 196_608;
const BINARY: i16 = 1;

pub(crate) enum Statement {
    Select(Users),
    Update(Writes),
}

pub(crate) struct Postgres {
    user: String,
    database: String,
    statement: Statement,
    state: State,
    /// Answers come in the order of calls; this is the first one.
    calls: std::collections::VecDeque<usize>,
    rows: u64,
    failed: bool,
}

#[derive(PartialEq)]
enum State {
    Starting,
    Preparing,
    Ready,
}

impl Postgres {
    pub(crate) fn new(user: &str, database: &str, statement: Statement) -> Self {
        let (user, database) = (user.to_owned(), database.to_owned());
        Self { user, database, statement, state: State::Starting, calls: Default::default(), rows: 0, failed: false }
    }

    fn sql(&self) -> &'static str {
        match self.statement {
            Statement::Select(_) => "select role from users where user_id = $1",
            Statement::Update(_) => {
                "update users set role = case role when 'admin' then 'user' else 'admin' end where user_id = $1"
            }
        }
    }
}

impl Protocol for Postgres {
    fn begin(&mut self, out: &mut Vec<u8>) {
        let mut body = VERSION.to_be_bytes().to_vec();
        for text in ["user", &self.user, "database", &self.database, ""] {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        out.extend_from_slice(&(body.len() as i32 + 4).to_be_bytes());
        out.extend_from_slice(&body);
    }

    fn call(&mut self, slot: usize, out: &mut Vec<u8>) {
        let user = match &mut self.statement {
            Statement::Select(users) => users.next(),
            Statement::Update(writes) => writes.next().1,
        };
        self.calls.push_back(slot);
        message(b'B', out, |out| {
            // No portal's name, the statement, one parameter in binary, the answer in binary.
            out.extend_from_slice(b"\0s\0");
            [1, BINARY, 1].iter().for_each(|it| out.extend_from_slice(&it.to_be_bytes()));
            out.extend_from_slice(&8_i32.to_be_bytes());
            out.extend_from_slice(&user.to_be_bytes());
            [1, BINARY].iter().for_each(|it| out.extend_from_slice(&it.to_be_bytes()));
        });
        message(b'E', out, |out| out.extend_from_slice(&[0; 5]));
        message(b'S', out, |_| {});
    }

    fn take(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, events: &mut Vec<Event>) -> Result<(), Broken> {
        while let Some(&[kind, a, b, c, d]) = input.first_chunk::<5>() {
            let length = u32::from_be_bytes([a, b, c, d]) as usize + 1;
            if input.len() < length {
                break;
            }
            match kind {
                b'R' if input[5..length] != [0; 4] => return Err(Broken("PostgreSQL asks for a password".to_owned())),
                b'E' if self.state != State::Ready => {
                    return Err(Broken(format!("PostgreSQL refuses: {}", input[5..length].escape_ascii())));
                }
                b'E' => self.failed = true,
                b'D' => self.rows += 1,
                b'C' if input[5..length].starts_with(b"UPDATE 1") => self.rows += 1,
                b'Z' => match self.state {
                    State::Starting => {
                        self.state = State::Preparing;
                        let sql = self.sql();
                        message(b'P', out, |out| {
                            out.extend_from_slice(b"s\0");
                            out.extend_from_slice(sql.as_bytes());
                            // One parameter, of type bigint.
                            out.extend_from_slice(&[0, 0, 1, 0, 0, 0, 20]);
                        });
                        message(b'S', out, |_| {});
                    }
                    State::Preparing => {
                        self.state = State::Ready;
                        events.push(Event::Ready);
                    }
                    State::Ready => {
                        let right = self.rows == 1 && !self.failed;
                        (self.rows, self.failed) = (0, false);
                        events.extend(self.calls.pop_front().map(|slot| Event::Answered { slot, right }));
                    }
                },
                _ => {}
            }
            input.advance(length);
        }
        Ok(())
    }
}

fn message(kind: u8, out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(kind);
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    body(out);
    let length = (out.len() - start) as u32;
    out[start..start + 4].copy_from_slice(&length.to_be_bytes());
}
