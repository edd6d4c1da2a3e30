//! `LossScale`: the core's state machine, with plain numbers on both sides.

use pyo3::prelude::*;
use zerort_core::scaler::{self, Counting, Outcome, Policy, State};

pyo3::import_exception!(zerort.errors, ConfigError);

/// `(scale, hysteresis left, boundaries seen, boundary of the last overflow or 0)`.
type Saved = (f64, u32, u64, u64);

/// The dynamic loss scale, by `DeepSpeed`'s rules or by Apex's, as a pure state machine.
#[pyclass(module = "zerort._core")]
pub struct LossScale(scaler::LossScale);

#[pymethods]
impl LossScale {
    #[new]
    #[pyo3(signature = (
        *,
        initial,
        window,
        hysteresis,
        consecutive,
        minimum,
        forgives_at_minimum = false,
        maximum = f64::INFINITY,
        counts_through = false,
        factor = 2.0,
    ))]
    // Python's keywords: each has a name where it is given.
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)]
    fn new(
        initial: f64,
        window: u64,
        hysteresis: u32,
        consecutive: bool,
        minimum: f64,
        forgives_at_minimum: bool,
        maximum: f64,
        counts_through: bool,
        factor: f64,
    ) -> PyResult<Self> {
        let counting = if counts_through { Counting::Through } else { Counting::Before };
        let policy = Policy {
            window,
            counting,
            hysteresis,
            consecutive,
            minimum,
            forgives_at_minimum,
            maximum,
            factor,
        };
        scaler::LossScale::new(initial, policy).map(Self).map_err(refused)
    }

    #[getter]
    fn scale(&self) -> f64 {
        self.0.scale()
    }

    /// Advances by one boundary. False when the step overflowed with the scale already at its
    /// minimum, and the policy does not forgive that.
    fn update(&mut self, overflow: bool) -> bool {
        match self.0.update(overflow) {
            Outcome::Kept | Outcome::Grown | Outcome::Forgiven | Outcome::Cut => true,
            Outcome::AtMinimum => false,
        }
    }

    /// What a checkpoint must keep.
    fn state(&self) -> Saved {
        let State { scale, hysteresis_left, boundaries, last_overflow } = self.0.state();
        (scale, hysteresis_left, boundaries, last_overflow)
    }

    /// Goes on from what `state` gave.
    fn restore(&mut self, state: Saved) -> PyResult<()> {
        let (scale, hysteresis_left, boundaries, last_overflow) = state;
        self.0.restore(State { scale, hysteresis_left, boundaries, last_overflow }).map_err(refused)
    }
}

// A map_err adaptor takes its error by value.
#[allow(clippy::needless_pass_by_value)]
fn refused(error: scaler::LossScaleError) -> PyErr {
    ConfigError::new_err(format!("loss scale: {error}"))
}
