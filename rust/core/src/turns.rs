//! Memory that the ranks of one host share, used in turn: who has written what, and who has read it.
//!
//! Every rank has [`TURNS`] pieces of memory that its peers read. A *use* is one collective: each
//! rank writes into one of its pieces and *posts* the use, waits until its peers have posted it too,
//! reads what it needs of theirs, and says that it has. Uses are numbered, and the pieces taken in
//! turn:
//!
//! ```text
//! rank 0   write A ─ post 1 ─ read A of 1 ─ write B ─ post 2 ─ read B of 1 ─ write A ─ post 3
//! rank 1   write A ────────────────── post 1 ─ read A of 0 ─ write B ─ post 2 ─ ...
//! ```
//!
//! Each rank has one [`Line`] of counters, which it alone writes. A post is a release and a look at
//! it an acquire, so what was written before the one is seen behind the other; with reading it is
//! the same the other way round.
//!
//! - **TRN-1** Who sees that a peer has posted a use sees what it wrote for that use.
//! - **TRN-2** Nobody writes where a peer still reads: a use is posted once every peer has read the
//!   last but one, which lay in the same place. It is no wait but a condition that holds by itself
//!   where a rank reads each use before it posts the next: its peers have posted that one, and so
//!   had read those before.
//! - **TRN-3** Posting and reading the same use again changes nothing: who was broken off between
//!   two lines does it once more.
//!
//! What it does not do: it does not know where the counters lie, nor how a rank waits.

use std::sync::atomic::{AtomicU32, Ordering};

use thiserror::Error;

/// Pieces of memory that each rank has.
pub const TURNS: u32 = 2;

/// How a counter is read.
pub const LOAD: Ordering = Ordering::Acquire;
/// How it is written.
pub const STORE: Ordering = Ordering::Release;

/// A number that one rank writes and the others read, by [`LOAD`] and [`STORE`].
pub trait Counter {
    /// What was last stored, and all that was written before that.
    fn load(&self) -> u32;

    /// Stores `value` behind all that was written so far.
    fn store(&self, value: u32);
}

impl Counter for AtomicU32 {
    fn load(&self) -> u32 {
        self.load(LOAD)
    }

    fn store(&self, value: u32) {
        self.store(value, STORE);
    }
}

/// One rank's counters, on a cache line of their own: the use that it has posted last, and the one
/// that it has read last. Both begin with 0, which is no use.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Line<C = AtomicU32> {
    /// Written for the peers.
    pub posted: C,
    /// Read of the peers.
    pub read: C,
}

/// Why a use is not posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TurnError {
    /// It would be written over (TRN-2).
    #[error("use {number} is posted while rank {rank} has read no further than use {read}")]
    Unread {
        /// The use.
        number: u32,
        /// Who still reads.
        rank: usize,
        /// What that rank has read.
        read: u32,
    },
    /// Uses are posted one after the other.
    #[error("use {number} is posted behind use {posted}")]
    OutOfOrder {
        /// The use.
        number: u32,
        /// The last that was posted.
        posted: u32,
    },
}

/// One rank's place among its peers. The [module](self) says what it guarantees.
#[derive(Debug)]
pub struct Turns {
    rank: usize,
    posted: u32,
    read: u32,
}

impl Turns {
    /// Of the rank whose counters are `lines[rank]`; nothing has been used yet.
    pub const fn new(rank: usize) -> Self {
        Self { rank, posted: 0, read: 0 }
    }

    /// The number of the next use. It stays that until the use is posted.
    pub const fn next(&self) -> u32 {
        self.posted.wrapping_add(1)
    }

    /// The last use that this rank has posted; 0 before the first.
    pub const fn posted(&self) -> u32 {
        self.posted
    }

    /// Which piece of memory a use has, from 0.
    pub const fn turn(number: u32) -> u32 {
        number % TURNS
    }

    /// What this rank wrote for a use is there; returns whether it was not before.
    ///
    /// # Errors
    /// [`TurnError`]; the peers have seen nothing then.
    pub fn post<C: Counter>(&mut self, number: u32, lines: &[Line<C>]) -> Result<bool, TurnError> {
        if reached(self.posted, number) {
            return Ok(false);
        }
        if number != self.next() {
            return Err(TurnError::OutOfOrder { number, posted: self.posted });
        }
        if let Some((rank, read)) = self.unread(number, lines) {
            return Err(TurnError::Unread { number, rank, read });
        }
        lines[self.rank].posted.store(number);
        self.posted = number;
        Ok(true)
    }

    /// A peer that still reads where use `number` is to be written, and what it has read.
    fn unread<C: Counter>(&self, number: u32, lines: &[Line<C>]) -> Option<(usize, u32)> {
        let before = number.wrapping_sub(TURNS);
        let reads = lines.iter().map(|line| line.read.load()).enumerate();
        reads.filter(|&(rank, read)| rank != self.rank && !reached(read, before)).last()
    }

    /// Posts a use that is lost: nobody needs what was written, and this rank reads nothing of it,
    /// nor of those before. So it waits for no peer, and lets none wait.
    ///
    /// # Errors
    /// [`TurnError::OutOfOrder`].
    pub fn give_up<C: Counter>(
        &mut self,
        number: u32,
        lines: &[Line<C>],
    ) -> Result<bool, TurnError> {
        if reached(self.posted, number) {
            return Ok(false);
        }
        if number != self.next() {
            return Err(TurnError::OutOfOrder { number, posted: self.posted });
        }
        self.finish(number, lines);
        lines[self.rank].posted.store(number);
        self.posted = number;
        Ok(true)
    }

    /// The first rank that has not posted a use; None where what all wrote for it may be read.
    pub fn missing<C: Counter>(number: u32, lines: &[Line<C>]) -> Option<usize> {
        let mut ranks = lines.iter().enumerate();
        ranks.find(|(_, line)| !reached(line.posted.load(), number)).map(|(rank, _)| rank)
    }

    /// This rank has read what it needs of a use.
    pub fn finish<C: Counter>(&mut self, number: u32, lines: &[Line<C>]) {
        if !reached(self.read, number) {
            lines[self.rank].read.store(number);
            self.read = number;
        }
    }
}

/// Whether a counter has come to a use, across an overflow too: the two are never far apart.
pub const fn reached(counter: u32, number: u32) -> bool {
    counter.wrapping_sub(number) < u32::MAX / 2
}
