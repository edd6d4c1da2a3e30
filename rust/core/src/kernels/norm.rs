//! Squared norm and the search for what is not finite.

use super::{BLOCK, Element, Real};

/// Independent partial sums: enough to hide the latency of an addition, and a divisor of [`BLOCK`],
/// so that an element's lane is its index modulo `LANES` however many blocks came before.
const LANES: usize = 16;

/// A running sum of squares in fp64.
pub(super) struct SquaredNorm([f64; LANES]);

impl SquaredNorm {
    pub(super) const fn new() -> Self {
        Self([0.0; LANES])
    }

    /// Takes the next block; only the last one may have fewer than [`BLOCK`] elements.
    pub(super) fn add<R: Real>(&mut self, values: &[R]) {
        let (rows, rest) = values.as_chunks::<LANES>();
        let mut lanes = self.0; // a copy can stay in registers
        for row in rows {
            add_squares(&mut lanes, row);
        }
        add_squares(&mut lanes, rest);
        self.0 = lanes;
    }

    /// The sum of what `values` (all that was added) came to.
    ///
    /// The square of an fp32 can not overflow an fp64, that of an fp64 can. A caller reads an
    /// infinity as "an element is not finite", so a sum that overflowed by itself stops at the
    /// largest fp64.
    pub(super) fn total<E: Element>(self, values: &[E]) -> f64 {
        let total: f64 = self.0.iter().sum();
        if total.is_finite() || first_nonfinite(values).is_some() { total } else { f64::MAX }
    }
}

fn add_squares<R: Real>(lanes: &mut [f64; LANES], row: &[R]) {
    for (lane, value) in lanes.iter_mut().zip(row) {
        let value = value.to_f64();
        *lane += value * value;
    }
}

/// The squared norm, accumulated in fp64; not finite exactly when an element is not.
pub fn squared_norm<E: Element>(values: &[E]) -> f64 {
    let mut norm = SquaredNorm::new();
    let mut wide = [E::Sum::ZERO; BLOCK];
    for block in values.chunks(BLOCK) {
        let wide = &mut wide[..block.len()];
        E::load(block, wide);
        norm.add(wide);
    }
    norm.total(values)
}

/// Index of the first infinity or NaN.
pub fn first_nonfinite<E: Element>(values: &[E]) -> Option<usize> {
    // A block is searched to its end, without the early exit that would keep the loop from being
    // vectorised.
    let finite = |block: &[E]| block.iter().fold(true, |all, value| all & value.is_finite());
    let (index, block) = values.chunks(BLOCK).enumerate().find(|(_, block)| !finite(block))?;
    let within = block.iter().position(|value| !value.is_finite())?;
    Some(index * BLOCK + within)
}
