//! The commands that change something: `set`, `transfer`, `delete`, `mailbox`.
//!
//! Each write carries a request id, one made here where none is given: after a lost answer the hint names it, and the
//! same command with it has one effect.

use clap::{Args, Subcommand};
use uuid::Uuid;

use super::{
    Failure,
    client::ClientArgs,
    output::{self, Format},
};
use crate::proto::v1::{
    DeleteUserRequest, GetMailboxRequest, RegisterMailboxRequest, RoleChange, SetRoleRequest, TransferAdminRequest,
};

#[derive(Args, Debug)]
pub(super) struct SetArgs {
    /// Whose role
    #[arg(value_name = "USER", allow_negative_numbers = true)]
    user: i64,
    /// The new role, one of the server's --roles
    #[arg(value_name = "ROLE")]
    role: String,
    /// Kept beside the user, with or without the @; without this the known one stays
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    username: String,
    /// Write only if this is the role now. The default role also stands for a user that does not exist, "" only for
    /// such a one
    #[arg(long, value_name = "ROLE")]
    expect: Option<String>,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct TransferArgs {
    /// The admin who hands over
    #[arg(value_name = "FROM", allow_negative_numbers = true)]
    from: i64,
    /// The user who receives
    #[arg(value_name = "TO", allow_negative_numbers = true)]
    to: i64,
    /// The mailbox that changes hands: FROM must be its creator. Without it FROM must be an admin
    #[arg(long, value_name = "MAILBOX", allow_negative_numbers = true)]
    mailbox: Option<i64>,
    /// Also give FROM the default role; otherwise its role stays
    #[arg(long)]
    demote: bool,
    /// Kept beside TO, with or without the @
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    to_username: String,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct DeleteArgs {
    /// Who is forgotten, and has the default role again
    #[arg(value_name = "USER", allow_negative_numbers = true)]
    user: i64,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
struct Why {
    /// Kept in the change log, at most 500 bytes
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    reason: String,
    /// A key of your own for this one write: a repeat with it within a day gets the first answer and writes nothing
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

#[derive(Subcommand, Debug)]
pub(super) enum Mailbox {
    /// Make a mailbox known, with the user who created it
    Register {
        #[arg(value_name = "MAILBOX", allow_negative_numbers = true)]
        mailbox: i64,
        #[arg(value_name = "CREATOR", allow_negative_numbers = true)]
        creator: i64,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Who a mailbox belongs to now
    Get {
        #[arg(value_name = "MAILBOX", allow_negative_numbers = true)]
        mailbox: i64,
        #[command(flatten)]
        client: ClientArgs,
    },
}

pub(super) async fn set(args: SetArgs) -> Result<(), Failure> {
    let client = args.client.connect().await?;
    let request_id = args.why.request_id();
    let request = client.request(SetRoleRequest {
        user_id: args.user,
        role: args.role.clone(),
        username: without_at(&args.username),
        expected_role: args.expect,
        reason: args.why.reason,
        request_id: request_id.clone(),
    });
    let answer = client.written(&request_id, client.rpc().set_role(request)).await?;
    match (args.client.output, &answer.change) {
        (Format::Json, _) => output::json(&answer),
        (Format::Text, Some(change)) => tell(change),
        (Format::Text, None) => {
            output::line(format_args!("{} is {} already, revision {}", args.user, args.role, answer.revision))
        }
    }
}

pub(super) async fn transfer(args: TransferArgs) -> Result<(), Failure> {
    let client = args.client.connect().await?;
    let request_id = args.why.request_id();
    let request = client.request(TransferAdminRequest {
        from_user_id: args.from,
        to_user_id: args.to,
        mailbox_id: args.mailbox,
        demote_from: args.demote,
        to_username: without_at(&args.to_username),
        reason: args.why.reason,
        request_id: request_id.clone(),
    });
    let answer = client.written(&request_id, client.rpc().transfer_admin(request)).await?;
    match args.client.output {
        Format::Json => output::json(&answer),
        Format::Text => answer.changes.iter().try_for_each(tell),
    }
}

pub(super) async fn delete(args: DeleteArgs) -> Result<(), Failure> {
    let client = args.client.connect().await?;
    let request_id = args.why.request_id();
    let request = client.request(DeleteUserRequest {
        user_id: args.user,
        reason: args.why.reason,
        request_id: request_id.clone(),
    });
    let answer = client.written(&request_id, client.rpc().delete_user(request)).await?;
    match (args.client.output, &answer.change) {
        (Format::Json, _) => output::json(&answer),
        (Format::Text, Some(change)) => tell(change),
        (Format::Text, None) => output::line(format_args!("{} was not there, revision {}", args.user, answer.revision)),
    }
}

pub(super) async fn mailbox(command: Mailbox) -> Result<(), Failure> {
    match command {
        Mailbox::Register { mailbox, creator, client: args } => {
            let client = args.connect().await?;
            let request = client.request(RegisterMailboxRequest { mailbox_id: mailbox, creator_id: creator });
            let answer = client.answer(client.rpc().register_mailbox(request)).await?;
            match args.output {
                Format::Json => output::json(&answer),
                Format::Text => output::line(format_args!("mailbox {mailbox} belongs to {creator}")),
            }
        }
        Mailbox::Get { mailbox, client: args } => {
            let client = args.connect().await?;
            let request = client.request(GetMailboxRequest { mailbox_id: mailbox });
            let answer = client.answer(client.rpc().get_mailbox(request)).await?;
            match args.output {
                Format::Json => output::json(&answer),
                Format::Text => output::line(answer.creator_id),
            }
        }
    }
}

fn tell(change: &RoleChange) -> Result<(), Failure> {
    output::line(sentence(change))
}

/// What a change came to: `42 is now admin (was user), revision 7`.
fn sentence(change: &RoleChange) -> String {
    let (user, old, new) = (change.user_id, output::plain(&change.old_role), output::plain(&change.new_role));
    let what = match (&*old, &*new) {
        (old, "") => format!("is deleted (was {old})"),
        ("", new) => format!("is now {new} (new user)"),
        (old, new) if old == new => format!("is {new} as before"),
        (old, new) => format!("is now {new} (was {old})"),
    };
    format!("{user} {what}, revision {}", change.revision)
}

/// The contract's usernames have no @.
fn without_at(username: &str) -> String {
    username.strip_prefix('@').unwrap_or(username).to_owned()
}

// === impl Why ===

impl Why {
    fn request_id(&self) -> String {
        self.request_id.clone().unwrap_or_else(|| Uuid::new_v4().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_in_a_sentence() {
        for (old, new, sentence_) in [
            ("user", "admin", "42 is now admin (was user), revision 7"),
            ("", "admin", "42 is now admin (new user), revision 7"),
            ("admin", "", "42 is deleted (was admin), revision 7"),
            ("admin", "admin", "42 is admin as before, revision 7"),
        ] {
            let (old_role, new_role) = (old.to_owned(), new.to_owned());
            let change = RoleChange { user_id: 42, revision: 7, old_role, new_role, ..Default::default() };
            assert_eq!(sentence(&change), sentence_);
        }
        assert_eq!(without_at("@bob"), "bob");
    }
}
