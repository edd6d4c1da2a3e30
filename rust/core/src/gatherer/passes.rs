//! How passes open, roll, and close.

use super::{Agreed, Gatherer, Opening, Pass};
use crate::command::Action;
use crate::cursor::Cursor;
use crate::error::StepError;
use crate::ids::UnitId;
use crate::reducer::Reducer;
use crate::roll::{self, At, OWN, Reading, Row};
use crate::route::{Key, PassKind};

impl Gatherer {
    /// Something is about to begin: a pass that calls module number `entry`, while torch's sequence
    /// number is `seq`; the boundary; or serving. Nothing has been sent yet.
    ///
    /// # Errors
    /// [`StepError::PassUnderWay`]; [`StepError::NotRolling`] for [`At::Need`], which
    /// [`Gatherer::need`] begins.
    pub fn open(&mut self, at: At, entry: u32, seq: u64) -> Result<(), StepError> {
        match self.pass {
            Pass::Idle => {}
            Pass::Rolling { .. } | Pass::Listed { .. } | Pass::Free { .. } => {
                return Err(StepError::PassUnderWay);
            }
        }
        let key = match at {
            At::Pass(kind) => self.learning.key(kind, entry),
            At::Boundary | At::Serve => Key(0),
            At::Need(_) | At::Elsewhere(_) => return Err(StepError::NotRolling),
        };
        self.pass = Pass::Rolling { opening: Opening { at, key, entry, seq }, agreed: None };
        Ok(())
    }

    /// This rank's row; `own` is the caller's.
    ///
    /// # Errors
    /// [`StepError::NotRolling`] unless something is about to begin or a unit is to be asked for.
    pub fn row(&self, reducer: &Reducer, own: [i64; OWN]) -> Result<Row, StepError> {
        let (at, key, ready) = match self.pass {
            Pass::Rolling { opening, .. } => {
                (opening.at, opening.key, self.list_for(opening, reducer).is_some())
            }
            Pass::Free { asking: Some(unit), key, .. } => (At::Need(unit), key, false),
            Pass::Idle | Pass::Free { asking: None, .. } | Pass::Listed { .. } => {
                return Err(StepError::NotRolling);
            }
        };
        let (count, failed, news) = (self.count, self.failed, self.news());
        Ok(Row { at, key, count, failed, ready, news, own })
    }

    /// What the rows of all ranks mean here.
    ///
    /// # Errors
    /// [`StepError::NotRolling`]; [`StepError::BadRows`], also where the others follow a list that
    /// this rank's plan has not.
    pub fn read(&mut self, rows: &[Row]) -> Result<Reading, StepError> {
        if rows.len() != self.plan.world() as usize {
            return Err(StepError::BadRows);
        }
        match self.pass {
            Pass::Rolling { .. } | Pass::Free { asking: Some(_), .. } => {}
            Pass::Idle | Pass::Free { asking: None, .. } | Pass::Listed { .. } => {
                return Err(StepError::NotRolling);
            }
        }
        let reading = roll::read(rows, self.rank);
        let decided = self.decided(&reading)?;
        if let (Pass::Rolling { agreed, .. }, Some(decided)) = (&mut self.pass, decided) {
            *agreed = Some(decided);
        }
        Ok(reading)
    }

    fn decided(&self, reading: &Reading) -> Result<Option<Agreed>, StepError> {
        let Pass::Rolling { opening, .. } = self.pass else { return Ok(None) };
        Ok(match *reading {
            Reading::Serve(_) | Reading::Again | Reading::Diverged(_) => None,
            Reading::Alone => {
                let kind = PassKind::Evaluation;
                Some(Agreed::Begin { kind, key: opening.key, list: None })
            }
            Reading::Together { at: At::Pass(kind), key, ready, .. } => {
                let key = key.unwrap_or(opening.key);
                let list = if ready { Some(self.agreed_list(kind, key)?) } else { None };
                Some(Agreed::Begin { kind, key, list })
            }
            Reading::Together {
                at: At::Boundary | At::Serve | At::Need(_) | At::Elsewhere(_),
                ..
            } => Some(Agreed::Over),
        })
    }

    fn agreed_list(&self, kind: PassKind, key: Key) -> Result<usize, StepError> {
        self.find_list(kind, key).ok_or(StepError::BadRows)
    }

    /// The list of the pass that has been agreed on and not begun.
    pub fn agreed(&self) -> Option<usize> {
        match self.pass {
            Pass::Rolling { agreed: Some(Agreed::Begin { list, .. }), .. } => list,
            Pass::Idle | Pass::Rolling { .. } | Pass::Listed { .. } | Pass::Free { .. } => None,
        }
    }

