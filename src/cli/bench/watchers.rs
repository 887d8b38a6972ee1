//! Many watches, and one caller whose changes all of them are told.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::{
    Plan,
    report::{Bar, Done, Samples},
};
use crate::{
    cli::{
        Exit, Failure,
        client::{Client, failure},
    },
    proto::v1::{
        SetRoleRequest, WatchRoleChangesRequest, WatchRoleChangesResponse, watch_role_changes_response::Event,
    },
};

/// Changes a second where no rate is asked for.
const RATE: u32 = 100;

/// How long a watch may take to begin, and the last message to arrive.
const BEGIN: Duration = Duration::from_secs(10);
const LAST: Duration = Duration::from_secs(1);

/// When each change was asked for, by the number in its reason.
type Sent = Arc<Mutex<Vec<Instant>>>;

const REASON: &str = "bench ";

/// Latency is from when a change was asked for until a watch has it.
pub(super) async fn run(plan: &Plan) -> Result<Done, Failure> {
    let args = &plan.args;
    let sent = Sent::default();
    let over = CancellationToken::new();
    let mut watches = JoinSet::new();
    for n in 0..args.watchers {
        let stream = open(&plan.clients[usize::from(n) % plan.clients.len()]).await?;
        watches.spawn(follow(stream, sent.clone(), over.clone()));
    }
    let writer = &plan.clients[0];
    let rate = if args.rate == 0 { RATE } else { args.rate };
    let begun = Instant::now();
    let bar = Bar::of(args.duration);
    for number in 0.. {
        let due = begun + Duration::from_secs_f64(f64::from(number) / f64::from(rate));
        if due >= begun + args.duration {
            break;
        }
        sleep_until(due).await;
        sent.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
        let request = SetRoleRequest {
            user_id: args.first_user + i64::from(number % args.users),
            role: if (number / args.users).is_multiple_of(2) { "admin" } else { "user" }.to_owned(),
            reason: format!("{REASON}{number}"),
            ..Default::default()
        };
        writer.answer(writer.rpc().set_role(writer.request(request))).await?;
    }
    let took = begun.elapsed();
    drop(bar);
    // What is on its way still.
    sleep(LAST).await;
    over.cancel();
    let mut samples = Samples::new();
    while let Some(followed) = watches.join_next().await {
        match followed {
            Ok(followed) => samples.add(&followed?),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    Ok(Done { samples, took, whole: took, each: 1 })
}

async fn open(client: &Client) -> Result<Streaming<WatchRoleChangesResponse>, Failure> {
    // Without a deadline: it goes on as long as it goes on.
    let mut rpc = client.rpc();
    let opened = rpc.watch_role_changes(WatchRoleChangesRequest::default()).await;
    let mut stream = opened.map_err(|status| failure(&status, None))?.into_inner();
    // The first word, after which it is told of everything.
    match timeout(BEGIN, stream.message()).await {
        Ok(Ok(_)) => Ok(stream),
        Ok(Err(status)) => Err(failure(&status, None)),
        Err(_) => Err(Failure::new(Exit::Unavailable, "a watch did not begin in time")),
    }
}

async fn follow(
    mut stream: Streaming<WatchRoleChangesResponse>,
    sent: Sent,
    over: CancellationToken,
) -> Result<Samples, Failure> {
    let mut samples = Samples::new();
    loop {
        let message = tokio::select! {
            biased;
            message = stream.message() => message.map_err(|status| failure(&status, None))?,
            () = over.cancelled() => return Ok(samples),
        };
        let Some(message) = message else {
            return Err(Failure::new(Exit::Unavailable, "the server ended a watch"));
        };
        let now = Instant::now();
        let Some(Event::Commit(commit)) = message.event else { continue };
        for change in commit.changes {
            let number = change.reason.strip_prefix(REASON).and_then(|number| number.parse::<usize>().ok());
            let asked =
                number.and_then(|number| sent.lock().unwrap_or_else(PoisonError::into_inner).get(number).copied());
            if let Some(asked) = asked {
                samples.count(now - asked, None);
            }
        }
    }
}
