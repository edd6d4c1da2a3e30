//! What somebody is about to read, and what is to be run for it.

use std::sync::Arc;

use super::{Answer, Gatherer, Pass, SetId};
use crate::command::{Action, Command};
use crate::cursor::{Cursor, Overtake};
use crate::error::StepError;
use crate::ids::UnitId;
use crate::reducer::Reducer;
use crate::route::PassKind;

impl Gatherer {
    /// The units of `set` are about to be read; in a backward by the node with torch's sequence
    /// number `node`. None: they are whole, go on. Otherwise what is to be done first, and the same
    /// call again where that ends with a roll, or breaks off.
    ///
    /// # Errors
    /// [`StepError::NoPass`], [`StepError::UnknownSet`].
    #[inline]
    pub fn need(
        &mut self,
        reducer: &mut Reducer,
        set: SetId,
        node: Option<u64>,
    ) -> Result<Option<Answer>, StepError> {
        if self.current == Some(set) { Ok(None) } else { self.fetch(reducer, set, node) }
    }

    /// Whether `set` is current, so that [`Gatherer::need`] has nothing to ask for.
    #[inline]
    pub fn is_current(&self, set: SetId) -> bool {
        self.current == Some(set)
    }

    fn fetch(
        &mut self,
        reducer: &mut Reducer,
        set: SetId,
        node: Option<u64>,
    ) -> Result<Option<Answer>, StepError> {
        let kind = match self.pass {
            Pass::Idle | Pass::Rolling { .. } => return Err(StepError::NoPass),
            Pass::Listed { kind, .. } | Pass::Free { kind, .. } => kind,
        };
        let wanted = Arc::clone(self.units_of(set)?);
        self.current = None;
        let backward = is_backward(kind);
        if let (true, Some(node)) = (backward, node) {
            self.memory.come_to(node);
        }
        for &unit in wanted.iter() {
            self.memory.needed(unit, backward);
        }
        self.learning.stop(set, &wanted, self.memory.held(), reducer.arrivals());
        let mut actions = Vec::new();
        self.follow(reducer, set, &wanted, &mut actions);
        for &unit in wanted.iter() {
            self.memory.asked_for(unit);
        }
        let ask = self.ask(&wanted, &mut actions);
        let whole = wanted.iter().all(|&unit| self.memory.is_whole(unit));
        if actions.is_empty() && whole {
            self.current = Some(set);
            return Ok(None);
        }
        Ok(Some(Answer { actions, ask }))
    }

    /// Goes along the list to the stop that needs `set`, or leaves it where no stop to come does
    /// and it is not here.
    fn follow(
        &mut self,
        reducer: &mut Reducer,
        set: SetId,
        wanted: &[UnitId],
        actions: &mut Vec<Action>,
    ) {
        let Pass::Listed { kind, key, list, cursor, done, asked } = self.pass else { return };
        let here = wanted.iter().all(|&unit| self.memory.is_here(unit));
        let stops = self.stops[list].get(asked as usize..).unwrap_or_default();
        // What is here needs no haste: a jump would overtake launches, and gather what is not
        // needed yet.
        let ahead = if here { 1 } else { stops.len() };
        let stop = stops.iter().take(ahead).position(|&stop| stop == set);
        let Some(stop) = stop.map(|skipped| asked + skipped as u32) else {
            if !here {
                self.run_out(reducer, wanted, actions);
                self.pass = Pass::Free { kind, key, off: true, asking: None };
            }
            return;
        };
        let mut cursor = cursor;
        let hi = self.advance(reducer, &mut cursor, Overtake::Until(stop));
        self.pass = Pass::Listed { kind, key, list, cursor, done, asked: stop + 1 };
        self.hand_out(hi, wanted, actions);
    }

    /// The list's cursor, which is the reducer's where that follows it.
    fn advance(
        &self,
        reducer: &mut Reducer,
        cursor: &mut Cursor,
        overtake: Overtake,
    ) -> Option<usize> {
        let Pass::Listed { kind, list, .. } = self.pass else { return None };
        if Self::reduces(kind) {
            match overtake {
                Overtake::Until(stop) => reducer.need(stop),
                Overtake::All => reducer.rest(),
                Overtake::Nothing => None,
            }
        } else {
            cursor.advance(self.plan.commands(Some(list)), overtake, |_, must| must)
        }
    }

    /// The rest of the list, whatever is not full.
    pub(super) fn run_out(
        &mut self,
        reducer: &mut Reducer,
        wanted: &[UnitId],
        actions: &mut Vec<Action>,
    ) {
        let Pass::Listed { list, mut cursor, .. } = self.pass else { return };
        self.advance(reducer, &mut cursor, Overtake::All);
        self.hand_out(Some(self.plan.commands(Some(list)).len()), wanted, actions);
    }

