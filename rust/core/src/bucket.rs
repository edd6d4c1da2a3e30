//! Which parameters are reduced together.
//!
//! One collective per parameter would pay the latency of a network thousands of times; one for all
//! of them could only start when backward has ended. A bucket is the compromise: some megabytes of
//! gradients that become ready at about the same time.
//!
//! Backward makes gradients roughly in reverse registration order, so parameters are assigned in
//! that order. A bucket holds one dtype, because a buffer has one, one optimizer group, because a
//! shard is updated with one set of hyperparameters, one wire format, because it is encoded as a
//! whole, one unit, because a unit is gathered and freed as a whole: it is one or more buckets, and
//! one grain, because a bucket is cut by one rule.
//!
//! Parameters that no optimizer has share buckets too. Those are *held*: gathered and freed with
//! their unit like the others, and nothing is reduced in them.
//!
//! The assignment fixes the layout of every buffer and of optimizer state. It is made once, never
//! from an observation.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::grain::Grain;
use crate::ids::{BucketId, Dtype, GroupId, ParamId, UnitId, WireId};
use crate::stage::Placement;

/// What planning knows of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// Number of elements; 0 is legal.
    pub numel: u64,
    /// Element type.
    pub dtype: Dtype,
    /// The optimizer group it belongs to; None where it is only held, and nothing updates it.
    pub group: Option<GroupId>,
    /// How its gradient is encoded.
    pub wire: WireId,
    /// What it is gathered and freed with; None where every rank keeps it whole.
    pub unit: Option<UnitId>,
    /// What of it may not be cut.
    pub grain: Grain,
    /// What its update costs the rank that owns it, in any measure; read where the grain is
    /// [`Grain::Whole`].
    pub cost: u64,
}

/// What the parameters of a bucket have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    /// Element type.
    pub dtype: Dtype,
    /// The optimizer group.
    pub group: Option<GroupId>,
    /// How gradients are encoded.
    pub wire: WireId,
    /// What they are gathered and freed with.
    pub unit: Option<UnitId>,
    /// What of them may not be cut.
    pub grain: Grain,
}

impl Param {
    /// What it has in common with the other parameters of its bucket.
    pub const fn kind(&self) -> Kind {
        let Self { dtype, group, wire, unit, grain, .. } = *self;
        Kind { dtype, group, wire, unit, grain }
    }
}

/// How long a bucket may become, the space between its parameters included and its padding at the
/// end not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cap {
    /// In bytes of the bucket's dtype.
    Bytes(u64),
    /// In elements.
    Elements(u64),
}

impl Cap {
    /// The cap of a bucket of `dtype`, in elements.
    pub const fn elements(self, dtype: Dtype) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes / dtype.size(),
            Self::Elements(elements) => elements,
        }
    }
}

/// Parameters that are reduced together in one flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Its position in layout order.
    pub id: BucketId,
    /// Element type of all its parameters.
    pub dtype: Dtype,
    /// Optimizer group of all its parameters; None where they are only held.
    pub group: Option<GroupId>,
    /// How the gradients of all its parameters are encoded.
    pub wire: WireId,
    /// The unit that it belongs to.
    pub unit: Option<UnitId>,
    /// What of its parameters a shard border does not cut.
    pub grain: Grain,
    /// In the order in which they lie in the buffer.
    pub params: Vec<ParamId>,
}

impl Bucket {
    /// A bucket of `params`, which are of this kind.
    pub(crate) fn new(id: BucketId, kind: Kind, params: Vec<ParamId>) -> Self {
        let Kind { dtype, group, wire, unit, grain } = kind;
        Self { id, dtype, group, wire, unit, grain, params }
    }

    /// Whether an optimizer updates its parameters, so that their gradients are reduced.
    pub const fn is_trained(&self) -> bool {
        self.group.is_some()
    }

    /// Where its parameters live between their uses: sharded where they are in a unit.
    pub const fn parameter(&self) -> Placement {
        match self.unit {
            Some(_) => Placement::Sharded,
            None => Placement::Replicated,
        }
    }
}

/// Assigns every parameter to a bucket.
///
/// Walks the parameters in reverse. A parameter that does not fit any more closes its bucket and
/// opens the next one, so that a parameter larger than the cap has a bucket of its own. Identifiers
/// follow the order in which the walk completes the buckets, which is the order in which backward
/// is expected to fill them.
pub fn assign(params: &[Param], cap: Cap) -> Vec<Bucket> {
    let mut open: BTreeMap<Kind, Open> = BTreeMap::new();
    let mut closed = Vec::new();
    for (index, param) in params.iter().enumerate().rev() {
        let bucket = open.entry(param.kind()).or_insert_with(|| Open::new(*param));
        if !bucket.fits(*param, cap) {
            closed.push(std::mem::replace(bucket, Open::new(*param)).bucket);
        }
        bucket.push(ParamId(index as u32), *param);
    }
    closed.extend(open.into_values().map(|last| last.bucket));
    closed.sort_by_key(|bucket| Reverse(bucket.params.last().copied()));
    for (index, bucket) in closed.iter_mut().enumerate() {
        bucket.id = BucketId(index as u32);
    }
    closed
}

/// A bucket that may still grow.
struct Open {
    bucket: Bucket,
    /// Length so far; saturates, so that a length beyond any cap stays beyond it.
    end: u64,
}

impl Open {
    fn new(param: Param) -> Self {
        Self { bucket: Bucket::new(BucketId(0), param.kind(), Vec::new()), end: 0 }
    }

    /// An empty bucket takes anything, and an empty parameter goes anywhere.
    fn fits(&self, param: Param, cap: Cap) -> bool {
        self.bucket.params.is_empty()
            || param.numel == 0
            || self.end_with(param) <= cap.elements(param.dtype)
    }

    fn push(&mut self, id: ParamId, param: Param) {
        self.end = self.end_with(param);
        self.bucket.params.push(id);
    }

    fn end_with(&self, param: Param) -> u64 {
        let start = self.end.checked_next_multiple_of(param.dtype.align());
        start.and_then(|start| start.checked_add(param.numel)).unwrap_or(u64::MAX)
    }
}
