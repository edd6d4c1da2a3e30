//! What of a parameter may not be cut, as Python says it: `"element"`, `"whole"`, or the length of a
//! block.

use std::num::NonZeroU64;

use pyo3::prelude::*;

use crate::errors::PlanError;

/// A grain in Python.
#[derive(FromPyObject, IntoPyObject)]
pub enum Grain {
    /// Elements in a block.
    Block(i64),
    /// Any other grain, by its name.
    Named(String),
}

impl Grain {
    /// The core's.
    pub fn read(self) -> PyResult<zerort_core::Grain> {
        let block = |length| u64::try_from(length).ok().and_then(NonZeroU64::new);
        let grain = match &self {
            Self::Block(length) => block(*length).map(zerort_core::Grain::Block),
            Self::Named(name) if name == "element" => Some(zerort_core::Grain::Element),
            Self::Named(name) if name == "whole" => Some(zerort_core::Grain::Whole),
            Self::Named(_) => None,
        };
        let got = match self {
            Self::Block(length) => length.to_string(),
            Self::Named(name) => format!("{name:?}"),
        };
        grain.ok_or_else(|| {
            PlanError::new_err(format!(
                "a grain can not be {got}: expected \"element\", \"whole\" or the length of a block"
            ))
        })
    }
}

impl From<zerort_core::Grain> for Grain {
    fn from(grain: zerort_core::Grain) -> Self {
        match grain {
            zerort_core::Grain::Element => Self::Named("element".to_owned()),
            zerort_core::Grain::Whole => Self::Named("whole".to_owned()),
            zerort_core::Grain::Block(length) => Self::Block(length.get().cast_signed()),
        }
    }
}
