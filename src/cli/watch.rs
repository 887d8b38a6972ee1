//! `watch`: every commit once, whole and in order, over as many connections as it takes.
//!
//! A broken connection resumes from the last resume token, with back-off. What ends the watch is the caller
//! (Ctrl-C, `--count`) or an answer that asking again would not change.

use std::{future::Future, time::Duration};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use clap::{Args, ValueEnum};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};
use tonic::{Code, Status, Streaming};

use super::{
    Exit, Failure,
    client::{self, ClientArgs},
    output::{self, Format},
    progress::Progress,
};
use crate::proto::v1::{
    ChangeKind, FeedState, WatchRoleChangesRequest, WatchRoleChangesResponse, watch_role_changes_response::Event,
};

/// The contract's, where none is asked for.
const DEFAULT_HEARTBEAT: Duration = Duration::from_secs(10);

/// The server loads a snapshot within 60 s.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(75);

#[derive(Args, Debug)]
pub(super) struct WatchArgs {
    /// Resume after the commit that this resume token came with; a bare revision works too, 0 for the beginning.
    /// Without it: from now on
    #[arg(long, value_name = "TOKEN", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    after: String,
    /// First everybody with a role other than the default; with --after only where that cannot be resumed from. Such
    /// a watch also starts over by itself, when the log or the history that it was at is gone
    #[arg(long)]
    snapshot: bool,
    /// Only this user; repeat it for several
    #[arg(long = "user", value_name = "USER", allow_negative_numbers = true)]
    users: Vec<i64>,
    /// Only changes from or to this role; repeat it for several
    #[arg(long = "role", value_name = "ROLE")]
    roles: Vec<String>,
    /// Only changes of this kind; repeat it for several
    #[arg(long = "kind", value_enum, value_name = "KIND")]
    kinds: Vec<Kind>,
    /// How often the server says that all is well (100ms to 1h, 10s where not given), and show it. A connection on
    /// which it says nothing three times over counts as broken
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    heartbeat: Option<Duration>,
    /// End after so many commits
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    UserCreated,
    AdminAdded,
    AdminRemoved,
    AdminTransferred,
    RoleChanged,
    UserDeleted,
}

/// How one connection ended, short of the end of the watch.
struct Broken {
    failure: Failure,
    /// The server's wish, if it had one.
    wait: Duration,
    /// Whether another connection may help.
    again: bool,
}

struct Watch {
    args: WatchArgs,
    progress: Progress,
    back_off: ExponentialBackoff,
    /// Whether a server has answered at all.
    started: bool,
    feed_state: FeedState,
    commits: u64,
}

pub(super) async fn run(args: WatchArgs) -> Result<(), Failure> {
    let stop = stop_signal()?;
    let mut watch = Watch {
        progress: Progress::new(args.after.clone()),
        back_off: back_off(),
        started: false,
        feed_state: FeedState::Live,
        commits: 0,
        args,
    };
    let ended = tokio::select! {
        ended = watch.follow() => ended,
        () = stop => Ok(()),
    };
    if watch.started && ended != Err(Failure::quiet()) {
        output::talk(format_args!("to go on from here: --after {}", watch.progress.after));
    }
    ended
}

// === impl Watch ===

impl Watch {
    /// Connection after connection, until the watch has ended.
    async fn follow(&mut self) -> Result<(), Failure> {
        loop {
            let Err(broken) = self.connection().await else { return Ok(()) };
            // Nobody has ever answered there: the caller should hear of it rather than wait.
            if !broken.again || !self.started {
                return Err(broken.failure);
            }
            self.progress.broken();
            let wait = self.back_off.next().unwrap_or(broken.wait).max(broken.wait);
            let from =
                self.progress.revision.map_or_else(|| "now on".into(), |revision| format!("revision {revision}"));
            let why = broken.failure.message.lines().next().unwrap_or_default();
            let wait_text = humantime::format_duration(Duration::from_millis(wait.as_millis() as u64));
            output::talk(format_args!("watch: {why}; resuming from {from} in {wait_text}"));
            sleep(wait).await;
        }
    }

    /// One connection, until it breaks, or until the watch has told what it was asked for.
    async fn connection(&mut self) -> Result<(), Broken> {
        let mut stream = self.open().await?;
        loop {
            let message = match timeout(self.patience(), stream.message()).await {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return Err(Broken::again("the server ended the stream")),
                Ok(Err(status)) => return Err(self.broken(&status)),
                Err(_) => return Err(Broken::again("the server says nothing any more")),
            };
            if matches!(message.event, Some(Event::Started(_))) {
                self.started = true;
                self.back_off = back_off();
            }
            let whole = self.progress.take(message, self.args.snapshot);
            for message in &whole.messages {
                self.tell(message).map_err(|failure| Broken { failure, wait: Duration::ZERO, again: false })?;
            }
            self.commits += u64::from(whole.commit);
            if self.args.count.is_some_and(|count| self.commits >= count) {
                return Ok(());
            }
        }
    }

