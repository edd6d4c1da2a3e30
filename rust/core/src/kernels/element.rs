//! What a buffer may hold: [`Element`] is a number as it travels, [`Real`] the one it is summed in.

use std::ops::{Add, Mul};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::BLOCK;

/// A number in which sums are taken: `f32` or `f64`.
pub trait Real: Element<Sum = Self> + Add<Output = Self> + Mul<Output = Self> {
    /// Zero.
    const ZERO: Self;

    /// The value in fp64; exact.
    fn to_f64(self) -> f64;

    /// The nearest value to `value`.
    fn from_f64(value: f64) -> Self;
}

/// A number as it lies in a buffer or on the wire.
///
/// The provided methods are loops over [`Element::widen`]; a type whose conversion does not vectorise replaces them.
pub trait Element: Copy + Send + Sync + 'static {
    /// What the type is summed in.
    type Sum: Real;

    /// The same value as a [`Element::Sum`]; exact.
    fn widen(self) -> Self::Sum;

    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;

    /// `sum[i] = values[i]`. Slices of equal length, at most [`BLOCK`].
    fn load(values: &[Self], sum: &mut [Self::Sum]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum = value.widen();
        }
    }

    /// `sum[i] += values[i]`. Slices of equal length, at most [`BLOCK`].
    fn accumulate(values: &[Self], sum: &mut [Self::Sum]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum = *sum + value.widen();
        }
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;

    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;

    fn to_f64(self) -> f64 {
        self
    }

    fn from_f64(value: f64) -> Self {
        value
    }
}

impl Element for f32 {
    type Sum = f32;

    fn widen(self) -> f32 {
        self
    }

    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
}

impl Element for f64 {
    type Sum = f64;

    fn widen(self) -> f64 {
        self
    }

    fn is_finite(self) -> bool {
        f64::is_finite(self)
    }
}

impl Element for bf16 {
    type Sum = f32;

    // A bf16 is the upper half of a binary32: a shift is exact, and it vectorises where `to_f32` branches on NaN.
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn is_finite(self) -> bool {
        bf16::is_finite(self)
    }
}

impl Element for f16 {
    type Sum = f32;

    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn is_finite(self) -> bool {
        f16::is_finite(self)
    }

    // Whole slices, because `half` asks once per slice, not once per element, whether the CPU converts by itself.
    fn load(values: &[Self], sum: &mut [f32]) {
        values.convert_to_f32_slice(sum);
    }

    fn accumulate(values: &[Self], sum: &mut [f32]) {
        let mut widened = [0.0; BLOCK];
        let widened = &mut widened[..values.len()];
        values.convert_to_f32_slice(widened);
        f32::accumulate(widened, sum);
    }
}
