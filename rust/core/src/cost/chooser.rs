//! Which bucket size and window a step is fastest with.
//!
//! A closed form says about where: backward makes gradients at g bytes a ns, a bucket of b bytes
//! takes alpha + beta b on the wire. Where communication keeps up, beta g < 1, no bucket waits for
//! the one before it from b = alpha g / (1 - beta g) on, and larger ones only end later. Where it
//! does not, the wire is busy to the end: the first bucket leaves b / g behind the start, M / b
//! messages follow, and the sum of both is least at b = sqrt(alpha M g). Sizes around that are then
//! planned and simulated, and beside them the one that is given.

use super::account::Prediction;
use super::machine::{Machine, Workload};
use super::{CostError, prices, simulate};
use crate::bucket::Cap;
use crate::plan::{Plan, PlanSpec};

/// A bucket size and a window, and what they come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How long a bucket may become.
    pub cap: Cap,
    /// Buckets that may be under way; None is all.
    pub window: Option<u32>,
    /// The step.
    pub prediction: Prediction,
}

/// The closed form: bytes of a bucket for `alpha_ns` a collective, `byte_ns` a byte, `rate` bytes a
/// ns from the backward and `total` bytes of gradients.
pub fn guess(alpha_ns: f64, byte_ns: f64, rate: f64, total: f64) -> f64 {
    let busy = byte_ns * rate;
    let bytes =
        if busy < 1.0 { alpha_ns * rate / (1.0 - busy) } else { (alpha_ns * total * rate).sqrt() };
    if bytes.is_finite() { bytes.min(total) } else { total }
}

/// The fastest of the sizes around the guess, of `spec`'s own and of those that are `also` given,
/// each with each of `windows`. Of equally fast ones that which holds least in flight, and then the
/// first.
///
/// # Errors
/// Those of [`simulate`].
pub fn choose(
    spec: &PlanSpec,
    workload: &Workload,
    machine: &Machine,
    windows: &[Option<u32>],
    also: &[Cap],
) -> Result<Choice, CostError> {
    let present = simulated(spec, workload, machine, (spec.cap, spec.window))?;
    let around = around(spec, workload, machine)?;
    let caps = std::iter::once(spec.cap).chain(also.iter().copied()).chain(around);
    let mut best = present;
    for cap in caps {
        for &window in windows.iter().chain(std::iter::once(&spec.window)) {
            let choice = simulated(spec, workload, machine, (cap, window))?;
            if choice.rank() < best.rank() {
                best = choice;
            }
        }
    }
    Ok(best)
}

impl Choice {
    fn rank(&self) -> (u64, u64) {
        (self.prediction.total_ns, self.prediction.peak_in_flight)
    }
}

fn simulated(
    spec: &PlanSpec,
    workload: &Workload,
    machine: &Machine,
    (cap, window): (Cap, Option<u32>),
) -> Result<Choice, CostError> {
    let plan = ordered(PlanSpec { cap, window, ..spec.clone() }, workload)?;
    let prediction = simulate(&plan, workload, machine)?;
    Ok(Choice { cap, window, prediction })
}

/// A plan whose launches are in the order of arrival, as after a first pass.
fn ordered(spec: PlanSpec, workload: &Workload) -> Result<Plan, CostError> {
    let plan = Plan::new(spec)?;
    workload.check(&plan)?;
    Ok(plan.reordered(&workload.observed())?)
}

/// Sizes from a sixteenth of the guess to sixteen times it.
fn around(
    spec: &PlanSpec,
    workload: &Workload,
    machine: &Machine,
) -> Result<impl Iterator<Item = Cap>, CostError> {
    let whole = Plan::new(PlanSpec { cap: Cap::Bytes(u64::MAX), ..spec.clone() })?;
    machine.check()?;
    let prices = prices::prices(&whole, machine)?;
    let legs = || prices.buckets.iter().flat_map(|bucket| &bucket.reduce);
    let buckets = prices.buckets.len().max(1) as f64;
    let alpha = legs().map(|leg| leg.price.latency_ns as f64).sum::<f64>() / buckets;
    let memory = whole.buckets().iter().filter_map(|bucket| {
        let partition = whole.partition(bucket.id).ok()?;
        bucket.is_trained().then(|| partition.numel() as f64 * bucket.dtype.size() as f64)
    });
    let total = memory.sum::<f64>().max(1.0);
    let beta = legs().map(|leg| leg.price.transfer_ns as f64).sum::<f64>() / total;
    let rate = total / (workload.backward_ns.max(1) as f64);
    let guess = guess(alpha, beta, rate, total).max(1.0);
    let sizes = (-8..=8_i32).map(move |power| guess * 2_f64.powf(f64::from(power) / 2.0));
    // a cap in bytes is an integer: the conversion saturates
    #[allow(clippy::cast_sign_loss)]
    Ok(sizes.map(|size| Cap::Bytes((size as u64).max(1))))
}
