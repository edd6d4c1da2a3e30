//! The roll call: what every rank is at, and what follows from that.
//!
//! Before a pass begins, at the boundary, and when it needs a unit that no list brings, a rank puts
//! what it is at into a [`Row`]. One small all-reduce brings every rank the rows of all, in rank
//! order, and [`read`] says what they mean: a pure function, so that all ranks come to one decision.
//!
//! | rows | a rank at a pass or the boundary | at an evaluation | asking | serving |
//! |---|---|---|---|---|
//! | some rank asks | serve, again | serve, again | serve, go on | serve, again |
//! | some evaluate, some do not | again | alone | | again |
//! | all alike, but for those that serve | together | together | | together |
//! | anything else | diverged | | | diverged |
//!
//! A process may have several engines, and ranks answer the rolls of all of them at one place. Who is
//! in another engine's call is [*elsewhere*](Row::apart) for this one:
//!
//! | rows, some of them elsewhere | at a pass or the boundary | at an evaluation | asking | serving |
//! |---|---|---|---|---|
//! | some rank asks, here or there | serve, again | serve, again | serve, go on | serve, again |
//! | some rank evaluates, here or there | again | alone | | again |
//! | anything else | diverged | | | diverged |
//!
//! - *Together*: the pass begins on all ranks. It follows its list where all ranks have it and find
//!   whole what it begins with.
//! - *Alone*: so does this evaluation, but without a list; the others serve it until it is over.
//! - *Serve*: all ranks gather the units asked for, by rank; nothing else may stand between.
//! - *Again*: the next roll will tell more.
//! - *Diverged*: ranks are at different places, and nobody can go on. All learn it at one roll.
//!
//! A rank that *serves* has failed, or is out of data: it does as the others do.
//!
//! - **GAT-11** A rank blocks in a roll, in a need for what it has launched, and in the vote. It
//!   waits for the sums of a pass without a list only behind a roll that was read as *together*,
//!   where all ranks launch them.

use crate::ids::{Rank, UnitId};
use crate::route::{Key, PassKind};

/// What a rank is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum At {
    /// A pass is about to begin.
    Pass(PassKind),
    /// The end of an accumulation window.
    Boundary,
    /// It needs a unit that no list brings.
    Need(UnitId),
    /// It does as the others do.
    Serve,
    /// It is in another engine's call. No rank brings this to a roll; see [`Row::apart`].
    Elsewhere(Apart),
}

/// What a rank is at in another engine's call, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Apart {
    /// It needs a unit, and is served before anything else.
    Asks,
    /// It evaluates, and comes here when that is over.
    Evaluates,
    /// It comes here only behind others.
    Waits,
}

/// What one rank brings to a roll.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// What it is at.
    pub at: At,
    /// Which pass that is.
    pub key: Key,
    /// Forwards and backwards that have begun since the last boundary.
    pub count: u32,
    /// Its step is lost.
    pub failed: bool,
    /// It has the list of this pass, and finds whole what that begins with.
    pub ready: bool,
    /// It has seen routes that the plan's lists do not have.
    pub news: bool,
    /// The caller's own, carried and never looked at.
    pub own: [i64; OWN],
}

/// How many integers of a row are the caller's own.
pub const OWN: usize = 6;
/// How many integers a row is.
pub const WIDTH: usize = 5 + OWN;

/// What the rows mean for one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// All ranks but those that serve are at the same; [`At::Serve`] where all serve.
    Together {
        /// What they are at.
        at: At,
        /// Which pass that is; None where they differ.
        key: Option<Key>,
        /// Every one of them has its list and can begin it.
        ready: bool,
        /// Rank 0 has routes to broadcast.
        news: bool,
    },
    /// An evaluation that not all ranks run.
    Alone,
    /// Units that ranks ask for, by rank, each once.
    Serve(Vec<UnitId>),
    /// Some rank evaluates, and this one does not.
    Again,
    /// This rank is elsewhere than the first one.
    Diverged(Rank),
}

