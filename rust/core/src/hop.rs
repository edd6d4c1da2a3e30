//! The hops of a bucket: which collectives, over which ranks, encoded how.
//!
//! A gradient goes through the *reduce* hops one after the other, from the whole of what this rank
//! has computed to what its optimizer needs: the sum over all ranks, its shard of it or the whole.
//! Updated parameters go through the *publish* hops, from this rank's shard to the whole.
//!
//! | optimizer state | parameter  | reduce                        | publish     |
//! |-----------------|------------|-------------------------------|-------------|
//! | replicated      | replicated | reduce-scatter, all-gather    |             |
//! | sharded         | replicated | reduce-scatter                | all-gather  |
//! | sharded         | sharded    | reduce-scatter                |             |
//!
//! The parameter's placement is the bucket's: at stage 3 one without a unit is replicated, and
//! published. One in a unit is gathered when it is needed ([`crate::gatherer`]), on the hops of an
//! all-gather. A bucket that is only held has no others.
//!
//! Where the optimizer is replicated the sum is gathered, not all-reduced: every shard is summed
//! once, in rank order, so that its bits are those of the other rows. The mesh refines each entry:
//!
//! - *Several hosts*: reduce-scatter is one on `inner` in full precision and then one on `outer`
//!   in the bucket's wire format; all-gather is one on `outer` and then one on `inner`. A narrow
//!   format so loses bits only where the network is slow.
//! - *Several copies of the model state*: an all-reduce on `replica` follows the reduce-scatter.
//! - *Parameters kept on their host* between forward and backward: what publish's first hop leaves
//!   is contiguous, so the second use needs its last hop alone.
//! - *State that lives elsewhere*, in the host's memory: nothing is planned for it. A copy behind the
//!   reduce hops and one before the publish hops are a rank's own matter.
//! - *Parameters that are stepped whole by one rank, of which shards hold parts*: between the two,
//!   once a boundary, gradients go to their owners and parameters come back ([`crate::exchange`]).
//!
//! - **HOP-1** The reduce hops leave every rank the sum over all ranks, each once: of the shard
//!   with its number where the optimizer is sharded, of everything where it is not. The publish
//!   hops leave it the whole.
//! - **HOP-2** All members of a group add in the same order, so equal shards have equal bits.
//! - **HOP-3** A rank sends (N-1)/N of a bucket to reduce it to N shards and as much to gather
//!   them; with H hosts of L ranks (L-1)/L of it inside and (H-1)/H of a host's L-th between them.
//!
//! A hop over a group of one rank is left out, but for the first, which takes the gradient in.

use crate::bucket::Bucket;
use crate::command::Op;
use crate::ids::WireId;
use crate::mesh::{Group, Mesh};
use crate::stage::{Placement, Rules};

/// One collective of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hop {
    /// What it does.
    pub op: Op,
    /// Whom with.
    pub group: Group,
    /// How it is encoded; None is as it lies in memory.
    pub wire: Option<WireId>,
}

/// All collectives of a bucket, in the order in which they run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hops {
    /// From a rank's own gradient to what its optimizer needs.
    pub reduce: Vec<Hop>,
    /// From a rank's updated shard to the parameters that it computes with.
    pub publish: Vec<Hop>,
    /// The same where parameters are sharded between their uses: whenever they are needed.
    pub gather: Vec<Hop>,
}

impl Hops {
    /// The hops of a bucket of a plan with these `rules`.
    pub(crate) fn of(bucket: &Bucket, rules: Rules, mesh: &Mesh) -> Self {
        if bucket.is_trained() {
            Self::new(Rules { parameter: bucket.parameter(), ..rules }, mesh, bucket.wire)
        } else {
            Self {
                reduce: Vec::new(),
                publish: Vec::new(),
                gather: gathers(bucket.parameter(), mesh),
            }
        }
    }

    /// The hops of a bucket whose gradients are encoded as `wire`.
    pub fn new(rules: Rules, mesh: &Mesh, wire: WireId) -> Self {
        let mut reduce = scatter(mesh, wire);
        if mesh.size(Group::Replica) > 1 {
            reduce.push(Hop { op: Op::AllReduce, group: Group::Replica, wire: Some(wire) });
        }
        if rules.gathers_gradient() {
            reduce.extend(gather(mesh, Some(wire)));
        }
        let publish = if rules.gathers_parameter() { gather(mesh, None) } else { Vec::new() };
        Self { reduce, publish, gather: gathers(rules.parameter, mesh) }
    }
}

/// What brings parameters to where they are used.
fn gathers(parameter: Placement, mesh: &Mesh) -> Vec<Hop> {
    match parameter {
        Placement::Sharded => gather(mesh, None),
        Placement::Replicated => Vec::new(),
    }
}

/// From whole gradients to summed shards.
fn scatter(mesh: &Mesh, wire: WireId) -> Vec<Hop> {
    let hop = |group, wire| Hop { op: Op::ReduceScatter, group, wire };
    if is_nested(mesh) {
        vec![hop(Group::Inner, None), hop(Group::Outer, Some(wire))]
    } else {
        vec![hop(Group::Shard, Some(wire))]
    }
}

/// From shards to the whole, the way back of [`scatter`].
fn gather(mesh: &Mesh, wire: Option<WireId>) -> Vec<Hop> {
    let hop = |group, wire| Hop { op: Op::AllGather, group, wire };
    if is_nested(mesh) {
        vec![hop(Group::Outer, wire), hop(Group::Inner, None)]
    } else if mesh.size(Group::Shard) > 1 {
        vec![hop(Group::Shard, wire)]
    } else {
        Vec::new()
    }
}

/// Whether a shard group spans several hosts, several ranks each.
fn is_nested(mesh: &Mesh) -> bool {
    mesh.size(Group::Inner) > 1 && mesh.size(Group::Outer) > 1
}
