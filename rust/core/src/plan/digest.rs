//! Hashes of plans: 64 bits that are equal on ranks with the same plan, on every platform and in
//! every release.

use xxhash_rust::xxh3::Xxh3;

use super::Layout;
use crate::command::{Command, Op};
use crate::grain::Grain;
use crate::hop::Hop;
use crate::ids::{BucketId, Dtype, ParamId, UnitId};
use crate::mesh::{Group, Mesh};
use crate::route::List;
use crate::schedule::Schedule;
use crate::stage::{Placement, Rules};

impl Layout {
    /// Everything but the order of launches, and the lists.
    pub(super) fn hash(&self) -> u64 {
        let mut hash = Digest::new(b"zerort layout 2");
        hash.mesh(&self.mesh);
        hash.words([rules_code(self.rules), self.params.len() as u64]);
        for param in &self.params {
            hash.words([
                param.numel,
                dtype_code(param.dtype),
                param.group.map_or(u64::MAX, |group| u64::from(group.0)),
                u64::from(param.wire.0),
            ]);
        }
        for ((bucket, partition), hops) in self.buckets.iter().zip(&self.partitions).zip(&self.hops)
        {
            hash.words([bucket.params.len() as u64, partition.numel()]);
            for (param, &offset) in bucket.params.iter().zip(partition.offsets()) {
                hash.words([u64::from(param.0), offset]);
            }
            hash.hops(&hops.reduce);
            hash.hops(&hops.publish);
        }
        for bucket in self.buckets.iter().filter(|bucket| bucket.unit.is_some()) {
            hash.words([
                u64::from(bucket.id.0),
                bucket.unit.map_or(0, |unit| 1 + u64::from(unit.0)),
            ]);
        }
        self.hash_grains(&mut hash);
        hash.finish()
    }

    /// Nothing where all is elementwise, so that grains left the digests of such plans as they were.
    fn hash_grains(&self, hash: &mut Digest) {
        let grained = || (0..).zip(&self.params).filter(|(_, one)| one.grain != Grain::Element);
        let count = grained().count() as u64;
        if count > 0 {
            hash.0.update(b"grains");
            hash.words([count]);
        }
        for (id, param) in grained() {
            let owner = self.owners.of(ParamId(id));
            hash.words([
                u64::from(id),
                grain_code(param.grain),
                param.cost,
                owner.map_or(0, |owner| 1 + u64::from(owner)),
            ]);
        }
    }
}

/// A layout and the order of its launches.
pub(super) fn schedule_digest(layout: u64, schedule: &Schedule) -> u64 {
    let mut hash = Digest::new(b"zerort schedule 1");
    hash.words([layout, schedule.commands().len() as u64]);
    for command in schedule.commands() {
        hash.words(command_code(*command));
    }
    hash.finish()
}

/// A plan without lists, and lists.
pub(super) fn lists_digest(plan: u64, lists: &[List]) -> u64 {
    let mut hash = Digest::new(b"zerort lists 1");
    hash.words([plan, lists.len() as u64]);
    for list in lists {
        hash.words([list.kind.code().cast_unsigned(), list.key.0, list.stops.len() as u64]);
        for units in [&list.start, &list.end].into_iter().chain(&list.stops) {
            hash.units(units);
        }
        hash.words([list.commands().len() as u64]);
        for command in list.commands() {
            hash.words(command_code(*command));
        }
    }
    hash.finish()
}

/// xxh3 over little-endian words, so that the hash does not depend on the platform. Every list is
/// preceded by its length.
struct Digest(Xxh3);

impl Digest {
    fn new(purpose: &[u8]) -> Self {
        let mut hash = Xxh3::new();
        hash.update(purpose);
        Self(hash)
    }

    fn words<const N: usize>(&mut self, words: [u64; N]) {
        self.0.update(words.map(u64::to_le_bytes).as_flattened());
    }

    /// Sizes, and who stands where: every other group follows.
    fn mesh(&mut self, mesh: &Mesh) {
        let sizes = [Group::Shard, Group::Replica, Group::Outer].map(|group| mesh.size(group));
        self.words(sizes.map(u64::from));
        for rank in mesh.ranks() {
            self.words([u64::from(rank.0)]);
        }
    }

    fn hops(&mut self, hops: &[Hop]) {
        self.words([hops.len() as u64]);
        for hop in hops {
            let wire = hop.wire.map_or(0, |wire| 1 + u64::from(wire.0));
            self.words([op_code(hop.op), group_code(hop.group), wire]);
        }
    }

    fn units(&mut self, units: &[UnitId]) {
        self.words([units.len() as u64]);
        for unit in units {
            self.words([u64::from(unit.0)]);
        }
    }

    fn finish(self) -> u64 {
        self.0.digest()
    }
}

/// Codes are written out: reordering an enum must not change a digest.
const fn command_code(command: Command) -> [u64; 2] {
    let (kind, id) = match command {
        Command::Launch(BucketId(id)) => (0, id),
        Command::Retire(BucketId(id)) => (1, id),
        Command::Need(stop) => (2, stop),
        Command::Gather(UnitId(id)) => (3, id),
        Command::Free(UnitId(id)) => (4, id),
    };
    [kind, id as u64]
}

const fn dtype_code(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::BF16 => 2,
        Dtype::F64 => 3,
    }
}

/// 0 is a block of no elements, which there is not.
const fn grain_code(grain: Grain) -> u64 {
    match grain {
        Grain::Element => 1,
        Grain::Block(block) => block.get(),
        Grain::Whole => 0,
    }
}

const fn op_code(op: Op) -> u64 {
    match op {
        Op::ReduceScatter => 0,
        Op::AllReduce => 1,
        Op::AllGather => 2,
        Op::Copy => 3,
    }
}

const fn group_code(group: Group) -> u64 {
    match group {
        Group::Shard => 0,
        Group::Replica => 1,
        Group::Inner => 2,
        Group::Outer => 3,
        Group::Job => 4,
        Group::Own => 5,
    }
}

const fn rules_code(rules: Rules) -> u64 {
    placement_bit(rules.optimizer) << 2
        | placement_bit(rules.gradient) << 1
        | placement_bit(rules.parameter)
}

const fn placement_bit(placement: Placement) -> u64 {
    match placement {
        Placement::Replicated => 0,
        Placement::Sharded => 1,
    }
}
