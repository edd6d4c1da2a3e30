//! The cursor for parameters: which units are whole, and what is to be run so that those are which
//! somebody needs.
//!
//! A module's pre-hook, and in a backward the pre-hook of a node, calls [`Gatherer::need`] with the
//! set of units that is about to be read. Nearly always that set is the current one, and nothing is
//! to be done. Else the answer is a list of [`Action`]s to be run, in order, first in first out over
//! all passes; and where no list brings a unit, that it must be asked for in a [roll](crate::roll).
//!
//! ```text
//! unit   Sharded      ── cursor passes Gather, or it is served ──> Gathering
//!        Gathering    ── waited for: arrived ──> Whole{users}
//!        Gathering, Whole, not held ── cursor passes Free ──> Sharded
//!        held, or not asked for while there is room: it lingers, and is looked at again later
//!
//! pass   Idle    ── open ──> Rolling ── together: begin ──> Listed, Free    ── close ──> Idle
//!        Rolling ── some rank asks: serve, served ──> Rolling
//!        Listed  ── need that the list has not: its rest is run ──> Free
//!        Free    ── need of a unit that is not here ──> asking ── serve, served ──> Free
//! ```
//!
//! A unit is *held* while it may still be read: in a forward while a use is open, in a backward from
//! its first need until a need comes at a node that is older than its first use. torch runs nodes in
//! falling sequence number, so nothing that comes then can read it. Where that is not known, because
//! the first use was not seen or an older graph is run, it is held to the end.
//!
//! - **GAT-1** Every rank is handed out the same gathers and launches in the same order: a list's
//!   are handed out as they stand, all of them, and everything else in rolls, to all ranks at once.
//! - **GAT-2** A set becomes current when all its units have arrived, and not before.
//! - **GAT-3** What is held, or just asked for, is not freed.
//! - **GAT-4** In a pass along a list at most `room` elements are whole or gathering, where the
//!   list can. A rank that runs ahead adds what it passed over, one that serves what it serves.
//! - **GAT-6** A need never waits for a gradient: see [`Reducer::need`].
//! - **GAT-7** A pass that ends has handed out its whole list.
//! - **GAT-10** Behind a backward, an evaluation and the boundary no unit is whole.
//!
//! GAT-8 and GAT-9, about what a tensor is meanwhile, are its owner's.
//!
//! # What is learnt
//!
//! Every pass writes down its route. That of a pass without a list is kept, and on rank 0 it is
//! *news*: it is broadcast, and [`Plan::routed`] makes its list. A pass that needed what its list
//! has not is free the next time on all ranks, so that its route is seen anew. After three in a row
//! that pass stays free on this rank, and thereby on all.

mod learning;
mod memory;
mod needs;
mod passes;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::command::{Action, Command};
use crate::cursor::Cursor;
use crate::error::StepError;
use crate::ids::{Rank, UnitId};
use crate::plan::Plan;
use crate::reducer::Reducer;
use crate::roll::At;
use crate::route::{Key, PassKind};

use learning::Learning;
use memory::Memory;
pub use memory::Residence;

/// A set of units; its number means nothing to other ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetId(pub u32);

/// The cursor for parameters. See the [module](self) for its states and invariants.
#[derive(Clone, Debug)]
pub struct Gatherer {
    plan: Arc<Plan>,
    rank: Rank,
    room: u64,
    sets: Vec<Arc<[UnitId]>>,
    numbers: BTreeMap<Arc<[UnitId]>, SetId>,
    /// The sets that each list's stops need, by list.
    stops: Vec<Vec<SetId>>,
    memory: Memory,
    /// The set of which all units are whole, and that nothing has been needed behind.
    current: Option<SetId>,
    pass: Pass,
    /// Units that are here only because they were served, until that is over.
    guests: Vec<UnitId>,
    learning: Learning,
    /// Forwards and backwards since the boundary.
    count: u32,
    failed: bool,
}

/// What [`Gatherer::need`] asks to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// To be run.
    pub actions: Vec<Action>,
    /// To be asked for in a roll, behind which the need is to be repeated. None: the set is whole
    /// once its gathers have been waited for; say so with [`Gatherer::arrived`].
    pub ask: Option<UnitId>,
}

/// What is about to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Opening {
    at: At,
    key: Key,
    /// What was called.
    entry: u32,
    /// torch's sequence number then.
    seq: u64,
}

/// The phase, with what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Idle,
    Rolling { opening: Opening, agreed: Option<Agreed> },
    Listed { kind: PassKind, key: Key, list: usize, cursor: Cursor, done: usize, asked: u32 },
    Free { kind: PassKind, key: Key, off: bool, asking: Option<UnitId> },
}

/// What a roll came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agreed {
    /// The pass begins, along a list or free.
    Begin { kind: PassKind, key: Key, list: Option<usize> },
    /// The boundary, or nothing: all serve.
    Over,
}

impl Gatherer {
    /// A gatherer for `plan` on rank `rank`, between passes, with every unit sharded. `room` is how
    /// many elements may be whole or gathering at once.
    pub fn new(plan: Arc<Plan>, rank: Rank, room: u64) -> Self {
        let memory = Memory::new(plan.units());
        let mut gatherer = Self {
            plan,
            rank,
            room,
            sets: Vec::new(),
            numbers: BTreeMap::new(),
            stops: Vec::new(),
            memory,
            current: None,
            pass: Pass::Idle,
            guests: Vec::new(),
            learning: Learning::default(),
            count: 0,
            failed: false,
        };
        gatherer.find_stops();
        gatherer
    }

