//! Kernels against slow twins that do one element at a time and know no blocks.

#![allow(clippy::float_cmp)] // what a kernel promises is bits

use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::kernels::{
    BLOCK, Element, Real, ShapeError, Write, first_nonfinite, reduce, reduce_strided, squared_norm,
};

/// The definition: one element after the other, ranks in order.
fn reduce_twin<E: Element>(
    chunks: &[E],
    accum: &mut [E::Sum],
    world: usize,
    scale: E::Sum,
    write: Write,
) {
    let length = accum.len();
    for (index, out) in accum.iter_mut().enumerate() {
        let mut sum = chunks[index].widen();
        for rank in 1..world {
            sum = sum + chunks[rank * length + index].widen();
        }
        *out = match write {
            Write::Over => sum * scale,
            Write::Onto => *out + sum * scale,
        };
    }
}

fn norm_twin<E: Element>(values: &[E]) -> f64 {
    values.iter().map(|value| value.widen().to_f64().powi(2)).sum()
}

/// Bits, with all NaNs as one: which payload comes out of an addition of two is not defined.
fn bits<R: Real>(values: &[R]) -> Vec<u64> {
    let bits = |value: f64| if value.is_nan() { f64::NAN.to_bits() } else { value.to_bits() };
    values.iter().map(|value| bits(value.to_f64())).collect()
}

fn close(got: f64, expected: f64) -> bool {
    if expected.is_finite() {
        (got - expected).abs() <= 1e-12 * expected.abs()
    } else {
        !got.is_finite()
    }
}

/// Ranks and the length of a shard: around the ends of a block, and far from them.
fn shapes() -> impl Strategy<Value = (usize, usize)> {
    let length = prop_oneof![0..40_usize, BLOCK - 2..BLOCK + 3, 2 * BLOCK - 1..2 * BLOCK + 18];
    (1..5_usize, length)
}

/// Chunks and an old accumulator of a random shape, made from random bits: every kind of number is
/// among them.
fn inputs<E>(of_bits: fn(u64) -> E) -> impl Strategy<Value = (usize, Vec<E>, Vec<E::Sum>)>
where
    E: Element + std::fmt::Debug,
    E::Sum: std::fmt::Debug,
{
    let numbers = move |length| vec(any::<u64>().prop_map(of_bits), length);
    shapes().prop_flat_map(move |(world, length)| {
        let accum =
            numbers(length).prop_map(|values| values.into_iter().map(Element::widen).collect());
        (Just(world), numbers(world * length), accum)
    })
}

fn writes() -> impl Strategy<Value = Write> {
    prop_oneof![Just(Write::Over), Just(Write::Onto)]
}

fn agrees_with_the_twin<E: Element>(
    (world, chunks, accum): (usize, Vec<E>, Vec<E::Sum>),
    scale: f64,
    write: Write,
) -> Result<(), TestCaseError> {
    let scale = E::Sum::from_f64(scale);
    let (mut got, mut expected) = (accum.clone(), accum);
    let norm = reduce(&chunks, &mut got, world, scale, write)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    reduce_twin(&chunks, &mut expected, world, scale, write);
    prop_assert_eq!(bits(&got), bits(&expected));
    prop_assert_eq!(bits(&[norm]), bits(&[squared_norm(&got)]));
    prop_assert_eq!(norm.is_finite(), first_nonfinite(&got).is_none());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn fp32_sums_equal_the_twin_to_the_bit(
        input in inputs(|bits| f32::from_bits(bits as u32)),
        scale in any::<f32>(),
        write in writes(),
    ) {
        agrees_with_the_twin(input, f64::from(scale), write)?;
    }

    #[test]
    fn fp64_sums_equal_the_twin_to_the_bit(
        input in inputs(f64::from_bits),
        scale in any::<f64>(),
        write in writes(),
    ) {
        agrees_with_the_twin(input, scale, write)?;
    }

    #[test]
    fn bf16_sums_equal_the_twin_to_the_bit(
        input in inputs(|bits| bf16::from_bits(bits as u16)),
        scale in any::<f32>(),
        write in writes(),
    ) {
        agrees_with_the_twin(input, f64::from(scale), write)?;
    }

    #[test]
    fn fp16_sums_equal_the_twin_to_the_bit(
        input in inputs(|bits| f16::from_bits(bits as u16)),
        scale in any::<f32>(),
        write in writes(),
    ) {
        agrees_with_the_twin(input, f64::from(scale), write)?;
    }

    #[test]
    fn an_element_has_the_same_sum_wherever_the_buffer_is_cut(
        values in vec(-1e3_f32..1e3, 3 * (BLOCK + 5)), cut in 0..=BLOCK + 5,
    ) {
        let length = BLOCK + 5;
        let mut whole = vec![0.0; length];
        reduce(&values, &mut whole, 3, 0.1, Write::Over).unwrap();
        let mut pieces = Vec::new();
        for part in [0..cut, cut..length] {
            let chunk = |rank: usize| &values[rank * length..][part.clone()];
            let chunks = (0..3).map(chunk).collect::<Vec<_>>().concat();
            let mut sums = vec![0.0; part.len()];
            reduce(&chunks, &mut sums, 3, 0.1, Write::Over).unwrap();
            pieces.extend(sums);
        }
        prop_assert_eq!(bits(&whole), bits(&pieces));
    }

    #[test]
    fn the_squared_norm_is_that_of_the_twin(values in vec(any::<f32>(), 0..3 * BLOCK)) {
        prop_assert!(close(squared_norm(&values), norm_twin(&values)));
    }

    #[test]
    fn the_first_of_several_infinities_is_found(
        length in 1..3 * BLOCK, places in vec((any::<prop::sample::Index>(), any::<bool>()), 1..4),
    ) {
        let mut values = vec![f32::MAX; length];
        for (place, nan) in &places {
            values[place.index(length)] = if *nan { f32::NAN } else { f32::NEG_INFINITY };
        }
        let first = places.iter().map(|(place, _)| place.index(length)).min();
        prop_assert_eq!(first_nonfinite(&values), first);
        prop_assert!(!squared_norm(&values).is_finite());
    }
}

