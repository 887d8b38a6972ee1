//! What SQLite's own errors mean to the callers of a store.

use std::{io, sync::Arc};

use sqlx::Error;

use crate::store::{Cause, LogError, StoreError};

/// Primary result codes, which the low byte of an extended one holds.
pub(super) mod code {
    pub(in super::super) const ERROR: i32 = 1;
    pub(in super::super) const BUSY: i32 = 5;
    pub(in super::super) const LOCKED: i32 = 6;
    pub(in super::super) const NOMEM: i32 = 7;
    pub(in super::super) const READONLY: i32 = 8;
    pub(in super::super) const INTERRUPT: i32 = 9;
    pub(in super::super) const IOERR: i32 = 10;
    pub(in super::super) const CORRUPT: i32 = 11;
    pub(in super::super) const FULL: i32 = 13;
    pub(in super::super) const CANTOPEN: i32 = 14;
    pub(in super::super) const PROTOCOL: i32 = 15;
    pub(in super::super) const SCHEMA: i32 = 17;
    pub(in super::super) const TOOBIG: i32 = 18;
    pub(in super::super) const CONSTRAINT: i32 = 19;
    pub(in super::super) const MISMATCH: i32 = 20;
    pub(in super::super) const NOTADB: i32 = 26;
}

/// The primary result code of an error that came from SQLite.
pub(super) fn code_of(error: &Error) -> Option<i32> {
    let code: i32 = error.as_database_error()?.code()?.parse().ok()?;
    Some(code & 0xff)
}

/// Somebody else holds the lock that the statement needs.
pub(super) fn is_busy(error: &Error) -> bool {
    matches!(code_of(error), Some(code::BUSY | code::LOCKED))
}

/// A constraint or a trigger of the bot's own tables said no; the statement is at fault, not the store.
pub(super) fn is_rejection(error: &Error) -> bool {
    matches!(code_of(error), Some(code::CONSTRAINT | code::MISMATCH | code::TOOBIG | code::ERROR))
}

pub(super) fn cause(error: impl std::error::Error + Send + Sync + 'static) -> Cause {
    Arc::new(error)
}

/// A cause in our own words.
pub(super) fn words(text: impl Into<String>) -> Cause {
    Arc::new(io::Error::other(text.into()))
}

pub(super) fn broken(text: impl Into<String>) -> StoreError {
    StoreError::Broken(words(text))
}

pub(super) fn unreachable(text: impl Into<String>) -> StoreError {
    StoreError::Unreachable(words(text))
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        use code::*;
        let passing = match &error {
            Error::Database(_) => matches!(
                code_of(&error),
                Some(BUSY | LOCKED | NOMEM | READONLY | INTERRUPT | IOERR | FULL | CANTOPEN | PROTOCOL | SCHEMA)
            ),
            Error::Io(_) | Error::PoolTimedOut | Error::PoolClosed | Error::WorkerCrashed | Error::BeginFailed => true,
            _ => false,
        };
        if passing { Self::Unreachable(cause(error)) } else { Self::Broken(cause(error)) }
    }
}

impl From<Error> for LogError {
    fn from(error: Error) -> Self {
        Self::Store(error.into())
    }
}
