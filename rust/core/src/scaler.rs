//! The dynamic loss scale of fp16 training, as a pure state machine.
//!
//! A loss is multiplied by the scale so that small gradients do not underflow, and gradients are
//! divided by it before the optimizer sees them. The scale halves when a gradient overflows and
//! doubles after a window of clean steps, so that it stays just below the largest one that works.
//! Hysteresis forgives that many overflows less one before a cut.
//!
//! ```text
//!  overflow, hysteresis left > 1 ──────────────► one forgiven, scale kept
//!  overflow, hysteresis left = 1 ──────────────► scale / factor, not below the minimum
//!                                                already at the minimum: AtMinimum, or forgiven
//!  clean, a whole window of clean ones ────────► scale x factor, not above the maximum, and
//!                                                hysteresis restored
//!  clean, any other ───────────────────────────► nothing; with `consecutive`, hysteresis restored
//! ```
//!
//! Guarantees: the same updates give the same scale on every rank, bit for bit; the scale is always
//! finite, positive, never above the maximum and, once it has fallen to the minimum, never below
//! it. A cut does not restore the hysteresis: until the next growth (or, with `consecutive`, the
//! next clean step) every overflow cuts.
//!
//! [`Counting`] says when a window is whole. A policy that counts [`Counting::Before`], without a
//! maximum and with an end at the minimum, is `DeepSpeed`'s, to the step; one that counts
//! [`Counting::Through`], cuts at each overflow and forgives at the minimum is Apex's, and without
//! bounds that of torch's `GradScaler`.
//!
//! It does not look at gradients, skip steps or log: whether there was an overflow is an argument,
//! and the caller sees to it that all ranks give the same.

use thiserror::Error;

/// When a window of clean boundaries is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counting {
    /// It lies before the boundary at which the scale grows.
    Before,
    /// The boundary at which the scale grows is its last.
    Through,
}

/// How the scale moves; fixed for a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Clean boundaries since the last overflow, or growth, after which the next clean one lets the
    /// scale grow.
    pub window: u64,
    /// Whether the boundary at which the scale grows belongs to that window.
    pub counting: Counting,
    /// Overflows that it takes to cut the scale; 1 cuts at each.
    pub hysteresis: u32,
    /// Whether every clean boundary restores the hysteresis, rather than only one at which the
    /// scale grows.
    pub consecutive: bool,
    /// What the scale never falls below.
    pub minimum: f64,
    /// Whether an overflow at the minimum is forgiven, rather than the end: [`Outcome::AtMinimum`].
    pub forgives_at_minimum: bool,
    /// What the scale never grows beyond; infinity for no such bound.
    pub maximum: f64,
    /// What the scale is divided and multiplied by.
    pub factor: f64,
}

impl Policy {
    fn check(self) -> Result<Self, LossScaleError> {
        positive("minimum", self.minimum)?;
        positive("factor", self.factor)?;
        if self.maximum.is_nan() || self.maximum < self.minimum {
            let Self { minimum, maximum, .. } = self;
            return Err(LossScaleError::MaximumTooSmall { minimum, maximum });
        }
        if self.window == 0 {
            return Err(LossScaleError::Zero { name: "window" });
        }
        if self.hysteresis == 0 {
            return Err(LossScaleError::Zero { name: "hysteresis" });
        }
        if self.factor <= 1.0 {
            return Err(LossScaleError::FactorTooSmall { factor: self.factor });
        }
        Ok(self)
    }
}

fn positive(name: &'static str, value: f64) -> Result<(), LossScaleError> {
    if value.is_finite() && value > 0.0 {
        Ok(())
    } else {
        Err(LossScaleError::NotPositive { name, value })
    }
}

/// Everything that a checkpoint must keep of a loss scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    /// What the next loss is multiplied by.
    pub scale: f64,
    /// Overflows until the next cut.
    pub hysteresis_left: u32,
    /// Boundaries seen so far, overflowed ones included.
    pub boundaries: u64,
    /// The boundary of the last overflow, counted from one; zero before the first.
    pub last_overflow: u64,
}

/// What an update did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A clean boundary; the scale stays.
    Kept,
    /// A clean boundary that completed a window; the scale is larger now.
    Grown,
    /// An overflow that the hysteresis, or the policy at the minimum, forgave; the scale stays.
    Forgiven,
    /// An overflow; the scale is smaller now.
    Cut,
    /// An overflow that no smaller scale can answer; the scale stays at the minimum.
    AtMinimum,
}

