//! The CPU kernels, over [`Buffer`]s: shapes and types are checked with the GIL, the work is done
//! without it.

use pyo3::prelude::*;
use zerort_core::kernels::{self, Element, Write};

use crate::buffer::Buffer;
use crate::dlpack::{Sums, Values};
use crate::errors::LayoutError;
use crate::streaming;

/// Sums `world` equal chunks in rank order, times `scale`, into or onto `accum`; returns its
/// squared norm afterwards. With a `stride` a chunk begins so many elements behind the last.
#[pyfunction]
#[pyo3(signature = (chunks, accum, *, world, scale, add, stride=None))]
pub fn reduce(
    py: Python<'_>,
    chunks: &Buffer,
    accum: &Buffer,
    world: usize,
    scale: f64,
    add: bool,
    stride: Option<usize>,
) -> PyResult<f64> {
    let write = if add { Write::Onto } else { Write::Over };
    let source = chunks.memory().read()?;
    let mut target = accum.memory().write()?;
    let how = Ranks { world, stride };
    match (source.values(), target.sums()) {
        (Values::F32(chunks), Sums::F32(accum)) => {
            detached(py, chunks, accum, how, scale as f32, write)
        }
        (Values::F16(chunks), Sums::F32(accum)) => {
            detached(py, chunks, accum, how, scale as f32, write)
        }
        (Values::BF16(chunks), Sums::F32(accum)) => {
            detached(py, chunks, accum, how, scale as f32, write)
        }
        (Values::F64(chunks), Sums::F64(accum)) => detached(py, chunks, accum, how, scale, write),
        (
            Values::F32(_) | Values::F16(_) | Values::BF16(_) | Values::F64(_) | Values::U8,
            Sums::F32(_) | Sums::F64(_) | Sums::Other(_),
        ) => Err(LayoutError::new_err(format!(
            "fp32, bf16 and fp16 are summed in fp32, fp64 in fp64; got {} chunks and a {} \
             accumulator",
            chunks.memory().dtype().name(),
            accum.memory().dtype().name()
        ))),
    }
}

/// How chunks lie: so many, one behind the other or `stride` elements apart.
#[derive(Clone, Copy)]
struct Ranks {
    world: usize,
    stride: Option<usize>,
}

fn detached<E: Element>(
    py: Python<'_>,
    chunks: &[E],
    accum: &mut [E::Sum],
    Ranks { world, stride }: Ranks,
    scale: E::Sum,
    write: Write,
) -> PyResult<f64> {
    let stride = stride.unwrap_or(accum.len());
    py.detach(|| kernels::reduce_strided(chunks, stride, accum, world, scale, write))
        .map_err(|error| LayoutError::new_err(error.to_string()))
}

/// The squared norm of a CPU buffer, accumulated in fp64; not finite exactly when an element is
/// not.
#[pyfunction]
pub fn squared_norm(py: Python<'_>, values: &Buffer) -> PyResult<f64> {
    let reading = values.memory().read()?;
    match reading.values() {
        Values::F32(values) => Ok(py.detach(|| kernels::squared_norm(values))),
        Values::F16(values) => Ok(py.detach(|| kernels::squared_norm(values))),
        Values::BF16(values) => Ok(py.detach(|| kernels::squared_norm(values))),
        Values::F64(values) => Ok(py.detach(|| kernels::squared_norm(values))),
        Values::U8 => Err(not_a_number("norm")),
    }
}

/// Index of the first infinity or NaN of a CPU buffer.
#[pyfunction]
pub fn first_nonfinite(py: Python<'_>, values: &Buffer) -> PyResult<Option<usize>> {
    let reading = values.memory().read()?;
    match reading.values() {
        Values::F32(values) => Ok(py.detach(|| kernels::first_nonfinite(values))),
        Values::F16(values) => Ok(py.detach(|| kernels::first_nonfinite(values))),
        Values::BF16(values) => Ok(py.detach(|| kernels::first_nonfinite(values))),
        Values::F64(values) => Ok(py.detach(|| kernels::first_nonfinite(values))),
        Values::U8 => Err(not_a_number("infinity")),
    }
}

/// Takes what was written into `values` since they were cast from `master` over into `master`;
/// returns the number of elements.
#[pyfunction]
pub fn take_writes(py: Python<'_>, values: &Buffer, master: &Buffer) -> PyResult<usize> {
    let source = values.memory().read()?;
    let mut target = master.memory().write()?;
    if values.memory().numel() != master.memory().numel() {
        return Err(LayoutError::new_err(format!(
            "{} values have no {} masters",
            values.memory().numel(),
            master.memory().numel()
        )));
    }
    match (source.values(), target.sums()) {
        (Values::F16(values), Sums::F32(master)) => {
            Ok(py.detach(|| kernels::take_writes(values, master)))
        }
        (Values::BF16(values), Sums::F32(master)) => {
            Ok(py.detach(|| kernels::take_writes(values, master)))
        }
        (
            Values::F32(_) | Values::F16(_) | Values::BF16(_) | Values::F64(_) | Values::U8,
            Sums::F32(_) | Sums::F64(_) | Sums::Other(_),
        ) => Err(LayoutError::new_err(format!(
            "bf16 and fp16 have an fp32 master; got {} values and a {} master",
            values.memory().dtype().name(),
            master.memory().dtype().name()
        ))),
    }
}

/// Copies bytes, past the processor's caches where there are many.
#[pyfunction]
#[pyo3(signature = (source, target, *, threads=1))]
pub fn copy(py: Python<'_>, source: &Buffer, target: &Buffer, threads: usize) -> PyResult<()> {
    let reading = source.memory().read()?;
    let mut writing = target.memory().write()?;
    match (reading.bytes(), writing.bytes()) {
        (Some(from), Some(into)) if from.len() == into.len() => {
            py.detach(|| streaming::copy(from, into, threads));
            Ok(())
        }
        _ => Err(LayoutError::new_err(format!(
            "as many bytes are copied as there is room for; got {} of {} into {} of {}",
            source.memory().numel(),
            source.memory().dtype().name(),
            target.memory().numel(),
            target.memory().dtype().name()
        ))),
    }
}

fn not_a_number(what: &str) -> PyErr {
    LayoutError::new_err(format!("uint8 is bytes on a wire and has no {what}"))
}
