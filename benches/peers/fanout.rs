//! Changes, and the time until all who subscribe have been told of them.

use std::{
    io::{BufRead, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::LocalSet,
};

use crate::{
    cpu::Servers,
    latencies::Latencies,
    protocol::{Broken, Event, Protocol, Subscription, Told},
};

/// How long it may take until all have subscribed, or have been told.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Fanout {
    pub(crate) address: SocketAddr,
    pub(crate) publish_at: SocketAddr,
    /// Of which so many never read.
    pub(crate) subscribers: usize,
    pub(crate) stuck: usize,
    /// So often, so many changes at once.
    pub(crate) times: usize,
    pub(crate) burst: usize,
    /// Each once the one before is answered, instead of all at once.
    pub(crate) in_a_row: bool,
    /// From one time to the next, or longer where not all have been told by then.
    pub(crate) interval: Duration,
    pub(crate) servers: Servers,
}

#[derive(Default)]
struct Board {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    subscribed: usize,
    /// Of each change.
    told: Vec<Reached>,
    broken: Option<String>,
}

#[derive(Clone, Copy, Default)]
struct Reached {
    count: usize,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Fanout {
    /// Subscribes on this thread, and publishes on another one that waits for nobody here.
    pub(crate) fn run(
        &self,
        subscriptions: Vec<Box<dyn Subscription>>,
        publish: impl FnOnce() -> Box<dyn Protocol> + Send,
    ) -> Result<Value, Broken> {
        self.beside(subscriptions, |board| {
            let mut publisher = Publisher::open(self.publish_at, publish())?;
            self.publish(&mut publisher, board)
        })
    }

    /// Subscribes, says so, and stays until standard input ends.
    pub(crate) fn hold(&self, subscriptions: Vec<Box<dyn Subscription>>) -> Result<Value, Broken> {
        self.beside(subscriptions, |_| {
            println!("{}", json!({ "subscribed": self.subscribers }));
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line)?;
            Ok(Value::Null)
        })
    }

