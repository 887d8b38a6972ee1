//! Somebody who takes every session that a PostgreSQL gives, and does nothing with them.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use crate::support::postgres::Session;

/// Until nobody else has a session.
const TAKEN: Duration = Duration::from_secs(10);

/// All of them, its own one too; closed, and so given back, when it is dropped.
#[expect(dead_code, reason = "held")]
pub struct Sessions(Session, Vec<TcpStream>);

impl Sessions {
    /// Takes all there are, and ends those of the replicas until it has all.
    pub fn take_all(url: &str) -> Self {
        // Its own session, with which it ends the others'.
        let mut own = Session::open(url);
        let all: usize = own.run("show max_connections;").parse().expect("a number");
        let mut taken = Vec::new();
        let until = Instant::now() + TAKEN;
        loop {
            while let Some(session) = take(url) {
                taken.push(session);
            }
            // By count: one that is just beginning has a place, and no name yet.
            if taken.len() + 1 == all {
                return Self(own, taken);
            }
            own.run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'rolecache';");
            assert!(Instant::now() < until, "only {} of {all} sessions were taken", taken.len());
        }
    }
}

/// None where the server has none left.
fn take(url: &str) -> Option<TcpStream> {
    let (user, rest) = url.strip_prefix("postgres://")?.split_once('@')?;
    let (address, database) = rest.split_once('/')?;
    let mut stream = TcpStream::connect(address).unwrap();
    let mut startup = 196_608_i32.to_be_bytes().to_vec();
    startup.extend(format!("user\0{user}\0database\0{database}\0\0").bytes());
    stream.write_all(&(startup.len() as i32 + 4).to_be_bytes()).unwrap();
    stream.write_all(&startup).unwrap();
    // R: it may come in. E: there are too many already.
    let mut first = [0];
    stream.read_exact(&mut first).unwrap();
    (first[0] == b'R').then_some(stream)
}
