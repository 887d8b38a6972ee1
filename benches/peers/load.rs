//! A closed loop: so many connections, with so many calls in flight on each, as fast as the answers come.

use std::{
    cell::RefCell,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinSet, LocalSet},
    time::{sleep_until, timeout},
};

use crate::{
    cpu::Servers,
    latencies::Latencies,
    protocol::{Broken, Event, Protocol},
};

/// How long the last answers may take, and the beginning.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Load {
    pub(crate) address: SocketAddr,
    pub(crate) in_flight: usize,
    pub(crate) warm_up: Duration,
    pub(crate) duration: Duration,
    pub(crate) servers: Servers,
}

/// What all connections count into.
struct Board {
    begins: Instant,
    ends: Instant,
    latencies: Latencies,
    wrong: u64,
}

impl Load {
    /// On one thread: the servers have the other cores.
    pub(crate) fn run(&self, connections: Vec<Box<dyn Protocol>>) -> Result<Value, Broken> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(LocalSet::new().run_until(self.run_all(connections)))
    }

    async fn run_all(&self, protocols: Vec<Box<dyn Protocol>>) -> Result<Value, Broken> {
        let count = protocols.len();
        let mut connections = Vec::new();
        for protocol in protocols {
            connections.push(Connection::open(self.address, protocol).await?);
        }
        let begins = Instant::now() + self.warm_up;
        let ends = begins + self.duration;
        let board = Rc::new(RefCell::new(Board { begins, ends, latencies: Latencies::new(), wrong: 0 }));
        let mut callers = JoinSet::new();
        for connection in connections {
            callers.spawn_local(timeout(
                self.warm_up + self.duration + PATIENCE,
                connection.call_on(board.clone(), self.in_flight),
            ));
        }
        sleep_until(begins.into()).await;
        let before = self.servers.worked()?;
        sleep_until(ends.into()).await;
        let worked = self.servers.worked()? - before;
        while let Some(done) = callers.join_next().await {
            let done = done.map_err(|error| Broken(error.to_string()))?;
            done.map_err(|_| Broken("the last answers did not come".to_owned()))??;
        }
        let board = board.borrow();
        let calls = board.latencies.len();
        let seconds = self.duration.as_secs_f64();
        Ok(json!({
            "connections": count,
            "inFlight": self.in_flight,
            "seconds": seconds,
            "calls": calls,
            "perSecond": calls as f64 / seconds,
            "latency": board.latencies.told(),
            "wrong": board.wrong,
            "serverCpu": worked.as_secs_f64() * 1e6 / calls.max(1) as f64,
            "serverBusy": worked.as_secs_f64() / seconds,
        }))
    }
}

struct Connection {
    stream: TcpStream,
    protocol: Box<dyn Protocol>,
    input: BytesMut,
    out: Vec<u8>,
    events: Vec<Event>,
}

impl Connection {
    async fn open(address: SocketAddr, protocol: Box<dyn Protocol>) -> Result<Self, Broken> {
        let opened = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let mut connection =
                Self { stream, protocol, input: BytesMut::with_capacity(1 << 16), out: Vec::new(), events: Vec::new() };
            connection.protocol.begin(&mut connection.out);
            while !connection.events.contains(&Event::Ready) {
                connection.turn().await?;
            }
            connection.events.clear();
            Ok(connection)
        };
        timeout(PATIENCE, opened).await.map_err(|_| Broken("the server does not begin".to_owned()))?
    }

    /// Writes what is to be said, and reads what comes next.
    async fn turn(&mut self) -> Result<(), Broken> {
        if !self.out.is_empty() {
            self.stream.write_all(&self.out).await?;
            self.out.clear();
        }
        if self.stream.read_buf(&mut self.input).await? == 0 {
            return Err(Broken("the server closed a connection".to_owned()));
        }
        self.protocol.take(&mut self.input, &mut self.out, &mut self.events)
    }

    async fn call_on(mut self, board: Rc<RefCell<Board>>, in_flight: usize) -> Result<(), Broken> {
        let mut begun = vec![Instant::now(); in_flight];
        (0..in_flight).for_each(|slot| self.protocol.call(slot, &mut self.out));
        let mut left = in_flight;
        while left > 0 {
            self.turn().await?;
            let now = Instant::now();
            let mut board = board.borrow_mut();
            for event in std::mem::take(&mut self.events) {
                let Event::Answered { slot, right } = event else { continue };
                if now >= board.begins && now < board.ends {
                    match right {
                        true => board.latencies.count(now - begun[slot]),
                        false => board.wrong += 1,
                    }
                }
                if now < board.ends {
                    begun[slot] = now;
                    self.protocol.call(slot, &mut self.out);
                } else {
                    left -= 1;
                }
            }
        }
        Ok(())
    }
}
