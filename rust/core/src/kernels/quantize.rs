//! Gradients as bytes: groups of [`GROUP`] elements that share one scale.
//!
//! A *piece* is a shard as it is sent: a byte for each element, then an fp32 scale for each group,
//! little-endian. An element is its code, -127 to 127, times its group's scale, which is the
//! group's largest magnitude over 127. A group whose magnitudes are below about 1e-28 is zeros, so
//! that nothing here is subnormal and a thread that flushes such numbers reads the same bits.
//!
//! A group with an infinity or NaN has NaN for a scale, and its codes say which elements are not
//! finite: they arrive as they were, the others as zeros. Such a step is not applied anyway.
//!
//! Arithmetic takes longer here than memory does, so whoever calls [`quantize`] may compile it once
//! more, for a wider processor: all of it is inlined, plain loops none of whose operations is fused
//! or reordered, and the bits are the same.
//!
//! A *residual* is what rounding has left out, in 16 bits: each element in units of the 65536th
//! part of its group's scale at that time, then that unit for each group, in fp32. It is as exact,
//! beside the group's largest element, as the fp32 sum that it is added to.

#![allow(clippy::inline_always)] // see above

use super::norm::SquaredNorm;
use super::reduce::{ShapeError, Write, store};
use super::{BLOCK, Real};

/// Elements that share a scale; fewer at the end of a shard.
pub const GROUP: usize = 256;

const LARGEST: f32 = 127.0;
/// A scale below this is zero: 2 to the -100.
const SMALLEST_SCALE: f32 = f32::from_bits((127 - 100) << 23);
/// 1.5 x 2 to the 23: added to what is less than 2 to the 22, it leaves the nearest integer, ties to
/// even, in the lowest bits, in two's complement. This vectorises on any CPU.
const MAGIC: f32 = 12_582_912.0;
/// Units of a residual in a scale.
const UNITS: f32 = 65_536.0;
const INFINITE: u8 = 1;
const NEGATIVE: u8 = (-1_i8).cast_unsigned();
const NAN: u8 = 2;

/// What becomes of what lies between two codes.
pub enum Rounding<'a> {
    /// To the nearest, ties to even.
    Nearest,
    /// To either of the two, so that the expectation is the value: by random numbers that are a
    /// function of this seed and of the element's index.
    Stochastic(u64),
    /// To the nearest, once the residual of what was rounded `before` has been added; what is left
    /// out now is written to `after`, which is also read where there is no `before`.
    Feedback {
        /// A residual of as many elements, in as many shards.
        before: Option<&'a [u8]>,
        /// The same.
        after: &'a mut [u8],
    },
}

/// Bytes of a piece of so many elements.
pub const fn piece_bytes(numel: usize) -> usize {
    numel + 4 * numel.div_ceil(GROUP)
}

/// Bytes of a residual of `world` shards with so many elements each.
pub const fn residual_bytes(shard: usize, world: usize) -> usize {
    world * (2 * shard + 4 * shard.div_ceil(GROUP))
}

/// Writes `values` times `scale`, which are `world` equal shards, into as many `pieces`.
///
/// # Errors
/// [`ShapeError`] if the lengths do not fit; nothing has been written then.
#[inline(always)]
pub fn quantize(
    values: &[f32],
    scale: f32,
    world: usize,
    pieces: &mut [u8],
    mut rounding: Rounding<'_>,
) -> Result<(), ShapeError> {
    let shard = shard_of(values.len(), world)?;
    fits(pieces.len(), world, piece_bytes(shard))?;
    if let Rounding::Feedback { before, after } = &rounding {
        let length = residual_bytes(shard, 1);
        fits(after.len(), world, length)?;
        fits(before.map_or(after.len(), <[u8]>::len), world, length)?;
    }
    if shard == 0 {
        return Ok(());
    }
    let mut wanted = [0.0; GROUP];
    let pieces = pieces.chunks_exact_mut(piece_bytes(shard));
    for (rank, (values, piece)) in values.chunks_exact(shard).zip(pieces).enumerate() {
        let (codes, scales) = piece.split_at_mut(shard);
        let groups = values.chunks(GROUP).zip(codes.chunks_mut(GROUP));
        for (index, ((values, codes), out)) in groups.zip(scales.as_chunks_mut().0).enumerate() {
            let start = rank * shard + index * GROUP;
            let wanted = &mut wanted[..values.len()];
            for (wanted, value) in wanted.iter_mut().zip(values) {
                *wanted = value * scale;
            }
            let step = match &mut rounding {
                Rounding::Nearest => encode(wanted, codes),
                Rounding::Stochastic(seed) => encode_randomly(wanted, codes, *seed, start),
                Rounding::Feedback { before, after } => {
                    let at = Place::of(shard, rank, index, values.len());
                    at.add(before.unwrap_or(after), wanted);
                    let step = encode(wanted, codes);
                    at.keep(after, wanted, codes, step);
                    step
                }
            };
            *out = step.to_le_bytes();
        }
    }
    Ok(())
}