    fn beside(
        &self,
        subscriptions: Vec<Box<dyn Subscription>>,
        work: impl FnOnce(&Board) -> Result<Value, Broken> + Send,
    ) -> Result<Value, Broken> {
        let board = Arc::new(Board::default());
        board.state().told = vec![Reached::default(); self.times * self.burst];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let tasks = LocalSet::new();
        for subscription in subscriptions {
            let (board, address, expected) = (board.clone(), self.address, self.subscribers - self.stuck);
            tasks.spawn_local(async move {
                if let Err(broken) = subscribe(address, subscription, &board, expected).await {
                    board.state().broken.get_or_insert(broken.0);
                    board.moved.notify_all();
                }
            });
        }
        thread::scope(|scope| {
            let (over, ended) = tokio::sync::oneshot::channel();
            let worker = scope.spawn(|| {
                let done = board.wait(|state| state.subscribed >= self.subscribers).and_then(|()| work(&board));
                let _ = over.send(());
                done
            });
            let _ = runtime.block_on(tasks.run_until(ended));
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn publish(&self, publisher: &mut Publisher, board: &Board) -> Result<Value, Broken> {
        let expected = self.subscribers - self.stuck;
        let [mut answer, mut first, mut all, mut after] = [(); 4].map(|()| Latencies::new());
        let before = self.servers.worked()?;
        let begun = Instant::now();
        for time in 0..self.times {
            thread::sleep((begun + self.interval * time as u32).saturating_duration_since(Instant::now()));
            let asked = Instant::now();
            let mut answered = asked;
            let (calls, at_once) = if self.in_a_row { (self.burst, 1) } else { (1, self.burst) };
            for _ in 0..calls {
                let begun = Instant::now();
                for at in publisher.publish(at_once)? {
                    answer.count(at - begun);
                    answered = at;
                }
            }
            let changes = time * self.burst..(time + 1) * self.burst;
            let is_told = |state: &State| state.told[changes.clone()].iter().all(|it| it.count >= expected);
            board.wait(is_told)?;
            let state = board.state();
            let told = &state.told[changes];
            if let Some(at) = told.iter().filter_map(|it| it.first).min() {
                first.count(at - asked);
            }
            if let Some(at) = told.iter().filter_map(|it| it.last).max() {
                all.count(at - asked);
                after.count(at.saturating_duration_since(answered));
            }
        }
        let took = begun.elapsed();
        let worked = self.servers.worked()? - before;
        let deliveries = (self.times * self.burst * expected) as f64;
        Ok(json!({
            "subscribers": self.subscribers,
            "stuck": self.stuck,
            "times": self.times,
            "burst": self.burst,
            "seconds": took.as_secs_f64(),
            "deliveries": deliveries,
            // From when the changes were asked for, until: the answer, the first to be told, the last one.
            "answer": answer.told(),
            "first": first.told(),
            "all": all.told(),
            // From the answer until the last one was told.
            "allAfterAnswer": after.told(),
            "serverCpu": worked.as_secs_f64() * 1e6 / deliveries.max(1.0),
            "serverBusy": worked.as_secs_f64() / took.as_secs_f64(),
        }))
    }
}

impl Board {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, is_so: impl Fn(&State) -> bool) -> Result<(), Broken> {
        let is_going_on = |state: &mut State| state.broken.is_none() && !is_so(state);
        let (state, waited) =
            self.moved.wait_timeout_while(self.state(), PATIENCE, is_going_on).unwrap_or_else(PoisonError::into_inner);
        match &state.broken {
            Some(broken) => Err(Broken(broken.clone())),
            None if waited.timed_out() => Err(Broken(format!("not all were told; {} subscribed", state.subscribed))),
            None => Ok(()),
        }
    }

    fn read(&self, told: &mut Vec<Told>, expected: usize) {
        if told.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut state = self.state();
        let mut is_moved = false;
        for told in told.drain(..) {
            match told {
                Told::Subscribed => {
                    state.subscribed += 1;
                    is_moved = true;
                }
                Told::Change(number) => {
                    let Some(reached) = state.told.get_mut(number as usize) else { continue };
                    reached.count += 1;
                    reached.first.get_or_insert(now);
                    reached.last = Some(now);
                    is_moved |= reached.count >= expected;
                }
            }
        }
        drop(state);
        if is_moved {
            self.moved.notify_all();
        }
    }
}

async fn subscribe(
    address: SocketAddr,
    mut subscription: Box<dyn Subscription>,
    board: &Board,
    expected: usize,
) -> Result<(), Broken> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut input, mut out, mut told) = (BytesMut::with_capacity(1 << 12), Vec::new(), Vec::new());
    subscription.begin(&mut out);
    loop {
        if !out.is_empty() {
            stream.write_all(&out).await?;
            out.clear();
        }
        if stream.read_buf(&mut input).await? == 0 {
            return Err(Broken("the server closed a connection".to_owned()));
        }
        subscription.take(&mut input, &mut out, &mut told)?;
        board.read(&mut told, expected);
    }
}

/// Who asks for changes, on a connection and a thread of its own.
pub(crate) struct Publisher {
    stream: TcpStream,
    protocol: Box<dyn Protocol>,
    input: BytesMut,
    out: Vec<u8>,
    events: Vec<Event>,
}

impl Publisher {
    pub(crate) fn open(address: SocketAddr, protocol: Box<dyn Protocol>) -> Result<Self, Broken> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut publisher = Self { stream, protocol, input: BytesMut::new(), out: Vec::new(), events: Vec::new() };
        publisher.protocol.begin(&mut publisher.out);
        while !publisher.events.contains(&Event::Ready) {
            publisher.turn()?;
        }
        publisher.events.clear();
        Ok(publisher)
    }

    /// So many changes at once; when each was answered.
    pub(crate) fn publish(&mut self, burst: usize) -> Result<Vec<Instant>, Broken> {
        (0..burst).for_each(|slot| self.protocol.call(slot, &mut self.out));
        let mut answered = Vec::new();
        while answered.len() < burst {
            self.turn()?;
            let now = Instant::now();
            for event in self.events.drain(..) {
                match event {
                    Event::Answered { right: true, .. } => answered.push(now),
                    Event::Answered { right: false, .. } => return Err(Broken("a change was refused".to_owned())),
                    Event::Ready => {}
                }
            }
        }
        Ok(answered)
    }

    fn turn(&mut self) -> Result<(), Broken> {
        self.stream.write_all(&self.out)?;
        self.out.clear();
        let mut bytes = [0; 1 << 14];
        let count = self.stream.read(&mut bytes)?;
        if count == 0 {
            return Err(Broken("the server closed a connection".to_owned()));
        }
        self.input.extend_from_slice(&bytes[..count]);
        self.protocol.take(&mut self.input, &mut self.out, &mut self.events)
    }
}
