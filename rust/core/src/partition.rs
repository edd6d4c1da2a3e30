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
//! - **PAR-4** No border between shards cuts a grain, but where matrices are exchanged
//!   ([`Way::Exchanged`](crate::exchange::Way)).
//!
//! Every bucket is cut evenly, not every parameter, so that each collective is balanced. A fragment
//! is computed when it is asked for: a plan for a thousand ranks costs no more than one for two.
//!
//! # Padding
//!
//! It never reaches a bound that follows from the grain. Let N be the shards, e where the last
//! parameter ends when each starts at the first 64 bytes behind the one before, T the sum of lengths
//! rounded up to 64 bytes, m the longest of them; e and T at least 1.
//!
//! - *Element*: the bucket is shorter than e + 128 N, as it is e rounded up.
//! - *Block of k*: with u = lcm(128, k) it is shorter than e + 2 N u. Only a parameter across one of
//!   the N - 1 inner borders is moved, by less than u. So what is e rounded up to N u, and one u a
//!   shard more, always suffices.
//! - *Whole*: it is shorter than T + (N - 1) m + 128 N. The last parameter of the fullest shard came
//!   when no shard was emptier, at most (T - m') / N, and is m' <= m long. So the fullest shard is at
//!   most T / N + m (N - 1) / N, and all are as long, rounded up; see [`crate::packing`].

use crate::bucket::{Bucket, Param};
use crate::error::PlanError;
use crate::grain::Grain;
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

