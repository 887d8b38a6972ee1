//! The built binary as a process of its own, whose memory and log can be looked at.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
};

use rolecache::proto::v1::role_cache_service_client::RoleCacheServiceClient;
use tonic::transport::Channel;

use super::server::{PATIENCE, client};

/// A running `rolecache serve`, killed when it is dropped.
pub struct ChildServer {
    pub address: SocketAddr,
    pub client: RoleCacheServiceClient<Channel>,
    log: Arc<Mutex<Vec<String>>>,
    process: Child,
}

impl ChildServer {
    /// Starts the server and waits until it says that it is ready.
    pub async fn serve(url: &str, args: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_rolecache"))
            .args(["serve", "--listen", "127.0.0.1:0", "--log-format", "text", "--database-url", url])
            .args(args)
            .env_remove("DATABASE_URL")
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (found, address) = mpsc::channel();
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
        let address = tokio::task::spawn_blocking(move || address.recv_timeout(PATIENCE)).await.unwrap();
        let Ok(address) = address else {
            process.kill().unwrap();
            panic!("the server did not get ready: {:#?}", log.lock().unwrap());
        };
        Self { address, client: client(address).await, log, process }
    }

    /// Whether a line of its log has this in it.
    pub fn logged(&self, text: &str) -> bool {
        self.log.lock().unwrap().iter().any(|line| line.contains(text))
    }

    /// A figure of `/proc/PID/status`, such as VmRSS or VmHWM, in MiB.
    pub fn memory(&self, figure: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
    }
}

impl Drop for ChildServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
