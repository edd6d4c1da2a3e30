//! Runs actions first in first out, as the executor of the engine does.

use std::collections::{BTreeMap, VecDeque};

use zerort_core::{Action, BucketId, UnitId};

use super::Shared;

#[derive(Clone, Debug, Default)]
pub struct Executor {
    rank: usize,
    queue: VecDeque<Action>,
    /// The last gather of each unit whose storage is there.
    whole: BTreeMap<UnitId, usize>,
    /// Launched and unretired.
    flying: BTreeMap<BucketId, usize>,
    /// Buckets that have been packed, in order.
    pub launched: Vec<BucketId>,
    /// Units that somebody reads.
    pub read: Vec<UnitId>,
}

impl Executor {
    pub fn new(rank: usize) -> Self {
        Self { rank, ..Self::default() }
    }

    /// Appends, and runs as far as it goes without blocking.
    pub fn run(&mut self, actions: Vec<Action>, shared: &mut Shared) -> Result<(), String> {
        self.queue.extend(actions);
        self.advance(shared)
    }

    fn advance(&mut self, shared: &mut Shared) -> Result<(), String> {
        while let Some(&action) = self.queue.front() {
            match action {
                Action::Launch(bucket) => {
                    let index = shared.start(self.rank, action);
                    self.flying.insert(bucket, index);
                    self.launched.push(bucket);
                }
                Action::Gather(unit) => {
                    let index = shared.start(self.rank, action);
                    self.whole.insert(unit, index);
                }
                Action::Retire(bucket) => {
                    let index = self.flying.get(&bucket).ok_or("a Retire without its Launch")?;
                    if !shared.is_complete(*index) {
                        return Ok(());
                    }
                    self.flying.remove(&bucket);
                }
                Action::Free(unit) => {
                    let index = self.whole.get(&unit).ok_or(format!("{unit:?} freed twice"))?;
                    if !shared.is_complete(*index) {
                        return Ok(());
                    }
                    if self.read.contains(&unit) {
                        return Err(format!("GAT-3: {unit:?} is freed while it is read"));
                    }
                    self.whole.remove(&unit);
                }
            }
            self.queue.pop_front();
        }
        Ok(())
    }

    /// Whether everything queued has been started.
    pub fn reached(&mut self, shared: &mut Shared) -> Result<bool, String> {
        self.advance(shared)?;
        Ok(self.queue.iter().all(|action| match action {
            Action::Launch(_) | Action::Gather(_) => false,
            Action::Retire(_) | Action::Free(_) => true,
        }))
    }

    /// Whether everything queued has been done.
    pub fn drained(&mut self, shared: &mut Shared) -> Result<bool, String> {
        self.advance(shared)?;
        Ok(self.queue.is_empty())
    }

    /// Whether the values of these units are here.
    pub fn is_whole(&self, units: &[UnitId], shared: &Shared) -> bool {
        units
            .iter()
            .all(|unit| self.whole.get(unit).is_some_and(|&index| shared.is_complete(index)))
    }

    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    pub fn holds_nothing(&self) -> bool {
        self.whole.is_empty()
    }
}
