//! Who may ask, and for what: callers, known by a token or a certificate, and the scopes that each of them has.
//!
//! Without credentials the doors are open, and everybody is one caller without a name. With them everything is denied that
//! is not given.

pub mod credentials;
mod scope;
mod secret;

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use self::credentials::{ANONYMOUS, Credential, Proof};
pub use self::{
    scope::{Scope, ScopeError, Scopes},
    secret::{Digest, Secret},
};

/// Everybody who may come in.
pub struct Access {
    doors: Doors,
    allowance: Allowance,
    /// Held while credentials are compared with those of before, which nobody who calls waits for.
    replacing: Mutex<()>,
    /// Rung whenever callers may have been revoked.
    replaced: watch::Sender<()>,
}

enum Doors {
    Open(Arc<Caller>),
    /// Never held across an await.
    Closed(RwLock<Arc<Callers>>),
}

/// How much one caller may do, over all its connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allowance {
    /// None for no bound.
    pub calls_per_second: Option<NonZeroU32>,
    /// In flight.
    pub calls: usize,
    pub watches: usize,
}

/// Users and roles in the filters of all watches of one caller, which are held as long as those are open: some 50 MiB.
const FILTERS: usize = 1_000_000;

/// Turns of one caller at once, of the four that there are of each kind for what is read from the store: who asks for much, or
/// leaves it unread, is not in everybody's way.
const TURNS: usize = 3;

/// Bytes of one caller's large requests at once, a quarter of what there may be of all.
const BYTES: usize = 16 << 20;

/// Denied calls of one caller that are logged, a second; the others are counted.
const LOGGED: NonZeroU32 = NonZeroU32::new(10).expect("more than 0");

/// Who makes a call. Lives as long as its credential stands in the file, unchanged.
pub struct Caller {
    pub name: Arc<str>,
    pub scopes: Scopes,
    share: Arc<Share>,
    revoked: CancellationToken,
}

/// Why somebody is not let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Denied {
    NoCredentials,
    /// Unknown, revoked or malformed: nobody is told which.
    BadCredentials,
}

#[derive(Default)]
struct Callers {
    tokens: Vec<(Digest, Arc<Caller>)>,
    certificates: HashMap<String, Arc<Caller>>,
}

/// What all credentials of one name have together.
struct Share {
    calls_per_second: Option<DefaultDirectRateLimiter>,
    calls: Arc<Semaphore>,
    watches: Arc<Semaphore>,
    filters: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    snapshots: Arc<Semaphore>,
    lists: Arc<Semaphore>,
    resumes: Arc<Semaphore>,
    denials: Denials,
}

/// Which denied calls of somebody are logged: no more than somebody reads, whoever knocks however fast.
pub struct Denials {
    logged: DefaultDirectRateLimiter,
    unlogged: AtomicU64,
}

// === impl Access ===

impl Access {
    /// Where all are one, there is nobody beside them to leave anything for.
    pub fn open(allowance: Allowance) -> Self {
        let all = Semaphore::MAX_PERMITS;
        let allowance = Allowance { calls: all, watches: all, ..allowance };
        let caller = Caller {
            name: ANONYMOUS.into(),
            scopes: Scopes::all(),
            share: Arc::new(Share::new(allowance, Semaphore::MAX_PERMITS, Semaphore::MAX_PERMITS)),
            revoked: CancellationToken::new(),
        };
        Self {
            doors: Doors::Open(Arc::new(caller)),
            allowance,
            replacing: Mutex::default(),
            replaced: watch::Sender::new(()),
        }
    }

    pub fn closed(credentials: Vec<Credential>, allowance: Allowance) -> Self {
        let (doors, replacing, replaced) = (Doors::Closed(RwLock::default()), Mutex::default(), watch::Sender::new(()));
        let access = Self { doors, allowance, replacing, replaced };
        access.replace(credentials);
        access
    }

    /// From now on these are the credentials. Whose own are among them, unchanged, goes on; the others are revoked.
    ///
    /// # Panics
    /// Where the doors are open: there is nothing to replace.
    pub fn replace(&self, credentials: Vec<Credential>) {
        let Doors::Closed(callers) = &self.doors else { panic!("open doors have no credentials") };
        let _turn = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = callers.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut shares: HashMap<Arc<str>, Arc<Share>> =
            before.all().map(|caller| (caller.name.clone(), caller.share.clone())).collect();
        let mut after = Callers::default();
        for Credential { name, proof, scopes } in credentials {
            let same = |caller: &&Arc<Caller>| *caller.name == *name && caller.scopes == scopes;
            let caller = before.find(&proof).filter(same).cloned().unwrap_or_else(|| {
                let name: Arc<str> = name.into();
                let share = shares
                    .entry(name.clone())
                    .or_insert_with(|| Arc::new(Share::new(self.allowance, TURNS, BYTES)))
                    .clone();
                Arc::new(Caller { name, scopes, share, revoked: CancellationToken::new() })
            });
            match proof {
                Proof::Token(digest) => after.tokens.push((digest, caller)),
                Proof::Certificate(name) => drop(after.certificates.insert(name, caller)),
            }
        }
        let stays: HashSet<_> = after.all().map(Arc::as_ptr).collect();
        *callers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(after);
        for gone in before.all().filter(|caller| !stays.contains(&Arc::as_ptr(caller))) {
            gone.revoked.cancel();
        }
        self.replaced.send_replace(());
    }

