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

/// Buckets of one kind from which on the first and the last are short.
const MANY: u64 = 4;
/// What such an end has of the cap.
const END: u64 = 2;
/// How much shorter than a parameter those are, all together, that leave with it.
const SMALL: u64 = 16;

/// Assigns every parameter to a bucket.
///
/// Walks the parameters of a kind in reverse. A parameter that does not fit any more closes its
/// bucket and opens the next one, so that a parameter larger than the cap has a bucket of its own.
/// Small ones just in front of it, if there are any, go with it: the bias of a layer is registered
/// behind its weight, and their gradients come at the same time. A bucket that had the bias alone
/// would wait for all of the layer's backward.
///
/// Where a kind fills four buckets or more, the first and the last have at most half the cap, or one
/// parameter and its small ones: nothing is sent before the first is full, and nothing hides what the
/// last one takes. Updated parameters come back in the other order, and there too it is the ends that
/// are waited for. A unit has no short ends, since it is gathered as a whole.
///
/// Identifiers follow the order in which the walk completes the buckets, which is the order in which
/// backward is expected to fill them.
pub fn assign(params: &[Param], cap: Cap) -> Vec<Bucket> {
    let mut walks: BTreeMap<Kind, Vec<ParamId>> = BTreeMap::new();
    for (index, param) in params.iter().enumerate().rev() {
        walks.entry(param.kind()).or_default().push(ParamId(index as u32));
    }
    let mut buckets = Vec::new();
    for (kind, walk) in walks {
        let pieces = Walk { params, kind, cap: cap.elements(kind.dtype) }.cut(&walk);
        buckets.extend(pieces.into_iter().map(|ids| Bucket::new(BucketId(0), kind, ids)));
    }
    buckets.sort_by_key(|bucket| Reverse(bucket.params.last().copied()));
    for (index, bucket) in buckets.iter_mut().enumerate() {
        bucket.id = BucketId(index as u32);
    }
    buckets
}

/// How parameters of one kind are cut into buckets.
struct Walk<'a> {
    params: &'a [Param],
    kind: Kind,
    /// In elements.
    cap: u64,
}

impl Walk<'_> {
    fn cut(&self, walk: &[ParamId]) -> Vec<Vec<ParamId>> {
        let end = self.end(walk);
        let (walk, last) = walk.split_at(walk.len() - end.map_or(0, |end| self.fitting(walk, end)));
        let mut closed = Vec::new();
        let (mut open, mut length) = (Vec::new(), 0);
        for &id in walk {
            let most = end.filter(|_| closed.is_empty()).unwrap_or(self.cap);
            if !self.fits(&open, length, id, most) {
                let stay = open.len() - self.accompany(&open, id);
                if stay > 0 {
                    let with = open.split_off(stay);
                    closed.push(std::mem::replace(&mut open, with));
                    length = self.length(&open);
                }
            }
            length = self.longer(length, id);
            open.push(id);
        }
        closed.extend([open, last.to_vec()].into_iter().filter(|ids| !ids.is_empty()));
        closed
    }

    /// How long the first and the last bucket may become; None where they are like the others.
    fn end(&self, walk: &[ParamId]) -> Option<u64> {
        let many = self.length(walk) / MANY >= self.cap;
        (many && self.kind.unit.is_none()).then_some(self.cap / END)
    }

    /// How many of the walk's last parameters surely fit into `most`, at least one.
    fn fitting(&self, walk: &[ParamId], most: u64) -> usize {
        let align = self.kind.dtype.align();
        let from_behind = walk.iter().rev().scan(0_u64, |sum, &id| {
            let aligned = self.numel(id).checked_next_multiple_of(align).unwrap_or(u64::MAX);
            *sum = sum.saturating_add(aligned);
            Some(*sum)
        });
        from_behind.take_while(|&sum| sum <= most).count().max(1)
    }

    /// How many of the last parameters of a bucket leave it with `next`, which does not fit any more.
    fn accompany(&self, open: &[ParamId], next: ParamId) -> usize {
        let small = self.numel(next) / SMALL;
        let sums = open.iter().rev().scan(0_u64, |sum, &id| {
            *sum = sum.saturating_add(self.numel(id));
            Some(*sum)
        });
        let count = sums.take_while(|&sum| sum <= small).count();
        let with = &open[open.len() - count..];
        let fits = self.longer(self.length(with), next) <= self.cap;
        let matters = with.iter().any(|&id| self.numel(id) > 0);
        if fits && matters { count } else { 0 }
    }

    /// An empty bucket takes anything, and an empty parameter goes anywhere.
    fn fits(&self, open: &[ParamId], length: u64, id: ParamId, most: u64) -> bool {
        open.is_empty() || self.numel(id) == 0 || self.longer(length, id) <= most
    }

    fn numel(&self, id: ParamId) -> u64 {
        self.params[id.index()].numel
    }

    fn length(&self, ids: &[ParamId]) -> u64 {
        ids.iter().fold(0, |length, &id| self.longer(length, id))
    }

    /// With one more behind; saturates, so that a length beyond any cap stays beyond it.
    fn longer(&self, length: u64, id: ParamId) -> u64 {
        let start = length.checked_next_multiple_of(self.kind.dtype.align());
        start.and_then(|start| start.checked_add(self.numel(id))).unwrap_or(u64::MAX)
    }
}
