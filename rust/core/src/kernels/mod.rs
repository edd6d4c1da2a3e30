//! CPU kernels: slices in, slices out.
//!
//! [`reduce`] is where a reduce-scatter over a network without reductions ends: every rank sent its
//! copy of our shard, and the copies are summed here. [`squared_norm`] and [`first_nonfinite`] are
//! what clipping and the overflow check ask about a gradient. [`take_writes`] brings to the masters
//! what was written into parameters behind their back. [`quantize`] makes bytes of a gradient, and
//! [`sum_quantized`] adds up what arrives of such.
//!
//! Guarantees:
//! * Low precision is for the wire alone: fp16 and bf16 are widened exactly and summed in fp32;
//!   fp64 stays fp64.
//! * A sum is taken element by element in rank order, so its bits depend neither on how a bucket
//!   was cut nor on where in the buffer an element lies.
//! * A squared norm is accumulated in fp64 over a fixed number of lanes: the same values give the
//!   same bits.
//!
//! What they do not do: allocate, spawn threads, or choose instructions. A block of [`BLOCK`]
//! elements stays in the first level cache between the passes over it, each pass is a plain loop
//! that the compiler vectorises, and what is left is bound by memory.

mod element;
mod norm;
mod quantize;
mod reduce;
mod writes;

pub use element::{Element, Real};
pub use norm::{first_nonfinite, squared_norm};
pub use quantize::{
    GROUP, Rounding, dequantize, piece_bytes, quantize, residual_bytes, sum_quantized,
};
pub use reduce::{ShapeError, Write, reduce, reduce_strided};
pub use writes::{Published, take_writes};

/// Elements that one pass works on: 4 KiB of fp32.
pub const BLOCK: usize = 1024;