/// What `rows`, by rank, mean for rank `own`.
pub fn read(rows: &[Row], own: Rank) -> Reading {
    let asked = asked(rows);
    if !asked.is_empty() {
        return Reading::Serve(asked);
    }
    if rows.iter().any(|row| row.at == At::Elsewhere(Apart::Asks)) {
        return Reading::Again;
    }
    let evaluates = |row: &Row| row.at == At::Pass(PassKind::Evaluation);
    let there = |row: &Row| row.at == At::Elsewhere(Apart::Evaluates);
    let mut going = (0..).map(Rank).zip(rows).filter(|(_, row)| row.at != At::Serve);
    let Some((_, first)) = going.clone().next() else {
        return Reading::Together { at: At::Serve, key: None, ready: false, news: false };
    };
    let apart = going.clone().find(|(_, row)| matches!(row.at, At::Elsewhere(_)));
    let evaluating = going.clone().filter(|(_, row)| evaluates(row) || there(row)).count();
    if evaluating > 0 && (apart.is_some() || evaluating < going.clone().count()) {
        return match rows.get(own.index()) {
            Some(row) if evaluates(row) => Reading::Alone,
            Some(_) | None => Reading::Again,
        };
    }
    let differs = |row: &Row| row.at != first.at || (row.count != first.count && !evaluates(row));
    if let Some((rank, _)) = apart.or_else(|| going.clone().find(|(_, row)| differs(row))) {
        return Reading::Diverged(rank);
    }
    let alike = going.clone().all(|(_, row)| row.key == first.key);
    Reading::Together {
        at: first.at,
        key: alike.then_some(first.key),
        ready: alike && going.clone().all(|(_, row)| row.ready),
        news: going.any(|(rank, row)| rank == Rank(0) && row.news),
    }
}

/// The units that `rows` ask for, in their order, each once.
pub fn asked(rows: &[Row]) -> Vec<UnitId> {
    let mut asked = Vec::new();
    for row in rows {
        match row.at {
            At::Need(unit) if !asked.contains(&unit) => asked.push(unit),
            At::Need(_) | At::Pass(_) | At::Boundary | At::Serve | At::Elsewhere(_) => {}
        }
    }
    asked
}

impl At {
    const fn words(self) -> [i64; 2] {
        match self {
            Self::Pass(kind) => [kind.code(), 0],
            Self::Boundary => [5, 0],
            Self::Need(unit) => [6, unit.0 as i64],
            Self::Serve => [7, 0],
            Self::Elsewhere(apart) => [8, apart as i64],
        }
    }

    fn of(words: [i64; 2]) -> Option<Self> {
        match words {
            [5, 0] => Some(Self::Boundary),
            [6, unit] => u32::try_from(unit).ok().map(|unit| Self::Need(UnitId(unit))),
            [7, 0] => Some(Self::Serve),
            [8, 0] => Some(Self::Elsewhere(Apart::Asks)),
            [8, 1] => Some(Self::Elsewhere(Apart::Evaluates)),
            [8, 2] => Some(Self::Elsewhere(Apart::Waits)),
            [kind, 0] => PassKind::of(kind).map(Self::Pass),
            _ => None,
        }
    }
}

impl Row {
    /// The row as it looks from another engine's call.
    #[must_use]
    pub const fn apart(mut self) -> Self {
        self.at = At::Elsewhere(match self.at {
            At::Need(_) => Apart::Asks,
            At::Pass(PassKind::Evaluation) => Apart::Evaluates,
            At::Pass(PassKind::Forward | PassKind::Backward | PassKind::LocalBackward)
            | At::Boundary
            | At::Serve => Apart::Waits,
            At::Elsewhere(apart) => apart,
        });
        self
    }

    /// The row as integers, which are all 0 for no row: a sum over ranks, each with its own row at
    /// its place, is the rows of all.
    pub fn words(&self) -> [i64; WIDTH] {
        let [at, unit] = self.at.words();
        let flags = [self.failed, self.ready, self.news];
        let flags = flags.iter().rev().fold(0, |word, &flag| 2 * word + i64::from(flag));
        let head = [at, unit, self.key.word(), i64::from(self.count), flags];
        let mut words = [0; WIDTH];
        for (word, value) in words.iter_mut().zip(head.into_iter().chain(self.own)) {
            *word = value;
        }
        words
    }

    /// The row that [`Row::words`] wrote; None for anything else.
    pub fn from_words(words: [i64; WIDTH]) -> Option<Self> {
        let [at, unit, key, count, flags, own @ ..] = words;
        let flag = |bit: u32| flags & (1 << bit) != 0;
        Some(Self {
            at: At::of([at, unit])?,
            key: Key::of(key),
            count: u32::try_from(count).ok()?,
            failed: flag(0),
            ready: flag(1),
            news: flag(2),
            own,
        })
    }
}
