//! Python border of `zerort-core`.

use pyo3::prelude::*;

mod scaler;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::scaler::LossScale;
}
