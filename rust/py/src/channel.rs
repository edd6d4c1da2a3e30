//! `Channel`: one lane of a segment, with the counters of all ranks; how a rank waits for its peers.
//!
//! Every call but `wait` keeps the GIL: it takes less than releasing it would.

use std::hint;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use zerort_core::turns::{Counter, Turns, reached};

use crate::errors::StepError;
use crate::futex;
use crate::mapping::Mapping;
use crate::reducer::locked;

/// How long a rank looks before it sleeps: about what a sleep and being woken take.
const SPIN: Duration = Duration::from_micros(30);

/// Memory used in turn, see [`zerort_core::turns`].
#[pyclass(frozen, module = "zerort._core")]
pub struct Channel {
    mapping: Arc<Mapping>,
    number: usize,
    turns: Mutex<Turns>,
}

impl Channel {
    /// Nothing has been used yet.
    pub fn new(mapping: Arc<Mapping>, number: usize) -> Self {
        let turns = Mutex::new(Turns::new(mapping.layout.rank));
        Self { mapping, number, turns }
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        locked(&self.turns)
    }

    /// Looks until all have posted `number`, for at most `limit`.
    fn look(&self, number: u32, limit: Duration) -> Option<usize> {
        let lines = self.mapping.lines(self.number);
        let missing = || Turns::missing(number, lines);
        let began = Instant::now();
        loop {
            let peer = missing()?;
            let spent = began.elapsed();
            if spent < SPIN {
                hint::spin_loop();
                continue;
            }
            let rest = limit.saturating_sub(spent);
            if rest.is_zero() || self.mapping.left(peer) {
                return missing();
            }
            let word = &lines[peer].posted;
            let seen = Counter::load(word);
            if !reached(seen, number) {
                futex::sleep(word, seen, rest);
            }
        }
    }
}

#[pymethods]
impl Channel {
    /// The number of the next use; it stays that until the use is posted.
    #[getter]
    fn next(&self) -> u32 {
        self.turns().next()
    }

    /// What this rank wrote for a use is there. With `lost` nobody needs it, and this rank reads
    /// nothing of that use.
    #[pyo3(signature = (number, *, lost=false))]
    fn post(&self, number: u32, lost: bool) -> PyResult<()> {
        let lines = self.mapping.lines(self.number);
        let mut turns = self.turns();
        let posted = if lost { turns.give_up(number, lines) } else { turns.post(number, lines) };
        if posted.map_err(|error| StepError::new_err(error.to_string()))? {
            futex::wake(&lines[self.mapping.layout.rank].posted);
        }
        Ok(())
    }

    /// The first rank that has not posted a use.
    fn missing(&self, number: u32) -> Option<usize> {
        Turns::missing(number, self.mapping.lines(self.number))
    }

    /// Waits until all have posted a use, at most `seconds`, or until one that has not has left.
    fn wait(&self, py: Python<'_>, number: u32, seconds: f64) -> Option<usize> {
        let missing = self.missing(number);
        missing?;
        let limit = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO);
        py.detach(|| self.look(number, limit))
    }

    /// This rank has read what it needs of a use.
    fn finish(&self, number: u32) {
        self.turns().finish(number, self.mapping.lines(self.number));
    }
}
