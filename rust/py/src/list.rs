//! `List`: the static list of one pass at stage 3, read-only.

use std::sync::Arc;

use pyo3::prelude::*;
use zerort_core::UnitId;

use crate::names::{kind, pass_name};

/// The static list of one pass.
#[pyclass(frozen, module = "zerort._core")]
pub struct List {
    plan: Arc<zerort_core::Plan>,
    index: usize,
}

impl List {
    /// One list of a plan.
    pub fn of(plan: &Arc<zerort_core::Plan>, index: usize) -> Self {
        Self { plan: Arc::clone(plan), index }
    }

    fn inner(&self) -> &zerort_core::List {
        &self.plan.lists()[self.index]
    }
}

fn numbers(units: &[UnitId]) -> Vec<u32> {
    units.iter().map(|unit| unit.0).collect()
}

#[pymethods]
impl List {
    #[getter]
    fn kind(&self) -> &'static str {
        pass_name(self.inner().kind)
    }

    #[getter]
    fn key(&self) -> u64 {
        self.inner().key.0
    }

    /// Units that it finds whole.
    #[getter]
    fn start(&self) -> Vec<u32> {
        numbers(&self.inner().start)
    }

    /// Units that it leaves whole.
    #[getter]
    fn end(&self) -> Vec<u32> {
        numbers(&self.inner().end)
    }

    /// (kind, number of the bucket, unit or stop).
    #[getter]
    fn commands(&self) -> Vec<(&'static str, u32)> {
        let commands = self.inner().commands().iter();
        commands.map(|&command| (kind(command), command.number())).collect()
    }

    /// The units that each stop needs.
    #[getter]
    fn stops(&self) -> Vec<Vec<u32>> {
        self.inner().stops.iter().map(|units| numbers(units)).collect()
    }
}
