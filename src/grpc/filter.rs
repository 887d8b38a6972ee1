//! What a watch wants to hear of.

use std::collections::HashSet;

use super::{convert, fault::Fault};
use crate::role::{Change, ChangeKind, RoleName, UserId, UserRow};

/// Roles in the filter of a watch, which holds them as long as it is open.
const MOST_ROLES: usize = 1_000;

/// What is empty lets everything pass.
pub(super) struct Filter {
    users: HashSet<UserId>,
    roles: HashSet<Box<str>>,
    kinds: HashSet<ChangeKind>,
}

impl Filter {
    pub(super) fn of(users: &[i64], roles: Vec<String>, kinds: &[i32]) -> Result<Self, Fault> {
        let users = convert::user_ids("user_ids", users)?.into_iter().collect();
        if roles.len() > MOST_ROLES {
            return Err(Fault::field("roles", format!("a watch has at most {MOST_ROLES} of them")));
        }
        let compare = |(index, role)| convert::role_to_compare(&format!("roles[{index}]"), role);
        let roles = roles.into_iter().enumerate().map(compare).collect::<Result<_, _>>()?;
        let kinds = convert::change_kinds("kinds", kinds)?;
        Ok(Self { users, roles, kinds })
    }

    /// How many users and roles it names.
    pub(super) fn len(&self) -> u32 {
        (self.users.len() + self.roles.len()) as u32
    }

    pub(super) fn passes(&self, change: &Change, admin: &RoleName) -> bool {
        let of_role = |role: &Option<RoleName>| role.as_ref().is_some_and(|role| self.roles.contains(role.as_str()));
        (self.users.is_empty() || self.users.contains(&change.user))
            && (self.roles.is_empty() || of_role(&change.old) || of_role(&change.new))
            && (self.kinds.is_empty() || self.kinds.contains(&change.kind(admin)))
    }

    pub(super) fn passes_user(&self, row: &UserRow) -> bool {
        (self.users.is_empty() || self.users.contains(&row.user))
            && (self.roles.is_empty() || self.roles.contains(row.role.as_str()))
    }
}
