//! What goes to stdout: text for people and scripts, or the contract's messages as proto3 JSON, one a line.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    io::{self, Write},
    sync::LazyLock,
};

use comfy_table::{ColumnConstraint, Table, Width, presets};
use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use prost_types::Timestamp;

use super::{Exit, Failure};
use crate::proto::{
    self,
    v1::{ChangeKind, FeedState, RoleChange},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(super) enum Format {
    /// For people, and for the simplest of scripts
    Text,
    /// proto3 JSON, one message a line
    Json,
}

static DESCRIPTORS: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET).expect("build.rs wrote the descriptors that it compiled")
});

/// Writes one line to stdout; a reader who left ends the command quietly.
pub(super) fn line(text: impl fmt::Display) -> Result<(), Failure> {
    writeln!(io::stdout().lock(), "{text}").map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::quiet(),
        _ => Failure::new(Exit::Refused, format!("cannot write to stdout: {error}")),
    })
}

/// Writes one line to stderr; nobody there is no reason to end.
pub(super) fn talk(text: impl fmt::Display) {
    let _nobody_listens = writeln!(io::stderr().lock(), "{text}");
}

/// Writes a message as one line of proto3 JSON: 64-bit numbers as strings, and zero values written out.
pub(super) fn json<M: Message + Name>(message: &M) -> Result<(), Failure> {
    line(to_json(message))
}

fn to_json<M: Message + Name>(message: &M) -> String {
    let descriptor = DESCRIPTORS.get_message_by_name(&M::full_name()).expect("every message of ours is described");
    let dynamic =
        DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).expect("it was encoded just now");
    let options = SerializeOptions::new().skip_default_fields(false);
    let mut text = Vec::new();
    dynamic
        .serialize_with_options(&mut serde_json::Serializer::new(&mut text), &options)
        .expect("messages of ours have nothing that JSON lacks");
    String::from_utf8(text).expect("JSON is UTF-8")
}

/// A text of somebody's, fit for a terminal: an adopted table may hold anything, escape sequences among it.
pub(super) fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let escape = |out: String, c: char| {
        if c.is_control() { out + &c.escape_default().to_string() } else { out + &c.to_string() }
    };
    text.chars().fold(String::new(), escape).into()
}

/// To the second, in UTC.
pub(super) fn time(at: Option<&Timestamp>) -> String {
    at.map_or_else(|| "-".into(), |at| Timestamp { seconds: at.seconds, nanos: 0 }.to_string())
}

pub(super) fn kind(change: &RoleChange) -> &'static str {
    match change.kind() {
        ChangeKind::Unspecified => "changed",
        ChangeKind::UserCreated => "user created",
        ChangeKind::AdminAdded => "admin added",
        ChangeKind::AdminRemoved => "admin removed",
        ChangeKind::AdminTransferred => "admin transferred",
        ChangeKind::RoleChanged => "role changed",
        ChangeKind::UserDeleted => "user deleted",
    }
}

pub(super) fn feed_state(state: FeedState) -> &'static str {
    match state {
        FeedState::Unspecified => "unknown",
        FeedState::Live => "live",
        FeedState::CatchingUp => "catching up",
        FeedState::Disconnected => "disconnected",
    }
}

/// `42`, or `42 @bob` where the name is known.
pub(super) fn user(id: i64, username: &str) -> String {
    if username.is_empty() { id.to_string() } else { format!("{id} @{}", plain(username)) }
}

/// `user -> admin`, with a dash for no row.
pub(super) fn move_of(change: &RoleChange) -> String {
    let [old, new] =
        [&change.old_role, &change.new_role].map(|role| if role.is_empty() { Cow::from("-") } else { plain(role) });
    format!("{old} -> {new}")
}

/// Who, and why where that is known.
pub(super) fn by(change: &RoleChange) -> String {
    let mut text = plain(&change.actor).into_owned();
    if !change.reason.is_empty() {
        let _infallible = write!(text, ": {}", plain(&change.reason));
    }
    text
}

/// A table without lines, printed page by page: the header once, and no column narrower than on the page before.
pub(super) struct Pages {
    header: Option<Vec<&'static str>>,
    widths: Vec<u16>,
}

// === impl Pages ===

impl Pages {
    pub(super) fn new(header: &[&'static str]) -> Self {
        Self { header: Some(header.to_vec()), widths: vec![0; header.len()] }
    }

    pub(super) fn print(&mut self, rows: Vec<Vec<String>>) -> Result<(), Failure> {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        if let Some(header) = self.header.take() {
            table.set_header(header);
        } else if rows.is_empty() {
            return Ok(());
        }
        table.add_rows(rows);
        for (known, width) in self.widths.iter_mut().zip(table.column_max_content_widths()) {
            *known = width.max(*known);
        }
        // With the padding: none before the first column, one on every other side.
        let least = |(column, width): (usize, &u16)| {
            let padding = if column == 0 { 1 } else { 2 };
            ColumnConstraint::LowerBoundary(Width::Fixed(width.saturating_add(padding)))
        };
        table.set_constraints(self.widths.iter().enumerate().map(least));
        if let Some(first) = table.column_mut(0) {
            first.set_padding((0, 1));
        }
        table.lines().try_for_each(|text| line(text.trim_end()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::{GetRoleResponse, WatchRoleChangesResponse, watch_role_changes_response::Event};

    #[test]
    fn json_is_proto3_json_with_zero_values() {
        let answer = GetRoleResponse { user_id: -42, role: "admin".into(), source: 1, ..Default::default() };
        let expected = r#"{"userId":"-42","role":"admin","revision":"0","source":"SOURCE_CACHE","stale":false}"#;
        assert_eq!(to_json(&answer), expected);
    }

    #[test]
    fn json_leaves_out_what_is_absent() {
        let change = RoleChange {
            kind: ChangeKind::AdminAdded.into(),
            changed_at: Some(Timestamp { seconds: 0, nanos: 0 }),
            ..Default::default()
        };
        let commit = proto::v1::Commit { changes: vec![change], ..Default::default() };
        let text = to_json(&WatchRoleChangesResponse { event: Some(Event::Commit(commit)) });
        assert!(text.starts_with(r#"{"commit":{"#), "{text}");
        assert!(text.contains(r#""kind":"CHANGE_KIND_ADMIN_ADDED""#), "{text}");
        assert!(text.contains(r#""changedAt":"1970-01-01T00:00:00Z""#), "{text}");
        assert!(!text.contains("transfer"), "{text}");
    }

    #[test]
    fn a_terminal_gets_no_control_characters() {
        assert_eq!(plain("ad\x1b[2Jmin\n"), "ad\\u{1b}[2Jmin\\n");
        assert_eq!(plain("админ"), "админ");
    }
}