    /// The list's commands below `hi` that have not been handed out.
    fn hand_out(&mut self, hi: Option<usize>, wanted: &[UnitId], actions: &mut Vec<Action>) {
        let Pass::Listed { list, ref mut done, .. } = self.pass else { return };
        let commands = self.plan.commands(Some(list));
        let hi = hi.unwrap_or(0).min(commands.len());
        let fresh = commands.get(*done..hi).unwrap_or_default();
        *done = hi.max(*done);
        for &command in fresh {
            match command {
                Command::Need(_) => {}
                Command::Launch(bucket) => actions.push(Action::Launch(bucket)),
                Command::Retire(bucket) => actions.push(Action::Retire(bucket)),
                Command::Gather(unit) => {
                    let coming = self.memory.coming(unit);
                    self.memory.sweep(coming, wanted, self.room, actions);
                    self.memory.gather(unit, actions);
                }
                Command::Free(unit) => self.memory.pass_free(unit, wanted, self.room, actions),
            }
        }
        self.memory.sweep(0, wanted, self.room, actions);
    }

    /// Without a list: which unit is to be asked for, once it has room.
    fn ask(&mut self, wanted: &[UnitId], actions: &mut Vec<Action>) -> Option<UnitId> {
        let lacking: Vec<UnitId> =
            wanted.iter().copied().filter(|&unit| !self.memory.is_here(unit)).collect();
        match &mut self.pass {
            Pass::Free { asking, .. } => *asking = lacking.first().copied(),
            Pass::Idle | Pass::Rolling { .. } | Pass::Listed { .. } => return None,
        }
        if !lacking.is_empty() {
            self.memory.evict(self.memory.numel(&lacking), wanted, self.room, actions);
        }
        lacking.first().copied()
    }

    /// The gathers of the units of `set` have been waited for: it is the current one.
    ///
    /// # Errors
    /// [`StepError::UnknownSet`], [`StepError::NotGathered`].
    pub fn arrived(&mut self, set: SetId) -> Result<(), StepError> {
        let units = Arc::clone(self.units_of(set)?);
        if let Some(&unit) = units.iter().find(|&&unit| !self.memory.is_here(unit)) {
            return Err(StepError::NotGathered { unit });
        }
        for &unit in units.iter() {
            self.memory.arrived(unit);
        }
        self.current = self.in_pass().then_some(set);
        Ok(())
    }

    /// A use of `set` begins, at torch's sequence number `seq` where it enters a graph. False, and
    /// nothing is done, where the set is not the current one: it is to be needed first.
    ///
    /// # Errors
    /// [`StepError::UnknownSet`].
    #[inline]
    pub fn acquire(&mut self, set: SetId, seq: Option<u64>) -> Result<bool, StepError> {
        if self.current != Some(set) {
            return self.units_of(set).map(|_| false);
        }
        let sets = self.sets.len();
        let units = self.sets.get(set.0 as usize);
        for &unit in units.ok_or(StepError::UnknownSet { set: set.0, sets })?.iter() {
            self.memory.acquire(unit, seq);
        }
        Ok(true)
    }

    /// [`Gatherer::acquire`], where that has nothing to learn: in a forward, `set` is the current
    /// one, and the first uses of its units are known, so that a later one tells nothing. False,
    /// and nothing is done, everywhere else.
    #[inline]
    pub fn reuse(&mut self, set: SetId) -> bool {
        if self.current != Some(set) || !self.moves_on() {
            return false;
        }
        let Some(units) = self.sets.get(set.0 as usize) else { return false };
        if !units.iter().all(|&unit| self.memory.is_placed(unit)) {
            return false;
        }
        for &unit in units.iter() {
            self.memory.acquire(unit, None);
        }
        true
    }

    /// Whether torch's sequence number only rises in the pass under way: a backward recomputes on a
    /// thread that may have a number of its own.
    const fn moves_on(&self) -> bool {
        match self.pass {
            Pass::Listed { kind, .. } | Pass::Free { kind, .. } => !is_backward(kind),
            Pass::Idle | Pass::Rolling { .. } => false,
        }
    }

    /// A use of `set` ends.
    ///
    /// # Errors
    /// [`StepError::UnknownSet`].
    #[inline]
    pub fn release(&mut self, set: SetId) -> Result<(), StepError> {
        let sets = self.sets.len();
        let units = self.sets.get(set.0 as usize);
        for &unit in units.ok_or(StepError::UnknownSet { set: set.0, sets })?.iter() {
            self.memory.release(unit);
        }
        Ok(())
    }

    /// The reducer has answered `hi` in a backward along a list: what is to be run.
    pub fn reached(&mut self, hi: usize) -> Vec<Action> {
        let mut actions = Vec::new();
        let wanted = self.current.and_then(|set| self.sets.get(set.0 as usize)).cloned();
        self.hand_out(Some(hi), wanted.as_deref().unwrap_or_default(), &mut actions);
        actions
    }
}

const fn is_backward(kind: PassKind) -> bool {
    match kind {
        PassKind::Backward | PassKind::LocalBackward => true,
        PassKind::Forward | PassKind::Evaluation => false,
    }
}
