//! What a call has to do, given what the store holds: pure, so that every rule of a write stands in one place.

use std::collections::HashMap;

use crate::{
    role::{Change, MailboxId, RoleName, UserId},
    store::{Call, Facts, Op, Refusal},
};

/// What the store holds under the write lock, kept up to date as the batch goes on.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Without the column a username has no place but the log.
    pub(super) has_username: bool,
    pub(super) users: HashMap<UserId, KnownUser>,
    pub(super) mailboxes: HashMap<MailboxId, UserId>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct KnownUser {
    pub(super) role: RoleName,
    pub(super) username: Option<Box<str>>,
}

/// One statement of a call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Insert {
        user: UserId,
        role: RoleName,
        username: Option<Box<str>>,
    },
    SetRole {
        user: UserId,
        role: RoleName,
        username: Option<Box<str>>,
    },
    /// Not logged: no role changes.
    SetUsername {
        user: UserId,
        username: Box<str>,
    },
    /// For a hand-over to one who has the role already: the row stays, and the log says who got it.
    LogAgain {
        user: UserId,
        role: RoleName,
        username: Option<Box<str>>,
    },
    Delete {
        user: UserId,
    },
    InsertMailbox {
        mailbox: MailboxId,
        creator: UserId,
    },
    SetCreator {
        mailbox: MailboxId,
        creator: UserId,
    },
}

impl Known {
    /// The steps of a call, none where it has nothing to do, in the order in which their changes are logged.
    pub(super) fn plan(&self, call: &Call, facts: &Facts) -> Result<Vec<Step>, Refusal> {
        let within = |role: &RoleName| match call.grant.covers(role, &facts.default_role) {
            true => Ok(()),
            false => Err(Refusal::NotGranted { role: role.clone() }),
        };
        match &call.op {
            Op::Set { user, role, username, expected, .. } => {
                within(role)?;
                within(&self.role(*user, facts))?;
                let now = self.users.get(user);
                let matches = |expected: &str| match now {
                    Some(now) => now.role.as_str() == expected,
                    None => expected.is_empty() || expected == facts.default_role.as_str(),
                };
                if !expected.as_deref().is_none_or(matches) {
                    return Err(Refusal::RoleMismatch { current: self.role(*user, facts) });
                }
                Ok(self.give(*user, role, username.as_deref()))
            }
            Op::Transfer { from, to, mailbox, demote_from, to_username, .. } => {
                let admin = &facts.admin_role;
                within(admin)?;
                let mut steps = Vec::new();
                match mailbox {
                    Some(mailbox) => match self.mailboxes.get(mailbox) {
                        None => return Err(Refusal::MailboxNotFound),
                        Some(creator) if creator != from => {
                            return Err(Refusal::NotTheCreator { creator: *creator });
                        }
                        Some(_) => steps.push(Step::SetCreator { mailbox: *mailbox, creator: *to }),
                    },
                    None => {
                        let current = self.role(*from, facts);
                        if current != facts.admin_role {
                            return Err(Refusal::NotAnAdmin { current });
                        }
                    }
                }
                within(&self.role(*to, facts))?;
                if *demote_from {
                    within(&self.role(*from, facts))?;
                }
                steps.extend(self.give(*to, admin, to_username.as_deref()));
                if let Some(known) = self.users.get(to).filter(|known| known.role == *admin) {
                    let username = to_username.clone().or_else(|| known.username.clone());
                    steps.push(Step::LogAgain { user: *to, role: admin.clone(), username });
                }
                if *demote_from && self.users.get(from).is_some_and(|known| known.role != facts.default_role) {
                    steps.push(Step::SetRole { user: *from, role: facts.default_role.clone(), username: None });
                }
                Ok(steps)
            }
            Op::Delete { user, .. } => {
                within(&self.role(*user, facts))?;
                match self.users.contains_key(user) {
                    true => Ok(vec![Step::Delete { user: *user }]),
                    false => Ok(Vec::new()),
                }
            }
            Op::Register { mailbox, creator } => match self.mailboxes.get(mailbox) {
                None => Ok(vec![Step::InsertMailbox { mailbox: *mailbox, creator: *creator }]),
                Some(known) if known == creator => Ok(Vec::new()),
                Some(known) => Err(Refusal::MailboxExists { creator: *known }),
            },
        }
    }

    /// What the log says of a change holds from here on, whoever caused it: a bot's trigger may touch others.
    pub(super) fn apply(&mut self, change: &Change) {
        match &change.new {
            None => {
                self.users.remove(&change.user);
            }
            Some(role) => {
                let username = change.username.clone();
                self.users.insert(change.user, KnownUser { role: role.clone(), username });
            }
        }
    }

    fn role(&self, user: UserId, facts: &Facts) -> RoleName {
        self.users.get(&user).map_or_else(|| facts.default_role.clone(), |known| known.role.clone())
    }

    fn give(&self, user: UserId, role: &RoleName, username: Option<&str>) -> Vec<Step> {
        let Some(known) = self.users.get(&user) else {
            return vec![Step::Insert { user, role: role.clone(), username: username.map(Into::into) }];
        };
        let new_name = username.filter(|new| self.has_username && known.username.as_deref() != Some(new));
        if known.role != *role {
            return vec![Step::SetRole { user, role: role.clone(), username: new_name.map(Into::into) }];
        }
        new_name.map(|username| Step::SetUsername { user, username: username.into() }).into_iter().collect()
    }
}

impl Step {
    /// The role, or the absence, that the log must say in the end of this user; otherwise the step was swallowed.
    pub(super) fn outcome(&self) -> Option<(UserId, Option<&RoleName>)> {
        match self {
            Self::Insert { user, role, .. } | Self::SetRole { user, role, .. } | Self::LogAgain { user, role, .. } => {
                Some((*user, Some(role)))
            }
            Self::Delete { user } => Some((*user, None)),
            Self::SetUsername { .. } | Self::InsertMailbox { .. } | Self::SetCreator { .. } => None,
        }
    }
}