#[test]
fn every_half_precision_number_is_widened_exactly() {
    for bits in 0..=u16::MAX {
        let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
        for (got, expected) in [(half.widen(), half.to_f32()), (brain.widen(), brain.to_f32())] {
            let both_nan = got.is_nan() && expected.is_nan();
            assert!(
                both_nan || got.to_bits() == expected.to_bits(),
                "{bits:#06x}: {got} is not {expected}"
            );
        }
        assert_eq!(Element::is_finite(half), half.widen().is_finite(), "{bits:#06x}");
        assert_eq!(Element::is_finite(brain), brain.widen().is_finite(), "{bits:#06x}");
    }
}

#[test]
fn ranks_are_summed_in_order() {
    let (large, small) = (1e8_f32, 1.0_f32);
    let mut sum = [0.0];
    reduce(&[large, -large, small], &mut sum, 3, 1.0, Write::Over).unwrap();
    assert_eq!(sum, [1.0]);
    reduce(&[large, small, -large], &mut sum, 3, 1.0, Write::Over).unwrap();
    assert_eq!(sum, [0.0]); // 1e8 + 1 is 1e8 in fp32
}

#[test]
fn chunks_that_lie_apart_have_the_sums_of_those_that_do_not() {
    let values: Vec<f32> = (0..3 * (BLOCK + 5)).map(|i| 1.0 / (i + 1) as f32).collect();
    let length = BLOCK + 5;
    let mut expected = vec![0.0; length];
    let norm = reduce(&values, &mut expected, 3, 0.3, Write::Over);
    for gap in [0, 1, 64] {
        let mut apart = Vec::new();
        for chunk in values.chunks(length) {
            apart.extend_from_slice(chunk);
            apart.extend(std::iter::repeat_n(f32::NAN, gap));
        }
        apart.truncate(apart.len() - gap);
        let mut sum = vec![0.0; length];
        assert_eq!(reduce_strided(&apart, length + gap, &mut sum, 3, 0.3, Write::Over), norm);
        assert_eq!(sum, expected);
    }
}

#[test]
fn chunks_that_overlap_or_do_not_end_where_they_should_are_refused() {
    let mut sum = [7.0_f32; 2];
    for (chunks, stride, world) in [(3, 1, 2), (5, 2, 2), (2, 2, 0), (4, usize::MAX, 3), (3, 3, 1)]
    {
        let values = vec![1.0_f32; chunks];
        let refused = reduce_strided(&values, stride, &mut sum, world, 1.0, Write::Over);
        assert_eq!(refused, Err(ShapeError { chunks, world, accum: 2 }), "{stride}");
    }
    assert_eq!(sum, [7.0; 2]);
    assert_eq!(reduce_strided(&[3.0_f32, 4.0], 0, &mut sum, 1, 1.0, Write::Over), Ok(25.0));
}

#[test]
fn a_scale_comes_after_the_sum_and_a_second_pass_is_added() {
    let mut sum = [0.0];
    let norm = reduce(&[1.0_f32, 2.0], &mut sum, 2, 0.5, Write::Over);
    assert_eq!((sum, norm), ([1.5], Ok(2.25)));
    let norm = reduce(&[1.0_f32, 2.0], &mut sum, 2, 0.5, Write::Onto);
    assert_eq!((sum, norm), ([3.0], Ok(9.0)));
}

#[test]
fn low_precision_is_summed_in_fp32() {
    let ones = vec![bf16::ONE; 300];
    let mut sum = [0.0];
    reduce(&ones, &mut sum, 300, 1.0, Write::Over).unwrap();
    assert_eq!(sum, [300.0]); // in bf16 the sum would stop at 256
}

#[test]
fn a_negative_zero_stays_negative() {
    let mut sum = [1.0];
    reduce(&[-0.0_f32, -0.0], &mut sum, 2, 1.0, Write::Over).unwrap();
    assert_eq!(sum[0].to_bits(), (-0.0_f32).to_bits());
}

#[test]
fn a_finite_fp64_never_looks_infinite() {
    assert_eq!(squared_norm(&[1e200, -1e200]), f64::MAX);
    assert!(squared_norm(&[1e200, f64::NEG_INFINITY]).is_infinite());
    assert!(squared_norm(&[1e200, f64::NAN]).is_nan());
}

#[test]
fn nothing_has_a_norm_of_zero_and_no_infinity() {
    assert_eq!(squared_norm::<f32>(&[]), 0.0);
    assert_eq!(first_nonfinite::<bf16>(&[]), None);
    assert_eq!(reduce::<f16>(&[], &mut [], 3, 1.0, Write::Onto), Ok(0.0));
}

#[test]
fn chunks_of_another_length_are_refused_and_nothing_is_written() {
    let mut sum = [7.0; 2];
    for (chunks, world) in [(3, 2), (5, 2), (4, 0), (0, 2), (4, usize::MAX)] {
        let refused = reduce(&vec![1.0_f32; chunks], &mut sum, world, 1.0, Write::Over);
        assert_eq!(refused, Err(ShapeError { chunks, world, accum: 2 }));
    }
    assert_eq!(sum, [7.0; 2]);
}
