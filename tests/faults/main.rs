//! Campaigns: parts are broken on purpose under a real load, clients write down what they were told, and a checker judges
//! it afterwards by the log in the store.
//!
//! Run by `scripts/campaign`. Every random choice comes from the seed that is printed.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

mod asking;
mod campaign;
mod campaigns;
mod checker;
mod cluster;
mod history;
mod log;
mod pulse;
mod request;
mod sessions;
#[path = "../support/mod.rs"]
mod support;
mod traffic;
mod watcher;

use std::process::ExitCode;

use clap::Parser;

use self::campaign::{Report, Tier};

/// Breaks parts of a running service, and checks that it keeps its promises.
#[derive(Parser)]
struct Args {
    /// Those whose name has one of these in it; all without any.
    names: Vec<String>,
    /// How long.
    #[arg(long, value_enum, default_value_t = Tier::Short)]
    tier: Tier,
    /// Where all random choices come from; another each time without it.
    #[arg(long)]
    seed: Option<u64>,
    /// Rounds of each campaign, in place of its tier's.
    #[arg(long)]
    rounds: Option<u64>,
    /// Only say which there are.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    campaigns::with_private_mounts();
    let wanted: Vec<_> = campaigns::all()
        .into_iter()
        .filter(|campaign| args.names.is_empty() || args.names.iter().any(|name| campaign.name.contains(name.as_str())))
        .collect();
    if wanted.is_empty() {
        eprintln!("no campaign is called that; --list says which there are");
        return ExitCode::from(2);
    }
    if args.list {
        for campaign in wanted {
            println!("{} ({} {}): {}", campaign.name, campaign.rounds(args.tier), campaign.unit, campaign.must_hold);
        }
        return ExitCode::SUCCESS;
    }
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    println!("seed {seed}");
    let mut reports: Vec<Report> = Vec::new();
    for campaign in wanted {
        let rounds = args.rounds.unwrap_or_else(|| campaign.rounds(args.tier));
        println!("\n== {}: {rounds} {}", campaign.name, campaign.unit);
        let report = campaign.run(rounds, seed);
        report.print();
        reports.push(report);
    }
    let failed: Vec<&str> = reports.iter().filter(|report| !report.holds()).map(|report| report.name).collect();
    println!("\ncampaigns: {} held, {} failed, seed {seed}", reports.len() - failed.len(), failed.len());
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed: {}", failed.join(", "));
    ExitCode::FAILURE
}
