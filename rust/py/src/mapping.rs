//! `Mapping`: a file without a name that all ranks of one host map, and what lies where in it.
//!
//! ```text
//! | heads, one a rank | lines, one a channel and rank | rank 0's memory | rank 1's memory | ...
//! ```
//!
//! # Guarantees
//!
//! * The file is as long as the layout says, or it is not mapped: nothing behind its end is touched.
//!   That it stays so is for whoever made it to seal.
//! * What is not needed any more is unmapped: the mapping lives as long as what is over it.
//! * A rank writes its own head and lines, and no other's.
//!
//! # Limitations
//!
//! Other processes write to this memory while it is mapped here. Counters are atomics, and may be
//! read at any time; of the rest [`zerort_core::turns`] says who writes when, and a buffer is read
//! or written only then.

use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::MmapRaw;
use pyo3::PyResult;
use zerort_core::turns::Line;

use crate::dlpack::Memory;
use crate::errors::LayoutError;
use crate::futex;

/// Each rank's memory begins on one of these, so that it can be reserved by itself.
pub const PAGE: usize = 1 << 12;
/// A head: whether its rank has left.
const HEAD: usize = size_of::<Line>();

/// How a segment is cut.
#[derive(Clone, Copy)]
pub struct Layout {
    pub rank: usize,
    pub world: usize,
    pub channels: usize,
    /// Bytes of each rank's memory.
    pub memory: usize,
}

impl Layout {
    /// None unless the rank is below its world, and the memory is whole pages.
    pub fn new(rank: usize, world: usize, channels: usize, memory: usize) -> Option<Self> {
        let layout = Self { rank, world, channels, memory };
        let fits = rank < world && memory.is_multiple_of(PAGE) && layout.length().is_some();
        fits.then_some(layout)
    }

    /// Bytes in front of the memory.
    pub fn front(&self) -> Option<usize> {
        let lines = self.channels.checked_add(1)?.checked_mul(self.world)?;
        lines.checked_mul(HEAD)?.checked_next_multiple_of(PAGE)
    }

    /// Bytes of the file.
    pub fn length(&self) -> Option<usize> {
        let length = self.front()?.checked_add(self.world.checked_mul(self.memory)?)?;
        isize::try_from(length).is_ok().then_some(length)
    }
}

/// A file as this process sees it.
pub struct Mapping {
    map: MmapRaw,
    pub layout: Layout,
}

impl Mapping {
    /// Of a file of exactly the layout's length.
    pub fn of(file: i32, layout: Layout) -> PyResult<Self> {
        let map = map(file, layout.length().unwrap_or(usize::MAX), &layout)?;
        Ok(Self { map, layout })
    }

    /// So many bytes from `start` of the file on, None where it is not as long.
    pub fn bytes(self: &Arc<Self>, start: usize, length: usize) -> Option<Memory> {
        let end = start.checked_add(length)?;
        if end > self.map.len() {
            return None;
        }
        let data = self.map.as_mut_ptr().wrapping_add(start);
        // SAFETY: inside the mapping, which the owner keeps; it is host memory, and writable.
        Some(unsafe { Memory::of_bytes(data, length, self.clone()) })
    }

    /// The counters of all ranks on one channel.
    pub fn lines(&self, channel: usize) -> &[Line] {
        assert!(channel < self.layout.channels, "a channel of this segment");
        self.front_lines(channel + 1)
    }

    /// Whether each rank has left.
    fn heads(&self) -> &[Line] {
        self.front_lines(0)
    }

    #[allow(clippy::cast_ptr_alignment)] // a mapping begins on a page
    fn front_lines(&self, row: usize) -> &[Line] {
        let Layout { world, .. } = self.layout;
        // SAFETY: inside the mapping, which begins on a page, by the layout; every bit pattern is a
        // line, and other processes write it by atomics alone.
        unsafe { slice::from_raw_parts(self.map.as_ptr().cast::<Line>().add(row * world), world) }
    }

    /// This rank has left: who waits for it hears so.
    pub fn leave(&self) {
        let rank = self.layout.rank;
        self.heads()[rank].posted.store(1, Ordering::Release);
        for channel in 0..self.layout.channels {
            futex::wake(&self.lines(channel)[rank].posted);
        }
    }

    /// Whether a rank has left.
    pub fn left(&self, rank: usize) -> bool {
        self.heads()[rank].posted.load(Ordering::Acquire) != 0
    }
}

/// Maps a file of exactly `length` bytes, and touches all of it.
#[cfg(unix)]
fn map(file: i32, length: usize, layout: &Layout) -> PyResult<MmapRaw> {
    use std::fs::File;
    use std::os::fd::BorrowedFd;

    if file < 0 {
        return Err(LayoutError::new_err(format!("no file has the descriptor {file}")));
    }
    // SAFETY: the descriptor is used before the call is over, in which its owner keeps it open; a
    // number that is none is refused by the system.
    let file = File::from(unsafe { BorrowedFd::borrow_raw(file) }.try_clone_to_owned()?);
    let found = file.metadata()?.len();
    if found != length as u64 {
        let Layout { world, channels, memory, .. } = layout;
        return Err(LayoutError::new_err(format!(
            "a segment of {world} ranks with {channels} channels and {memory} bytes each is \
             {length} bytes long; the file has {found}"
        )));
    }
    Ok(memmap2::MmapOptions::new().len(length).populate().map_raw(&file)?)
}

/// There are no descriptors.
#[cfg(not(unix))]
fn map(_: i32, _: usize, _: &Layout) -> PyResult<MmapRaw> {
    Err(LayoutError::new_err("this system has no files without a name to map"))
}

/// The counters' words are futexes.
const _: () = assert!(align_of::<AtomicU32>() == 4);
