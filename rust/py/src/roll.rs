//! `Reading`: what the rows of all ranks mean for one.

use pyo3::prelude::*;
use zerort_core::roll::{OWN, WIDTH};
use zerort_core::{At, PassKind, Reading, Row};

use crate::errors::StepError;
use crate::names::pass_name;

/// What the rows of all ranks mean for this one.
#[pyclass(frozen, module = "zerort._core", name = "Reading")]
pub struct PyReading {
    pub(crate) reading: Reading,
    pub(crate) list: Option<usize>,
    pub(crate) rows: Vec<Row>,
}

/// The name in Python of what a rank is at.
pub const fn at_name(at: At) -> &'static str {
    match at {
        At::Pass(kind) => pass_name(kind),
        At::Boundary => "boundary",
        At::Need(_) => "need",
        At::Serve => "serve",
        At::Elsewhere(_) => "elsewhere",
    }
}

/// What can be opened by name.
pub fn at_named(name: &str) -> PyResult<At> {
    let passes =
        [PassKind::Forward, PassKind::Backward, PassKind::LocalBackward, PassKind::Evaluation];
    let all = passes.map(At::Pass).into_iter().chain([At::Boundary, At::Serve]);
    all.into_iter().find(|&at| at_name(at) == name).ok_or_else(|| {
        StepError::new_err(format!(
            "{name:?} can not be opened: expected forward, backward, local_backward, evaluation, \
             boundary or serve"
        ))
    })
}

/// Rows by rank from integers, as many as make whole rows.
pub fn rows(words: &[i64]) -> PyResult<Vec<Row>> {
    let refused = || StepError::new_err(zerort_core::StepError::BadRows.to_string());
    let (whole, rest) = words.as_chunks::<WIDTH>();
    if !rest.is_empty() {
        return Err(refused());
    }
    whole.iter().map(|&words| Row::from_words(words).ok_or_else(refused)).collect()
}

/// The caller's own part of a row.
pub fn own(words: &[i64]) -> PyResult<[i64; OWN]> {
    let mut own = [0; OWN];
    let room = own.get_mut(..words.len()).ok_or_else(|| {
        let got = words.len();
        StepError::new_err(format!("a row has room for {OWN} integers of its caller, got {got}"))
    })?;
    room.copy_from_slice(words);
    Ok(own)
}

#[pymethods]
impl PyReading {
    /// What is to be done.
    #[getter]
    fn what(&self) -> &'static str {
        match self.reading {
            Reading::Together { .. } => "together",
            Reading::Alone => "alone",
            Reading::Serve(_) => "serve",
            Reading::Again => "again",
            Reading::Diverged(_) => "diverged",
        }
    }

    /// What all ranks are at, or the one that differs.
    #[getter]
    fn kind(&self) -> &'static str {
        match &self.reading {
            Reading::Together { at, .. } => at_name(*at),
            Reading::Alone => pass_name(PassKind::Evaluation),
            Reading::Serve(_) => "need",
            Reading::Diverged(rank) => {
                self.rows.get(rank.index()).map_or("", |row| at_name(row.at))
            }
            Reading::Again => "",
        }
    }

    /// The list that the pass follows; None where it is free.
    #[getter]
    fn list(&self) -> Option<usize> {
        self.list
    }

    /// Rank 0 has routes to broadcast.
    #[getter]
    fn news(&self) -> bool {
        match self.reading {
            Reading::Together { news, .. } => news,
            Reading::Alone | Reading::Serve(_) | Reading::Again | Reading::Diverged(_) => false,
        }
    }

    /// To be gathered by every rank in this order.
    #[getter]
    fn units(&self) -> Vec<u32> {
        match &self.reading {
            Reading::Serve(units) => units.iter().map(|unit| unit.0).collect(),
            Reading::Together { .. } | Reading::Alone | Reading::Again | Reading::Diverged(_) => {
                Vec::new()
            }
        }
    }

    /// The first rank that differs; 0 where none does.
    #[getter]
    fn rank(&self) -> u32 {
        match self.reading {
            Reading::Diverged(rank) => rank.0,
            Reading::Together { .. } | Reading::Alone | Reading::Serve(_) | Reading::Again => 0,
        }
    }

    /// Ranks whose step is lost.
    #[getter]
    fn failed(&self) -> Vec<usize> {
        let failed = self.rows.iter().enumerate().filter(|(_, row)| row.failed);
        failed.map(|(rank, _)| rank).collect()
    }

    /// By rank: what it is at, forwards and backwards since the boundary, what is its caller's.
    #[getter]
    fn rows(&self) -> Vec<(&'static str, u32, Vec<i64>)> {
        self.rows.iter().map(|row| (at_name(row.at), row.count, row.own.to_vec())).collect()
    }
}