/// Sums the `world` pieces of one shard in rank order, times `scale`, over or onto `accum`; returns
/// the squared norm of `accum` afterwards, which is not finite exactly when an element of it is not.
/// Each piece begins `stride` bytes behind the one before, and the last ends `pieces`.
///
/// The bits are those of [`super::reduce`] over what [`dequantize`] reads.
///
/// # Errors
/// [`ShapeError`] if the lengths do not fit; nothing has been written then.
pub fn sum_quantized(
    pieces: &[u8],
    stride: usize,
    accum: &mut [f32],
    world: usize,
    scale: f32,
    write: Write,
) -> Result<f64, ShapeError> {
    let shard = accum.len();
    let length = piece_bytes(shard);
    let apart = world.checked_sub(1).and_then(|gaps| gaps.checked_mul(stride));
    let needed = apart.and_then(|apart| apart.checked_add(length));
    if needed != Some(pieces.len()) || (world > 1 && stride < length) {
        return Err(ShapeError { chunks: pieces.len(), world, accum: length });
    }
    let mut norm = SquaredNorm::new();
    let mut sum = [0.0; BLOCK];
    for (index, out) in accum.chunks_mut(BLOCK).enumerate() {
        let sum = &mut sum[..out.len()];
        for rank in 0..world {
            let (codes, scales) = pieces[rank * stride..][..length].split_at(shard);
            let codes = codes[index * BLOCK..][..out.len()].chunks(GROUP);
            let scales = &scales.as_chunks().0[index * (BLOCK / GROUP)..];
            for ((sum, codes), scale) in sum.chunks_mut(GROUP).zip(codes).zip(scales) {
                let scale = f32::from_le_bytes(*scale);
                if rank == 0 {
                    decode(codes, scale, sum, |_, value| value);
                } else {
                    decode(codes, scale, sum, |sum, value| sum + value);
                }
            }
        }
        store(sum, scale, out, write);
        norm.add(out);
    }
    Ok(norm.total(accum))
}

/// Reads `world` pieces into as many equal shards of `values`.
///
/// # Errors
/// [`ShapeError`] if the lengths do not fit; nothing has been written then.
pub fn dequantize(pieces: &[u8], values: &mut [f32], world: usize) -> Result<(), ShapeError> {
    let shard = shard_of(values.len(), world)?;
    fits(pieces.len(), world, piece_bytes(shard))?;
    if shard == 0 {
        return Ok(());
    }
    let pieces = pieces.chunks_exact(piece_bytes(shard));
    for (values, piece) in values.chunks_exact_mut(shard).zip(pieces) {
        let (codes, scales) = piece.split_at(shard);
        let groups = values.chunks_mut(GROUP).zip(codes.chunks(GROUP));
        for ((values, codes), scale) in groups.zip(scales.as_chunks().0) {
            decode(codes, f32::from_le_bytes(*scale), values, |_, value| value);
        }
    }
    Ok(())
}

fn shard_of(numel: usize, world: usize) -> Result<usize, ShapeError> {
    match numel.checked_rem(world) {
        Some(0) => Ok(numel / world),
        Some(_) | None => Err(ShapeError { chunks: numel, world, accum: numel }),
    }
}

fn fits(length: usize, world: usize, each: usize) -> Result<(), ShapeError> {
    if world > 0 && world.checked_mul(each) == Some(length) {
        return Ok(());
    }
    Err(ShapeError { chunks: length, world, accum: each })
}

/// The scale of a group, NaN where it is not finite.
#[inline(always)]
fn scale_of(wanted: &[f32]) -> f32 {
    // Integers are compared, so that a NaN is larger than an infinity, and that larger than the
    // rest.
    let bits = |value: &f32| (value.to_bits() & 0x7fff_ffff).cast_signed();
    let largest = wanted.iter().map(bits).fold(0, i32::max);
    let largest = f32::from_bits(largest.cast_unsigned());
    if !largest.is_finite() {
        return f32::NAN;
    }
    let scale = largest / LARGEST;
    if scale < SMALLEST_SCALE { 0.0 } else { scale }
}

/// What a group is multiplied by, to have codes.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[inline(always)]
fn nearest(wanted: f32, inverse: f32) -> f32 {
    (wanted * inverse).clamp(-LARGEST, LARGEST) + MAGIC
}