    async fn open(&self) -> Result<Streaming<WatchRoleChangesResponse>, Broken> {
        let connect = |failure| Broken { failure, wait: Duration::ZERO, again: true };
        let client = self.args.client.connect().await.map_err(connect)?;
        let heartbeat_interval = self.args.heartbeat.map(prost_types::Duration::try_from).transpose();
        let request = WatchRoleChangesRequest {
            after: self.progress.after.clone(),
            initial_snapshot: self.args.snapshot,
            user_ids: self.args.users.clone(),
            roles: self.args.roles.clone(),
            kinds: self.args.kinds.iter().map(|kind| ChangeKind::from(*kind).into()).collect(),
            heartbeat_interval: heartbeat_interval.map_err(|error| Broken {
                failure: Failure::new(Exit::Usage, format!("--heartbeat: {error}")),
                wait: Duration::ZERO,
                again: false,
            })?,
        };
        // No deadline goes with it: that would be the end of the stream.
        client.try_answer(client.rpc().watch_role_changes(request)).await.map_err(|status| self.broken(&status))
    }

    /// How long a living server may be silent.
    fn patience(&self) -> Duration {
        let silence = self.args.heartbeat.unwrap_or(DEFAULT_HEARTBEAT) * 3 + Duration::from_secs(5);
        if self.progress.is_receiving() { silence.max(SNAPSHOT_LIMIT) } else { silence }
    }

    fn broken(&self, status: &Status) -> Broken {
        let reason = client::reason(status);
        let again = match (status.code(), reason.as_deref()) {
            (_, Some("REVISION_COMPACTED" | "HISTORY_CHANGED")) => self.args.snapshot,
            (_, Some("MESSAGE_TOO_LARGE")) => false,
            (Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded, _) => true,
            // The transport's, or a proxy's: the service names a reason.
            (Code::Cancelled | Code::Unknown | Code::Internal, None) => true,
            _ => false,
        };
        Broken { failure: client::failure(status, None), wait: client::retry_delay(status).unwrap_or_default(), again }
    }

    fn tell(&mut self, message: &WatchRoleChangesResponse) -> Result<(), Failure> {
        if self.args.client.output == Format::Json {
            output::json(message)?;
        }
        let text = self.args.client.output == Format::Text;
        match &message.event {
            Some(Event::Started(started)) => {
                let how = if started.resumed { "resumed" } else { "watching" };
                output::talk(format_args!("watch: {how} after revision {}", started.revision));
            }
            Some(Event::Snapshot(part)) if text => {
                let revision = self.progress.revision.unwrap_or_default();
                for user in &part.users {
                    let who = output::user(user.user_id, &user.username);
                    output::line(format_args!("{revision:>6}  snapshot  {who}  {}", output::plain(&user.role)))?;
                }
            }
            Some(Event::Commit(part)) if text => {
                for change in &part.changes {
                    let who = output::user(change.user_id, &change.username);
                    output::line(format_args!(
                        "{:>6}  {}  {:<17}  {who:<14}  {}  by {}",
                        change.revision,
                        output::time(change.changed_at.as_ref()),
                        output::kind(change),
                        output::move_of(change),
                        output::by(change),
                    ))?;
                }
            }
            Some(Event::Heartbeat(heartbeat)) => {
                let state = heartbeat.feed_state();
                if self.args.heartbeat.is_some() || state != self.feed_state {
                    let (revision, feed) = (heartbeat.revision, output::feed_state(state));
                    output::talk(format_args!("watch: all told up to revision {revision}, feed {feed}"));
                }
                self.feed_state = state;
            }
            _ => {}
        }
        Ok(())
    }
}

// === impl Broken ===

impl Broken {
    fn again(why: &str) -> Self {
        Self { failure: Failure::new(Exit::Unavailable, why), wait: Duration::ZERO, again: true }
    }
}

// === impl Kind ===

impl From<Kind> for ChangeKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::UserCreated => Self::UserCreated,
            Kind::AdminAdded => Self::AdminAdded,
            Kind::AdminRemoved => Self::AdminRemoved,
            Kind::AdminTransferred => Self::AdminTransferred,
            Kind::RoleChanged => Self::RoleChanged,
            Kind::UserDeleted => Self::UserDeleted,
        }
    }
}

fn back_off() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(10))
        .without_max_times()
        .with_jitter()
        .build()
}

/// Ctrl-C, or a supervisor's wish to end.
fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    let no_signals = |error| Failure::new(Exit::Refused, format!("cannot listen to signals: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}
