//! What a step runs on, and what it computes: everything that is measured or assumed.

use std::cmp::Reverse;

use super::CostError;
use super::collective::Algorithm;
use crate::command::Op;
use crate::ids::ParamId;
use crate::mesh::Group;
use crate::plan::Plan;

/// What a kind of collective costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// How it is made.
    pub algorithm: Algorithm,
    /// ns of one message, however short.
    pub alpha_ns: f64,
    /// ns of one byte through a rank's link.
    pub byte_ns: f64,
    /// ns that every further message of [`Algorithm::Flat`] adds where all are sent at once; None
    /// where they follow one another.
    pub message_ns: Option<f64>,
}

/// What one collective takes of a wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Price {
    pub(super) latency_ns: u64,
    pub(super) transfer_ns: u64,
    /// Bytes that a rank sends.
    pub(super) sent: u64,
}

impl Link {
    /// `op` of `nbytes`, those of the whole, over `ranks` ranks.
    pub(super) fn price(&self, op: Op, ranks: u32, nbytes: f64) -> Price {
        let prices = self.algorithm.candidates().iter().map(|algorithm| {
            let steps = algorithm.steps(op, ranks);
            let latency = match (algorithm, self.message_ns) {
                (Algorithm::Flat, Some(more)) if steps.messages > 0.0 => {
                    self.alpha_ns + more * (steps.messages - 1.0)
                }
                _ => self.alpha_ns * steps.messages,
            };
            Price {
                latency_ns: whole(latency),
                transfer_ns: whole(self.byte_ns * steps.volume * nbytes),
                sent: whole(steps.sent * nbytes),
            }
        });
        prices
            .min_by_key(|price| price.latency_ns.saturating_add(price.transfer_ns))
            .unwrap_or_default()
    }

    /// ns of one such collective by itself.
    pub fn duration_ns(&self, op: Op, ranks: u32, nbytes: f64) -> u64 {
        let price = self.price(op, ranks, nbytes);
        price.latency_ns.saturating_add(price.transfer_ns)
    }
}

/// One network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fabric {
    /// Reduce-scatters, and all-reduces.
    pub scatter: Link,
    /// All-gathers.
    pub gather: Link,
    /// Collectives that may be under way at once, whose bytes still follow one another.
    pub lanes: u32,
}

/// How ranks are connected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    /// Between hosts; all of it where there is one rank a host, or one host.
    pub outer: Fabric,
    /// Within a host.
    pub inner: Fabric,
    /// The small all-reduces of a boundary.
    pub control: Link,
    /// Hosts over which the ranks are spread evenly; 0 is as the plan's mesh has it.
    pub hosts: u32,
}

impl Network {
    /// Of a group: `[outer, inner]`, its number there, and the link of `op`.
    pub(super) fn link(&self, group: Group, op: Op) -> (usize, &Link) {
        let (number, fabric) =
            if group == Group::Inner { (1, &self.inner) } else { (0, &self.outer) };
        (number, if op == Op::AllGather { &fabric.gather } else { &fabric.scatter })
    }
}

/// Local work around a collective.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// ns to start a bucket, however small.
    pub launch_ns: f64,
    /// ns a byte of a gradient that is packed.
    pub pack_byte_ns: f64,
    /// ns a byte that has arrived and is summed or taken.
    pub sum_byte_ns: f64,
    /// ns to take what a reduce hop has brought, however little.
    pub sum_ns: f64,
    /// ns an element that this rank's optimizer updates.
    pub update_element_ns: f64,
    /// ns to update a bucket, however small, and to start its publication.
    pub update_ns: f64,
    /// ns of a vote beside its collective.
    pub vote_ns: f64,
}

/// What waiting for updated parameters within a step has to cost, so that they are waited for in the
/// next forward instead; 0 and 0 is always.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overlap {
    /// ns, at least.
    pub least_ns: f64,
    /// And at least so much of the step.
    pub share: f64,
}

impl Overlap {
    /// Whether it does in a step of `total_ns`, of which `waited_ns` are waited.
    pub(super) fn pays(&self, waited_ns: u64, total_ns: u64) -> bool {
        let waited = waited_ns as f64;
        waited >= self.least_ns && waited >= self.share * total_ns as f64
    }
}

