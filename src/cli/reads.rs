//! The commands that ask: `get`, `users`, `history`, `stats`, and `mailbox get` beside its sibling in `writes`.

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};

use super::{
    Failure,
    client::ClientArgs,
    output::{self, Format, Pages},
};
use crate::proto::v1::{
    BatchGetRolesRequest, GetRoleRequest, ListRoleChangesRequest, ListUsersRequest, StatsRequest, StatsResponse,
};

/// The contract's largest page.
const MAX_PAGE: u32 = 1_000;

#[derive(Args, Debug)]
pub(super) struct GetArgs {
    /// Whose role; of several each line has the user, a tab, and the role
    #[arg(value_name = "USER", required = true, allow_negative_numbers = true)]
    users: Vec<i64>,
    /// Answer as of this revision or a later one: your own write, even through another server
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    min_revision: i64,
    /// Ask the store itself, whatever is cached
    #[arg(long)]
    fresh: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct UsersArgs {
    /// Only users with this role
    #[arg(long, value_name = "ROLE", default_value = "", hide_default_value = true)]
    role: String,
    #[command(flatten)]
    how_many: HowMany,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct HistoryArgs {
    /// Only this user's changes
    #[arg(value_name = "USER", allow_negative_numbers = true)]
    user: Option<i64>,
    /// Only changes after this revision
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    after: i64,
    #[command(flatten)]
    how_many: HowMany,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
struct HowMany {
    /// How many at most
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// However many there are
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

#[derive(Args, Debug)]
pub(super) struct StatsArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// How far a listing has come.
struct Listing {
    left: Option<u32>,
    page_token: String,
}

pub(super) async fn get(args: GetArgs) -> Result<(), Failure> {
    let client = args.client.connect().await?;
    let (min_revision, fully_consistent) = (args.min_revision, args.fresh);
    let stale = if let [user_id] = args.users[..] {
        let request = client.request(GetRoleRequest { user_id, min_revision, fully_consistent });
        let answer = client.answer(client.rpc().get_role(request)).await?;
        match args.client.output {
            Format::Text => output::line(output::plain(&answer.role))?,
            Format::Json => output::json(&answer)?,
        }
        answer.stale
    } else {
        let user_ids = args.users.clone();
        let request = client.request(BatchGetRolesRequest { user_ids, min_revision, fully_consistent });
        let answer = client.answer(client.rpc().batch_get_roles(request)).await?;
        match args.client.output {
            Format::Text => {
                for (user, index) in args.users.iter().zip(&answer.role_indexes) {
                    let role = answer.roles.get(*index as usize).map_or("", String::as_str);
                    output::line(format_args!("{user}\t{}", output::plain(role)))?;
                }
            }
            Format::Json => output::json(&answer)?,
        }
        answer.stale
    };
    if stale {
        output::talk("stale: the server has lost its store and answers with what it knew");
    }
    Ok(())
}

pub(super) async fn users(args: UsersArgs) -> Result<(), Failure> {
    let client = args.client.connect().await?;
    let mut table = Pages::new(&["USER", "ROLE", "USERNAME"]);
    let mut listing = Listing::new(&args.how_many);
    while let Some((page_size, page_token)) = listing.next_page() {
        let request = client.request(ListUsersRequest { role: args.role.clone(), page_size, page_token });
        let page = client.answer(client.rpc().list_users(request)).await?;
        listing.took(page.users.len(), &page.next_page_token);
        match args.client.output {
            Format::Json => output::json(&page)?,
            Format::Text => {
                let row = |user: &crate::proto::v1::UserRole| {
                    vec![
                        user.user_id.to_string(),
                        output::plain(&user.role).into(),
                        output::plain(&user.username).into(),
                    ]
                };
                table.print(page.users.iter().map(row).collect())?;
            }
        }
    }
    listing.say_what_is_left();
    Ok(())
}

pub(super) async fn history(args: HistoryArgs) -> Result<(), Failure> {
    let client = args.client.connect().await?;
    let mut table = Pages::new(&["REVISION", "TIME", "WHAT", "USER", "ROLE", "BY"]);
    let mut listing = Listing::new(&args.how_many);
    while let Some((page_size, page_token)) = listing.next_page() {
        let (user_id, after_revision) = (args.user, args.after);
        let request = client.request(ListRoleChangesRequest { user_id, after_revision, page_size, page_token });
        let page = client.answer(client.rpc().list_role_changes(request)).await?;
        listing.took(page.changes.len(), &page.next_page_token);
        match args.client.output {
            Format::Json => output::json(&page)?,
            Format::Text => {
                let row = |change: &crate::proto::v1::RoleChange| {
                    vec![
                        change.revision.to_string(),
                        output::time(change.changed_at.as_ref()),
                        output::kind(change).to_owned(),
                        output::user(change.user_id, &change.username),
                        output::move_of(change),
                        output::by(change),
                    ]
                };
                table.print(page.changes.iter().map(row).collect())?;
            }
        }
    }
    listing.say_what_is_left();
    Ok(())
}

pub(super) async fn stats(args: StatsArgs) -> Result<(), Failure> {
    let client = args.client.connect().await?;
    let stats = client.answer(client.rpc().stats(client.request(StatsRequest {}))).await?;
    match args.client.output {
        Format::Json => output::json(&stats),
        Format::Text => output::line(stats_table(&stats)),
    }
}

fn stats_table(stats: &StatsResponse) -> Table {
    let uptime = stats.uptime.and_then(|uptime| std::time::Duration::try_from(uptime).ok()).unwrap_or_default();
    let uptime = std::time::Duration::from_secs(uptime.as_secs());
    let hit_rate = match stats.hits + stats.misses {
        0 => "no reads yet".to_owned(),
        _ => format!("{:.1} %", stats.hit_rate_percent),
    };
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.add_rows([
        ["users in cache", &grouped(stats.cache_size)],
        ["cache memory", &bytes(stats.cache_bytes)],
        ["hits", &grouped(stats.hits)],
        ["misses", &grouped(stats.misses)],
        ["hit rate", &hit_rate],
        ["misses that waited for another", &grouped(stats.coalesced_misses)],
        ["reads of the store", &grouped(stats.store_reads)],
        ["stale answers", &grouped(stats.stale_answers)],
        ["changes applied", &grouped(stats.events_processed)],
        ["handlers (open watches)", &grouped(stats.event_handlers)],
        ["feed", output::feed_state(stats.feed_state())],
        ["revision, applied", &grouped(stats.revision)],
        ["revision, store", &grouped(stats.store_revision)],
        ["store", &format!("{} {}", output::plain(&stats.store_kind), output::plain(&stats.store_id))],
        ["mismatches found", &grouped(stats.cache_mismatches)],
        ["panics", &grouped(stats.panics)],
        ["uptime", &humantime::format_duration(uptime).to_string()],
        ["version", &output::plain(&stats.version)],
    ]);
    if let Some(values) = table.column_mut(1) {
        values.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// `1,234,567`.
fn grouped(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::from(if number < 0 { "-" } else { "" });
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn bytes(number: i64) -> String {
    match number {
        ..=1_023 => format!("{number} B"),
        1_024..=1_048_575 => format!("{:.1} KiB", number as f64 / 1_024.0),
        _ => format!("{:.1} MiB", number as f64 / 1_048_576.0),
    }
}

// === impl Listing ===

impl Listing {
    fn new(how_many: &HowMany) -> Self {
        Self { left: (!how_many.all).then_some(how_many.limit), page_token: String::new() }
    }

    /// What to ask next; none at the end. The first page is always asked for.
    fn next_page(&self) -> Option<(i32, String)> {
        let size = self.left.unwrap_or(MAX_PAGE).min(MAX_PAGE);
        (size > 0).then(|| (size.cast_signed(), self.page_token.clone()))
    }

    fn took(&mut self, rows: usize, next_page_token: &str) {
        let rows = u32::try_from(rows).unwrap_or(u32::MAX);
        next_page_token.clone_into(&mut self.page_token);
        self.left = match self.left {
            // The end of the list.
            _ if next_page_token.is_empty() => Some(0),
            left => left.map(|left| left.saturating_sub(rows)),
        };
    }

    fn say_what_is_left(&self) {
        if !self.page_token.is_empty() {
            output::talk("there are more: --all, or a larger --limit, shows them");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (-1_234_567, "-1,234,567")] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!([512, 1_536, 3_145_728].map(bytes), ["512 B", "1.5 KiB", "3.0 MiB"]);
    }

    #[test]
    fn a_listing_ends_at_its_limit_or_at_the_last_page() {
        let mut limited = Listing::new(&HowMany { limit: 1_500, all: false });
        assert_eq!(limited.next_page(), Some((1_000, String::new())));
        limited.took(1_000, "a");
        assert_eq!(limited.next_page(), Some((500, "a".into())));
        limited.took(500, "b");
        assert_eq!(limited.next_page(), None);

        let mut all = Listing::new(&HowMany { limit: 100, all: true });
        all.took(1_000, "a");
        assert_eq!(all.next_page(), Some((1_000, "a".into())));
        all.took(3, "");
        assert_eq!(all.next_page(), None);
    }

    #[test]
    fn stats_fit_into_a_table() {
        let stats = StatsResponse { hits: 3, misses: 1, hit_rate_percent: 75.0, ..Default::default() };
        let text = stats_table(&stats).to_string();
        assert!(text.contains("75.0 %") && text.lines().count() == 20, "{text}");
    }
}
