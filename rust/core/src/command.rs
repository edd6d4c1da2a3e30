//! What a schedule is made of.
//!
//! There is no command for "wait until done": a retired bucket's result is waited for by the
//! *stream*, so that nothing in a schedule depends on time and the core never hears of completions.

use std::fmt;

use crate::ids::BucketId;

/// One element of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Start the bucket's collective.
    Launch(BucketId),
    /// Make the stream wait for it, take its result, free its buffer.
    Retire(BucketId),
}

impl Command {
    /// The bucket it is about.
    pub const fn bucket(self) -> BucketId {
        match self {
            Self::Launch(bucket) | Self::Retire(bucket) => bucket,
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Launch(bucket) => write!(f, "Launch b{}", bucket.0),
            Self::Retire(bucket) => write!(f, "Retire b{}", bucket.0),
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
