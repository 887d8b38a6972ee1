//! Opaque tokens: where a watch resumes, and where a listing goes on.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::role::{Anchor, Revision, Tag, UserId};

/// What a client may resume a watch from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Resume {
    /// A token: the store, and a commit of its log.
    After { store_id: Uuid, anchor: Anchor },
    /// A revision that the client names itself: nobody can tell of which history it is.
    Revision(Revision),
}

/// A place in ListUsers: after this user, of this listing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct UsersPlace {
    pub(super) listing: Listing,
    pub(super) after: UserId,
}

/// A place in ListRoleChanges: the change that the next page starts with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ChangesPlace {
    pub(super) listing: Listing,
    pub(super) revision: Revision,
    /// Its index, and the store's key of it.
    pub(super) index: u64,
    pub(super) row: i64,
}

/// What was asked for: a token of another listing is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Listing([u8; 8]);

/// More changes than a commit can have. A store counts on from the index of a token, which must not overflow.
const INDEXES: u64 = 1 << 48;

/// A text that none of these functions made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BrokenToken;

// === impl Resume ===

pub(super) fn resume_token(store_id: Uuid, anchor: Anchor) -> String {
    encode(&[store_id.as_bytes(), &anchor.revision.0.to_be_bytes(), anchor.tag.0.as_bytes()])
}

impl Resume {
    pub(super) fn parse(text: &str) -> Result<Self, BrokenToken> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return text.parse().map(|revision| Self::Revision(Revision(revision))).map_err(|_| BrokenToken);
        }
        let [store_id, revision, tag] = decode(text, [16, 8, 16])?;
        let anchor = Anchor { revision: Revision(int(&revision)?), tag: Tag(uuid(&tag)?) };
        if anchor.revision < Revision(0) {
            return Err(BrokenToken);
        }
        Ok(Self::After { store_id: uuid(&store_id)?, anchor })
    }
}

// === impl listings ===

impl Listing {
    pub(super) fn new(of: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for part in of {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let mut listing = [0; 8];
        listing.copy_from_slice(&hash.finalize()[..8]);
        Self(listing)
    }
}

impl UsersPlace {
    pub(super) fn token(&self) -> String {
        encode(&[&self.listing.0, &self.after.0.to_be_bytes()])
    }

    pub(super) fn parse(text: &str, listing: Listing) -> Result<Self, BrokenToken> {
        let [of, after] = decode(text, [8, 8])?;
        if of != listing.0 {
            return Err(BrokenToken);
        }
        Ok(Self { listing, after: UserId(int(&after)?) })
    }
}

impl ChangesPlace {
    pub(super) fn token(&self) -> String {
        let Self { listing, revision, index, row } = self;
        encode(&[&listing.0, &revision.0.to_be_bytes(), &index.to_be_bytes(), &row.to_be_bytes()])
    }

    pub(super) fn parse(text: &str, listing: Listing) -> Result<Self, BrokenToken> {
        let [of, revision, index, row] = decode(text, [8, 8, 8, 8])?;
        if of != listing.0 {
            return Err(BrokenToken);
        }
        let index = u64::try_from(int(&index)?).ok().filter(|index| *index < INDEXES).ok_or(BrokenToken)?;
        let revision = Revision(int(&revision)?);
        if revision < Revision(0) {
            return Err(BrokenToken);
        }
        Ok(Self { listing, revision, index, row: int(&row)? })
    }
}

fn encode(parts: &[&[u8]]) -> String {
    URL_SAFE_NO_PAD.encode(parts.concat())
}

/// The parts of a token, of these lengths and nothing more.
fn decode<const N: usize>(text: &str, lengths: [usize; N]) -> Result<[Vec<u8>; N], BrokenToken> {
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| BrokenToken)?;
    if bytes.len() != lengths.iter().sum::<usize>() {
        return Err(BrokenToken);
    }
    let mut rest = &bytes[..];
    Ok(lengths.map(|length| {
        let (part, after) = rest.split_at(length);
        rest = after;
        part.to_vec()
    }))
}

fn int(bytes: &[u8]) -> Result<i64, BrokenToken> {
    bytes.try_into().map(i64::from_be_bytes).map_err(|_| BrokenToken)
}

fn uuid(bytes: &[u8]) -> Result<Uuid, BrokenToken> {
    Uuid::from_slice(bytes).map_err(|_| BrokenToken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_token_comes_back_as_what_it_was_made_of(
            store: u128, tag: u128, revision in 0i64.., index in 0..INDEXES, row: i64, user: i64,
        ) {
            let (store_id, tag) = (Uuid::from_u128(store), Tag(Uuid::from_u128(tag)));
            let anchor = Anchor { revision: Revision(revision), tag };
            let token = resume_token(store_id, anchor);
            prop_assert_eq!(Resume::parse(&token), Ok(Resume::After { store_id, anchor }));
            prop_assert_eq!(Resume::parse(&token[1..]), Err(BrokenToken));

            let (mine, other) = (Listing::new(&[b"a", b"bc"]), Listing::new(&[b"ab", b"c"]));
            let place = ChangesPlace { listing: mine, revision: Revision(revision), index, row };
            prop_assert_eq!(ChangesPlace::parse(&place.token(), mine), Ok(place));
            prop_assert_eq!(ChangesPlace::parse(&place.token(), other), Err(BrokenToken));
            let place = UsersPlace { listing: mine, after: UserId(user) };
            prop_assert_eq!(UsersPlace::parse(&place.token(), mine), Ok(place));
        }

        #[test]
        fn no_text_breaks_the_parser(text in ".{0,80}") {
            let _ = Resume::parse(&text);
            let _ = UsersPlace::parse(&text, Listing::new(&[]));
            let _ = ChangesPlace::parse(&text, Listing::new(&[]));
        }
    }

    #[test]
    fn a_bare_revision_works_and_a_negative_one_does_not() {
        assert_eq!(Resume::parse("0"), Ok(Resume::Revision(Revision(0))));
        assert_eq!(Resume::parse("42"), Ok(Resume::Revision(Revision(42))));
        assert_eq!(Resume::parse("-1"), Err(BrokenToken));
        assert_eq!(Resume::parse("99999999999999999999"), Err(BrokenToken));
    }
}
