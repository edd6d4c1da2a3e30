//! Everything that must be equal on all ranks, decided before the first step.
//!
//! A plan is immutable and a pure function of its [`PlanSpec`]: ranks that were given the same
//! specification hold the same plan, and [`Plan::digest`] proves it with one integer. It has two
//! parts:
//!
//! - the *layout*: rules, mesh, buckets, partitions, hops. Buffers and optimizer state follow from
//!   it, so it never changes.
//! - the *launch order*: the [`Schedule`], in which every bucket stands that is trained. An
//!   observed order of arrival may change it, which moves no data. So do routes, from which the
//!   [`List`]s of stage 3 are made. Plans that differ in these alone share their layout and have the
//!   same [`Plan::layout_digest`].
//!
//! A plan knows lengths and identifiers, never a name, a tensor or a device.

mod check;
mod digest;

use std::fmt;
use std::sync::Arc;

use self::check::{check, check_once, drop_grains};
use crate::bucket::{Bucket, Cap, Param, assign};
use crate::command::Command;
use crate::error::PlanError;
use crate::exchange::{Exchange, Owners, Way};
use crate::hop::Hops;
use crate::ids::{BucketId, ParamId, Rank};
use crate::mesh::{Group, Mesh};
use crate::packing::lay_out;
use crate::partition::{BucketLayout, Fragment, Partition};
use crate::route::{self, Bounds, List, Route};
use crate::schedule::Schedule;
use crate::stage::Rules;
use crate::units::{Unit, units};

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
    /// How much longer, in millionths, a bucket may become than it is when it is cut evenly, so that
    /// its shards hold whole parameters where they may not be cut: see [`Way`].
    pub whole_padding: u32,
}

/// What a bucket may become longer by default: a tenth.
pub const WHOLE_PADDING: u32 = 100_000;

/// The immutable result of planning.
#[derive(Clone)]
pub struct Plan {
    layout: Arc<Layout>,
    schedule: Schedule,
    lists: Arc<[List]>,
    digest: u64,
}

struct Layout {
    params: Vec<Param>,
    mesh: Mesh,
    rules: Rules,
    cap: Cap,
    window: u32,
    buckets: Vec<Bucket>,
    partitions: Vec<Partition>,
    hops: Vec<Hops>,
    units: Vec<Unit>,
    /// Bucket of each parameter and its position there.
    homes: Vec<(BucketId, u32)>,
    owners: Owners,
    digest: u64,
}

