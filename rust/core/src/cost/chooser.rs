//! Which bucket size and window a step is fastest with.
//!
//! A closed form says about where: backward makes gradients at g bytes a ns, a bucket of b bytes
//! takes alpha + beta b on the wire. Where communication keeps up, beta g < 1, no bucket waits for
//! the one before it from b = alpha g / (1 - beta g) on, and larger ones only end later. Where it
//! does not, the wire is busy to the end: the first bucket leaves b / g behind the start, M / b
//! messages follow, and the sum of both is least at b = sqrt(alpha M g). Where a bucket costs its host
//! something, however small it is, that is as good as a message. Sizes around that are then planned
//! and simulated, and beside them the one that is given. Where nothing has been measured yet,
//! [`unmeasured`] says which size is seldom far off.

use super::account::Prediction;
use super::machine::{Machine, Workload};
use super::{CostError, prices, simulate};
use crate::bucket::{Cap, Param};
use crate::plan::{Plan, PlanSpec};
use crate::stage::{Placement, Rules};

/// Buckets that a model is in, where it is neither short nor long.
const SHARES: u64 = 10;
/// No bucket is shorter: what a host does for each then counts more than what it waits for.
const LEAST: u64 = 1 << 20;
/// For each rank: shorter messages cross one another on gloo's connections.
const MESSAGE: u64 = 128 << 10;
/// No bucket is longer.
const MOST: u64 = 25 << 20;

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

/// What decides how long a bucket may become, where nobody has said it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// A tenth of the trained parameters.
    Share,
    /// What a bucket has at least.
    Least,
    /// What each rank gets of one at least.
    Message,
    /// What a bucket has at most.
    Most,
    /// The same, of what is gathered whole.
    Unit,
}

/// Bytes of a bucket among `ranks` where nothing is measured and nobody has said how long one may
/// become, and what decided it: a tenth of the trained parameters, as they lie in memory, but at
/// least 1 MiB and 128 KiB a rank, and above all at most 25 MiB.
///
/// The closed form for a wire that is busy to the end is sqrt(alpha M g). A backward that takes T
/// makes its M bytes at g = M / T, so that this is M sqrt(alpha / T): a share of the model, whatever
/// its length. It is a tenth where a bucket costs a hundredth of the backward, as over gloo, where
/// that is some milliseconds of some hundreds. The root forgives: where a bucket costs four times as
/// much, or a quarter, what a tenth leaves exposed is a quarter more than at the best size. A faster
/// wire, which is not busy to the end, would take smaller buckets; there a tenth leaves exposed what
/// a tenth of the bytes take.
///
/// Where parameters are sharded it is 25 MiB whatever the model: what a bucket may have is what a unit
/// may have there, and shorter ones tear the modules of a model that is gathered twice a step: four
/// units of a transformer of 82 MB would be eighteen.
///
/// A function of what all ranks know, so that they come to the same size.
pub fn unmeasured(params: &[Param], ranks: u32, rules: Rules) -> (u64, Bound) {
    match rules.parameter {
        Placement::Sharded => return (MOST, Bound::Unit),
        Placement::Replicated => {}
    }
    let trained = params.iter().filter(|param| param.group.is_some());
    let total = trained.fold(0_u64, |sum, param| {
        sum.saturating_add(param.numel.saturating_mul(param.dtype.size()))
    });
    let bounds = [
        (LEAST, Bound::Least),
        (total / SHARES, Bound::Share),
        (MESSAGE.saturating_mul(ranks.into()), Bound::Message),
    ];
    let least = bounds.into_iter().max_by_key(|&(nbytes, _)| nbytes).unwrap_or(bounds[0]);
    if least.0 > MOST { (MOST, Bound::Most) } else { least }
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
    let rates = &machine.rates;
    let host = rates.launch_ns + rates.sum_ns + rates.update_ns;
    let alpha = host + legs().map(|leg| leg.price.latency_ns as f64).sum::<f64>() / buckets;
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
