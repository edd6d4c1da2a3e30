//! `Segment`: memory that all ranks of one host map ([`crate::mapping`]), as Python sees it.
//!
//! It gives out buffers over each rank's memory, and channels, which count what was done with them.
//! What Python does not need any more is unmapped: the mapping lives as long as a [`Segment`], a
//! [`Channel`] or a [`Buffer`] over it.

use std::sync::Arc;

use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::channel::Channel;
use crate::errors::LayoutError;
use crate::mapping::{Layout, Mapping, PAGE};

/// Memory that all ranks of one host map.
#[pyclass(frozen, module = "zerort._core")]
pub struct Segment {
    mapping: Arc<Mapping>,
}

fn refused(rank: usize, world: usize, channels: usize, memory: usize) -> PyErr {
    LayoutError::new_err(format!(
        "a segment has a rank below its world and whole pages of {PAGE} bytes; got rank {rank} of \
         {world}, {channels} channels, {memory} bytes"
    ))
}

impl Segment {
    /// From where `length` bytes from `start` on begin in the memory of rank `first` to where they
    /// end in that of `last`.
    fn run(&self, first: usize, last: usize, start: usize, length: usize) -> PyResult<Buffer> {
        let memory = self.mapping.layout.memory;
        let own = self.start(first)?;
        if start.checked_add(length).is_none_or(|end| end > memory) {
            return Err(LayoutError::new_err(format!(
                "{length} bytes from {start} on are not in a rank's {memory}"
            )));
        }
        let found = self.mapping.bytes(own + start, (last - first) * memory + length);
        found
            .map(Buffer::of)
            .ok_or_else(|| LayoutError::new_err("a segment is longer than its file"))
    }
}

#[pymethods]
impl Segment {
    #[new]
    #[pyo3(signature = (file, *, rank, world, channels, memory))]
    fn new(file: i32, rank: usize, world: usize, channels: usize, memory: usize) -> PyResult<Self> {
        let layout = Layout::new(rank, world, channels, memory)
            .ok_or_else(|| refused(rank, world, channels, memory))?;
        Ok(Self { mapping: Arc::new(Mapping::of(file, layout)?) })
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
        self.run(rank, rank, start, length)
    }

    /// From where `length` bytes from `start` on begin in the first rank's memory to where they end
    /// in the last one's, as uint8.
    fn across(&self, start: usize, length: usize) -> PyResult<Buffer> {
        self.run(0, self.mapping.layout.world - 1, start, length)
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
