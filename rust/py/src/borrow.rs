//! Which pieces of memory a kernel holds at this moment.
//!
//! # Rationale
//!
//! A kernel runs without the GIL on slices of memory that Python objects share, so two kernels
//! could meet in the same memory: on two threads, or in one call whose source and target overlap. A
//! `&mut [T]` beside another reference to the same bytes is undefined behaviour in Rust, whatever
//! the kernel does with it. So every slice is taken together with a [`Hold`] on its address range,
//! and a range that is being written is given out once. The table is one for the process, because
//! two buffers may have come to the same memory by different ways; it has as many rows as kernels
//! run at once.
//!
//! # Limitations
//!
//! The table knows kernels of this crate only. Torch, NumPy or a collective library writing to the
//! memory while a kernel runs is a race as between any two of them, and it is the caller's to
//! exclude. The engine does: it calls a kernel only on a bucket whose collective has completed.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a kernel does with a range.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads; others may read too.
    Shared,
    /// Writes; nobody else may touch it.
    Exclusive,
}

struct Row {
    id: u64,
    range: Range<usize>,
    access: Access,
}

struct Table {
    next: u64,
    rows: Vec<Row>,
}

static TABLE: Mutex<Table> = Mutex::new(Table { next: 0, rows: Vec::new() });

// A panic while the table is locked leaves it usable: each change is one push or one retain.
fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A range of addresses that is held until this is dropped.
pub struct Hold(u64);

impl Hold {
    /// Holds `range`, or answers None if another hold excludes that. An empty range excludes
    /// nothing.
    pub fn take(range: Range<usize>, access: Access) -> Option<Self> {
        let mut table = table();
        let excluded = |row: &Row| {
            let overlap = row.range.start.max(range.start) < row.range.end.min(range.end);
            overlap && (row.access == Access::Exclusive || access == Access::Exclusive)
        };
        if table.rows.iter().any(excluded) {
            return None;
        }
        let id = table.next;
        table.next += 1;
        table.rows.push(Row { id, range, access });
        Some(Self(id))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        table().rows.retain(|row| row.id != self.0);
    }
}