impl Plan {
    /// Plans `spec`.
    ///
    /// # Errors
    /// A [`PlanError`] that names what is wrong with the specification.
    pub fn new(mut spec: PlanSpec) -> Result<Self, PlanError> {
        check(&spec)?;
        drop_grains(&mut spec);
        let mut buckets = assign(&spec.params, spec.cap);
        let mut spent = vec![0; spec.mesh.size(Group::Shard) as usize];
        let partition = |bucket| lay_out(bucket, &spec.params, spec.whole_padding, &mut spent);
        let partitions = buckets.iter_mut().map(partition).collect::<Result<Vec<_>, _>>()?;
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
    /// buckets that the parameters and ranks do not tile, [`PlanError::CutBlock`].
    pub fn restore(
        params: Vec<Param>,
        layouts: Vec<BucketLayout>,
        world: u32,
        rules: Rules,
    ) -> Result<Self, PlanError> {
        let mesh = Mesh::flat(world)?;
        let cap = Cap::Bytes(u64::MAX);
        let mut spec =
            PlanSpec { params, mesh, rules, cap, window: None, whole_padding: WHOLE_PADDING };
        check(&spec)?;
        drop_grains(&mut spec);
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
        let all = trained(&buckets).count() as u32;
        let window = spec.window.map_or(all, |window| window.min(all));
        let PlanSpec { params, mesh, rules, cap, .. } = spec;
        let hops = buckets.iter().map(|bucket| Hops::of(bucket, rules, &mesh)).collect();
        let units = units(&buckets, &partitions);
        let owners = Owners::new(&buckets, &partitions, &params, mesh.size(Group::Shard));
        let mut layout = Layout {
            params,
            mesh,
            rules,
            cap,
            window,
            buckets,
            partitions,
            hops,
            units,
            homes,
            owners,
            digest: 0,
        };
        layout.digest = layout.hash();
        let order: Vec<BucketId> = trained(&layout.buckets).map(|bucket| bucket.id).collect();
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
            trained(self.buckets()).map(|bucket| (filled(bucket), bucket.id)).collect();
        order.sort_unstable();
        let order: Vec<BucketId> = order.into_iter().map(|(_, bucket)| bucket).collect();
        Ok(Self::with_order(Arc::clone(&self.layout), &order))
    }

    fn with_order(layout: Arc<Layout>, order: &[BucketId]) -> Self {
        let schedule = Schedule::new(order, layout.window);
        let digest = digest::schedule_digest(layout.digest, &schedule);
        Self { layout, schedule, lists: Arc::new([]), digest }
    }

    /// The same layout and order of launches, with a list for each of `routes`, which are in the
    /// order in which their passes ran. `room` is how many elements may be whole or gathering at
    /// once, `depth` how many stops ahead units are gathered.
    ///
    /// # Errors
    /// [`PlanError::BadRoute`].
    pub fn routed(&self, routes: &[Route], room: u64, depth: u32) -> Result<Self, PlanError> {
        let order: Vec<BucketId> = self.schedule.launches().collect();
        let (units, window) = (self.units(), self.window());
        let buckets = self.buckets();
        let bounds = Bounds { buckets, units, order: &order, window, room, depth };
        let lists = route::lists(&bounds, routes)?;
        let layout = Arc::clone(&self.layout);
        let digest =
            digest::lists_digest(digest::schedule_digest(layout.digest, &self.schedule), &lists);
        Ok(Self { layout, schedule: self.schedule.clone(), lists: lists.into(), digest })
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

    /// How long a bucket might become when they were assigned. Not part of the layout, which says how
    /// long they have become; a restored one has no cap that bounds.
    pub fn cap(&self) -> Cap {
        self.layout.cap
    }

    /// How many launched buckets may be unretired: at least 1 where one is trained, at most all.
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

    /// What is gathered and freed together, by id. Empty unless parameters are sharded.
    pub fn units(&self) -> &[Unit] {
        &self.layout.units
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

    /// How a bucket's whole gradients reach their owners; None for a bucket whose parameters may be
    /// cut.
    ///
    /// # Errors
    /// [`PlanError::UnknownBucket`].
    pub fn way(&self, id: BucketId) -> Result<Option<Way>, PlanError> {
        self.bucket(id).map(|bucket| self.layout.owners.way(bucket.id))
    }

    /// The number of the shard whose rank steps a parameter; None for one that may be cut.
    ///
    /// # Errors
    /// [`PlanError::UnknownParam`].
    pub fn owner(&self, param: ParamId) -> Result<Option<u32>, PlanError> {
        self.home(param).map(|_| self.layout.owners.of(param))
    }

    /// What the updates of parameters that may not be cut cost, by shard.
    pub fn costs(&self) -> &[u128] {
        self.layout.owners.costs()
    }

    /// What `rank` sends and receives where its shard group exchanges gradients: one entry for each
    /// dtype, the same dtypes on all ranks.
    ///
    /// # Errors
    /// [`PlanError::UnknownRank`].
    pub fn exchanges(&self, rank: Rank) -> Result<Vec<Exchange>, PlanError> {
        let Layout { mesh, buckets, partitions, owners, .. } = &*self.layout;
        let shard = mesh.position(Group::Shard, rank)?;
        Ok(owners.exchanges(buckets, partitions, shard))
    }

    /// The static list of a pass.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The lists of passes whose routes are known.
    pub fn lists(&self) -> &[List] {
        &self.lists
    }

    /// The commands of a pass along the list of this number, or where it has none along the
    /// schedule.
    pub fn commands(&self, list: Option<usize>) -> &[Command] {
        let list = list.and_then(|list| self.lists.get(list));
        list.map_or_else(|| self.schedule.commands(), List::commands)
    }

    /// Hash of everything: layout, rules, mesh, hops, launch order, window, lists. The same on
    /// every platform.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Hash of everything but schedule and lists. Plans with equal ones can stand in for each other over
    /// the same buffers.
    pub fn layout_digest(&self) -> u64 {
        self.layout.digest
    }
}

/// A plan is long: its digest and its sizes.
impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units: Vec<u64> = self.units().iter().map(|unit| unit.numel).collect();
        f.debug_struct("Plan")
            .field("digest", &self.digest)
            .field("params", &self.params().len())
            .field("buckets", &self.buckets().len())
            .field("units", &units)
            .finish_non_exhaustive()
    }
}

/// The buckets that are reduced, by id.
fn trained(buckets: &[Bucket]) -> impl Iterator<Item = &Bucket> {
    buckets.iter().filter(|bucket| bucket.is_trained())
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
