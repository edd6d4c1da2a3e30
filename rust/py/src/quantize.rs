//! The kernels of the wire that sends bytes, over [`Buffer`]s: shapes and types are checked with the
//! GIL, the work is done without it.

use pyo3::prelude::*;
use zerort_core::kernels::{self, Rounding, ShapeError, Write};

use crate::buffer::Buffer;
use crate::dlpack::{Reading, Sums, Values, Writing};
use crate::errors::LayoutError;
use crate::wide;

/// Writes `values` times `scale`, which are `world` equal shards, into `pieces` of bytes: to the
/// nearest, randomly where there is a `seed`, or with what was left out `before`, which is in
/// `after` where there is none.
#[pyfunction]
#[pyo3(signature = (values, pieces, *, world, scale, seed=None, before=None, after=None))]
#[expect(clippy::too_many_arguments)] // keywords
pub fn quantize(
    py: Python<'_>,
    values: &Buffer,
    pieces: &Buffer,
    world: usize,
    scale: f32,
    seed: Option<u64>,
    before: Option<&Buffer>,
    after: Option<&Buffer>,
) -> PyResult<()> {
    let source = values.memory().read()?;
    let mut target = pieces.memory().write()?;
    let kept = before.map(|before| before.memory().read()).transpose()?;
    let mut next = after.map(|after| after.memory().write()).transpose()?;
    let kept = kept.as_ref().map(read_bytes).transpose()?;
    let rounding = match (next.as_mut(), seed) {
        (Some(after), None) => Rounding::Feedback { before: kept, after: written_bytes(after)? },
        (None, Some(seed)) if kept.is_none() => Rounding::Stochastic(seed),
        (None, None) if kept.is_none() => Rounding::Nearest,
        (Some(_) | None, Some(_) | None) => {
            return Err(LayoutError::new_err(
                "rounding has a seed, or a residual `after` with or without one `before`, or none \
                 of these",
            ));
        }
    };
    let values = read_values(&source)?;
    let pieces = written_bytes(&mut target)?;
    py.detach(|| wide::quantize(values, scale, world, pieces, rounding)).map_err(misfit)
}

/// Sums `world` pieces of one shard in rank order, times `scale`, into or onto `accum`; returns its
/// squared norm afterwards. With a `stride` a piece begins so many bytes behind the last.
#[pyfunction]
#[pyo3(signature = (pieces, accum, *, world, scale, add, stride=None))]
pub fn sum_quantized(
    py: Python<'_>,
    pieces: &Buffer,
    accum: &Buffer,
    world: usize,
    scale: f64,
    add: bool,
    stride: Option<usize>,
) -> PyResult<f64> {
    let write = if add { Write::Onto } else { Write::Over };
    let source = pieces.memory().read()?;
    let mut target = accum.memory().write()?;
    let (pieces, accum) = (read_bytes(&source)?, written_values(&mut target)?);
    let stride = stride.unwrap_or(kernels::piece_bytes(accum.len()));
    py.detach(|| kernels::sum_quantized(pieces, stride, accum, world, scale as f32, write))
        .map_err(misfit)
}

/// Reads `world` pieces into as many equal shards of `values`.
#[pyfunction]
#[pyo3(signature = (pieces, values, *, world))]
pub fn dequantize(py: Python<'_>, pieces: &Buffer, values: &Buffer, world: usize) -> PyResult<()> {
    let source = pieces.memory().read()?;
    let mut target = values.memory().write()?;
    let (pieces, values) = (read_bytes(&source)?, written_values(&mut target)?);
    py.detach(|| kernels::dequantize(pieces, values, world)).map_err(misfit)
}

fn read_bytes<'a>(source: &'a Reading<'_>) -> PyResult<&'a [u8]> {
    source.bytes().ok_or_else(not_bytes)
}

fn written_bytes<'a>(target: &'a mut Writing<'_>) -> PyResult<&'a mut [u8]> {
    target.bytes().ok_or_else(not_bytes)
}

fn read_values<'a>(source: &'a Reading<'_>) -> PyResult<&'a [f32]> {
    match source.values() {
        Values::F32(values) => Ok(values),
        Values::F16(_) | Values::BF16(_) | Values::F64(_) | Values::U8 => Err(not_values()),
    }
}

fn written_values<'a>(target: &'a mut Writing<'_>) -> PyResult<&'a mut [f32]> {
    match target.sums() {
        Sums::F32(values) => Ok(values),
        Sums::F64(_) | Sums::Other(_) => Err(not_values()),
    }
}

fn not_bytes() -> PyErr {
    LayoutError::new_err("pieces and residuals are uint8")
}

fn not_values() -> PyErr {
    LayoutError::new_err("values and sums that are sent as bytes are fp32")
}

fn misfit(error: ShapeError) -> PyErr {
    LayoutError::new_err(error.to_string())
}
