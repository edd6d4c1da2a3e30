//! When a bucket's gradients came, for the trace.
//!
//! Times are nanoseconds of the caller's clock: the core has none. They are recorded, never looked
//! at.

use crate::ids::{BucketId, ParamId};

/// One bucket's gradients in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// The bucket.
    pub bucket: BucketId,
    /// When its first gradient came.
    pub first_ns: u64,
    /// When its last one came that was waited for: it was full then, unless some never came.
    pub full_ns: u64,
    /// When the one before it came, `full_ns` where there is none: until then more than one was
    /// lacking.
    pub prior_ns: u64,
    /// The parameter that came last.
    pub last: ParamId,
}

impl Life {
    /// Notes one more arrival in `bucket`.
    pub(crate) fn note(life: &mut Option<Self>, bucket: BucketId, param: ParamId, now_ns: u64) {
        let (first_ns, prior_ns) =
            life.map_or((now_ns, now_ns), |life| (life.first_ns, life.full_ns));
        *life = Some(Self { bucket, first_ns, prior_ns, full_ns: now_ns, last: param });
    }
}
