//! What a schedule is made of.
//!
//! There is no command for "wait until done": a retired bucket's result is waited for by the
//! *stream*, so that nothing in a schedule depends on time and the core never hears of completions.

use std::fmt;

use crate::ids::{BucketId, UnitId};

/// One element of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Start the bucket's collective.
    Launch(BucketId),
    /// Make the stream wait for it, take its result, free its buffer.
    Retire(BucketId),
    /// A marker: what stands behind it runs once this stop of the route has been asked for.
    Need(u32),
    /// Start to bring the unit's values here.
    Gather(UnitId),
    /// Give the memory of its values back.
    Free(UnitId),
}

/// A command that something is done for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// [`Command::Launch`].
    Launch(BucketId),
    /// [`Command::Retire`].
    Retire(BucketId),
    /// [`Command::Gather`].
    Gather(UnitId),
    /// [`Command::Free`].
    Free(UnitId),
}

impl Command {
    /// The bucket it is about.
    pub const fn bucket(self) -> Option<BucketId> {
        match self {
            Self::Launch(bucket) | Self::Retire(bucket) => Some(bucket),
            Self::Need(_) | Self::Gather(_) | Self::Free(_) => None,
        }
    }

    /// The number of its bucket, stop or unit.
    pub const fn number(self) -> u32 {
        match self {
            Self::Launch(BucketId(number))
            | Self::Retire(BucketId(number))
            | Self::Need(number)
            | Self::Gather(UnitId(number))
            | Self::Free(UnitId(number)) => number,
        }
    }

    /// What is to be done; None for a marker.
    pub const fn action(self) -> Option<Action> {
        match self {
            Self::Launch(bucket) => Some(Action::Launch(bucket)),
            Self::Retire(bucket) => Some(Action::Retire(bucket)),
            Self::Gather(unit) => Some(Action::Gather(unit)),
            Self::Free(unit) => Some(Action::Free(unit)),
            Self::Need(_) => None,
        }
    }
}

impl Action {
    /// One integer: four times the bucket or unit, plus 0 for Launch, 1 for Retire, 2 for Gather, 3
    /// for Free.
    pub const fn code(self) -> u64 {
        let (id, verb) = match self {
            Self::Launch(BucketId(id)) => (id, 0),
            Self::Retire(BucketId(id)) => (id, 1),
            Self::Gather(UnitId(id)) => (id, 2),
            Self::Free(UnitId(id)) => (id, 3),
        };
        4 * id as u64 + verb
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Launch(bucket) => write!(f, "Launch b{}", bucket.0),
            Self::Retire(bucket) => write!(f, "Retire b{}", bucket.0),
            Self::Need(stop) => write!(f, "Need {stop}"),
            Self::Gather(unit) => write!(f, "Gather u{}", unit.0),
            Self::Free(unit) => write!(f, "Free u{}", unit.0),
        }
    }
}

/// What a hop does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Every rank gets the whole sum.
    AllReduce,
    /// Every rank gets its shard of the sum.
    ReduceScatter,
    /// Every rank gets all shards.
    AllGather,
    /// What the rank has goes to another memory of its own, such as the host's.
    Copy,
}
