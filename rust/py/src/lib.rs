//! Python border of `zerort-core`.

mod trace;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::trace::PyTrace;
}
