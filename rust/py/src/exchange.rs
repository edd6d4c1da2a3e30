//! `Exchange`: what a rank sends and receives so that owners get whole gradients, read-only.

use pyo3::prelude::*;
use zerort_core::{Piece, Way};

use crate::names::dtype_name;

/// One rank's part in bringing gradients of one dtype to their owners, and parameters back.
#[pyclass(frozen, module = "zerort._core")]
pub struct Exchange {
    pub(crate) inner: zerort_core::Exchange,
    pub(crate) shards: u32,
}

/// (bucket, parameter, start in the holder's shard, start in the owner's room, length), in elements.
type Row = (u32, u32, u64, u64, u64);

#[pymethods]
impl Exchange {
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype_name(self.inner.dtype)
    }

    /// Length of this rank's room; 0 where it owns nothing.
    #[getter]
    fn room(&self) -> u64 {
        self.inner.room
    }

    /// The parameters that it owns, and where each starts in its room.
    #[getter]
    fn places(&self) -> Vec<(u32, u64)> {
        self.inner.places.iter().map(|&(param, start)| (param.0, start)).collect()
    }

    /// How many elements go to each peer.
    #[getter]
    fn send_splits(&self) -> Vec<u64> {
        self.inner.send_splits(self.shards)
    }

    /// How many elements come from each peer.
    #[getter]
    fn recv_splits(&self) -> Vec<u64> {
        self.inner.receive_splits(self.shards)
    }

    /// What it holds and another owns, by peer.
    #[getter]
    fn send(&self) -> Vec<Row> {
        rows(&self.inner.send)
    }

    /// What it owns and another holds, by peer.
    #[getter]
    fn recv(&self) -> Vec<Row> {
        rows(&self.inner.receive)
    }

    /// What it holds and owns.
    #[getter]
    fn kept(&self) -> Vec<Row> {
        rows(&self.inner.kept)
    }
}

fn rows(pieces: &[Piece]) -> Vec<Row> {
    let row = |&Piece { bucket, param, shard_start, room_start, length, .. }: &Piece| {
        (bucket.0, param.0, shard_start, room_start, length)
    };
    pieces.iter().map(row).collect()
}

/// The way's name in Python.
pub const fn way_name(way: Way) -> &'static str {
    match way {
        Way::Owned => "owned",
        Way::Exchanged => "exchanged",
    }
}
