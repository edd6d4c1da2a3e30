//! What fills a shard of one plan from the shards of another.
//!
//! A checkpoint holds the shards of the plan that saved it. The plan that loads it may have another
//! world, other caps, other dtypes, another order of parameters. Both know where every parameter
//! lies, so a shard of the target is put together from contiguous segments of the source's shards,
//! and a rank reads those and nothing else.
//!
//! - **PAR-3** Resharding from N ranks to M and back is the identity.
//!
//! A parameter that the source does not have, and padding, is not listed: what lies there is the
//! caller's decision. Whether state was sharded or replicated makes no difference: the partition
//! defines the shards either way.

use crate::error::PlanError;
use crate::ids::{BucketId, ParamId, Rank};
use crate::partition::Fragment;
use crate::plan::Plan;

/// A contiguous piece of a target's shard and where it comes from, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Where it starts in the target's shard.
    pub start: u64,
    /// The rank of the source whose shard holds it.
    pub source_rank: Rank,
    /// The bucket of the source in which it lies.
    pub source_bucket: BucketId,
    /// Where it starts in the source's shard.
    pub source_start: u64,
    /// How long it is; never 0.
    pub length: u64,
}

/// What fills `rank`'s shard of `bucket` in `target`, in the order in which it lies there.
///
/// `came_from` has, for each parameter of the bucket in its order, the source's id of it, or None
/// where the source has none.
///
/// # Errors
/// [`PlanError::UnknownBucket`], [`PlanError::UnknownRank`] and [`PlanError::WrongLength`] about
/// the target, [`PlanError::UnknownParam`] about the source, and [`PlanError::Mismatch`] when they
/// disagree about a parameter's length.
pub fn reshard(
    source: &Plan,
    target: &Plan,
    bucket: BucketId,
    rank: Rank,
    came_from: &[Option<ParamId>],
) -> Result<Vec<Segment>, PlanError> {
    let members = &target.bucket(bucket)?.params;
    if came_from.len() != members.len() {
        return Err(PlanError::WrongLength { params: members.len(), got: came_from.len() });
    }
    let mut segments = Vec::new();
    // Fragments lie in the order of the bucket's parameters, and empty ones have none.
    let mut origins = members.iter().zip(came_from);
    for fragment in target.fragments(bucket, rank)? {
        let origin = origins.find(|(member, _)| **member == fragment.param);
        if let Some((_, Some(origin))) = origin {
            let origin = *origin;
            check_length(source, target, origin, fragment.param)?;
            cut(source, origin, fragment, &mut segments)?;
        }
    }
    Ok(segments)
}

fn check_length(
    source: &Plan,
    target: &Plan,
    origin: ParamId,
    param: ParamId,
) -> Result<(), PlanError> {
    let params = source.params().len();
    let unknown = PlanError::UnknownParam { param: origin, params };
    let got = source.params().get(origin.index()).ok_or(unknown)?.numel;
    let expected = target.params()[param.index()].numel;
    if got == expected { Ok(()) } else { Err(PlanError::Mismatch { param, expected, got }) }
}

/// Cuts a fragment of the target where the shards of the source end.
fn cut(
    source: &Plan,
    origin: ParamId,
    fragment: Fragment,
    segments: &mut Vec<Segment>,
) -> Result<(), PlanError> {
    let (source_bucket, offset) = source.home(origin)?;
    let shard_numel = source.partition(source_bucket)?.shard_numel();
    let mut position = offset + fragment.param_start;
    let end = position + fragment.length;
    let mut start = fragment.shard_start;
    while position < end {
        let source_start = position % shard_numel;
        let length = (shard_numel - source_start).min(end - position);
        let shard = (position / shard_numel) as u32;
        let source_rank = source.mesh().holder(shard);
        segments.push(Segment { start, source_rank, source_bucket, source_start, length });
        position += length;
        start += length;
    }
    Ok(())
}
