//! The built binary as a process of its own, whose memory and log can be looked at, and which can be killed or paused.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use rolecache::proto::v1::role_cache_service_client::RoleCacheServiceClient;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tonic::transport::Channel;

use super::server::{PATIENCE, try_client};

/// A running `rolecache serve`, killed when it is dropped.
pub struct ChildServer {
    pub address: SocketAddr,
    pub client: RoleCacheServiceClient<Channel>,
    log: Arc<Mutex<Vec<String>>>,
    process: Process,
}

/// A server that is on its way.
pub struct Starting {
    process: Process,
    log: Arc<Mutex<Vec<String>>>,
    ready: mpsc::Receiver<SocketAddr>,
}

/// Killed when it is dropped, before it is ready too.
struct Process(Child);

/// How a server is started.
#[derive(Clone, Default)]
pub struct Start<'a> {
    pub url: &'a str,
    /// 0 for a free one.
    pub port: u16,
    pub args: &'a [&'a str],
    /// How many files it may have open, where not as many as we.
    pub files: Option<u32>,
    pub env: &'a [(&'a str, &'a str)],
}

// === impl Start ===

impl Start<'_> {
    pub fn spawn(self) -> Starting {
        let listen = format!("127.0.0.1:{}", self.port);
        let binary = env!("CARGO_BIN_EXE_rolecache");
        let mut command = match self.files {
            None => Command::new(binary),
            Some(files) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\""), binary]);
                shell
            }
        };
        let mut process = command
            .args(["serve", "--listen", &listen, "--log-format", "text", "--database-url", self.url])
            .args(self.args)
            .env_remove("DATABASE_URL")
            .envs(self.env.iter().copied())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (found, ready) = mpsc::channel();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let kept = log.clone();
        // Ends with the process.
        std::thread::spawn(move || {
            let mut listening = None;
            for line in lines.map_while(Result::ok) {
                if let Some((_, address)) = line.split_once("listening on ") {
                    listening = address.split_whitespace().next().and_then(|address| address.parse().ok());
                }
                if let (true, Some(address)) = (line.contains("ready"), listening) {
                    let _ = found.send(address);
                }
                kept.lock().unwrap().push(line);
            }
        });
        Starting { process: Process(process), log, ready }
    }
}

// === impl Starting ===

impl Starting {
    /// Waits until it says that it is ready.
    pub async fn ready(self) -> ChildServer {
        let log = self.log.clone();
        match self.ready_or_ended().await {
            Ok(server) => server,
            Err(status) => panic!("the server did not get ready, {status:?}: {:#?}", log.lock().unwrap()),
        }
    }

    /// The same; Err where it does not get there, with how it ended, if it did.
    pub async fn ready_or_ended(self) -> Result<ChildServer, Option<ExitStatus>> {
        let Self { mut process, log, ready } = self;
        let address = tokio::task::spawn_blocking(move || ready.recv_timeout(PATIENCE)).await.unwrap();
        let client = match address {
            Ok(address) => try_client(address).await.map(|client| (address, client)),
            Err(_) => None,
        };
        match client {
            Some((address, client)) => Ok(ChildServer { address, client, log, process }),
            None => Err(tokio::task::spawn_blocking(move || process.ended(Duration::from_secs(5))).await.unwrap()),
        }
    }
}

// === impl ChildServer ===

impl ChildServer {
    /// Starts the server and waits until it says that it is ready.
    pub async fn serve(url: &str, args: &[&str]) -> Self {
        Start { url, args, ..Start::default() }.spawn().ready().await
    }

    /// Whether a line of its log has this in it.
    pub fn logged(&self, text: &str) -> bool {
        self.log.lock().unwrap().iter().any(|line| line.contains(text))
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// A figure of `/proc/PID/status`, such as VmRSS or VmHWM, in MiB.
    pub fn memory(&self, figure: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
    }

    /// From now on `VmHWM` is the most that it takes from now on: see proc(5), `clear_refs`.
    pub fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.process.0.id()), "5").unwrap();
    }

    /// How long processors have worked for it.
    pub fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.0.id())).unwrap();
        // After the name, which may hold anything: in hundredths of a second, its own and the kernel's for it.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
    }

    /// How many files it may have open from now on, of those that it was started with; what is open stays.
    pub fn limit_files(&self, files: u64, most: u64) {
        let limit = Rlimit { current: Some(files), maximum: Some(most) };
        prlimit(Some(Pid::from_child(&self.process.0)), Resource::Nofile, limit).unwrap();
    }

    /// Sends a signal, such as STOP, CONT or TERM.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.process.0.id().to_string()]).status().unwrap();
        assert!(sent.success(), "the server is gone");
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.process.0.try_wait().unwrap()
    }

    /// Kills it as a crash would, and waits until it is gone.
    pub fn kill(mut self) {
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }
}

impl Process {
    fn ended(&mut self, limit: Duration) -> Option<ExitStatus> {
        let until = std::time::Instant::now() + limit;
        loop {
            match self.0.try_wait().unwrap() {
                None if std::time::Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                status => return status,
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
