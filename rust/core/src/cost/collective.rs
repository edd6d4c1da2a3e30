//! What a collective takes: a row for each algorithm.
//!
//! Each is so many messages one behind the other, and so many of the payload's bytes through a rank's
//! link. For n bytes over p ranks, with lg the logarithm to base 2 rounded up:
//!
//! | algorithm | reduce-scatter | all-gather |
//! |-----------|----------------|------------|
//! | ring | p-1, (p-1)/p | the same |
//! | halving, doubling | lg p, (p-1)/p; for p no power of two 2 + ⌊log p⌋, 2 | lg p, (p-1)/p |
//! | tree | 2 lg p, lg p + (p-1)/p (reduce, then scatter) | the same (gather, then broadcast) |
//! | flat | p-1, (p-1)/p | the same |
//! | broadcasts | as flat | p lg p, lg p: one broadcast a rank, in a row |
//! | measured | 1, 1 | the same |
//!
//! An all-reduce is the one and then the other, but for the tree: 2 lg p, 2 lg p (reduce, then
//! broadcast).
//!
//! Ring and flat: Patarasuk and Yuan 2009; Thakur, Rabenseifner and Gropp 2005 (pairwise exchange).
//! Halving, its price for other numbers than powers of two, and trees: Thakur et al.; doubling for
//! any number: Bruck et al. 1997. Broadcasts: gloo's are binomial trees.

use crate::command::Op;

/// How a collective is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Each rank sends to its neighbour.
    Ring,
    /// Recursive halving and doubling.
    Halving,
    /// Binomial trees.
    Tree,
    /// Each rank sends to each.
    Flat,
    /// Gathers by one broadcast a rank, scatters as [`Algorithm::Flat`].
    Broadcasts,
    /// The cheapest of ring, halving and tree, as a library chooses.
    Best,
    /// Alpha and beta are those of a whole collective, as it was measured with these ranks.
    Measured,
}

/// Messages one behind the other, and how often the payload passes a rank's link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Steps {
    pub(super) messages: f64,
    pub(super) volume: f64,
    /// What a rank sends of the payload.
    pub(super) sent: f64,
}

impl Steps {
    const NONE: Self = Self { messages: 0.0, volume: 0.0, sent: 0.0 };

    fn of(messages: f64, volume: f64) -> Self {
        Self { messages, volume, sent: volume }
    }

    fn and(self, next: Self) -> Self {
        Self {
            messages: self.messages + next.messages,
            volume: self.volume + next.volume,
            sent: self.sent + next.sent,
        }
    }
}

impl Algorithm {
    /// All, by name.
    pub const NAMES: [(&'static str, Self); 7] = [
        ("ring", Self::Ring),
        ("halving", Self::Halving),
        ("tree", Self::Tree),
        ("flat", Self::Flat),
        ("broadcasts", Self::Broadcasts),
        ("best", Self::Best),
        ("measured", Self::Measured),
    ];

    /// What it may turn out to be.
    pub(super) const fn candidates(&self) -> &[Self] {
        match self {
            Self::Best => &[Self::Ring, Self::Halving, Self::Tree],
            _ => std::slice::from_ref(self),
        }
    }

    /// `op` over `ranks` ranks.
    pub(super) fn steps(self, op: Op, ranks: u32) -> Steps {
        if ranks <= 1 {
            return Steps::NONE;
        }
        match op {
            Op::ReduceScatter => self.scatter(ranks),
            Op::AllGather => self.gather(ranks),
            Op::AllReduce if self == Self::Tree => {
                Steps::of(2.0 * f64::from(log2(ranks)), 2.0 * f64::from(log2(ranks)))
            }
            Op::AllReduce => self.scatter(ranks).and(self.gather(ranks)),
            Op::Copy => Steps::NONE,
        }
    }

    fn scatter(self, ranks: u32) -> Steps {
        let floor = f64::from(ranks.ilog2());
        match self {
            Self::Halving if !ranks.is_power_of_two() => Steps::of(floor + 2.0, 2.0),
            Self::Broadcasts => Self::Flat.gather(ranks),
            Self::Ring | Self::Halving | Self::Tree | Self::Flat | Self::Best | Self::Measured => {
                self.gather(ranks)
            }
        }
    }

    fn gather(self, ranks: u32) -> Steps {
        let (all, log) = (f64::from(ranks), f64::from(log2(ranks)));
        let others = (all - 1.0) / all;
        match self {
            Self::Ring | Self::Flat => Steps::of(all - 1.0, others),
            Self::Halving | Self::Best => Steps::of(log, others),
            Self::Tree => Steps::of(2.0 * log, log + others),
            Self::Broadcasts => Steps::of(all * log, log),
            Self::Measured => Steps { messages: 1.0, volume: 1.0, sent: others },
        }
    }
}

/// The logarithm to base 2, rounded up.
fn log2(ranks: u32) -> u32 {
    ranks.next_power_of_two().ilog2()
}