/// A [`Fragment`] without the names of parameter and bucket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) shard: u32,
    pub(crate) param_start: u64,
    pub(crate) shard_start: u64,
    pub(crate) length: u64,
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
    /// Takes `layout` as it is, after checking that its parameters follow one another, that
    /// `shards` shards tile it and that no border cuts a block.
    pub(crate) fn restore(
        bucket: &Bucket,
        params: &[Param],
        layout: BucketLayout,
        shards: u32,
    ) -> Result<Self, PlanError> {
        let BucketLayout { params: placed, numel } = layout;
        if numel == 0 || numel % u64::from(shards) != 0 || numel > limit(bucket) {
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
        let restored = Self { offsets, numels, numel, shard_numel: numel / u64::from(shards) };
        match (bucket.grain, restored.cut(bucket)) {
            (Grain::Block(_), Some(param)) => Err(PlanError::CutBlock { bucket: bucket.id, param }),
            _ => Ok(restored),
        }
    }

    /// Lays `bucket` out evenly for `shards` ranks, in the order of its parameters. A border cuts
    /// no block; it may cut a parameter whose grain is [`Grain::Whole`]. `params` are all
    /// parameters, by id.
    ///
    /// # Errors
    /// [`PlanError::BadWorld`] for no shard, [`PlanError::TooLarge`] when the buffer would
    /// exceed 2^63 - 1 bytes, [`PlanError::UnknownParam`] when the bucket holds a parameter that is
    /// not in `params`.
    pub fn new(bucket: &Bucket, params: &[Param], shards: u32) -> Result<Self, PlanError> {
        if shards == 0 {
            return Err(PlanError::BadWorld);
        }
        let even = Self::in_order(bucket, params, shards)?;
        match bucket.grain {
            Grain::Block(_) => even.between_blocks(bucket, shards),
            Grain::Element | Grain::Whole => Ok(even),
        }
    }

    /// Parameters one behind the other, whatever a border cuts.
    fn in_order(bucket: &Bucket, params: &[Param], shards: u32) -> Result<Self, PlanError> {
        let limit = limit(bucket);
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

    /// The same parameters in the same order, where no border cuts a block: shards are whole blocks
    /// long, and what would be cut starts at the next one.
    fn between_blocks(self, bucket: &Bucket, shards: u32) -> Result<Self, PlanError> {
        let last = bucket.params.last().copied().unwrap_or(ParamId(0));
        let too_large = PlanError::TooLarge { param: last };
        let step = bucket.grain.step();
        let align = multiple_of_both(bucket.dtype.align(), step).ok_or(too_large)?;
        let unit = multiple_of_both(SHARD_UNIT, step).ok_or(too_large)?;
        let shards = u64::from(shards);
        let end = self.end().max(1).div_ceil(shards);
        let mut shard_numel = end.checked_next_multiple_of(unit).ok_or(too_large)?;
        loop {
            let numel = shard_numel.checked_mul(shards).filter(|&numel| numel <= limit(bucket));
            let numel = numel.ok_or(too_large)?;
            if let Some(offsets) = self.starts(bucket, shard_numel, align, numel) {
                return Ok(Self { offsets, numels: self.numels, numel, shard_numel });
            }
            shard_numel += unit;
        }
    }

    /// Where each parameter starts behind its predecessor, or at the next multiple of `align` where
    /// a grain would be cut; None if the last ends behind `numel`.
    fn starts(
        &self,
        bucket: &Bucket,
        shard_numel: u64,
        align: u64,
        numel: u64,
    ) -> Option<Vec<u64>> {
        let mut end = 0_u64;
        let start = |&length: &u64| {
            let mut start = end.checked_next_multiple_of(bucket.dtype.align())?;
            start.checked_add(length)?;
            if bucket.grain.is_cut(start, length, shard_numel) {
                start = start.checked_next_multiple_of(align)?;
            }
            end = start.checked_add(length).filter(|&end| end <= numel)?;
            Some(start)
        };
        self.numels.iter().map(start).collect()
    }

    /// The bucket with parameters at these places, its shards of `shard_numel` elements.
    pub(crate) fn placed(
        (offsets, numels): (Vec<u64>, Vec<u64>),
        shard_numel: u64,
        shards: u32,
    ) -> Self {
        Self { offsets, numels, numel: shard_numel * u64::from(shards), shard_numel }
    }

    /// The first of the bucket's parameters of which a border between shards cuts a grain.
    pub(crate) fn cut(&self, bucket: &Bucket) -> Option<ParamId> {
        let mut extents = bucket.params.iter().zip(self.offsets.iter().zip(&self.numels));
        extents
            .find(|&(_, (&start, &numel))| bucket.grain.is_cut(start, numel, self.shard_numel))
            .map(|(&param, _)| param)
    }

    /// The parts of the parameter at `position` of the bucket, shard by shard.
    pub(crate) fn cuts(&self, position: usize) -> impl Iterator<Item = Cut> + '_ {
        let (offset, numel) = (self.offsets[position], self.numels[position]);
        let mut done = 0;
        std::iter::from_fn(move || {
            let start = offset + done;
            let (shard, shard_start) = (start / self.shard_numel, start % self.shard_numel);
            let length = (numel - done).min(self.shard_numel - shard_start);
            let cut = Cut { shard: shard as u32, param_start: done, shard_start, length };
            done += length;
            (length > 0).then_some(cut)
        })
    }

    /// The shard in which the parameter at `position` of the bucket starts. One without an element
    /// may lie behind the last, and counts as the last's.
    pub(crate) fn shard_at(&self, position: usize) -> u32 {
        let last = self.numel / self.shard_numel - 1;
        (self.offsets[position] / self.shard_numel).min(last) as u32
    }

    /// Where its last parameter ends.
    fn end(&self) -> u64 {
        self.offsets.last().zip(self.numels.last()).map_or(0, |(start, numel)| start + numel)
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

/// How many elements of a bucket can be addressed.
pub(crate) const fn limit(bucket: &Bucket) -> u64 {
    i64::MAX as u64 / bucket.dtype.size()
}

/// The least common multiple, where it can be counted.
fn multiple_of_both(one: u64, other: u64) -> Option<u64> {
    let (mut divisor, mut rest) = (one, other);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    (one / divisor).checked_mul(other)
}

/// Where a parameter of `numel` elements starts behind `end`, and the padded length of the bucket
/// with it.
fn append(end: u64, numel: u64, align: u64, unit: u64) -> Option<(u64, u64)> {
    let start = end.checked_next_multiple_of(align)?;
    let padded = start.checked_add(numel)?.max(1).checked_next_multiple_of(unit)?;
    Some((start, padded))
}
