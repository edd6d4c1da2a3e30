//! `Gatherer`: the cursor for parameters. Integers in, integers out.
//!
//! It moves the reducer that it was made with, under that reducer's mutex: with the GIL held nobody
//! ever waits for either.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use zerort_core::roll::WIDTH;
use zerort_core::{Action, Rank, Residence, SetId, UnitId};

use crate::errors::StepError;
use crate::ids::number;
use crate::names::{kind, pass_name};
use crate::plan::Plan;
use crate::reducer::{Reducer, locked, refused};
use crate::roll::{self, PyReading, at_named};

/// Actions as codes, and the unit that is to be asked for.
type Answer = (Vec<u64>, Option<u32>);

/// The cursor for parameters: which units are whole, and what is to be run so that those are which
/// somebody needs.
#[pyclass(frozen, module = "zerort._core")]
pub struct Gatherer {
    inner: Mutex<zerort_core::Gatherer>,
    reducer: Arc<Mutex<zerort_core::Reducer>>,
}

fn codes(actions: Vec<Action>) -> Vec<u64> {
    actions.into_iter().map(Action::code).collect()
}

fn set_id(set: i64) -> PyResult<SetId> {
    number("set", set).map(SetId).map_err(StepError::new_err)
}

fn unit_ids(units: Vec<i64>) -> PyResult<Vec<UnitId>> {
    let id = |unit| number("unit", unit).map(UnitId).map_err(StepError::new_err);
    units.into_iter().map(id).collect()
}

/// A sequence number of torch's; None below 0.
fn seq(number: i64) -> Option<u64> {
    u64::try_from(number).ok()
}

#[pymethods]
impl Gatherer {
    /// How many integers a row is.
    #[classattr]
    const WIDTH: usize = WIDTH;

    #[new]
    #[pyo3(signature = (reducer, *, rank, room))]
    fn new(reducer: &Reducer, rank: i64, room: u64) -> PyResult<Self> {
        let rank = Rank(number("rank", rank).map_err(StepError::new_err)?);
        let reducer = Arc::clone(reducer.inner());
        let plan = Arc::clone(locked(&reducer).plan());
        let inner = Mutex::new(zerort_core::Gatherer::new(plan, rank, room));
        Ok(Self { inner, reducer })
    }

    /// The number of the set of these units.
    fn set_of(&self, units: Vec<i64>) -> PyResult<u32> {
        let units = unit_ids(units)?;
        locked(&self.inner).set_of(&units).map(|set| set.0).map_err(refused)
    }

    /// Takes a plan of the same layout with other lists.
    fn load(&self, plan: &Plan) -> PyResult<()> {
        locked(&self.inner).load(plan.inner().clone()).map_err(refused)
    }

    // A pass.

    /// Something is about to begin.
    #[pyo3(signature = (kind, entry=0, seq=0))]
    fn open(&self, kind: &str, entry: i64, seq: u64) -> PyResult<()> {
        let entry = number("module", entry).map_err(StepError::new_err)?;
        locked(&self.inner).open(at_named(kind)?, entry, seq).map_err(refused)
    }

    /// This rank's row.
    #[pyo3(signature = (own=Vec::new()), text_signature = "(self, own=())")]
    #[allow(clippy::needless_pass_by_value)] // a Python list can not be borrowed as a slice
    fn row(&self, own: Vec<i64>) -> PyResult<[i64; WIDTH]> {
        let own = roll::own(&own)?;
        let row = locked(&self.inner).row(&locked(&self.reducer), own).map_err(refused)?;
        Ok(row.words())
    }

    /// What the rows of all ranks, by rank, mean here; of those that are `apart` from another
    /// engine's call.
    #[pyo3(signature = (rows, apart=Vec::new()), text_signature = "(self, rows, apart=())")]
    #[allow(clippy::needless_pass_by_value)] // a Python list can not be borrowed as a slice
    fn read(&self, rows: Vec<i64>, apart: Vec<bool>) -> PyResult<PyReading> {
        let rows = roll::rows(&rows)?;
        let mut seen = rows.clone();
        for (row, _) in seen.iter_mut().zip(apart).filter(|(_, apart)| *apart) {
            *row = row.apart();
        }
        let mut inner = locked(&self.inner);
        let reading = inner.read(&seen).map_err(refused)?;
        Ok(PyReading { reading, list: inner.agreed(), rows })
    }

    /// The units that rows ask for.
    #[staticmethod]
    #[allow(clippy::needless_pass_by_value)] // a Python list can not be borrowed as a slice
    fn asked(rows: Vec<i64>) -> PyResult<Vec<u32>> {
        let units = zerort_core::roll::asked(&roll::rows(&rows)?);
        Ok(units.into_iter().map(|unit| unit.0).collect())
    }

    /// Ranks ask for units while this one is in another engine's call; returns what is to be run.
    fn leave(&self) -> Vec<u64> {
        codes(locked(&self.inner).leave(&mut locked(&self.reducer)))
    }

    /// What has been agreed on begins; returns what is to be run first.
    fn begin(&self) -> PyResult<Vec<u64>> {
        locked(&self.inner).begin().map(codes).map_err(refused)
    }