/// Writes the codes of a group, to the nearest; returns its scale.
#[inline(always)]
fn encode(wanted: &[f32], codes: &mut [u8]) -> f32 {
    let scale = scale_of(wanted);
    if scale.is_nan() {
        mark(wanted, codes);
        return scale;
    }
    let inverse = inverse(scale);
    for (code, wanted) in codes.iter_mut().zip(wanted) {
        *code = nearest(*wanted, inverse).to_bits() as u8;
    }
    scale
}

#[inline(always)]
fn encode_randomly(wanted: &[f32], codes: &mut [u8], seed: u64, start: usize) -> f32 {
    let scale = scale_of(wanted);
    if scale.is_nan() {
        mark(wanted, codes);
        return scale;
    }
    let inverse = inverse(scale);
    for (index, (code, wanted)) in (start as u32..).zip(codes.iter_mut().zip(wanted)) {
        let scaled = (wanted * inverse).clamp(-LARGEST, LARGEST) + offset(seed, index);
        *code = (scaled + MAGIC).to_bits() as u8;
    }
    scale
}

/// An odd multiple of the 131072th part of 1, between -1/2 and 1/2: a whole number to which it is
/// added stays the nearest, and there are no ties.
#[inline(always)]
fn offset(seed: u64, index: u32) -> f32 {
    const SMALLEST: f32 = 1.0 / 131_072.0;
    let mut hash = index ^ seed as u32;
    hash = (hash ^ hash >> 16).wrapping_mul(0x7feb_352d);
    hash = (hash ^ hash >> 15 ^ (seed >> 32) as u32).wrapping_mul(0x846c_a68b);
    hash ^= hash >> 16;
    (hash >> 16).cast_signed() as f32 * (2.0 * SMALLEST) + (SMALLEST - 0.5)
}

/// Writes the codes of a group that is not finite.
fn mark(wanted: &[f32], codes: &mut [u8]) {
    for (code, wanted) in codes.iter_mut().zip(wanted) {
        *code = if wanted.is_finite() {
            0
        } else if wanted.is_nan() {
            NAN
        } else if *wanted > 0.0 {
            INFINITE
        } else {
            NEGATIVE
        };
    }
}

/// Reads a group into or onto `out`, as `write` says.
fn decode(codes: &[u8], scale: f32, out: &mut [f32], write: impl Fn(f32, f32) -> f32) {
    if scale.is_finite() {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = write(*out, f32::from(code.cast_signed()) * scale);
        }
        return;
    }
    for (out, code) in out.iter_mut().zip(codes) {
        let value = match *code {
            0 => f32::ZERO,
            INFINITE => f32::INFINITY,
            NEGATIVE => f32::NEG_INFINITY,
            _ => f32::NAN,
        };
        *out = write(*out, value);
    }
}

/// Where a group is in a residual: its elements, and their unit.
struct Place {
    elements: std::ops::Range<usize>,
    unit: std::ops::Range<usize>,
}

impl Place {
    fn of(shard: usize, rank: usize, group: usize, numel: usize) -> Self {
        let start = rank * residual_bytes(shard, 1);
        let elements = start + 2 * group * GROUP;
        let unit = start + 2 * shard + 4 * group;
        Self { elements: elements..elements + 2 * numel, unit: unit..unit + 4 }
    }

    /// Adds a residual to a group; nothing where it is not finite.
    #[inline(always)]
    fn add(&self, residual: &[u8], wanted: &mut [f32]) {
        let unit = residual[self.unit.clone()].as_chunks().0[0];
        let unit = f32::from_le_bytes(unit);
        if !unit.is_finite() {
            return;
        }
        let elements = residual[self.elements.clone()].as_chunks().0;
        for (wanted, element) in wanted.iter_mut().zip(elements) {
            *wanted += f32::from(i16::from_le_bytes(*element)) * unit;
        }
    }

    /// Writes what the codes of a group leave out.
    #[inline(always)]
    fn keep(&self, residual: &mut [u8], wanted: &[f32], codes: &[u8], scale: f32) {
        let finite = scale.is_finite();
        let unit = if finite { scale / UNITS } else { 0.0 };
        residual[self.unit.clone()].copy_from_slice(&unit.to_le_bytes());
        let elements = &mut residual[self.elements.clone()];
        if !finite || scale == 0.0 {
            elements.fill(0);
            return;
        }
        let units = inverse(scale) * UNITS;
        let most = f32::from(i16::MAX);
        let pairs = wanted.iter().zip(codes);
        for (element, (wanted, code)) in elements.as_chunks_mut().0.iter_mut().zip(pairs) {
            let lost = wanted - f32::from(code.cast_signed()) * scale;
            let lost = (lost * units).clamp(-most, most) + MAGIC;
            *element = (lost.to_bits() as u16).to_le_bytes();
        }
    }
}
