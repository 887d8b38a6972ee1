//! Where a watch starts: after what its client has seen, now, or with every user first.

use super::{Core, fault::Fault, token::Resume};
use crate::{access::Caller, role::Anchor, step::History, store::LogError};

/// Where a watch starts.
pub(super) enum Start {
    /// The client goes on from here.
    Resumed(Anchor, History),
    /// From here on, with nothing before it.
    Now(Anchor, History),
    /// With every user first.
    Snapshot,
}

/// Everything that can be refused is refused here.
pub(super) async fn start(core: &Core, caller: &Caller, after: &str, initial_snapshot: bool) -> Result<Start, Fault> {
    // Of before the look into the store: should its history change in between, the cursor ends.
    let place = core.step.settled().await;
    if after.is_empty() {
        return Ok(if initial_snapshot { Start::Snapshot } else { Start::Now(place.applied, place.history) });
    }
    let resume = Resume::parse(after)
        .map_err(|_| Fault::field("after", "it is neither a resume_token of this service nor a revision"))?;
    let _turn = core.resume(caller).await?;
    let located = match resume {
        Resume::After { store_id, anchor } if store_id == core.store.facts().store_id => {
            core.store.locate(anchor.revision, Some(anchor.tag)).await
        }
        Resume::After { anchor, .. } => Err(LogError::HistoryChanged { at: anchor, head: place.applied.revision }),
        Resume::Revision(revision) => core.store.locate(revision, None).await,
    };
    match located {
        Ok(anchor) => Ok(Start::Resumed(anchor, place.history)),
        Err(LogError::Compacted { .. } | LogError::HistoryChanged { .. }) if initial_snapshot => Ok(Start::Snapshot),
        Err(error) => Err(Fault::log(error, core.store.facts().store_id)),
    }
}
