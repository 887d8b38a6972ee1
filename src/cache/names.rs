//! Role names as small integers, so that a cached user costs two bytes of role.
//!
//! Names are never forgotten: there are few, and both bounds below keep it so whatever a table holds.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
};

use crate::role::RoleName;

/// A role name, interned.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct RoleId(u16);

/// Why a role cannot be kept in memory. Users who have it are read from the store each time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotKept {
    #[error("its name is longer than {} bytes", Names::MAX_BYTES)]
    TooLong,
    #[error("there are {} names already", Names::MAX_NAMES)]
    TooMany,
}

pub(super) struct Names {
    /// Guards two views of one list; never held while anything waits.
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    ids: HashMap<RoleName, RoleId>,
    names: Vec<RoleName>,
}

impl Names {
    pub(super) const MAX_BYTES: usize = 256;
    pub(super) const MAX_NAMES: usize = 1 << 16;

    pub(super) fn new() -> Self {
        Self { inner: RwLock::default() }
    }

    pub(super) fn intern(&self, name: &RoleName) -> Result<RoleId, NotKept> {
        if let Some(id) = self.inner.read().unwrap_or_else(PoisonError::into_inner).ids.get(name) {
            return Ok(*id);
        }
        if name.as_str().len() > Self::MAX_BYTES {
            return Err(NotKept::TooLong);
        }
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        // Looked up again: somebody else may have been here between the two locks.
        if let Some(id) = inner.ids.get(name) {
            return Ok(*id);
        }
        let id = RoleId(u16::try_from(inner.names.len()).map_err(|_| NotKept::TooMany)?);
        inner.names.push(name.clone());
        inner.ids.insert(name.clone(), id);
        Ok(id)
    }

    pub(super) fn name(&self, id: RoleId) -> RoleName {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).names[usize::from(id.0)].clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_id_and_both_bounds_hold() {
        let names = Names::new();
        let admin = names.intern(&RoleName::held("admin")).unwrap();
        assert_eq!(names.intern(&RoleName::held("admin")), Ok(admin));
        assert_eq!(names.name(admin), RoleName::held("admin"));
        assert_eq!(names.intern(&RoleName::held(&"x".repeat(257))), Err(NotKept::TooLong));
        for n in 1..Names::MAX_NAMES {
            names.intern(&RoleName::held(&n.to_string())).unwrap();
        }
        assert_eq!(names.intern(&RoleName::held("one more")), Err(NotKept::TooMany));
        assert_eq!(names.intern(&RoleName::held("admin")), Ok(admin));
    }
}
