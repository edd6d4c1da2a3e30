//! Passes along a list in which units are needed too, and what such lists are made from.

use super::state::advance;
use super::{Pass, Reducer};
use crate::cursor::{Cursor, Overtake};
use crate::error::{Phase, StepError};
use crate::ids::BucketId;

impl Reducer {
    /// Starts a pass along the plan's list number `list`, in which units are needed too. Nothing is
    /// learnt in it.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] during a pass, [`StepError::UnknownList`].
    pub fn begin_list(&mut self, list: usize) -> Result<(), StepError> {
        let lists = self.plan.lists().len();
        if list >= lists {
            return Err(StepError::UnknownList { list, lists });
        }
        self.begin()?;
        self.pass = Pass::Backward { cursor: Cursor::default(), list: Some(list) };
        Ok(())
    }

    /// Starts a pass that only [observes](super#what-is-learnt), whatever is known.
    ///
    /// # Errors
    /// [`StepError::OutOfPhase`] during a pass.
    pub fn observe(&mut self) -> Result<(), StepError> {
        self.demand(Phase::Idle)?;
        for slot in &mut self.slots {
            slot.known = false;
        }
        self.watch();
        self.begin()
    }

    /// A stop of the list is asked for: it and all before it may run, launches of buckets that are
    /// not full included. Returns `hi` when commands became free.
    ///
    /// None outside a pass along a list.
    pub fn need(&mut self, stop: u32) -> Option<usize> {
        self.overtake(Overtake::Until(stop))
    }

    /// The rest of the list may run, whatever is not full.
    ///
    /// None outside a pass along a list.
    pub fn rest(&mut self) -> Option<usize> {
        self.overtake(Overtake::All)
    }

    fn overtake(&mut self, overtake: Overtake) -> Option<usize> {
        match &mut self.pass {
            Pass::Backward { cursor, list: Some(list) } => {
                let commands = self.plan.commands(Some(*list));
                advance(commands, &mut self.buckets, cursor, overtake)
            }
            Pass::Idle | Pass::Armed | Pass::Observing { .. } | Pass::Backward { .. } => None,
        }
    }

    /// Whether the next pass has to [observe](super#what-is-learnt).
    pub fn has_to_observe(&self) -> bool {
        self.learns()
    }

    /// Arrivals so far in an observing pass; 0 in any other.
    pub fn arrivals(&self) -> u64 {
        match self.pass {
            Pass::Observing { arrivals } => arrivals,
            Pass::Idle | Pass::Armed | Pass::Backward { .. } => 0,
        }
    }

    /// After which arrival of the last observing pass each bucket was full; buckets of which
    /// something did not come are left out, and so are those that are only held.
    pub fn filled(&self) -> Vec<(BucketId, u64)> {
        let mut places = vec![Some(0); self.buckets.len()];
        for slot in self.slots.iter().filter(|slot| slot.is_active()) {
            let place = &mut places[slot.bucket.index()];
            *place = place.filter(|_| slot.last > 0).map(|place: u64| place.max(slot.last));
        }
        let buckets = self.plan.buckets().iter().zip(places);
        let full = buckets.filter(|(bucket, _)| bucket.is_trained());
        full.filter_map(|(bucket, place)| Some((bucket.id, place?))).collect()
    }

    pub(super) fn list(&self) -> Option<usize> {
        match self.pass {
            Pass::Backward { list, .. } => list,
            Pass::Idle | Pass::Armed | Pass::Observing { .. } => None,
        }
    }
}
