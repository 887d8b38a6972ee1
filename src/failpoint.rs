//! Where a test may break this process, and the bugs that it may ask for, to see that they are found.
//!
//! The variable `FAILPOINTS` says what happens where, in the words of the crate `fail`. Macros, so that without the
//! feature `failpoints` not even the names are in the binary.

#[cfg(feature = "failpoints")]
pub(crate) mod armed {
    use tokio::{
        runtime::{Handle, RuntimeFlavor},
        task::block_in_place,
    };

    pub(crate) fn kill(name: &str) {
        let pass = || fail::eval(name, drop);
        // A point that sleeps must not keep other tasks from their thread.
        let asked = match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
            Ok(RuntimeFlavor::MultiThread) => block_in_place(pass),
            _ => pass(),
        };
        if asked.is_some() {
            std::process::abort();
        }
    }

    pub(crate) fn told(name: &str) -> Option<String> {
        fail::eval(name, Option::unwrap_or_default)
    }
}

/// A point at which a test may delay this process (`sleep`), have it panic (`panic`), or end it at once (`return`).
macro_rules! kill {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        crate::failpoint::armed::kill($name);
    };
}

/// What a test says here by `return(...)`.
macro_rules! told {
    ($name:literal) => {{
        #[cfg(feature = "failpoints")]
        let told: Option<String> = crate::failpoint::armed::told($name);
        #[cfg(not(feature = "failpoints"))]
        let told: Option<String> = None;
        told
    }};
}

/// Whether a test asks for this bug, by `return`.
macro_rules! is_on {
    ($name:literal) => {
        crate::failpoint::told!($name).is_some()
    };
}

pub(crate) use {is_on, kill, told};
