//! `Unit` and `cut_units`: what is gathered and freed together.

use pyo3::prelude::*;
use zerort_core::{Module, ParamId, units};

use crate::errors::{PlanError, refused};
use crate::ids::number;

/// Parameters that are gathered and freed together: whole buckets.
#[pyclass(frozen, module = "zerort._core")]
pub struct Unit {
    pub(crate) inner: zerort_core::Unit,
    pub(crate) params: Vec<u32>,
}

#[pymethods]
impl Unit {
    #[getter]
    fn id(&self) -> u32 {
        self.inner.id.0
    }

    #[getter]
    fn buckets(&self) -> Vec<u32> {
        self.inner.buckets.iter().map(|bucket| bucket.0).collect()
    }

    /// Of all its buckets, in their order.
    #[getter]
    fn params(&self) -> Vec<u32> {
        self.params.clone()
    }

    /// Padded length of its buckets together.
    #[getter]
    fn numel(&self) -> u64 {
        self.inner.numel
    }
}

/// The unit of each parameter. A module is (index of its parent or -1, its own parameters); a
/// parameter of less than 0 elements stays whole.
#[pyfunction]
#[pyo3(signature = (modules, numels, *, cap))]
#[allow(clippy::needless_pass_by_value)] // a Python list can not be borrowed as a slice
pub fn cut_units(
    modules: Vec<(i64, Vec<i64>)>,
    numels: Vec<i64>,
    cap: u64,
) -> PyResult<Vec<Option<u32>>> {
    let modules = modules.into_iter().map(module).collect::<PyResult<Vec<_>>>()?;
    let numels: Vec<Option<u64>> =
        numels.into_iter().map(|numel| u64::try_from(numel).ok()).collect();
    let units = units::cut(&modules, &numels, cap).map_err(refused)?;
    Ok(units.into_iter().map(|unit| unit.map(|unit| unit.0)).collect())
}

fn module((parent, params): (i64, Vec<i64>)) -> PyResult<Module> {
    let id = |param| number("parameter", param).map(ParamId).map_err(PlanError::new_err);
    let params = params.into_iter().map(id).collect::<PyResult<_>>()?;
    Ok(Module { parent: usize::try_from(parent).ok(), params })
}