/// A loss scale that cannot be made or restored.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum LossScaleError {
    /// A quantity that must be finite and above zero.
    #[error("{name}: expected a finite number above 0, got {value}")]
    NotPositive {
        /// Which quantity.
        name: &'static str,
        /// Its value.
        value: f64,
    },
    /// A count that must be at least one.
    #[error("{name}: expected at least 1, got 0")]
    Zero {
        /// Which count.
        name: &'static str,
    },
    /// A factor that would leave the scale where it is, or move it the wrong way.
    #[error("factor: expected a number above 1, got {factor}")]
    FactorTooSmall {
        /// The factor.
        factor: f64,
    },
    /// A maximum that no scale between the bounds fits under.
    #[error("maximum: expected at least the minimum, {minimum}, got {maximum}")]
    MaximumTooSmall {
        /// The minimum.
        minimum: f64,
        /// The maximum.
        maximum: f64,
    },
    /// A state in which the last overflow lies in the future.
    #[error("state: the last overflow, {last_overflow}, is after the last boundary, {boundaries}")]
    FutureOverflow {
        /// Boundary of the last overflow.
        last_overflow: u64,
        /// Boundaries seen.
        boundaries: u64,
    },
}

/// The scale and the rules by which it moves.
///
/// ```
/// use zerort_core::scaler::{Counting, LossScale, Outcome, Policy};
/// let policy = Policy {
///     window: 2,
///     counting: Counting::Before,
///     hysteresis: 1,
///     consecutive: false,
///     minimum: 1.0,
///     forgives_at_minimum: false,
///     maximum: f64::INFINITY,
///     factor: 2.0,
/// };
/// let mut scale = LossScale::new(1024.0, policy)?;
/// assert_eq!(scale.update(true), Outcome::Cut);
/// assert_eq!([scale.update(false), scale.update(false)], [Outcome::Kept; 2]);
/// assert_eq!(scale.update(false), Outcome::Grown);
/// assert_eq!(scale.scale(), 1024.0);
/// # Ok::<(), zerort_core::scaler::LossScaleError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    policy: Policy,
    state: State,
}

impl LossScale {
    /// A scale before its first boundary; one above the maximum begins there.
    ///
    /// # Errors
    /// When `initial`, the minimum or the factor is not a finite positive number, a count is zero,
    /// the factor does not exceed one, or the maximum is below the minimum.
    pub fn new(initial: f64, policy: Policy) -> Result<Self, LossScaleError> {
        let policy = policy.check()?;
        let hysteresis_left = policy.hysteresis;
        let state = State { scale: initial, hysteresis_left, boundaries: 0, last_overflow: 0 };
        let mut scale = Self { policy, state };
        scale.restore(state)?;
        Ok(scale)
    }

    /// What the next loss is multiplied by.
    pub const fn scale(&self) -> f64 {
        self.state.scale
    }

    /// What a checkpoint must keep.
    pub const fn state(&self) -> State {
        self.state
    }

    /// Goes on from a saved state. More hysteresis than the policy has, or a larger scale, saved
    /// under another policy, is cut to it.
    ///
    /// # Errors
    /// When the scale is not a finite positive number, no hysteresis is left, or the last overflow
    /// lies in the future.
    pub fn restore(&mut self, state: State) -> Result<(), LossScaleError> {
        positive("scale", state.scale)?;
        if state.hysteresis_left == 0 {
            return Err(LossScaleError::Zero { name: "hysteresis left" });
        }
        let State { last_overflow, boundaries, .. } = state;
        if last_overflow > boundaries {
            return Err(LossScaleError::FutureOverflow { last_overflow, boundaries });
        }
        let hysteresis_left = state.hysteresis_left.min(self.policy.hysteresis);
        self.state =
            State { scale: state.scale.min(self.policy.maximum), hysteresis_left, ..state };
        Ok(())
    }

    /// Advances by one boundary; `overflow` says whether any rank had a gradient that is not
    /// finite.
    pub fn update(&mut self, overflow: bool) -> Outcome {
        self.state.boundaries += 1;
        if overflow {
            self.state.last_overflow = self.state.boundaries;
            return self.overflowed();
        }
        self.clean()
    }

    fn overflowed(&mut self) -> Outcome {
        if self.state.hysteresis_left > 1 {
            self.state.hysteresis_left -= 1;
            return Outcome::Forgiven;
        }
        if self.state.scale <= self.policy.minimum {
            return if self.policy.forgives_at_minimum {
                Outcome::Forgiven
            } else {
                Outcome::AtMinimum
            };
        }
        self.state.scale = (self.state.scale / self.policy.factor).max(self.policy.minimum);
        Outcome::Cut
    }

    fn clean(&mut self) -> Outcome {
        let clean = self.state.boundaries - self.state.last_overflow;
        let counted = match self.policy.counting {
            Counting::Before => clean - 1,
            Counting::Through => clean,
        };
        let completed = counted > 0 && counted.is_multiple_of(self.policy.window);
        if completed || self.policy.consecutive {
            self.state.hysteresis_left = self.policy.hysteresis;
        }
        let grown = (self.state.scale * self.policy.factor).min(self.policy.maximum);
        // An infinite scale could never come down again: infinity halved is infinity.
        if !completed || !grown.is_finite() || grown <= self.state.scale {
            return Outcome::Kept;
        }
        self.state.scale = grown;
        Outcome::Grown
    }
}
