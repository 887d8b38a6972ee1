//! What a caller may do: scopes, and which roles its writes may give and take.

use std::{collections::BTreeSet, fmt, str::FromStr};

use crate::{
    role::{RoleName, RoleNameError},
    store::Grant,
};

/// A right that an RPC asks for. Which RPC asks for which stands in `grpc::door`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Scope {
    Read,
    Watch,
    List,
    Write,
    Mailbox,
    /// The power to make admins.
    Transfer,
    Stats,
}

/// Everything that one caller may do. What is not in here is denied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scopes {
    held: BTreeSet<Scope>,
    /// Of its writes; means something only with [`Scope::Write`].
    grant: Grant,
}

/// Why a text is no scope.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ScopeError {
    #[error("{0:?} is no scope: there are {names}, and write:ROLE", names = Scope::names())]
    Unknown(String),
    #[error("in {scope:?}: {error}")]
    Role { scope: String, error: RoleNameError },
    #[error("at least one scope is needed")]
    None,
}

// === impl Scope ===

impl Scope {
    pub const NAMES: [(Self, &'static str); 7] = [
        (Self::Read, "read"),
        (Self::Watch, "watch"),
        (Self::List, "list"),
        (Self::Write, "write"),
        (Self::Mailbox, "mailbox"),
        (Self::Transfer, "transfer"),
        (Self::Stats, "stats"),
    ];

    /// All of them, for people.
    pub fn names() -> String {
        Self::NAMES.map(|(_, name)| name).join(", ")
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(scope, _)| scope == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(text: &str) -> Result<Self, ScopeError> {
        let found = Self::NAMES.iter().find(|(_, name)| *name == text);
        found.map(|(scope, _)| *scope).ok_or_else(|| ScopeError::Unknown(text.to_owned()))
    }
}

// === impl Scopes ===

impl Scopes {
    /// Where the doors are open.
    pub fn all() -> Self {
        Self { held: Scope::NAMES.into_iter().map(|(scope, _)| scope).collect(), grant: Grant::Any }
    }

    /// Of words such as `read`, `write` and `write:moderator`. `write` alone is for every role.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, ScopeError> {
        let mut held = BTreeSet::new();
        let mut roles = BTreeSet::new();
        let mut any = false;
        for word in words {
            match word.strip_prefix("write:") {
                Some(role) => {
                    let role =
                        RoleName::to_write(role).map_err(|error| ScopeError::Role { scope: word.to_owned(), error })?;
                    roles.insert(role);
                    held.insert(Scope::Write);
                }
                None => {
                    let scope = word.parse()?;
                    any |= scope == Scope::Write;
                    held.insert(scope);
                }
            }
        }
        if held.is_empty() {
            return Err(ScopeError::None);
        }
        let grant = if any { Grant::Any } else { Grant::Only(roles.into_iter().collect()) };
        Ok(Self { held, grant })
    }

    pub fn contains(&self, scope: Scope) -> bool {
        self.held.contains(&scope)
    }

    /// Which roles its writes may give and take.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// The words of [`Scopes::parse`].
    pub fn words(&self) -> Vec<String> {
        let words = |scope: &Scope| match (scope, &self.grant) {
            (Scope::Write, Grant::Only(roles)) => roles.iter().map(|role| format!("write:{role}")).collect(),
            (scope, _) => vec![scope.to_string()],
        };
        self.held.iter().flat_map(words).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Scopes, ScopeError> {
        Scopes::parse(words.split_whitespace())
    }

    #[test]
    fn what_is_not_named_is_not_held() {
        let scopes = parse("read watch").unwrap();
        for (scope, name) in Scope::NAMES {
            assert_eq!(scopes.contains(scope), ["read", "watch"].contains(&name), "{name}");
        }
    }

    #[test]
    fn a_write_may_be_for_certain_roles_only() {
        assert_eq!(parse("write").unwrap().grant(), &Grant::Any);
        assert_eq!(parse("write:moderator write").unwrap().grant(), &Grant::Any);
        let some = parse("write:moderator write:helper read").unwrap();
        assert!(some.contains(Scope::Write));
        assert_eq!(some.grant(), &Grant::Only([RoleName::held("helper"), RoleName::held("moderator")].into()));
        assert_eq!(some.words(), ["read", "write:helper", "write:moderator"]);
        assert_eq!(parse("read").unwrap().grant(), &Grant::Only([].into()));
    }

    #[test]
    fn what_is_no_scope_is_named() {
        assert_eq!(parse("reed"), Err(ScopeError::Unknown("reed".into())));
        assert_eq!(parse("Read"), Err(ScopeError::Unknown("Read".into())));
        assert!(matches!(parse("write:"), Err(ScopeError::Role { .. })));
        assert!(matches!(parse("write:Admin"), Err(ScopeError::Role { .. })));
        assert!(matches!(parse("read:admin"), Err(ScopeError::Unknown(_))));
        assert_eq!(parse(""), Err(ScopeError::None));
        assert!(parse("reed").unwrap_err().to_string().contains("read, watch, list"));
    }
}
