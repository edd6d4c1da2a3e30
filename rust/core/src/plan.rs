//! Everything that must be equal on all ranks, decided before the first step.
//!
//! A plan is immutable and a pure function of its [`PlanSpec`]: ranks that were given the same
//! specification hold the same plan, and [`Plan::digest`] proves it with one integer. It has two
//! parts:
//!
//! - the *layout*: rules, mesh, buckets, partitions, hops. Buffers and optimizer state follow from
//!   it, so it never changes.
//! - the *launch order*: the [`Schedule`]. An observed order of arrival may change it, which moves
//!   no data; plans that differ in it alone share their layout and have the same
//!   [`Plan::layout_digest`].
//!
//! A plan knows lengths and identifiers, never a name, a tensor or a device.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::bucket::{Bucket, Cap, Param, assign};
use crate::command::{Command, Op};
use crate::error::PlanError;
use crate::hop::{Hop, Hops};
use crate::ids::{BucketId, Dtype, ParamId, Rank};
use crate::mesh::{Group, Mesh};
use crate::partition::{BucketLayout, Fragment, Partition};
use crate::schedule::Schedule;
use crate::stage::{Placement, Rules};

/// What a plan is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanSpec {
    /// All parameters, in registration order.
    pub params: Vec<Param>,
    /// The ranks, and which of them belong together.
    pub mesh: Mesh,
    /// Where things live.
    pub rules: Rules,
    /// How long a bucket may become.
    pub cap: Cap,
    /// How many launched buckets may be unretired; `None` means all.
    pub window: Option<u32>,
}

/// The immutable result of planning.
#[derive(Clone, Debug)]
pub struct Plan {
    layout: Arc<Layout>,
    schedule: Schedule,
    digest: u64,
}

#[derive(Debug)]
struct Layout {
    params: Vec<Param>,
    mesh: Mesh,
    rules: Rules,
    window: u32,
    buckets: Vec<Bucket>,
    partitions: Vec<Partition>,
    hops: Vec<Hops>,
    /// Bucket of each parameter and its position there.
    homes: Vec<(BucketId, u32)>,
    digest: u64,
}

impl Plan {
    /// Plans `spec`.
    ///
    /// # Errors
    /// A [`PlanError`] that names what is wrong with the specification.
    pub fn new(spec: PlanSpec) -> Result<Self, PlanError> {
        check(&spec)?;
        let buckets = assign(&spec.params, spec.cap);
        let shards = spec.mesh.size(Group::Shard);
        let partition = |bucket| Partition::new(bucket, &spec.params, shards);
        let partitions = buckets.iter().map(partition).collect::<Result<Vec<_>, _>>()?;
        Ok(Self::laid_out(spec, buckets, partitions))
    }

    /// The plan whose layout was written down as `layouts`, by this planner or another, for one
    /// model state over `world` ranks; launches follow layout order.
    ///
    /// Nothing is assigned anew, so a layout outlives the planner that made it. It may break
    /// PAR-2's alignments, which concern kernels, but nothing that moving data relies on.
    ///
    /// # Errors
    /// What [`Plan::new`] refuses; [`PlanError::NotOnce`], [`PlanError::EmptyBucket`],
    /// [`PlanError::MixedBucket`], [`PlanError::Overlap`] and [`PlanError::UnevenBucket`] for
    /// buckets that the parameters and ranks do not tile.
    pub fn restore(
        params: Vec<Param>,
        layouts: Vec<BucketLayout>,
        world: u32,
        rules: Rules,
    ) -> Result<Self, PlanError> {
        let mesh = Mesh::flat(world)?;
        let spec = PlanSpec { params, mesh, rules, cap: Cap::Bytes(u64::MAX), window: None };
        check(&spec)?;
        check_once(&layouts, spec.params.len())?;
        let mut buckets = Vec::with_capacity(layouts.len());
        let mut partitions = Vec::with_capacity(layouts.len());
        for (index, layout) in layouts.into_iter().enumerate() {
            let bucket = layout.bucket(BucketId(index as u32), &spec.params)?;
            partitions.push(Partition::restore(&bucket, &spec.params, layout, world)?);
            buckets.push(bucket);
        }
        Ok(Self::laid_out(spec, buckets, partitions))
    }

