//! Whether the machine itself stood still: what nobody answers then is nobody's fault.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

const BEAT: Duration = Duration::from_millis(50);
/// A thread that only sleeps is late by less on a machine that is merely busy.
const STANDSTILL: Duration = Duration::from_millis(500);

/// Beats until it is stopped.
pub struct Pulse {
    stopped: Sender<()>,
    beating: JoinHandle<()>,
    standstills: Arc<Mutex<Vec<Duration>>>,
}

impl Pulse {
    pub fn start() -> Self {
        let (stopped, stop) = channel();
        let standstills = Arc::new(Mutex::new(Vec::new()));
        let kept = standstills.clone();
        let beating = std::thread::spawn(move || {
            loop {
                let begun = Instant::now();
                if stop.recv_timeout(BEAT) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let late = begun.elapsed().saturating_sub(BEAT);
                if late > STANDSTILL {
                    kept.lock().unwrap_or_else(PoisonError::into_inner).push(late);
                }
            }
        });
        Self { stopped, beating, standstills }
    }

    /// For how long this process did not run, each time.
    pub fn stop(self) -> Vec<Duration> {
        drop(self.stopped);
        self.beating.join().expect("a pulse does not panic");
        std::mem::take(&mut *self.standstills.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
