//! One rank alone, whose rolls are its own.
#![allow(dead_code, reason = "every test file takes what it needs")]

use std::sync::Arc;

use zerort_core::roll::OWN;
use zerort_core::{
    Action, Answer, At, Gatherer, PassKind, Plan, Rank, Reading, Reducer, Residence, SetId, UnitId,
};

use crate::arbitrary::sharded_over;

pub const FORWARD: At = At::Pass(PassKind::Forward);
pub const LOCAL: At = At::Pass(PassKind::LocalBackward);
pub const EVALUATION: At = At::Pass(PassKind::Evaluation);
/// Elements of a unit.
pub const UNIT: u64 = 256;

pub fn gathers(units: &[u32]) -> Vec<Action> {
    units.iter().map(|&unit| Action::Gather(UnitId(unit))).collect()
}

pub fn frees(units: &[u32]) -> Vec<Action> {
    units.iter().map(|&unit| Action::Free(UnitId(unit))).collect()
}

/// One rank, whose world is itself.
pub struct Alone {
    pub gatherer: Gatherer,
    pub reducer: Reducer,
}

impl Alone {
    pub fn new(units: u32, room: u64) -> Self {
        Self::over(Arc::new(sharded_over(units, Some(1), 1)), room * UNIT)
    }

    pub fn over(plan: Arc<Plan>, room: u64) -> Self {
        let reducer = Reducer::new(Arc::clone(&plan));
        Self { gatherer: Gatherer::new(plan, Rank(0), room), reducer }
    }

    pub fn roll(&mut self) -> Reading {
        let row = self.gatherer.row(&self.reducer, [0; OWN]).unwrap();
        self.gatherer.read(&[row]).unwrap()
    }

    /// Whether the pass follows a list.
    pub fn open(&mut self, at: At, seq: u64) -> bool {
        self.gatherer.open(at, 0, seq).unwrap();
        self.roll();
        self.gatherer.begin().unwrap();
        self.gatherer.list().is_some()
    }

    pub fn set(&mut self, units: &[u32]) -> SetId {
        let units: Vec<UnitId> = units.iter().copied().map(UnitId).collect();
        self.gatherer.set_of(&units).unwrap()
    }

    pub fn answer(&mut self, units: &[u32], node: Option<u64>) -> Option<Answer> {
        let set = self.set(units);
        self.gatherer.need(&mut self.reducer, set, node).unwrap()
    }

    /// Needs units until they are whole; what was handed out for that.
    pub fn need_at(&mut self, units: &[u32], node: Option<u64>) -> Vec<Action> {
        let (set, mut done) = (self.set(units), Vec::new());
        let mut asked = 0;
        while let Some(answer) = self.answer(units, node) {
            asked += 1;
            assert!(asked < 99, "{units:?} never come");
            done.extend(answer.actions);
            if answer.ask.is_some() {
                let Reading::Serve(asked) = self.roll() else { panic!() };
                done.extend(self.gatherer.serve(&asked).unwrap());
                done.extend(self.gatherer.served());
            } else {
                self.gatherer.arrived(set).unwrap();
            }
        }
        done
    }

    pub fn need(&mut self, units: &[u32]) -> Vec<Action> {
        self.need_at(units, None)
    }

    /// A use that begins and ends.
    pub fn run(&mut self, units: &[u32], seq: u64) -> Vec<Action> {
        let (set, done) = (self.set(units), self.need(units));
        assert!(self.gatherer.reuse(set) || self.gatherer.acquire(set, Some(seq)).unwrap());
        self.gatherer.release(set).unwrap();
        done
    }

    pub fn close(&mut self) -> Vec<Action> {
        self.gatherer.close(&mut self.reducer, true)
    }

    pub fn whole(&self) -> Vec<u32> {
        let here = |unit: &u32| self.gatherer.residence(UnitId(*unit)) != Some(Residence::Sharded);
        (0..9)
            .filter(here)
            .filter(|&unit| self.gatherer.residence(UnitId(unit)).is_some())
            .collect()
    }

    /// Makes lists of what has been seen.
    pub fn learn(&mut self, room: u64, depth: u32) {
        let plan = self.reducer.plan().routed(self.gatherer.routes(), room * UNIT, depth).unwrap();
        self.reducer.reorder(Arc::new(plan.clone())).unwrap();
        self.gatherer.load(Arc::new(plan)).unwrap();
        self.gatherer.told();
    }

    /// An evaluation that needs these sets, one after the other.
    pub fn evaluate(&mut self, sets: &[&[u32]]) {
        self.open(EVALUATION, 0);
        for set in sets {
            self.need(set);
        }
        self.close();
    }

    pub fn boundary(&mut self) {
        self.open(At::Boundary, 0);
    }
}
