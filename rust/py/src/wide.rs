//! A kernel of the core compiled once more, for what most processors have beyond the least.
//!
//! Wheels run on every x86-64, so the compiler may use nothing younger than SSE2, with which rounding
//! at random takes twice as long. What is bound by memory gains nothing and is not here.

use zerort_core::kernels::{self, Rounding, ShapeError};

/// `zerort_core::kernels::quantize`, to the bit.
///
/// # Errors
/// As it.
pub fn quantize(
    values: &[f32],
    scale: f32,
    world: usize,
    pieces: &mut [u8],
    rounding: Rounding<'_>,
) -> Result<(), ShapeError> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has just said that it has what the function is compiled for.
        return unsafe { with_avx2(values, scale, world, pieces, rounding) };
    }
    kernels::quantize(values, scale, world, pieces, rounding)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2(
    values: &[f32],
    scale: f32,
    world: usize,
    pieces: &mut [u8],
    rounding: Rounding<'_>,
) -> Result<(), ShapeError> {
    kernels::quantize(values, scale, world, pieces, rounding)
}
