//! Ranks that train at stage 3, as state machines over the core's own reducer, gatherer and roll.
//!
//! What is modelled is what Python does around the core: an executor that runs actions first in first
//! out and polls where a hook may not block, the roll, the boundary with its vote, and a rank that
//! fails. A rank runs one step of its own at a time; which rank is next is the test's choice.
//!
//! Checked at every step: all ranks launch the same collectives in the same order, and the same
//! exchanges on the control group; a use finds its units whole and nothing frees them while they may
//! be read; behind a boundary no unit is whole and every gradient has been reduced once.
#![allow(dead_code, reason = "every test file takes what it needs")]

mod executor;
pub mod program;
mod rank;

use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use zerort_core::{Action, Plan};

pub use program::{Event, Node, Op};
pub use rank::Rank;

/// An exchange on the control group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exchange {
    Roll(zerort_core::Row),
    Vote { unreduced: u32, failed: bool },
    Learn(Vec<Vec<i64>>),
}

impl Exchange {
    fn pairs(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// What ranks see of each other.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// Collectives that each rank has started on the data group.
    pub logs: Vec<Vec<Action>>,
    /// What each rank has brought to the control group.
    pub control: Vec<Vec<Exchange>>,
}

impl Shared {
    /// Starts a collective; its number.
    pub fn start(&mut self, rank: usize, action: Action) -> usize {
        self.logs[rank].push(action);
        self.logs[rank].len() - 1
    }

    /// Whether all ranks have started collective number `index`.
    pub fn is_complete(&self, index: usize) -> bool {
        self.logs.iter().all(|log| log.len() > index)
    }

    pub fn bring(&mut self, rank: usize, exchange: Exchange) -> usize {
        self.control[rank].push(exchange);
        self.control[rank].len() - 1
    }

    /// What all ranks brought to exchange number `index`, once they have.
    pub fn brought(&self, index: usize) -> Option<Vec<&Exchange>> {
        self.control.iter().map(|rank| rank.get(index)).collect()
    }

    /// Whether what rank `rank` did last pairs with what the others did there.
    fn pairs(&self, rank: usize) -> Result<(), String> {
        if let Some(index) = self.logs[rank].len().checked_sub(1) {
            let mine = self.logs[rank][index];
            if let Some(other) =
                self.logs.iter().filter_map(|log| log.get(index)).find(|&&other| other != mine)
            {
                return Err(format!("collective {index} is {mine:?} and {other:?}"));
            }
        }
        if let Some(index) = self.control[rank].len().checked_sub(1) {
            let mine = &self.control[rank][index];
            let theirs = self.control.iter().filter_map(|log| log.get(index));
            if let Some(other) = theirs.into_iter().find(|other| !mine.pairs(other)) {
                return Err(format!("exchange {index} is {mine:?} and {other:?}"));
            }
        }
        Ok(())
    }
}

/// What is taken out of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// The second half of GAT-11: sums of a free backward are launched and waited for before a roll.
    WaitsForSums,
}

/// A plan, and what lists are made under.
#[derive(Clone, Debug)]
pub struct Setting {
    pub plan: Arc<Plan>,
    pub room: u64,
    pub depth: u32,
    pub mutant: Mutant,
}

#[derive(Clone, Debug)]
pub struct World {
    pub ranks: Vec<Rank>,
    pub shared: Shared,
}

/// How a run of one rank's next step went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Moved,
    Blocked,
    Done,
}

impl World {
    pub fn new(setting: &Setting, programs: Vec<Vec<Op>>) -> Self {
        let shared = Shared {
            logs: vec![Vec::new(); programs.len()],
            control: vec![Vec::new(); programs.len()],
        };
        let ranks = programs.into_iter().enumerate();
        let ranks = ranks.map(|(rank, program)| Rank::new(setting, rank, program)).collect();
        Self { ranks, shared }
    }

    /// Runs the next step of `rank`.
    pub fn step(&mut self, rank: usize) -> Result<Step, String> {
        let step = self.ranks[rank].step(&mut self.shared)?;
        self.shared.pairs(rank)?;
        Ok(step)
    }

    pub fn is_done(&self) -> bool {
        self.ranks.iter().all(Rank::is_done)
    }

    /// Checks of a run that is over.
    pub fn end(&self) -> Result<(), String> {
        let logs = &self.shared.logs;
        let diverged = self.ranks.iter().any(|rank| rank.diverged);
        if diverged != self.ranks.iter().all(|rank| rank.diverged) {
            return Err("some ranks have diverged, and some have not noticed".into());
        }
        let alike = logs.iter().all(|log| *log == logs[0]);
        if alike { Ok(()) } else { Err("ranks have launched different collectives".into()) }
    }

    /// A hash of all that decides what may happen next.
    pub fn fingerprint(&self) -> u64 {
        struct Into<'a>(&'a mut DefaultHasher);
        impl Write for Into<'_> {
            fn write_str(&mut self, s: &str) -> fmt::Result {
                self.0.write(s.as_bytes());
                Ok(())
            }
        }
        let mut hasher = DefaultHasher::new();
        let mut into = Into(&mut hasher);
        let Shared { logs, control } = &self.shared;
        // What all ranks have done has been compared.
        let done = logs.iter().map(Vec::len).min().unwrap_or(0);
        let read = control.iter().map(Vec::len).min().unwrap_or(0).saturating_sub(1);
        for ((rank, log), control) in self.ranks.iter().zip(logs).zip(control) {
            let seen = (&log[done..], control.len(), control.get(read..));
            write!(into, "{:?} {seen:?}", rank.state()).unwrap();
        }
        hasher.finish()
    }
}