    fn laid_out(spec: PlanSpec, buckets: Vec<Bucket>, partitions: Vec<Partition>) -> Self {
        let homes = homes(&buckets, spec.params.len());
        let all = buckets.len() as u32;
        let window = spec.window.map_or(all, |window| window.min(all));
        let PlanSpec { params, mesh, rules, .. } = spec;
        let hops = buckets.iter().map(|bucket| Hops::new(rules, &mesh, bucket.wire)).collect();
        let mut layout =
            Layout { params, mesh, rules, window, buckets, partitions, hops, homes, digest: 0 };
        layout.digest = layout.hash();
        let order: Vec<BucketId> = layout.buckets.iter().map(|bucket| bucket.id).collect();
        Self::with_order(Arc::new(layout), &order)
    }

    /// The same layout, launched in the order in which `observed`, parameters by arrival, fills the
    /// buckets.
    ///
    /// A bucket's place is that of its parameter that came last; where a parameter is listed twice,
    /// its last place counts. Buckets with a parameter that was never observed go last, in layout
    /// order: they fill only when a pass ends.
    ///
    /// # Errors
    /// [`PlanError::UnknownParam`].
    pub fn reordered(&self, observed: &[ParamId]) -> Result<Self, PlanError> {
        let params = self.layout.params.len();
        let mut arrival = vec![usize::MAX; params];
        for (place, &param) in observed.iter().enumerate() {
            let slot =
                arrival.get_mut(param.index()).ok_or(PlanError::UnknownParam { param, params })?;
            *slot = place;
        }
        let filled =
            |bucket: &Bucket| bucket.params.iter().map(|param| arrival[param.index()]).max();
        let mut order: Vec<_> =
            self.buckets().iter().map(|bucket| (filled(bucket), bucket.id)).collect();
        order.sort_unstable();
        let order: Vec<BucketId> = order.into_iter().map(|(_, bucket)| bucket).collect();
        Ok(Self::with_order(Arc::clone(&self.layout), &order))
    }

    fn with_order(layout: Arc<Layout>, order: &[BucketId]) -> Self {
        let schedule = Schedule::new(order, layout.window);
        let digest = schedule_digest(layout.digest, &schedule);
        Self { layout, schedule, digest }
    }

    /// All parameters, by id.
    pub fn params(&self) -> &[Param] {
        &self.layout.params
    }

    /// The ranks, and which of them belong together.
    pub fn mesh(&self) -> &Mesh {
        &self.layout.mesh
    }

    /// Number of ranks.
    pub fn world(&self) -> u32 {
        self.layout.mesh.world()
    }

    /// Where things live.
    pub fn rules(&self) -> Rules {
        self.layout.rules
    }

    /// How many launched buckets may be unretired: at least 1, at most all.
    pub fn window(&self) -> u32 {
        self.layout.window
    }

    /// All buckets, by id.
    pub fn buckets(&self) -> &[Bucket] {
        &self.layout.buckets
    }

    /// One bucket.
    ///
    /// # Errors
    /// [`PlanError::UnknownBucket`].
    pub fn bucket(&self, id: BucketId) -> Result<&Bucket, PlanError> {
        let buckets = self.layout.buckets.len();
        self.layout.buckets.get(id.index()).ok_or(PlanError::UnknownBucket { bucket: id, buckets })
    }

    /// How a bucket is laid out.
    ///
    /// # Errors
    /// [`PlanError::UnknownBucket`].
    pub fn partition(&self, id: BucketId) -> Result<&Partition, PlanError> {
        let buckets = self.layout.buckets.len();
        self.layout
            .partitions
            .get(id.index())
            .ok_or(PlanError::UnknownBucket { bucket: id, buckets })
    }

    /// The collectives of a bucket.
    ///
    /// # Errors
    /// [`PlanError::UnknownBucket`].
    pub fn hops(&self, id: BucketId) -> Result<&Hops, PlanError> {
        let buckets = self.layout.buckets.len();
        self.layout.hops.get(id.index()).ok_or(PlanError::UnknownBucket { bucket: id, buckets })
    }

