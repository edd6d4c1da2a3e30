//! Python border of `zerort-core`.

use pyo3::prelude::*;

#[pymodule]
mod _core {}
