//! Which rank steps a parameter that may not be cut, and where it lies in that rank's room.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::Way;
use crate::bucket::{Bucket, Param};
use crate::grain::Grain;
use crate::ids::{BucketId, Dtype, ParamId};
use crate::partition::Partition;

/// Owner and place of every parameter of grain Whole.
#[derive(Clone, Debug)]
pub(crate) struct Owners {
    /// By bucket; None where it may be cut.
    ways: Vec<Option<Way>>,
    /// By parameter: the number of its owner's shard.
    chosen: Vec<Option<u32>>,
    /// By parameter: where it starts in its owner's room; 0 where it is not exchanged.
    pub(super) places: Vec<u64>,
    /// Length of each owner's room, by dtype.
    pub(super) rooms: BTreeMap<Dtype, Vec<u64>>,
    /// By shard: what its rank's updates cost.
    costs: Vec<u128>,
}

impl Owners {
    /// Chooses them for buckets that are laid out already.
    pub(crate) fn new(
        buckets: &[Bucket],
        partitions: &[Partition],
        params: &[Param],
        shards: u32,
    ) -> Self {
        let ways = buckets.iter().zip(partitions).map(|(bucket, partition)| way(bucket, partition));
        let mut owners = Self {
            ways: ways.collect(),
            chosen: vec![None; params.len()],
            places: vec![0; params.len()],
            rooms: BTreeMap::new(),
            costs: vec![0; shards as usize],
        };
        let mut exchanged = Vec::new();
        for (bucket, partition) in buckets.iter().zip(partitions) {
            match owners.way(bucket.id) {
                Some(Way::Owned) => owners.own(bucket, partition, params),
                Some(Way::Exchanged) => exchanged.push((bucket, partition)),
                None => {}
            }
        }
        owners.choose(&exchanged, params);
        owners.make_room(&exchanged, params);
        owners
    }

    /// How a bucket's gradients reach their owners; None where it may be cut.
    pub(crate) fn way(&self, bucket: BucketId) -> Option<Way> {
        self.ways[bucket.index()]
    }

    /// The number of the owner's shard; None for a parameter that may be cut.
    pub(crate) fn of(&self, param: ParamId) -> Option<u32> {
        self.chosen[param.index()]
    }

    /// What the updates of each shard's rank cost.
    pub(crate) fn costs(&self) -> &[u128] {
        &self.costs
    }

    /// An owned bucket's parameters go to the ranks in whose shards they lie.
    fn own(&mut self, bucket: &Bucket, partition: &Partition, params: &[Param]) {
        spend(bucket, partition, params, &mut self.costs);
        for (position, param) in bucket.params.iter().enumerate() {
            self.chosen[param.index()] = Some(partition.shard_at(position));
        }
    }

    /// The costliest first, each to the rank that has least to do.
    fn choose(&mut self, exchanged: &[(&Bucket, &Partition)], params: &[Param]) {
        let mut all = Vec::new();
        for (bucket, partition) in exchanged {
            for (position, &id) in bucket.params.iter().enumerate() {
                all.push(Member::new(partition, position, id, params[id.index()].cost));
            }
        }
        all.sort_by_key(|one| (Reverse((one.cost, one.numel)), one.id));
        let mut idlest: BTreeSet<(u128, u32)> = self.costs.iter().copied().zip(0..).collect();
        for member in &all {
            let Some(&(least, first)) = idlest.first() else { return };
            let idle = |lo, hi| idlest.range((least, lo)..=(least, hi)).next().map(|&(_, one)| one);
            let owner = member.most(idle).unwrap_or(first);
            let cost = least + u128::from(member.cost);
            idlest.remove(&(least, owner));
            idlest.insert((cost, owner));
            self.costs[owner as usize] = cost;
            self.chosen[member.id.index()] = Some(owner);
        }
        for alike in all.chunk_by(|one, next| (one.cost, one.numel) == (next.cost, next.numel)) {
            self.trade(alike);
        }
    }

