//! What each bucket's hops and the work around them take, worked out once a prediction.

use super::CostError;
use super::machine::{Machine, Price, whole};
use crate::bucket::Bucket;
use crate::command::Op;
use crate::hop::{Hop, Hops};
use crate::ids::Rank;
use crate::mesh::{Group, Mesh};
use crate::plan::Plan;
use crate::stage::{Placement, Rules};

/// A hop with its price.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leg {
    /// Number of the wire.
    pub(super) wire: usize,
    pub(super) price: Price,
    /// ns to take its result.
    pub(super) take: u64,
}

/// A bucket's.
#[derive(Clone, Debug)]
pub(super) struct BucketPrices {
    pub(super) reduce: Vec<Leg>,
    pub(super) publish: Vec<Leg>,
    /// From shards to the whole, where it is in a unit.
    pub(super) gather: Vec<Leg>,
    /// ns to start it and to pack its gradients.
    pub(super) pack: u64,
    pub(super) update: u64,
    /// Bytes of its gradient as encoded.
    pub(super) nbytes: u64,
}

/// A plan's, by bucket.
#[derive(Clone, Debug)]
pub(super) struct Prices {
    pub(super) buckets: Vec<BucketPrices>,
    pub(super) vote: u64,
}

/// Doubles of a rank's row in the vote.
const ROW: f64 = 7.0;

pub(super) fn prices(plan: &Plan, machine: &Machine) -> Result<Prices, CostError> {
    let mesh = mesh(plan, machine.network.hosts)?;
    let pricing = Pricing { plan, machine, mesh: mesh.as_ref().unwrap_or(plan.mesh()) };
    let buckets = plan.buckets().iter().map(|bucket| pricing.bucket(bucket));
    let world = plan.world();
    let nbytes = 8.0 * ROW * f64::from(world);
    let vote = machine.network.control.duration_ns(Op::AllReduce, world, nbytes);
    let vote = if world > 1 { vote } else { 0 };
    Ok(Prices {
        buckets: buckets.collect(),
        vote: vote.saturating_add(whole(machine.rates.vote_ns)),
    })
}

/// The mesh of so many hosts; None where it is the plan's.
fn mesh(plan: &Plan, hosts: u32) -> Result<Option<Mesh>, CostError> {
    let world = plan.world();
    if hosts == 0 {
        return Ok(None);
    }
    if hosts > world || !world.is_multiple_of(hosts) {
        return Err(CostError::UnevenHosts { world, hosts });
    }
    let ranks: Vec<Rank> = (0..world).map(Rank).collect();
    let by_host = ranks.chunks((world / hosts) as usize).map(<[Rank]>::to_vec).collect();
    Ok(Some(Mesh::new(&[by_host])?))
}

struct Pricing<'a> {
    plan: &'a Plan,
    machine: &'a Machine,
    mesh: &'a Mesh,
}

impl Pricing<'_> {
    fn bucket(&self, bucket: &Bucket) -> BucketPrices {
        let partition = self.plan.partition(bucket.id);
        let (numel, shard) = partition.map_or((0, 0), |part| (part.numel(), part.shard_numel()));
        let rules = self.plan.rules();
        let rules = Rules { parameter: bucket.parameter(), ..rules };
        let mut prices = BucketPrices {
            reduce: Vec::new(),
            publish: Vec::new(),
            gather: Vec::new(),
            pack: 0,
            update: 0,
            nbytes: 0,
        };
        if bucket.unit.is_some() {
            let replicated = Rules { parameter: Placement::Replicated, ..rules };
            let gather = Hops::new(replicated, self.mesh, bucket.wire).publish;
            prices.gather = self.legs(bucket, &gather, shard);
        }
        if !bucket.is_trained() {
            return prices;
        }
        let hops = Hops::new(rules, self.mesh, bucket.wire);
        let rates = &self.machine.rates;
        let element = self.element(bucket, hops.reduce.first().and_then(|hop| hop.wire));
        let nbytes = numel as f64 * element;
        let owned = if rules.optimizer == Placement::Sharded { shard } else { numel };
        prices.reduce = self.legs(bucket, &hops.reduce, numel);
        prices.publish = self.legs(bucket, &hops.publish, shard);
        prices.pack = whole(rates.launch_ns + rates.pack_byte_ns * nbytes);
        prices.update = whole(rates.update_ns + rates.update_element_ns * owned as f64);
        prices.nbytes = whole(nbytes);
        prices
    }

    /// Hops that begin with `numel` elements on each rank.
    fn legs(&self, bucket: &Bucket, hops: &[Hop], numel: u64) -> Vec<Leg> {
        let mut here = numel as f64;
        let leg = |hop: &Hop| {
            let ranks = self.mesh.size(hop.group);
            let size = f64::from(ranks);
            let (all, after) = match hop.op {
                Op::ReduceScatter => (here, here / size),
                Op::AllGather => (here * size, here * size),
                Op::AllReduce | Op::Copy => (here, here),
            };
            let element = self.element(bucket, hop.wire);
            let rates = &self.machine.rates;
            let (wire, link) = self.machine.network.link(hop.group, hop.op);
            let arrives = match hop.op {
                Op::ReduceScatter if self.machine.sums_pieces => all,
                Op::ReduceScatter | Op::AllReduce => after,
                Op::AllGather | Op::Copy => 0.0, // in place
            };
            here = after;
            Leg {
                wire,
                price: link.price(hop.op, ranks, all * element),
                take: whole(rates.sum_ns + rates.sum_byte_ns * arrives * element),
            }
        };
        hops.iter().filter(|hop| hop.group != Group::Own).map(leg).collect()
    }

    /// Bytes of an element in a hop.
    fn element(&self, bucket: &Bucket, wire: Option<crate::ids::WireId>) -> f64 {
        let encoded = wire.and_then(|wire| self.machine.wires.get(wire.0 as usize).copied());
        encoded.unwrap_or(bucket.dtype.size() as f64)
    }
}