    /// The bucket a parameter lies in, and where it starts there, in elements.
    ///
    /// # Errors
    /// [`PlanError::UnknownParam`].
    pub fn home(&self, param: ParamId) -> Result<(BucketId, u64), PlanError> {
        let params = self.layout.params.len();
        let home = self
            .layout
            .homes
            .get(param.index())
            .ok_or(PlanError::UnknownParam { param, params })?;
        let (bucket, position) = *home;
        Ok((bucket, self.layout.partitions[bucket.index()].offsets()[position as usize]))
    }

    /// What lies in `rank`'s shard of `bucket`, in the order in which it lies there.
    ///
    /// # Errors
    /// [`PlanError::UnknownBucket`] or [`PlanError::UnknownRank`].
    pub fn fragments(
        &self,
        bucket: BucketId,
        rank: Rank,
    ) -> Result<impl Iterator<Item = Fragment> + '_, PlanError> {
        let shard = self.layout.mesh.position(Group::Shard, rank)?;
        Ok(self.partition(bucket)?.fragments(self.bucket(bucket)?, shard))
    }

    /// The static list of a pass.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Hash of everything: layout, rules, mesh, hops, launch order, window. The same on every
    /// platform.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Hash of everything but the schedule. Plans with equal ones can stand in for each other over
    /// the same buffers.
    pub fn layout_digest(&self) -> u64 {
        self.layout.digest
    }
}

fn check(spec: &PlanSpec) -> Result<(), PlanError> {
    let count = spec.params.len();
    if count == 0 {
        return Err(PlanError::NoParameters);
    }
    if u32::try_from(count).is_err() {
        return Err(PlanError::TooManyParameters { count });
    }
    if matches!(spec.cap, Cap::Bytes(0) | Cap::Elements(0)) {
        return Err(PlanError::BadCap);
    }
    if spec.window == Some(0) {
        return Err(PlanError::BadWindow);
    }
    Ok(())
}

/// Whether every parameter lies in exactly one bucket.
fn check_once(layouts: &[BucketLayout], params: usize) -> Result<(), PlanError> {
    let mut seen = vec![false; params];
    for &(param, _) in layouts.iter().flat_map(|layout| &layout.params) {
        let slot = seen.get_mut(param.index()).ok_or(PlanError::UnknownParam { param, params })?;
        if std::mem::replace(slot, true) {
            return Err(PlanError::NotOnce { param });
        }
    }
    match seen.iter().position(|seen| !seen) {
        Some(index) => Err(PlanError::NotOnce { param: ParamId(index as u32) }),
        None => Ok(()),
    }
}

/// Inverts the assignment, which covers every parameter exactly once.
fn homes(buckets: &[Bucket], params: usize) -> Vec<(BucketId, u32)> {
    let mut homes = vec![(BucketId(0), 0); params];
    for bucket in buckets {
        for (position, param) in bucket.params.iter().enumerate() {
            homes[param.index()] = (bucket.id, position as u32);
        }
    }
    homes
}

impl Layout {
    fn hash(&self) -> u64 {
        let mut hash = Digest::new(b"zerort layout 2");
        hash.mesh(&self.mesh);
        hash.words([rules_code(self.rules), self.params.len() as u64]);
        for param in &self.params {
            hash.words([
                param.numel,
                dtype_code(param.dtype),
                u64::from(param.group.0),
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
        hash.finish()
    }
}

fn schedule_digest(layout: u64, schedule: &Schedule) -> u64 {
    let mut hash = Digest::new(b"zerort schedule 1");
    hash.words([layout, schedule.commands().len() as u64]);
    for command in schedule.commands() {
        hash.words(match *command {
            Command::Launch(bucket) => [0, u64::from(bucket.0)],
            Command::Retire(bucket) => [1, u64::from(bucket.0)],
        });
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

    fn finish(self) -> u64 {
        self.0.digest()
    }
}

/// Codes are written out: reordering an enum must not change a digest.
const fn dtype_code(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::BF16 => 2,
        Dtype::F64 => 3,
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
