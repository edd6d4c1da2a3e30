//! What of a parameter may not be cut.
//!
//! An elementwise optimizer steps any elements by themselves. One that quantizes its state in
//! blocks needs each block in one place, and one that orthogonalises or factorises a matrix needs
//! the matrix. The grain says so, and a shard border never cuts one: see
//! [PAR-4](crate::partition). Whoever updates everything, as at stage 0, has no borders, and there a
//! grain means nothing.

use std::num::NonZeroU64;

/// The smallest part of a parameter that an optimizer can step by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Grain {
    /// One element.
    Element,
    /// So many consecutive elements, counted from the parameter's start; the last block may be
    /// shorter.
    Block(NonZeroU64),
    /// The whole parameter.
    Whole,
}

impl Grain {
    /// Borders inside a parameter lie at multiples of this from its start; 1 also where there are
    /// none.
    pub(crate) const fn step(self) -> u64 {
        match self {
            Self::Element | Self::Whole => 1,
            Self::Block(block) => block.get(),
        }
    }

    /// Whether a border between shards of `shard_numel` elements cuts a grain of a parameter of
    /// `numel` elements that starts at `start`.
    pub fn is_cut(self, start: u64, numel: u64, shard_numel: u64) -> bool {
        let (first, end) = ((start / shard_numel + 1) * shard_numel, start + numel);
        let several = first < end && end - first > shard_numel;
        first < end
            && match self {
                Self::Element => false,
                Self::Block(block) => {
                    (first - start) % block != 0 || several && shard_numel % block != 0
                }
                Self::Whole => true,
            }
    }
}
