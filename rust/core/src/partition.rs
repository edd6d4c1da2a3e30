//! How a bucket lies in memory and how it is cut among ranks.
//!
//! ```text
//! bucket   |-- p7 --|.|---- p6 ----|..|- p5 -|............|      . is padding
//! shards   |---- rank 0 ----|---- rank 1 ----|-- rank 2 --|      all of the same length
//! fragments|-- p7 --| |--p6-|-p6-|  |--p5----|
//! ```
//!
//! - **PAR-1** The fragments of all ranks tile the bucket's parameters: every element lies in
//!   exactly one.
//! - **PAR-2** The shards of a bucket are equal. Every parameter starts on 64 bytes and a bucket's
//!   length is a multiple of shards × 128 elements, so that no kernel meets another alignment or a
//!   scalar tail in another layout. (Both change the last bits of a result.) A bucket is never
//!   empty, even if all its parameters are.
//!
//! Every bucket is cut evenly, not every parameter, so that each collective is balanced. A fragment
//! is computed when it is asked for: a plan for a thousand ranks costs no more than one for two.

use crate::bucket::{Bucket, Param};
use crate::error::PlanError;
use crate::ids::{BucketId, ParamId};

/// Shards are multiples of this many elements.
pub const SHARD_UNIT: u64 = 128;

/// The layout of one bucket for one number of shards; all figures are in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    offsets: Vec<u64>,
    numels: Vec<u64>,
    numel: u64,
    shard_numel: u64,
}

/// A parameter's part inside one shard, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fragment {
    /// The parameter.
    pub param: ParamId,
    /// The bucket it lies in.
    pub bucket: BucketId,
    /// Number of the shard.
    pub shard: u32,
    /// Where it starts in the flattened parameter.
    pub param_start: u64,
    /// Where it starts in the shard.
    pub shard_start: u64,
    /// How long it is; never 0.
    pub length: u64,
}

/// A bucket's layout as it was written down, to be restored by [`crate::Plan::restore`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketLayout {
    /// The parameters in the order in which they lie in the buffer, each with where it starts
    /// there.
    pub params: Vec<(ParamId, u64)>,
    /// Padded length of the bucket.
    pub numel: u64,
}

impl BucketLayout {
    /// The bucket that is laid out so; dtype, group and wire are those of its parameters, which
    /// must agree.
    pub(crate) fn bucket(&self, id: BucketId, params: &[Param]) -> Result<Bucket, PlanError> {
        let &(first, _) = self.params.first().ok_or(PlanError::EmptyBucket { bucket: id })?;
        let kind = params[first.index()].kind();
        let stranger = self.params.iter().find(|(param, _)| params[param.index()].kind() != kind);
        if let Some(&(param, _)) = stranger {
            return Err(PlanError::MixedBucket { bucket: id, param });
        }
        Ok(Bucket::new(id, kind, self.params.iter().map(|&(param, _)| param).collect()))
    }
}

impl Partition {
    /// Takes `layout` as it is, after checking that its parameters follow one another and that
    /// `shards` shards tile it.
    pub(crate) fn restore(
        bucket: &Bucket,
        params: &[Param],
        layout: BucketLayout,
        shards: u32,
    ) -> Result<Self, PlanError> {
        let BucketLayout { params: placed, numel } = layout;
        if numel == 0
            || numel % u64::from(shards) != 0
            || numel > i64::MAX as u64 / bucket.dtype.size()
        {
            return Err(PlanError::UnevenBucket { bucket: bucket.id, numel, world: shards });
        }
        let mut end = 0;
        for &(param, start) in &placed {
            let past = start
                .checked_add(params[param.index()].numel)
                .filter(|&past| start >= end && past <= numel);
            end = past.ok_or(PlanError::Overlap { bucket: bucket.id, param })?;
        }
        let numels = placed.iter().map(|&(param, _)| params[param.index()].numel).collect();
        let offsets = placed.into_iter().map(|(_, start)| start).collect();
        Ok(Self { offsets, numels, numel, shard_numel: numel / u64::from(shards) })
    }

    /// Lays `bucket` out for `shards` ranks. `params` are all parameters, by id.
    ///
    /// # Errors
    /// [`PlanError::BadWorld`] for no shard, [`PlanError::TooLarge`] when the buffer would
    /// exceed 2^63 - 1 bytes, [`PlanError::UnknownParam`] when the bucket holds a parameter that is
    /// not in `params`.
    pub fn new(bucket: &Bucket, params: &[Param], shards: u32) -> Result<Self, PlanError> {
        if shards == 0 {
            return Err(PlanError::BadWorld);
        }
        let limit = i64::MAX as u64 / bucket.dtype.size();
        let unit = u64::from(shards) * SHARD_UNIT;
        let mut offsets = Vec::with_capacity(bucket.params.len());
        let mut numels = Vec::with_capacity(bucket.params.len());
        // The padded length after each parameter: the one that passes the limit is the one to name.
        let mut numel = unit;
        let mut end = 0;
        for &id in &bucket.params {
            let unknown = PlanError::UnknownParam { param: id, params: params.len() };
            let param = params.get(id.index()).ok_or(unknown)?;
            let (start, padded) = append(end, param.numel, bucket.dtype.align(), unit)
                .filter(|&(_, padded)| padded <= limit)
                .ok_or(PlanError::TooLarge { param: id })?;
            offsets.push(start);
            numels.push(param.numel);
            end = start + param.numel;
            numel = padded;
        }
        Ok(Self { offsets, numels, numel, shard_numel: numel / u64::from(shards) })
    }

    /// Start of each of the bucket's parameters.
    pub fn offsets(&self) -> &[u64] {
        &self.offsets
    }

    /// Length of each of the bucket's parameters.
    pub fn numels(&self) -> &[u64] {
        &self.numels
    }

    /// Padded length of the bucket.
    pub const fn numel(&self) -> u64 {
        self.numel
    }

    /// Length of every shard.
    pub const fn shard_numel(&self) -> u64 {
        self.shard_numel
    }

    /// The fragments in shard number `shard`, in the order in which they lie there; none beyond the
    /// last.
    ///
    /// `bucket` must be the one that was laid out.
    pub fn fragments<'a>(
        &'a self,
        bucket: &'a Bucket,
        shard: u32,
    ) -> impl Iterator<Item = Fragment> + 'a {
        let lo = u64::from(shard).saturating_mul(self.shard_numel);
        let hi = lo.saturating_add(self.shard_numel);
        // The last parameter that starts at or before the shard is the first that can reach into
        // it.
        let first = self.offsets.partition_point(|&start| start <= lo).saturating_sub(1);
        let extents = bucket.params.iter().zip(self.offsets.iter().zip(&self.numels)).skip(first);
        extents.take_while(move |&(_, (&start, _))| start < hi).filter_map(
            move |(&param, (&start, &numel))| {
                let from = start.max(lo);
                let length =
                    (start + numel).min(hi).checked_sub(from).filter(|&length| length > 0)?;
                let (param_start, shard_start) = (from - start, from - lo);
                Some(Fragment { param, bucket: bucket.id, shard, param_start, shard_start, length })
            },
        )
    }
}

/// Where a parameter of `numel` elements starts behind `end`, and the padded length of the bucket
/// with it.
fn append(end: u64, numel: u64, align: u64, unit: u64) -> Option<(u64, u64)> {
    let start = end.checked_next_multiple_of(align)?;
    let padded = start.checked_add(numel)?.max(1).checked_next_multiple_of(unit)?;
    Some((start, padded))
}