    /// Tells whenever callers may have been revoked, from now on.
    pub fn replaced(&self) -> watch::Receiver<()> {
        self.replaced.subscribe()
    }

    /// Who somebody is with this token and a certificate of these names. A token decides alone, where there is one.
    pub fn admit(&self, token: Option<&[u8]>, names: &[String]) -> Result<Arc<Caller>, Denied> {
        let callers = match &self.doors {
            Doors::Open(caller) => return Ok(caller.clone()),
            Doors::Closed(callers) => callers.read().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        match token {
            Some(token) => callers.of_token(&Digest::of(token)).cloned().ok_or(Denied::BadCredentials),
            None => {
                let found = names.iter().find_map(|name| callers.certificates.get(name));
                found.cloned().ok_or(Denied::NoCredentials)
            }
        }
    }
}

// === impl Callers ===

impl Callers {
    fn all(&self) -> impl Iterator<Item = &Arc<Caller>> {
        self.tokens.iter().map(|(_, caller)| caller).chain(self.certificates.values())
    }

    fn find(&self, proof: &Proof) -> Option<&Arc<Caller>> {
        match proof {
            Proof::Token(digest) => self.of_token(digest),
            Proof::Certificate(name) => self.certificates.get(name),
        }
    }

    /// All are compared, each in constant time: how long it takes says nothing about any of them.
    fn of_token(&self, digest: &Digest) -> Option<&Arc<Caller>> {
        self.tokens.iter().fold(None, |found, (known, caller)| if known == digest { Some(caller) } else { found })
    }
}

// === impl Caller ===

impl Caller {
    /// Counts a call; how long to wait where it is one too many for now.
    pub fn count_call(&self) -> Result<(), Duration> {
        let Some(calls) = &self.share.calls_per_second else { return Ok(()) };
        calls.check().map_err(|not_until| not_until.wait_time_from(DefaultClock::default().now()))
    }

    /// A place for one more call in flight, as long as it is held.
    pub fn begin_call(&self) -> Option<OwnedSemaphorePermit> {
        self.share.calls.clone().try_acquire_owned().ok()
    }

    /// Room for so many more bytes of a large request, as long as it is held.
    pub fn begin_bytes(&self, bytes: u32) -> Option<OwnedSemaphorePermit> {
        self.share.bytes.clone().try_acquire_many_owned(bytes).ok()
    }

    /// A turn for one more snapshot, as long as it is held; waits for it.
    pub async fn begin_snapshot(&self) -> OwnedSemaphorePermit {
        turn(&self.share.snapshots).await
    }

    /// The same for a list from the store.
    pub async fn begin_list(&self) -> OwnedSemaphorePermit {
        turn(&self.share.lists).await
    }

    /// The same for a place in the log from which a watch goes on.
    pub async fn begin_resume(&self) -> OwnedSemaphorePermit {
        turn(&self.share.resumes).await
    }

    pub fn denials(&self) -> &Denials {
        &self.share.denials
    }

    /// Places for one more watch with so many users and roles in its filter, as long as they are held.
    pub fn begin_watch(&self, filtered: u32) -> Option<[OwnedSemaphorePermit; 2]> {
        let watch = self.share.watches.clone().try_acquire_owned().ok()?;
        let filter = self.share.filters.clone().try_acquire_many_owned(filtered).ok()?;
        Some([watch, filter])
    }

    /// Whether its credential is gone or has other scopes.
    pub fn is_revoked(&self) -> bool {
        self.revoked.is_cancelled()
    }

