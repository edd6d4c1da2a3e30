//! How whole parameters are packed into equal shards.
//!
//! Every shard is as long as the fullest, so what matters is how full that one is. Longest first,
//! each parameter goes to the emptiest shard; then parameters are moved and swapped between the
//! fullest shard and another as long as that makes the fullest emptier. When nothing more is found,
//! or a bounded number of pairs has been tried, the same is done with what the owners' updates cost,
//! as far as no shard becomes longer by it. Last, what costs most goes to the rank that has least to
//! do so far: which shard is which rank's is free.
//!
//! - **PCK-1** The layout is a function of the parameters' lengths and costs alone: sums are
//!   integers, and ties go by position.
//! - **PCK-2** Where costs differ by at most d among a bucket's shards, and no bucket has a larger d,
//!   the ranks' sums over all buckets differ by at most d.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use crate::bucket::{Bucket, Param};
use crate::error::PlanError;
use crate::exchange::{self, Way};
use crate::grain::Grain;
use crate::partition::{Partition, SHARD_UNIT, limit};

/// How many pairs of parameters are tried: so many for each parameter and shard, and so many more,
/// which are all that a small bucket has.
const TRIES: (usize, usize) = (8, 2000);

/// What an item, or a bin, weighs: its length and its cost.
type Weight = [u128; 2];
const LENGTH: usize = 0;
const COST: usize = 1;

/// Lays a bucket out. Where its parameters may not be cut they are permuted, unless it would become
/// longer for it by more than `padding` millionths of its length; and what the updates of those that
/// are not cut cost is added to what each shard's rank has `spent`.
///
/// # Errors
/// Those of [`Partition::new`].
pub(crate) fn lay_out(
    bucket: &mut Bucket,
    params: &[Param],
    padding: u32,
    spent: &mut [u128],
) -> Result<Partition, PlanError> {
    let even = Partition::new(bucket, params, spent.len() as u32)?;
    if bucket.grain != Grain::Whole {
        return Ok(even);
    }
    let more = u128::from(even.numel()) * u128::from(padding) / 1_000_000;
    let longest = even.numel().saturating_add(u64::try_from(more).unwrap_or(u64::MAX));
    let partition = pack(bucket, params, &even, longest, spent).unwrap_or(even);
    if exchange::way(bucket, &partition) == Some(Way::Owned) {
        exchange::spend(bucket, &partition, params, spent);
    }
    Ok(partition)
}

/// Lays `bucket` out so that no border cuts a parameter, and permutes its parameters to this end.
/// None, and nothing, where it would be longer than `longest`. `even` is its even layout, `spent`
/// what each shard's rank has to do so far.
fn pack(
    bucket: &mut Bucket,
    params: &[Param],
    even: &Partition,
    longest: u64,
    spent: &[u128],
) -> Option<Partition> {
    let shards = spent.len() as u32;
    let most = longest.min(limit(bucket)) / u64::from(shards) / SHARD_UNIT * SHARD_UNIT;
    let items = items(bucket, params);
    if items.iter().any(|item| item[LENGTH] > u128::from(most)) || even.shard_numel() > most {
        return None;
    }
    let mut bins = Bins::longest_first(&items, shards as usize);
    bins.level(LENGTH, u128::MAX, u128::from(even.shard_numel()));
    let shard_numel = bins.fullest(LENGTH).next_multiple_of(u128::from(SHARD_UNIT));
    let shard_numel = u64::try_from(shard_numel).ok().filter(|&shard_numel| shard_numel <= most)?;
    let shard_numel = shard_numel.max(SHARD_UNIT);
    bins.level(COST, u128::from(shard_numel), 0);
    let members = bins.by_rank(spent);
    Some(place(bucket, params, &members, shard_numel))
}

/// What each parameter of the bucket takes and costs.
fn items(bucket: &Bucket, params: &[Param]) -> Vec<Weight> {
    let align = u128::from(bucket.dtype.align());
    let item =
        |param: &Param| [u128::from(param.numel).next_multiple_of(align), u128::from(param.cost)];
    bucket.params.iter().map(|param| item(&params[param.index()])).collect()
}

/// The bucket, with `members`, positions in it, in each shard.
fn place(
    bucket: &mut Bucket,
    params: &[Param],
    members: &[Vec<usize>],
    shard_numel: u64,
) -> Partition {
    let mut offsets = Vec::with_capacity(bucket.params.len());
    let mut numels = Vec::with_capacity(bucket.params.len());
    let mut order = Vec::with_capacity(bucket.params.len());
    for (shard, members) in (0..).zip(members) {
        let mut start = shard * shard_numel;
        for &position in members {
            let param = bucket.params[position];
            let numel = params[param.index()].numel;
            order.push(param);
            offsets.push(start);
            numels.push(numel);
            start += numel.next_multiple_of(bucket.dtype.align());
        }
    }
    bucket.params = order;
    Partition::placed((offsets, numels), shard_numel, members.len() as u32)
}

/// Items in bins, one a shard.
struct Bins<'a> {
    items: &'a [Weight],
    members: Vec<Vec<usize>>,
    weights: Vec<Weight>,
}

/// An item that leaves a bin, and what comes back for it, by their places in the bins.
type Swap = (usize, Option<usize>);