    /// Trades owners among parameters of one length and cost: who holds most of one shall own it.
    /// What owners cost stays as it is, and less is sent.
    fn trade(&mut self, alike: &[Member]) {
        let mut trading: BTreeMap<u32, usize> = BTreeMap::new();
        for owner in alike.iter().filter_map(|one| self.of(one.id)) {
            *trading.entry(owner).or_default() += 1;
        }
        let mut order: Vec<&Member> = alike.iter().collect();
        order.sort_by_key(|one| (Reverse(one.longest()), one.id));
        let mut left = Vec::new();
        for member in order {
            let first = |lo, hi| trading.range(lo..=hi).next().map(|(&one, _)| one);
            match member.most(first) {
                Some(owner) => self.take(member, owner, &mut trading),
                None => left.push(member),
            }
        }
        for member in left {
            if let Some((&owner, _)) = trading.first_key_value() {
                self.take(member, owner, &mut trading);
            }
        }
    }

    /// Makes `owner` that of a parameter, which is one of so many that it has.
    fn take(&mut self, member: &Member, owner: u32, trading: &mut BTreeMap<u32, usize>) {
        self.chosen[member.id.index()] = Some(owner);
        if let Some(count) = trading.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                trading.remove(&owner);
            }
        }
    }

    /// Lays the rooms out, in the order of the buckets.
    fn make_room(&mut self, exchanged: &[(&Bucket, &Partition)], params: &[Param]) {
        let shards = self.costs.len();
        for (bucket, _) in exchanged {
            let rooms = self.rooms.entry(bucket.dtype).or_insert_with(|| vec![0; shards]);
            for param in &bucket.params {
                let Some(owner) = self.chosen[param.index()] else { continue };
                let end = &mut rooms[owner as usize];
                self.places[param.index()] = *end;
                let past = end.saturating_add(params[param.index()].numel);
                *end = past.checked_next_multiple_of(bucket.dtype.align()).unwrap_or(u64::MAX);
            }
        }
    }
}

/// Adds what the updates of an owned bucket's parameters cost to what each shard's rank has to do.
pub(crate) fn spend(bucket: &Bucket, partition: &Partition, params: &[Param], costs: &mut [u128]) {
    for (position, param) in bucket.params.iter().enumerate() {
        costs[partition.shard_at(position) as usize] += u128::from(params[param.index()].cost);
    }
}

/// How a bucket's gradients reach their owners.
pub(crate) fn way(bucket: &Bucket, partition: &Partition) -> Option<Way> {
    match bucket.grain {
        Grain::Element | Grain::Block(_) => None,
        Grain::Whole if partition.cut(bucket).is_none() => Some(Way::Owned),
        Grain::Whole => Some(Way::Exchanged),
    }
}

/// An exchanged parameter, and where it lies: how much in the first shard that has some of it, how
/// much in the last; those between are full of it.
#[derive(Clone, Copy, Debug)]
struct Member {
    id: ParamId,
    cost: u64,
    numel: u64,
    shard_numel: u64,
    first: (u32, u64),
    last: (u32, u64),
}

impl Member {
    fn new(partition: &Partition, position: usize, id: ParamId, cost: u64) -> Self {
        let (numel, shard_numel) = (partition.numels()[position], partition.shard_numel());
        let start = partition.offsets()[position];
        let end = start + numel.max(1) - 1;
        let [first, last] = [start, end].map(|at| (at / shard_numel) as u32);
        let before = (shard_numel - start % shard_numel).min(numel);
        let behind = if first == last { numel } else { end % shard_numel + 1 };
        Self { id, cost, numel, shard_numel, first: (first, before), last: (last, behind) }
    }

    /// The most that one shard holds of it.
    fn longest(&self) -> u64 {
        if self.last.0 - self.first.0 > 1 {
            self.shard_numel
        } else {
            self.first.1.max(self.last.1)
        }
    }

    /// The shard that holds most of it, of those that may own it; the first of several. `one` says
    /// which is the first that may from one number up to another.
    fn most(&self, one: impl Fn(u32, u32) -> Option<u32>) -> Option<u32> {
        let ((first, before), (last, behind)) = (self.first, self.last);
        let between = if last - first > 1 { one(first + 1, last - 1) } else { None };
        let between = between.map(|shard| (self.shard_numel, Reverse(shard)));
        let at = |shard, length| one(shard, shard).map(|shard| (length, Reverse(shard)));
        let all = [at(first, before), between, at(last, behind)];
        let best = all.into_iter().flatten().filter(|&(length, _)| length > 0).max();
        best.map(|(_, Reverse(shard))| shard)
    }
}
