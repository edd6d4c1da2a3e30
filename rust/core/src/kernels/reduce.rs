//! The local half of a reduce-scatter: `world` copies of a shard become one.

use thiserror::Error;

use super::norm::SquaredNorm;
use super::{BLOCK, Element, Real};

/// What becomes of the accumulator's old value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// The sum replaces it.
    Over,
    /// The sum is added to it.
    Onto,
}

/// The chunks are not `world` times the accumulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{chunks} elements are not {world} chunks of {accum}")]
pub struct ShapeError {
    /// Elements in all chunks together.
    pub chunks: usize,
    /// Ranks that sent a chunk.
    pub world: usize,
    /// Elements in the accumulator.
    pub accum: usize,
}

/// Sums `world` equal chunks in rank order, times `scale`, over or onto `accum`; returns the
/// squared norm of `accum` afterwards, which is not finite exactly when an element of it is not.
///
/// Element `i` becomes `((c[0][i] + c[1][i]) + c[2][i] + ...) * scale`, with every operation
/// rounded once to [`Element::Sum`] and none fused, and then is added to the old value where
/// [`Write::Onto`] says so.
///
/// # Errors
/// [`ShapeError`] if `world` is zero or `chunks.len() != world * accum.len()`; nothing has been
/// written then.
pub fn reduce<E: Element>(
    chunks: &[E],
    accum: &mut [E::Sum],
    world: usize,
    scale: E::Sum,
    write: Write,
) -> Result<f64, ShapeError> {
    let length = accum.len();
    if world == 0 || world.checked_mul(length) != Some(chunks.len()) {
        return Err(ShapeError { chunks: chunks.len(), world, accum: length });
    }
    Ok(add_up(chunks, length, accum, world, scale, write))
}

/// The same of chunks that lie apart: each begins `stride` elements behind the one before, and the
/// last ends `chunks`. What lies between them is not read.
///
/// # Errors
/// [`ShapeError`] if `world` is zero, chunks would overlap or there are other elements than that;
/// nothing has been written then.
pub fn reduce_strided<E: Element>(
    chunks: &[E],
    stride: usize,
    accum: &mut [E::Sum],
    world: usize,
    scale: E::Sum,
    write: Write,
) -> Result<f64, ShapeError> {
    let length = accum.len();
    let apart = world.checked_sub(1).and_then(|gaps| gaps.checked_mul(stride));
    let needed = apart.and_then(|apart| apart.checked_add(length));
    if needed != Some(chunks.len()) || (world > 1 && stride < length) {
        return Err(ShapeError { chunks: chunks.len(), world, accum: length });
    }
    Ok(add_up(chunks, stride, accum, world, scale, write))
}

/// Both, checked.
fn add_up<E: Element>(
    chunks: &[E],
    stride: usize,
    accum: &mut [E::Sum],
    world: usize,
    scale: E::Sum,
    write: Write,
) -> f64 {
    let mut norm = SquaredNorm::new();
    let mut sum = [E::Sum::ZERO; BLOCK];
    for (index, out) in accum.chunks_mut(BLOCK).enumerate() {
        let sum = &mut sum[..out.len()];
        let start = index * BLOCK;
        E::load(&chunks[start..start + out.len()], sum);
        for rank in 1..world {
            let start = rank * stride + start;
            E::accumulate(&chunks[start..start + out.len()], sum);
        }
        store(sum, scale, out, write);
        norm.add(out);
    }
    norm.total(accum)
}

/// Writes one block of scaled sums.
pub(super) fn store<R: Real>(sum: &[R], scale: R, out: &mut [R], write: Write) {
    match write {
        Write::Over => {
            for (out, sum) in out.iter_mut().zip(sum) {
                *out = *sum * scale;
            }
        }
        Write::Onto => {
            for (out, sum) in out.iter_mut().zip(sum) {
                *out = *out + *sum * scale;
            }
        }
    }
}