impl<'a> Bins<'a> {
    /// Each item in the emptiest bin, longest first.
    fn longest_first(items: &'a [Weight], count: usize) -> Self {
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|&item| Reverse(items[item]));
        let mut emptiest: BinaryHeap<Reverse<(Weight, usize)>> =
            (0..count).map(|bin| Reverse(([0, 0], bin))).collect();
        let mut members = vec![Vec::new(); count];
        let mut weights = vec![[0, 0]; count];
        for item in order {
            let Some(mut top) = emptiest.peek_mut() else { break };
            let Reverse((weight, bin)) = &mut *top;
            *weight = sum(*weight, items[item]);
            weights[*bin] = *weight;
            members[*bin].push(item);
        }
        Self { items, members, weights }
    }

    fn fullest(&self, by: usize) -> u128 {
        self.weights.iter().map(|weight| weight[by]).max().unwrap_or(0)
    }

    /// Moves and swaps items between the fullest bin by this weight and others, as long as that
    /// makes it emptier and leaves both within `limit` by the other weight; until it is at `enough`,
    /// or as full as the largest item, or as a bin on average.
    fn level(&mut self, by: usize, limit: u128, enough: u128) {
        let total: u128 = self.weights.iter().map(|weight| weight[by]).sum();
        let largest = self.items.iter().map(|item| item[by]).max().unwrap_or(0);
        let least = enough.max(largest).max(total.div_ceil(self.weights.len() as u128));
        let mut tries = TRIES.0 * (self.items.len() + self.weights.len()) + TRIES.1;
        let bins = self.weights.iter().enumerate();
        let mut order: BTreeSet<(u128, usize)> = bins.map(|(bin, w)| (w[by], bin)).collect();
        while let Some((top, full)) = order.last().copied().filter(|&(top, _)| top > least) {
            let others = order.iter().take_while(|&&(low, _)| low < top);
            let found = { others }.find_map(|&(_, bin)| {
                self.best(by, limit, (full, bin), &mut tries).map(|swap| (bin, swap))
            });
            let Some((bin, swap)) = found else { break };
            for changed in [full, bin] {
                order.remove(&(self.weights[changed][by], changed));
            }
            self.swap((full, bin), swap);
            for changed in [full, bin] {
                order.insert((self.weights[changed][by], changed));
            }
        }
    }

    /// The swap that brings two bins closest to one another, if one does; `pair` is the fuller and
    /// the emptier one.
    fn best(
        &self,
        by: usize,
        limit: u128,
        (full, bin): (usize, usize),
        tries: &mut usize,
    ) -> Option<Swap> {
        let other = 1 - by;
        let [from, to] = [full, bin].map(|bin| self.weights[bin]);
        let gap = from[by] - to[by];
        let mut best: Option<(u128, Swap)> = None;
        for (leaves, &item) in self.members[full].iter().enumerate() {
            let back = self.members[bin].iter().map(|&back| self.items[back]);
            let back = std::iter::once([0, 0]).chain(back);
            for (place, back) in back.enumerate() {
                if *tries == 0 {
                    return best.map(|(_, swap)| swap);
                }
                *tries -= 1;
                let item = self.items[item];
                let less = item[by].saturating_sub(back[by]);
                let fits = to[other] + item[other] - back[other] <= limit
                    && from[other] + back[other] - item[other] <= limit;
                let off = gap.abs_diff(2 * less);
                if less > 0 && less < gap && fits && best.is_none_or(|(least, _)| off < least) {
                    best = Some((off, (leaves, place.checked_sub(1))));
                }
            }
        }
        best.map(|(_, swap)| swap)
    }

    fn swap(&mut self, (full, bin): (usize, usize), (leaves, back): Swap) {
        let item = self.members[full].swap_remove(leaves);
        self.weights[full] = difference(self.weights[full], self.items[item]);
        if let Some(back) = back {
            let back = self.members[bin].swap_remove(back);
            self.weights[bin] = difference(self.weights[bin], self.items[back]);
            self.weights[full] = sum(self.weights[full], self.items[back]);
            self.members[full].push(back);
        }
        self.weights[bin] = sum(self.weights[bin], self.items[item]);
        self.members[bin].push(item);
    }

    /// What each rank gets, in the order of the bucket: the costliest bin goes to the rank that has
    /// `spent` least.
    fn by_rank(mut self, spent: &[u128]) -> Vec<Vec<usize>> {
        let mut bins: Vec<usize> = (0..self.members.len()).collect();
        bins.sort_by_key(|&bin| Reverse(self.weights[bin][COST]));
        let mut ranks: Vec<usize> = (0..spent.len()).collect();
        ranks.sort_by_key(|&rank| spent[rank]);
        let mut members = vec![Vec::new(); spent.len()];
        for (rank, bin) in ranks.into_iter().zip(bins) {
            members[rank] = std::mem::take(&mut self.members[bin]);
            members[rank].sort_unstable();
        }
        members
    }
}

fn sum(one: Weight, other: Weight) -> Weight {
    [one[LENGTH] + other[LENGTH], one[COST] + other[COST]]
}

fn difference(one: Weight, other: Weight) -> Weight {
    [one[LENGTH] - other[LENGTH], one[COST] - other[COST]]
}
