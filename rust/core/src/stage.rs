//! ZeRO's stages as three placements.
//!
//! A stage is a number only where a user writes it. Everything else asks [`Rules`] a question by
//! name, so that a new mixture of placements is a new row in one table and nothing else.
//!
//! At stage 3 parameters outside any unit, which are small, stay replicated: see
//! [`Bucket::parameter`](crate::Bucket::parameter).
//!
//! | stage | optimizer state | gradient   | parameter  |
//! |------:|-----------------|------------|------------|
//! |     0 | replicated      | replicated | replicated |
//! |     1 | sharded         | replicated | replicated |
//! |     2 | sharded         | sharded    | replicated |
//! |     3 | sharded         | sharded    | sharded    |

use crate::error::PlanError;

/// Where a tensor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Placement {
    /// Every rank keeps the whole.
    Replicated,
    /// Every rank keeps its shard.
    Sharded,
}

/// A stage of the ZeRO paper (Rajbhandari et al., 2020).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Plain data parallelism.
    Zero,
    /// Optimizer state is sharded.
    One,
    /// And gradients.
    Two,
    /// And parameters.
    Three,
}

impl Stage {
    /// The stage with number `n`.
    ///
    /// # Errors
    /// [`PlanError::BadStage`] when `n` is larger than 3.
    pub const fn new(n: u8) -> Result<Self, PlanError> {
        match n {
            0 => Ok(Self::Zero),
            1 => Ok(Self::One),
            2 => Ok(Self::Two),
            3 => Ok(Self::Three),
            stage => Err(PlanError::BadStage { stage }),
        }
    }

    /// What the stage means.
    pub const fn rules(self) -> Rules {
        use Placement::{Replicated, Sharded};
        let (optimizer, gradient, parameter) = match self {
            Self::Zero => (Replicated, Replicated, Replicated),
            Self::One => (Sharded, Replicated, Replicated),
            Self::Two => (Sharded, Sharded, Replicated),
            Self::Three => (Sharded, Sharded, Sharded),
        };
        Rules { optimizer, gradient, parameter }
    }
}

/// The three placements, and what follows from them. Which collectives they ask for is said in
/// [`crate::hop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rules {
    /// Optimizer state and master weights.
    pub optimizer: Placement,
    /// Gradients between micro-batches.
    pub gradient: Placement,
    /// Parameters between their uses.
    pub parameter: Placement,
}

impl Rules {
    /// Whether gradients are reduced at every micro-batch, because no rank may keep them whole, or
    /// only at the boundary.
    pub fn reduces_every_micro_batch(self) -> bool {
        self.gradient == Placement::Sharded
    }

    /// Whether reduced gradients are gathered, because every rank updates everything.
    pub fn gathers_gradient(self) -> bool {
        self.optimizer == Placement::Replicated
    }

    /// Whether updated parameters are published to all ranks after a step.
    pub fn gathers_parameter(self) -> bool {
        self.optimizer == Placement::Sharded && self.parameter == Placement::Replicated
    }
}
