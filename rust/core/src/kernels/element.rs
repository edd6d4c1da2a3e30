//! What a buffer may hold: [`Element`] is a number as it is sent, [`Real`] what it is summed
//! in.

use std::ops::{Add, Mul};

use half::{bf16, f16};

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
/// Conversions are written so that the loops of the provided methods vectorise.
pub trait Element: Copy + Send + Sync + 'static {
    /// What the type is summed in.
    type Sum: Real;

    /// The same value as a [`Element::Sum`]; exact.
    fn widen(self) -> Self::Sum;

    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;

    /// `sum[i] = values[i]`.
    fn load(values: &[Self], sum: &mut [Self::Sum]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum = value.widen();
        }
    }

    /// `sum[i] += values[i]`.
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

    // A bf16 is the upper half of a binary32: a shift is exact, and it vectorises where `to_f32`
    // branches on NaN.
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn is_finite(self) -> bool {
        bf16::is_finite(self)
    }
}

impl Element for f16 {
    type Sum = f32;

    // Branches become selects, so that the loop over a slice is vectorised on any CPU. Subnormals
    // are found by subtracting two normal numbers: multiplying an fp32 subnormal up would give zero
    // in a thread that flushes them.
    fn widen(self) -> f32 {
        const INFINITY: u32 = 0x7c00 << 13;
        const SMALLEST_NORMAL: u32 = 0x0400 << 13;
        const REBIAS: u32 = (127 - 15) << 23;
        let half = u32::from(self.to_bits());
        let magnitude = (half & 0x7fff) << 13;
        let normal = magnitude + REBIAS;
        let subnormal = f32::from_bits(normal + (1 << 23)) - f32::from_bits(REBIAS + (1 << 23));
        let widened = if magnitude >= INFINITY {
            magnitude | f32::INFINITY.to_bits()
        } else if magnitude < SMALLEST_NORMAL {
            subnormal.to_bits()
        } else {
            normal
        };
        f32::from_bits(widened | (half & 0x8000) << 16)
    }

    fn is_finite(self) -> bool {
        f16::is_finite(self)
    }
}