    /// What has been agreed on begins. Returns what is to be run first.
    ///
    /// # Errors
    /// [`StepError::NotRolling`] where nothing has been agreed on.
    pub fn begin(&mut self) -> Result<Vec<Action>, StepError> {
        let Pass::Rolling { opening, agreed: Some(agreed) } = self.pass else {
            return Err(StepError::NotRolling);
        };
        let mut actions = Vec::new();
        match agreed {
            Agreed::Over => {
                self.pass = Pass::Idle;
                self.forget(&mut actions);
            }
            Agreed::Begin { kind, key, list } => {
                self.count = match kind {
                    PassKind::Evaluation => self.count,
                    PassKind::Forward | PassKind::Backward | PassKind::LocalBackward => {
                        self.count.saturating_add(1)
                    }
                };
                if self.learning.begin(kind, key, opening.entry) {
                    self.memory.forget_graphs(opening.seq);
                }
                self.pass = match list {
                    None => Pass::Free { kind, key, off: false, asking: None },
                    Some(list) => {
                        let start = self.plan.lists().get(list).map(|list| list.start.as_slice());
                        self.memory.free_all_but(start.unwrap_or_default(), &mut actions);
                        let cursor = Cursor::default();
                        Pass::Listed { kind, key, list, cursor, done: 0, asked: 0 }
                    }
                };
            }
        }
        Ok(actions)
    }

    /// Ranks ask for units while this one is in another engine's call: a pass along a list leaves
    /// that, for it has to hand out the rest of it first (GAT-1), as where it needs what the list
    /// has not. Nothing else changes anything.
    pub fn leave(&mut self, reducer: &mut Reducer) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Pass::Listed { kind, key, .. } = self.pass {
            self.current = None;
            self.run_out(reducer, &[], &mut actions);
            self.pass = Pass::Free { kind, key, off: true, asking: None };
        }
        actions
    }

    /// Ranks have asked for `units`: what is to be run, and waited for, before
    /// [`Gatherer::served`].
    ///
    /// # Errors
    /// [`StepError::UnknownUnit`].
    pub fn serve(&mut self, units: &[UnitId]) -> Result<Vec<Action>, StepError> {
        let count = self.plan.units().len();
        if let Some(&unit) = units.iter().find(|unit| unit.index() >= count) {
            return Err(StepError::UnknownUnit { unit, units: count });
        }
        let mut actions = Vec::new();
        for &unit in units {
            if !self.memory.is_here(unit) {
                self.guests.push(unit);
            }
            self.memory.gather(unit, &mut actions);
        }
        Ok(actions)
    }

    /// What was served has come: puts units back as they were. A rank that has asked keeps its own,
    /// and others as far as there is room, because it may ask for them next.
    pub fn served(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        let guests = std::mem::take(&mut self.guests);
        match &mut self.pass {
            Pass::Free { asking: asking @ Some(_), .. } => {
                let own: Vec<UnitId> = asking.take().into_iter().collect();
                for &unit in &guests {
                    self.memory.arrived(unit);
                }
                let evicted: Vec<UnitId> =
                    guests.into_iter().filter(|unit| !own.contains(unit)).collect();
                self.memory.shrink(&evicted, self.room, &mut actions);
            }
            Pass::Idle | Pass::Rolling { .. } | Pass::Listed { .. } | Pass::Free { .. } => {
                for unit in guests {
                    self.memory.free(unit, &mut actions);
                }
            }
        }
        actions
    }

    /// The pass is over: the rest of its list, and what is freed. `complete` unless it broke off, so
    /// that nothing can be learnt from it. In a backward the reducer has finished. Nothing where no
    /// pass is under way.
    pub fn close(&mut self, reducer: &mut Reducer, complete: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        let kind = match self.pass {
            Pass::Idle => return actions,
            Pass::Rolling { .. } => None,
            Pass::Listed { kind, .. } | Pass::Free { kind, .. } => Some(kind),
        };
        self.current = None;
        self.memory.let_go();
        self.run_out(reducer, &[], &mut actions);
        if complete {
            self.note_end(reducer);
        }
        let stays = self.stays();
        for guest in std::mem::take(&mut self.guests) {
            self.memory.free(guest, &mut actions);
        }
        self.pass = Pass::Idle;
        match (kind, stays) {
            (None, _) | (Some(PassKind::Forward), None) => {}
            (Some(PassKind::Forward), Some(stays)) => {
                self.memory.free_all_but(&stays, &mut actions);
            }
            (Some(PassKind::Backward | PassKind::LocalBackward | PassKind::Evaluation), _) => {
                self.memory.free_all_but(&[], &mut actions);
            }
        }
        actions
    }

    /// The window is lost, on all ranks alike: everything is freed, and what was counted forgotten.
    pub fn abandon(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        self.pass = Pass::Idle;
        self.forget(&mut actions);
        actions
    }

    /// What a list leaves whole.
    fn stays(&self) -> Option<Vec<UnitId>> {
        self.list().and_then(|list| self.plan.lists().get(list)).map(|list| list.end.clone())
    }

    /// Behind the boundary no unit is whole (GAT-10), and no graph is to be run.
    fn forget(&mut self, actions: &mut Vec<Action>) {
        self.current = None;
        self.guests.clear();
        self.memory.let_go();
        self.memory.free_all_but(&[], actions);
        self.learning.reset();
        (self.count, self.failed) = (0, false);
    }
}
