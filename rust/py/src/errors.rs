//! The exception classes of `zerort.errors` as Rust types: the border raises them itself and
//! defines none.
//!
//! Core errors hold ids and no names; their text passes through as it is, and the Python side adds
//! the names.

#![allow(missing_docs)] // the documentation of these classes is in zerort/errors.py

use pyo3::import_exception;
use pyo3::prelude::*;

import_exception!(zerort.errors, LayoutError);
import_exception!(zerort.errors, PlanError);
import_exception!(zerort.errors, StepError);

/// The core's refusal as the class that Python knows.
pub fn refused(error: zerort_core::PlanError) -> PyErr {
    PlanError::new_err(error.to_string())
}
