//! How long processors have worked for a server, by `/proc`.

use std::{collections::HashMap, fs, time::Duration};

use crate::protocol::Broken;

/// A process, and with `children` all that it has started: PostgreSQL is many.
#[derive(Clone, Debug)]
pub(crate) struct Servers(pub(crate) Vec<u32>);

struct Process {
    parent: u32,
    ticks: u64,
}

impl Servers {
    /// Their time and the kernel's for them, of those that have ended too.
    pub(crate) fn worked(&self) -> Result<Duration, Broken> {
        let mut processes = HashMap::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            if let Some(pid) = pid
                && let Some(process) = Process::read(pid)
            {
                processes.insert(pid, process);
            }
        }
        if let Some(gone) = self.0.iter().find(|pid| !processes.contains_key(pid)) {
            return Err(Broken(format!("the server {gone} has ended")));
        }
        let is_ours = |mut pid: u32| loop {
            if self.0.contains(&pid) {
                return true;
            }
            match processes.get(&pid) {
                Some(process) => pid = process.parent,
                None => return false,
            }
        };
        let ticks: u64 = processes.iter().filter(|(pid, _)| is_ours(**pid)).map(|(_, process)| process.ticks).sum();
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }
}

impl Process {
    /// Of proc_pid_stat(5), what follows the name, which may hold anything.
    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
        let parent = fields.get(1)?.parse().ok()?;
        let ticks = fields.get(11..15)?.iter().map(|it| it.parse::<u64>().ok()).sum::<Option<u64>>()?;
        Some(Self { parent, ticks })
    }
}
