//! `Reducer` and `Finished`: the cursor for gradients. Integers in, integers out.
//!
//! Every call keeps the GIL: the longest takes microseconds, and `grad_ready` less than releasing
//! the GIL would. The mutex makes the class sound on any thread; with the GIL held nobody ever
//! waits for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use zerort_core::ParamId;

use crate::errors::StepError;
use crate::ids::number;
use crate::names::kind;
use crate::plan::Plan;

/// The cursor for gradients: how far along the schedule one may go now.
#[pyclass(frozen, module = "zerort._core")]
pub struct Reducer {
    inner: Arc<Mutex<zerort_core::Reducer>>,
}

impl Reducer {
    /// The core's reducer, which a gatherer moves too.
    pub fn inner(&self) -> &Arc<Mutex<zerort_core::Reducer>> {
        &self.inner
    }

    fn lock(&self) -> MutexGuard<'_, zerort_core::Reducer> {
        locked(&self.inner)
    }
}

/// What a mutex guards. The core does not panic half-way through a change, so a poisoned lock guards
/// a sound state.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The core's refusal as the class that Python knows.
pub fn refused(error: zerort_core::StepError) -> PyErr {
    StepError::new_err(error.to_string())
}

fn id(param: i64) -> PyResult<ParamId> {
    number("parameter", param).map(ParamId).map_err(StepError::new_err)
}

fn ids(params: &[ParamId]) -> Vec<u32> {
    params.iter().map(|param| param.0).collect()
}

#[pymethods]
impl Reducer {
    #[new]
    fn new(plan: &Plan) -> Self {
        let reducer = zerort_core::Reducer::new(plan.inner().clone());
        Self { inner: Arc::new(Mutex::new(reducer)) }
    }

    /// Which parameters require grad; the others are not waited for. Only between passes.
    #[allow(clippy::needless_pass_by_value)] // a Python list can not be borrowed as a slice
    fn set_active(&self, active: Vec<bool>) -> PyResult<()> {
        self.lock().set_active(&active).map_err(refused)
    }

    /// From now on a bucket's sentinel alone is watched, where it has one. Only between passes.
    fn post_sentinels(&self) -> PyResult<()> {
        self.lock().post_sentinels().map_err(refused)
    }

    /// From now on every parameter that requires grad is watched. Only between passes.
    fn dismiss_sentinels(&self) -> PyResult<()> {
        self.lock().dismiss_sentinels().map_err(refused)
    }

    /// The parameters that `grad_ready` must be called for, in the pass under way or the next one.
    #[getter]
    fn watched(&self) -> Vec<u32> {
        self.lock().watched().map(|param| param.0).collect()
    }

    /// Starts a pass along the plan's schedule, or along its list of this number; or, with
    /// `observe`, one that hands out nothing before its end.
    #[pyo3(signature = (*, list=None, observe=false))]
    fn begin(&self, list: Option<usize>, observe: bool) -> PyResult<()> {
        let mut reducer = self.lock();
        let begun = match list {
            Some(list) => reducer.begin_list(list),
            None if observe => reducer.observe(),
            None => reducer.begin(),
        };
        begun.map_err(refused)
    }

    /// One gradient has been accumulated. None, or `hi`: every command of the schedule below `hi`
    /// may run.
    fn grad_ready(&self, param: i64) -> PyResult<Option<usize>> {
        self.lock().grad_ready(id(param)?).map_err(refused)
    }

    /// `grad_ready`, with the time kept for the trace.
    fn grad_ready_at(&self, param: i64, now_ns: u64) -> PyResult<Option<usize>> {
        self.lock().grad_ready_at(id(param)?, now_ns).map_err(refused)
    }

    /// Ends the pass and hands out the rest of the list.
    fn finish(&self) -> PyResult<Finished> {
        self.lock().finish().map(Finished).map_err(refused)
    }

    /// Takes a plan of the same layout with another launch order. Only between passes.
    fn reorder(&self, plan: &Plan) -> PyResult<()> {
        self.lock().reorder(plan.inner().clone()).map_err(refused)
    }

    #[getter]
    fn in_pass(&self) -> bool {
        self.lock().in_pass()
    }

    #[getter]
    fn observing(&self) -> bool {
        self.lock().observing()
    }

    /// The next gradient that arrives outside a pass is answered with 0.
    fn arm(&self) -> PyResult<()> {
        self.lock().arm().map_err(refused)
    }

    /// Takes back `arm`.
    fn disarm(&self) {
        self.lock().disarm();
    }

    /// Parameters in the order in which their last gradient arrived in the first pass; empty before
    /// it.
    #[getter]
    fn observed(&self) -> Vec<u32> {
        ids(self.lock().observed())
    }

    /// The command the cursor stands at (index, kind, bucket) and the parameters its bucket lacks;
    /// None outside a pass.
    fn explain(&self) -> Option<(usize, &'static str, u32, Vec<u32>)> {
        let why = self.lock().explain()?;
        Some((why.index, kind(why.command), why.command.number(), ids(&why.lacking)))
    }

    /// Per bucket of the last pass: (bucket, first gradient ns, last but one ns, full ns, parameter
    /// that came last).
    fn life(&self) -> Vec<(u32, u64, u64, u64, u32)> {
        self.lock()
            .life()
            .map(|life| (life.bucket.0, life.first_ns, life.prior_ns, life.full_ns, life.last.0))
            .collect()
    }
}

/// What `Reducer.finish` hands out.
#[pyclass(frozen, module = "zerort._core")]
pub struct Finished(zerort_core::Finished);

#[pymethods]
impl Finished {
    /// End of the list: every command below it may run now.
    #[getter]
    fn hi(&self) -> usize {
        self.0.hi
    }

    /// Watched parameters whose gradient never came.
    #[getter]
    fn absent(&self) -> Vec<u32> {
        ids(&self.0.absent)
    }

    /// Parameters whose gradient came after their bucket had left; the gradient is in `.grad`.
    #[getter]
    fn late(&self) -> Vec<u32> {
        ids(&self.0.late)
    }
}