    /// Ranks have asked for units: what is to be run and waited for.
    fn serve(&self, units: Vec<i64>) -> PyResult<Vec<u64>> {
        let units = unit_ids(units)?;
        locked(&self.inner).serve(&units).map(codes).map_err(refused)
    }

    /// What was served has come; returns what is to be run.
    fn served(&self) -> Vec<u64> {
        codes(locked(&self.inner).served())
    }

    /// Units are about to be read.
    #[pyo3(signature = (set, node=-1), text_signature = "(self, set, node=-1)")]
    fn need(&self, set: i64, node: i64) -> PyResult<Option<Answer>> {
        let set = set_id(set)?;
        let mut inner = locked(&self.inner);
        if inner.is_current(set) {
            return Ok(None);
        }
        let answer = inner.need(&mut locked(&self.reducer), set, seq(node)).map_err(refused)?;
        Ok(answer.map(|answer| (codes(answer.actions), answer.ask.map(|unit| unit.0))))
    }

    /// Whether a set is the current one, so that `need` has nothing to ask for.
    fn is_current(&self, set: u32) -> bool {
        locked(&self.inner).is_current(SetId(set))
    }

    /// The gathers of a set have been waited for.
    fn arrived(&self, set: i64) -> PyResult<()> {
        locked(&self.inner).arrived(set_id(set)?).map_err(refused)
    }

    /// A use begins; False where the set is to be needed first.
    #[pyo3(signature = (set, seq=-1), text_signature = "(self, set, seq=-1)")]
    fn acquire(&self, set: i64, seq: i64) -> PyResult<bool> {
        locked(&self.inner).acquire(set_id(set)?, self::seq(seq)).map_err(refused)
    }

    /// A use begins that tells nothing new; False, and nothing, where it may.
    fn reuse(&self, set: u32) -> bool {
        locked(&self.inner).reuse(SetId(set))
    }

    /// A use ends.
    fn release(&self, set: i64) -> PyResult<()> {
        locked(&self.inner).release(set_id(set)?).map_err(refused)
    }

    /// The reducer has answered `hi` in a backward along a list.
    fn reached(&self, hi: usize) -> Vec<u64> {
        codes(locked(&self.inner).reached(hi))
    }

    /// The pass is over: the rest of its list, and what is freed.
    #[pyo3(signature = (*, complete=true))]
    fn close(&self, complete: bool) -> Vec<u64> {
        codes(locked(&self.inner).close(&mut locked(&self.reducer), complete))
    }

    /// The window is lost, on all ranks alike.
    fn abandon(&self) -> Vec<u64> {
        codes(locked(&self.inner).abandon())
    }

    /// From now on this rank's rows say that its step is lost, until the boundary.
    fn fail(&self) {
        locked(&self.inner).fail();
    }

    // What it is at.

    /// Whether the pass under way follows a list.
    #[getter]
    fn listed(&self) -> bool {
        locked(&self.inner).list().is_some()
    }

    #[getter]
    fn in_pass(&self) -> bool {
        locked(&self.inner).in_pass()
    }

    /// The unit that is to be asked for in a roll.
    #[getter]
    fn asking(&self) -> Option<u32> {
        locked(&self.inner).asking().map(|unit| unit.0)
    }

    /// Whether the pass under way has needed what its list has not.
    #[getter]
    fn went_off(&self) -> bool {
        locked(&self.inner).went_off()
    }

    /// The command of the list that is next: its place, kind and number.
    fn explain(&self) -> Option<(usize, &'static str, u32)> {
        let (place, command) = locked(&self.inner).explain()?;
        Some((place, kind(command), command.number()))
    }

    /// Whether a unit may still be read.
    fn holds(&self, unit: i64) -> PyResult<bool> {
        let unit = UnitId(number("unit", unit).map_err(StepError::new_err)?);
        Ok(locked(&self.inner).holds(unit))
    }

    /// Where a unit is.
    fn state(&self, unit: i64) -> PyResult<&'static str> {
        let unit = UnitId(number("unit", unit).map_err(StepError::new_err)?);
        match locked(&self.inner).residence(unit) {
            Some(Residence::Sharded) => Ok("sharded"),
            Some(Residence::Gathering) => Ok("gathering"),
            Some(Residence::Whole { .. }) => Ok("whole"),
            None => Err(StepError::new_err(format!("unknown unit {}", unit.0))),
        }
    }

    /// Whether some use has begun and not ended.
    #[getter]
    fn in_use(&self) -> bool {
        locked(&self.inner).in_use()
    }

    /// Elements that are whole or gathering now.
    #[getter]
    fn live(&self) -> u64 {
        locked(&self.inner).live()
    }

    // What is learnt.

    /// Whether this rank has seen routes that have not been broadcast.
    #[getter]
    fn news(&self) -> bool {
        locked(&self.inner).news()
    }

    /// All routes that are known, in integers.
    fn routes(&self) -> Vec<Vec<i64>> {
        locked(&self.inner).routes().iter().map(zerort_core::Route::words).collect()
    }

    /// The routes have been broadcast.
    fn told(&self) {
        locked(&self.inner).told();
    }

    /// (kind, module) of passes that stay free on this rank.
    fn strays(&self) -> Vec<(&'static str, u32)> {
        locked(&self.inner).strays().map(|(kind, entry)| (pass_name(kind), entry)).collect()
    }
}