    /// The number of the set of `units`, in any order.
    ///
    /// # Errors
    /// [`StepError::UnknownUnit`].
    pub fn set_of(&mut self, units: &[UnitId]) -> Result<SetId, StepError> {
        let count = self.plan.units().len();
        match units.iter().find(|unit| unit.index() >= count) {
            Some(&unit) => Err(StepError::UnknownUnit { unit, units: count }),
            None => Ok(self.intern(units)),
        }
    }

    /// The units of a set, by id; None for an unknown one.
    pub fn set(&self, set: SetId) -> Option<&[UnitId]> {
        self.sets.get(set.0 as usize).map(AsRef::as_ref)
    }

    /// Takes a plan of the same layout with other lists.
    ///
    /// # Errors
    /// [`StepError::PassUnderWay`] in a pass that has begun, [`StepError::OtherLayout`].
    pub fn load(&mut self, plan: Arc<Plan>) -> Result<(), StepError> {
        match self.pass {
            Pass::Idle | Pass::Rolling { .. } => {}
            Pass::Listed { .. } | Pass::Free { .. } => return Err(StepError::PassUnderWay),
        }
        let (expected, got) = (self.plan.layout_digest(), plan.layout_digest());
        if expected != got {
            return Err(StepError::OtherLayout { expected, got });
        }
        self.plan = plan;
        self.find_stops();
        Ok(())
    }

    /// From now on this rank's rows say that its step is lost, until the boundary.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// Whether a pass has begun and not been closed.
    pub fn in_pass(&self) -> bool {
        match self.pass {
            Pass::Idle | Pass::Rolling { .. } => false,
            Pass::Listed { .. } | Pass::Free { .. } => true,
        }
    }

    /// The list that the pass under way follows.
    pub fn list(&self) -> Option<usize> {
        match self.pass {
            Pass::Listed { list, .. } => Some(list),
            Pass::Idle | Pass::Rolling { .. } | Pass::Free { .. } => None,
        }
    }

    /// The unit that must be asked for in a roll.
    pub fn asking(&self) -> Option<UnitId> {
        match self.pass {
            Pass::Free { asking, .. } => asking,
            Pass::Idle | Pass::Rolling { .. } | Pass::Listed { .. } => None,
        }
    }

    /// Whether the pass under way has needed what its list has not.
    pub fn went_off(&self) -> bool {
        match self.pass {
            Pass::Free { off, .. } => off,
            Pass::Idle | Pass::Rolling { .. } | Pass::Listed { .. } => false,
        }
    }

    /// The command of the list that is next, with its place; None without a list, and behind it.
    pub fn explain(&self) -> Option<(usize, Command)> {
        match self.pass {
            Pass::Listed { list, done, .. } => {
                self.plan.commands(Some(list)).get(done).map(|&command| (done, command))
            }
            Pass::Idle | Pass::Rolling { .. } | Pass::Free { .. } => None,
        }
    }

    /// Where a unit's values are; None for an unknown one.
    pub fn residence(&self, unit: UnitId) -> Option<Residence> {
        self.memory.residence(unit)
    }

    /// Whether a unit may still be read: a use of it is open, or this backward has needed it.
    pub fn holds(&self, unit: UnitId) -> bool {
        self.memory.held().contains(&unit)
    }

    /// Whether some use has begun and not ended.
    pub fn in_use(&self) -> bool {
        self.memory.in_use()
    }

    /// Elements that are whole or gathering now.
    pub fn live(&self) -> u64 {
        self.memory.live()
    }

    fn intern(&mut self, units: &[UnitId]) -> SetId {
        let mut units = units.to_vec();
        units.sort_unstable();
        units.dedup();
        if let Some(&known) = self.numbers.get(units.as_slice()) {
            return known;
        }
        let (set, units) = (SetId(self.sets.len() as u32), Arc::<[UnitId]>::from(units));
        self.sets.push(Arc::clone(&units));
        self.numbers.insert(units, set);
        set
    }

    fn find_stops(&mut self) {
        let plan = Arc::clone(&self.plan);
        let mut numbers = |units: &Vec<UnitId>| self.intern(units);
        let stops = plan.lists().iter().map(|list| list.stops.iter().map(&mut numbers).collect());
        self.stops = stops.collect();
    }

    fn units_of(&self, set: SetId) -> Result<&Arc<[UnitId]>, StepError> {
        let sets = self.sets.len();
        self.sets.get(set.0 as usize).ok_or(StepError::UnknownSet { set: set.0, sets })
    }

    /// Whether the pass under way is a backward whose gradients the reducer follows along the list.
    fn reduces(kind: PassKind) -> bool {
        match kind {
            PassKind::Backward => true,
            PassKind::Forward | PassKind::LocalBackward | PassKind::Evaluation => false,
        }
    }

    /// Whether the reducer has to observe in the next pass, so that a backward has no list.
    fn observes(kind: PassKind, reducer: &Reducer) -> bool {
        Self::reduces(kind) && reducer.has_to_observe()
    }
}
