//! `Segment`: a file without a name that all ranks of one host map, and what lies where in it.
//!
//! ```text
//! | heads, one a rank | lines, one a channel and rank | rank 0's memory | rank 1's memory | ...
//! ```
//!
//! # Guarantees
//!
//! * The file is as long as the layout says, or it is not mapped: nothing behind its end is touched.
//!   That it stays so is for whoever made it to seal.
//! * What Python does not need any more is unmapped: the mapping lives as long as a [`Segment`], a
//!   [`Channel`](crate::channel::Channel) or a [`Buffer`] over it.
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
use pyo3::prelude::*;
use zerort_core::turns::Line;

use crate::buffer::Buffer;
use crate::channel::Channel;
use crate::dlpack::Memory;
use crate::errors::LayoutError;
use crate::futex;

/// Each rank's memory begins on one of these, so that it can be reserved by itself.
const PAGE: usize = 1 << 12;
/// A head: whether its rank has left.
const HEAD: usize = size_of::<Line>();

/// How a segment is cut.
#[derive(Clone, Copy)]
pub struct Layout {
    pub rank: usize,
    pub world: usize,
    channels: usize,
    /// Bytes of each rank's memory.
    memory: usize,
}

impl Layout {
    fn new(rank: usize, world: usize, channels: usize, memory: usize) -> Option<Self> {
        let layout = Self { rank, world, channels, memory };
        let fits = rank < world && memory.is_multiple_of(PAGE) && layout.length().is_some();
        fits.then_some(layout)
    }

    /// Bytes in front of the memory.
    fn front(&self) -> Option<usize> {
        let lines = self.channels.checked_add(1)?.checked_mul(self.world)?;
        lines.checked_mul(HEAD)?.checked_next_multiple_of(PAGE)
    }

    /// Bytes of the file.
    fn length(&self) -> Option<usize> {
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
    fn leave(&self) {
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

/// Memory that all ranks of one host map.
#[pyclass(frozen, module = "zerort._core")]
pub struct Segment {
    mapping: Arc<Mapping>,
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

fn refused(rank: usize, world: usize, channels: usize, memory: usize) -> PyErr {
    LayoutError::new_err(format!(
        "a segment has a rank below its world and whole pages of {PAGE} bytes; got rank {rank} of \
         {world}, {channels} channels, {memory} bytes"
    ))
}

#[pymethods]
impl Segment {
    #[new]
    #[pyo3(signature = (file, *, rank, world, channels, memory))]
    fn new(file: i32, rank: usize, world: usize, channels: usize, memory: usize) -> PyResult<Self> {
        let layout = Layout::new(rank, world, channels, memory)
            .ok_or_else(|| refused(rank, world, channels, memory))?;
        let length = layout.length().unwrap_or(usize::MAX);
        let map = map(file, length, &layout)?;
        Ok(Self { mapping: Arc::new(Mapping { map, layout }) })
    }

    /// How long the file of a segment is.
    #[staticmethod]
    #[pyo3(signature = (*, world, channels, memory))]
    fn length(world: usize, channels: usize, memory: usize) -> PyResult<usize> {
        let layout = Layout::new(0, world, channels, memory);
        layout.and_then(|layout| layout.length()).ok_or_else(|| refused(0, world, channels, memory))
    }

    /// Where in the file a rank's memory begins.
    fn start(&self, rank: usize) -> PyResult<usize> {
        let Layout { world, memory, .. } = self.mapping.layout;
        match self.mapping.layout.front() {
            Some(front) if rank < world => Ok(front + rank * memory),
            Some(_) | None => {
                Err(LayoutError::new_err(format!("rank {rank} has no memory among {world}")))
            }
        }
    }

    /// Bytes of a rank's memory, as uint8.
    fn buffer(&self, rank: usize, start: usize, length: usize) -> PyResult<Buffer> {
        let own = self.start(rank)?;
        let memory = self.mapping.layout.memory;
        if start.checked_add(length).is_none_or(|end| end > memory) {
            return Err(LayoutError::new_err(format!(
                "{length} bytes from {start} on are not in a rank's {memory}"
            )));
        }
        let data = self.mapping.map.as_mut_ptr().wrapping_add(own + start);
        // SAFETY: inside the mapping, which the owner keeps; it is host memory, and writable.
        let memory = unsafe { Memory::of_bytes(data, length, self.mapping.clone()) };
        Ok(Buffer::of(memory))
    }

    /// From where `length` bytes from `start` on begin in the first rank's memory to where they end
    /// in the last one's, as uint8.
    fn across(&self, start: usize, length: usize) -> PyResult<Buffer> {
        let Layout { world, memory, .. } = self.mapping.layout;
        let first = self.buffer(0, start, length)?;
        let length = (world - 1) * memory + length;
        let data = self.mapping.map.as_mut_ptr().with_addr(first.memory().address());
        // SAFETY: both ends are inside the mapping, which the owner keeps.
        let memory = unsafe { Memory::of_bytes(data, length, self.mapping.clone()) };
        Ok(Buffer::of(memory))
    }

    /// What a lane's collectives are counted by.
    fn channel(&self, number: usize) -> PyResult<Channel> {
        let channels = self.mapping.layout.channels;
        if number >= channels {
            return Err(LayoutError::new_err(format!("channel {number} of {channels}")));
        }
        Ok(Channel::new(Arc::clone(&self.mapping), number))
    }

    fn leave(&self) {
        self.mapping.leave();
    }

    fn left(&self, rank: usize) -> bool {
        rank < self.mapping.layout.world && self.mapping.left(rank)
    }
}

/// The counters' words are futexes.
const _: () = assert!(align_of::<AtomicU32>() == 4);