    /// Resolves once its credential is gone or has other scopes: nothing that it opened may go on.
    pub async fn revoked(&self) {
        self.revoked.cancelled().await;
    }
}

async fn turn(turns: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    match turns.clone().acquire_owned().await {
        Ok(turn) => turn,
        Err(_) => unreachable!("it is never closed"),
    }
}

// === impl Denials ===

impl Default for Denials {
    fn default() -> Self {
        Self { logged: RateLimiter::direct(Quota::per_second(LOGGED)), unlogged: AtomicU64::new(0) }
    }
}

impl Denials {
    /// Whether one more is logged, with how many that were not since the last one.
    pub fn count(&self) -> Option<u64> {
        if self.logged.check().is_err() {
            self.unlogged.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.unlogged.swap(0, Ordering::Relaxed))
    }
}

// === impl Share ===

impl Share {
    fn new(allowance: Allowance, turns: usize, bytes: usize) -> Self {
        Self {
            calls_per_second: allowance.calls_per_second.map(|calls| RateLimiter::direct(Quota::per_second(calls))),
            calls: Arc::new(Semaphore::new(allowance.calls)),
            watches: Arc::new(Semaphore::new(allowance.watches)),
            filters: Arc::new(Semaphore::new(FILTERS)),
            bytes: Arc::new(Semaphore::new(bytes)),
            snapshots: Arc::new(Semaphore::new(turns)),
            lists: Arc::new(Semaphore::new(turns)),
            resumes: Arc::new(Semaphore::new(turns)),
            denials: Denials::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const ALLOWANCE: Allowance = Allowance { calls_per_second: NonZeroU32::new(2), calls: 1, watches: 1 };

    fn credential(name: &str, proof: Proof, scopes: &str) -> Credential {
        Credential { name: name.into(), proof, scopes: Scopes::parse(scopes.split(' ')).unwrap() }
    }

    fn token(name: &str, secret: &str, scopes: &str) -> Credential {
        credential(name, Proof::Token(Digest::of(secret.as_bytes())), scopes)
    }

    fn name(access: &Access, token: Option<&str>, names: &[&str]) -> Result<String, Denied> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        access.admit(token.map(str::as_bytes), &names).map(|caller| caller.name.to_string())
    }

    #[test]
    fn open_doors_let_everybody_in_as_nobody() {
        let access = Access::open(ALLOWANCE);
        assert_eq!(name(&access, None, &[]).unwrap(), ANONYMOUS);
        assert_eq!(name(&access, Some("anything"), &["any.name"]).unwrap(), ANONYMOUS);
    }

    #[test]
    fn a_token_decides_alone_where_there_is_one() {
        let of_certificate = credential("c", Proof::Certificate("bot.internal".into()), "read");
        let access = Access::closed(vec![token("a", "1", "read"), token("b", "2", "read"), of_certificate], ALLOWANCE);
        assert_eq!(name(&access, Some("1"), &[]).unwrap(), "a");
        assert_eq!(name(&access, Some("2"), &["bot.internal"]).unwrap(), "b");
        assert_eq!(name(&access, None, &["other", "bot.internal"]).unwrap(), "c");
        assert_eq!(name(&access, Some("3"), &["bot.internal"]), Err(Denied::BadCredentials));
        assert_eq!(name(&access, Some(""), &[]), Err(Denied::BadCredentials));
        assert_eq!(name(&access, None, &["other"]), Err(Denied::NoCredentials));
        assert_eq!(name(&access, None, &[]), Err(Denied::NoCredentials));
    }

    #[test]
    fn who_stays_unchanged_goes_on_and_the_others_are_revoked() {
        let access =
            Access::closed(vec![token("a", "1", "read"), token("b", "2", "read"), token("c", "3", "read")], ALLOWANCE);
        let before = ["1", "2", "3"].map(|secret| access.admit(Some(secret.as_bytes()), &[]).unwrap());
        access.replace(vec![token("c", "3", "read watch"), token("a", "1", "read"), token("d", "4", "read")]);
        let revoked = before.each_ref().map(|caller| caller.revoked().now_or_never().is_some());
        assert_eq!(revoked, [false, true, true]);
        assert!(Arc::ptr_eq(&before[0], &access.admit(Some(b"1"), &[]).unwrap()));
        assert_eq!(name(&access, Some("2"), &[]), Err(Denied::BadCredentials));
        assert!(access.admit(Some(b"3"), &[]).unwrap().scopes.contains(Scope::Watch));
        assert_eq!(name(&access, Some("4"), &[]).unwrap(), "d");
    }

    #[test]
    fn credentials_of_one_name_share_what_it_may_do() {
        let access = Access::closed(vec![token("a", "1", "read")], ALLOWANCE);
        let old = access.admit(Some(b"1"), &[]).unwrap();
        let watch = old.begin_watch(0).unwrap();
        access.replace(vec![token("a", "2", "read"), token("b", "3", "read")]);
        let [new, other] = [b"2", b"3"].map(|secret| access.admit(Some(secret), &[]).unwrap());
        assert!(new.begin_watch(0).is_none() && other.begin_watch(0).is_some());
        drop(watch);
        assert!(new.begin_watch(FILTERS as u32).is_some());
        assert!(old.count_call().is_ok() && new.count_call().is_ok());
        let wait = new.count_call().unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
        assert!(other.count_call().is_ok());
    }
}