/// What a step runs on.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// Between ranks.
    pub network: Network,
    /// Within one.
    pub rates: Rates,
    /// Whether waiting blocks the host, as on a CPU.
    pub blocks: bool,
    /// Whether every rank's piece arrives and is summed here, or what arrives has been added on the
    /// way.
    pub sums_pieces: bool,
    /// From when on updated parameters are published beside the next forward, where nothing is
    /// sharded between its uses; None is never.
    pub overlap: Option<Overlap>,
    /// Bytes of an element as encoded, by the number of the wire format; as in memory where there
    /// is none.
    pub wires: Vec<f64>,
    /// Elements that may be whole at once at stage 3, where the plan has no lists.
    pub room: u64,
    /// Uses ahead of which they are gathered.
    pub depth: u32,
}

/// What a rank computes in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// ns of the forward of one micro-batch.
    pub forward_ns: u64,
    /// ns of its backward.
    pub backward_ns: u64,
    /// When each parameter's gradient comes, in ns behind the start of a backward; at its end where
    /// that is later.
    pub arrivals: Vec<u64>,
    /// Micro-batches a step; 0 is taken as 1.
    pub micro_batches: u32,
    /// ns of a step in which neither is computed: the loader, the loop.
    pub other_ns: u64,
}

impl Machine {
    /// Whether all of it is finite and not negative.
    ///
    /// # Errors
    /// [`CostError::BadRate`].
    pub fn check(&self) -> Result<(), CostError> {
        let Network { outer, inner, control, .. } = &self.network;
        for (fabric, names) in [
            (outer, ["alpha of the outer link", "beta of the outer link"]),
            (inner, ["alpha of the inner link", "beta of the inner link"]),
        ] {
            fabric.scatter.check_as(names)?;
            fabric.gather.check_as(names)?;
        }
        control.check_as(["alpha of the control link", "beta of the control link"])?;
        let rates = &self.rates;
        check("launch_ns", rates.launch_ns)?;
        check("pack_byte_ns", rates.pack_byte_ns)?;
        check("sum_byte_ns", rates.sum_byte_ns)?;
        check("sum_ns", rates.sum_ns)?;
        check("update_element_ns", rates.update_element_ns)?;
        check("update_ns", rates.update_ns)?;
        check("vote_ns", rates.vote_ns)?;
        if let Some(Overlap { least_ns, share }) = self.overlap {
            check("least_ns of an overlap", least_ns)?;
            check("share of an overlap", share)?;
        }
        self.wires.iter().try_for_each(|&size| check("bytes of an element on the wire", size))
    }
}

impl Link {
    /// Whether it is finite and not negative.
    ///
    /// # Errors
    /// [`CostError::BadRate`].
    pub fn check(&self) -> Result<(), CostError> {
        self.check_as(["alpha", "beta"])
    }

    fn check_as(&self, [alpha, beta]: [&'static str; 2]) -> Result<(), CostError> {
        check(alpha, self.alpha_ns)?;
        check(beta, self.byte_ns)?;
        check("ns of a message", self.message_ns.unwrap_or(0.0))
    }
}

impl Workload {
    /// Parameters in the order in which their gradients come; of equal ones the last registered first.
    pub fn observed(&self) -> Vec<ParamId> {
        let mut order: Vec<ParamId> = (0..self.arrivals.len() as u32).map(ParamId).collect();
        order.sort_by_key(|&param| (self.arrivals[param.index()], Reverse(param)));
        order
    }

    pub(super) fn check(&self, plan: &Plan) -> Result<(), CostError> {
        let (params, got) = (plan.params().len(), self.arrivals.len());
        if params == got { Ok(()) } else { Err(CostError::WrongLength { params, got }) }
    }
}

fn check(what: &'static str, value: f64) -> Result<(), CostError> {
    if value.is_finite() && value >= 0.0 { Ok(()) } else { Err(CostError::BadRate { what, value }) }
}

/// To whole ns or bytes; saturates.
pub(super) fn whole(value: f64) -> u64 {
    // the conversion saturates, and of a NaN makes 0, which no checked rate can become
    #[allow(clippy::cast_sign_loss)]
    {
        value.round() as u64
    }
}
