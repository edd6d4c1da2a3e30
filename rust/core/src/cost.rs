//! What a step takes: a plan's own lists, run against a network and a machine that are numbers.
//!
//! [`simulate`] is an executor without tensors. It walks the commands that the real one runs, moved
//! by the same cursor, and where that would start a collective it books time on a [`Network`]: a
//! fixed price for each message and one for each byte (Hockney's alpha and beta), and the local work
//! around it, packing, summing, updating, at so many ns a byte or element (gamma) and so many a bucket. So what it says
//! follows from the order of *this* plan, its window and its buckets, not from averages.
//!
//! ```text
//! host    forward │ backward ──pack b0── backward ──pack b1──┤sum b0│wait│sum b1│ vote │ update │ wait
//! wire                              [alpha│beta b0][alpha│beta b1]                       [publish ...]
//! ```
//!
//! Where parameters are published beside the next forward ([`Overlap`]) a step is taken from one vote
//! to the next: buckets are updated and sent in the order in which a forward needs them, and what of
//! the loader and the forward lies before a bucket's need hides it.
//!
//! What it is given of the model is a [`Workload`]: how long a forward and a backward compute, and
//! when in a backward each parameter's gradient comes. At stage 3 what is needed when follows from
//! the plan's lists, or where there are none from units that are used one after the other.
//!
//! There are two kinds of machine. Where a wait *blocks* the host (gloo), packing and sums take time
//! of the backward, a Retire that is not complete is looked at again when the next bucket is full,
//! and what is left is waited for behind the backward. Where it does not (an accelerator), sums have
//! a stream of their own, and a Launch waits where its memory is still in use.
//!
//! - **CST-1** A prediction is a function of its arguments: no clock, no random number, all sums in
//!   integers of nanoseconds, which saturate.
//! - **CST-2** The parts add up: a step is compute, packing, sums, what was waited for, vote, update
//!   and publication, and nothing else. A bucket's time under way is what was waited for and what
//!   was hidden.
//! - **CST-3** A higher price of a message, a byte or any local work never makes a step shorter, where
//!   nothing is polled: on streams, and on a blocking host whose window is all and whose buckets have
//!   one reduce hop. Else such a host may take a sum into its backward that it would have taken while
//!   it waits, so there a better network may cost what those sums take, and no more.
//! - **CST-4** A window of all is never slower than a smaller one where a bucket has one reduce hop
//!   (stages 1 to 3 of a flat mesh). Where it has two, the second starts once the first is complete
//!   and the host comes by (SCH-4), on streams at its Retire: there a smaller window can be faster.
//! - **CST-5** What ranks send is what HOP-3 says, for every algorithm that sends no byte twice.
//!
//! - **CST-6** Publishing beside the next forward is never slower than within the step, and changes
//!   nothing else: all other parts are the same. An [`Overlap`] that asks for more than nothing is
//!   none where little is waited for, so there CST-3 holds on either side of that mark alone.
//!
//! What it does not know: other jobs on the network, its topology beyond hosts, messages that a
//! library pipelines within a collective, and ranks that differ from one another. A collective is as
//! if all ranks came to it at once.

mod account;
mod chooser;
mod collective;
mod executor;
mod machine;
mod passes;
mod prices;
mod wire;

use crate::error::PlanError;
use crate::plan::Plan;

pub use account::{BucketTimes, Prediction, Traffic};
pub use chooser::{Bound, Choice, choose, guess, unmeasured};
pub use collective::Algorithm;
pub use machine::{Fabric, Link, Machine, Network, Overlap, Rates, Workload};

/// Why nothing can be predicted.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum CostError {
    /// A price or a rate that is negative, infinite or no number.
    #[error("{what} is {value}: expected a finite number of 0 or more")]
    BadRate {
        /// Which one.
        what: &'static str,
        /// What was given.
        value: f64,
    },
    /// Not an arrival for each parameter.
    #[error("expected an arrival for each of {params} parameters, got {got}")]
    WrongLength {
        /// How many parameters the plan has.
        params: usize,
        /// How many arrivals were given.
        got: usize,
    },
    /// Hosts that the ranks cannot be spread over evenly.
    #[error("{world} ranks cannot be spread evenly over {hosts} hosts")]
    UnevenHosts {
        /// How many ranks there are.
        world: u32,
        /// How many hosts.
        hosts: u32,
    },
    /// Planning refused.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// The step of one rank.
///
/// # Errors
/// [`CostError`], which names what was given.
pub fn simulate(
    plan: &Plan,
    workload: &Workload,
    machine: &Machine,
) -> Result<Prediction, CostError> {
    machine.check()?;
    workload.check(plan)?;
    let routed = passes::routed(plan, workload, machine)?;
    let plan = routed.as_ref().unwrap_or(plan);
    let prices = prices::prices(plan, machine)?;
    let within = passes::step(plan, workload, machine, &prices, false);
    let overlap = machine.overlap.filter(|_| plan.units().is_empty() && within.publish_ns > 0);
    if overlap.is_some_and(|overlap| overlap.pays(within.publish_ns, within.total_ns)) {
        return Ok(passes::step(plan, workload, machine, &prices, true));
    }
    Ok(within)
}
