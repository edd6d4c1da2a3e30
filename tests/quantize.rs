//! The wire that sends bytes, against slow twins that do one element at a time.

#![allow(clippy::float_cmp)] // what a kernel promises is bits

use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::kernels::{
    GROUP, Rounding, ShapeError, Write, dequantize, piece_bytes, quantize, reduce, residual_bytes,
    sum_quantized,
};

/// What a piece says, by the definition: a code times the scale of its group.
fn read_twin(piece: &[u8], shard: usize) -> Vec<f32> {
    let value = |index: usize| {
        let at = shard + index / GROUP * 4;
        let scale = f32::from_le_bytes(piece[at..at + 4].try_into().unwrap());
        let code = piece[index].cast_signed();
        match (scale.is_finite(), code) {
            (true, code) => f32::from(code) * scale,
            (false, 0) => 0.0,
            (false, 1) => f32::INFINITY,
            (false, -1) => f32::NEG_INFINITY,
            (false, _) => f32::NAN,
        }
    };
    (0..shard).map(value).collect()
}

fn sent(values: &[f32], scale: f32, world: usize, rounding: Rounding<'_>) -> Vec<u8> {
    let mut pieces = vec![0xee; world * piece_bytes(values.len() / world)];
    quantize(values, scale, world, &mut pieces, rounding).unwrap();
    pieces
}

fn arrived(pieces: &[u8], numel: usize, world: usize) -> Vec<f32> {
    let mut values = vec![-7.0; numel];
    dequantize(pieces, &mut values, world).unwrap();
    values
}

/// The sum of pieces that have been laid so many bytes apart.
fn sum_apart(
    pieces: &[u8],
    apart: usize,
    sum: &mut [f32],
    world: usize,
    scale: f32,
    write: Write,
) -> f64 {
    let length = piece_bytes(sum.len());
    let mut laid = Vec::new();
    for piece in pieces.chunks(length) {
        laid.resize(laid.len().next_multiple_of(length + apart), 0x55);
        laid.extend(piece);
    }
    sum_quantized(&laid, length + apart, sum, world, scale, write).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    let bits = |value: &f32| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() };
    values.iter().map(bits).collect()
}

/// Ranks, and as many shards of ordinary numbers of very different sizes.
fn ordinary() -> impl Strategy<Value = (usize, Vec<f32>)> {
    (1..4_usize, 1..6_usize).prop_flat_map(|(world, lines)| {
        let number = (-1.0_f32..1.0, -20..20).prop_map(|(part, power)| part * 2_f32.powi(power));
        (Just(world), vec(number, world * lines * 128))
    })
}

/// The same of any bits at all.
fn arbitrary() -> impl Strategy<Value = (usize, Vec<f32>)> {
    (1..4_usize, 1..6_usize).prop_flat_map(|(world, lines)| {
        (Just(world), vec(any::<u32>().prop_map(f32::from_bits), world * lines * 128))
    })
}

/// By how much a value may change: half a step of its group's scale.
fn steps(values: &[f32], world: usize) -> Vec<f32> {
    let of_group = |group: &[f32]| {
        let largest = group.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        vec![largest / 127.0; group.len()]
    };
    let shards = values.chunks(values.len() / world);
    shards.flat_map(|shard| shard.chunks(GROUP).flat_map(of_group)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_read_is_what_the_pieces_say((world, values) in arbitrary(), scale in any::<f32>()) {
        let pieces = sent(&values, scale, world, Rounding::Nearest);
        let shard = values.len() / world;
        let twin: Vec<f32> =
            pieces.chunks(piece_bytes(shard)).flat_map(|piece| read_twin(piece, shard)).collect();
        prop_assert_eq!(bits(&arrived(&pieces, values.len(), world)), bits(&twin));
    }

    #[test]
    fn nothing_moves_by_more_than_half_a_step((world, values) in ordinary()) {
        let got = arrived(&sent(&values, 1.0, world, Rounding::Nearest), values.len(), world);
        for ((got, value), step) in got.iter().zip(&values).zip(steps(&values, world)) {
            prop_assert!((got - value).abs() <= step * 0.5001, "{value} became {got}");
        }
    }

    #[test]
    fn the_largest_of_a_group_arrives_as_it_was((world, values) in ordinary()) {
        let got = arrived(&sent(&values, 1.0, world, Rounding::Nearest), values.len(), world);
        for ((got, value), step) in got.iter().zip(&values).zip(steps(&values, world)) {
            if value.abs() == step * 127.0 {
                prop_assert!((got - value).abs() <= value.abs() * 2.0 * f32::EPSILON);
            }
        }
    }

    #[test]
    fn what_is_not_finite_arrives_as_it_was((world, values) in arbitrary()) {
        let got = arrived(&sent(&values, 1.0, world, Rounding::Nearest), values.len(), world);
        for (got, value) in got.iter().zip(&values) {
            if value.is_finite() {
                prop_assert!(got.is_finite());
            } else {
                prop_assert_eq!(bits(&[*got]), bits(&[*value]));
            }
        }
    }

    #[test]
    fn a_sum_of_pieces_is_the_sum_of_what_they_say(
        (world, values) in arbitrary(),
        scale in any::<f32>(),
        onto in any::<bool>(),
        apart in 0..9_usize,
    ) {
        let write = if onto { Write::Onto } else { Write::Over };
        let pieces = sent(&values, 1.0, world, Rounding::Nearest);
        let read = arrived(&pieces, values.len(), world);
        let mut expected = vec![0.5; values.len() / world];
        let mut got = expected.clone();
        let norm = reduce(&read, &mut expected, world, scale, write).unwrap();
        let found = sum_apart(&pieces, apart, &mut got, world, scale, write);
        prop_assert_eq!(bits(&got), bits(&expected));
        prop_assert_eq!(norm.is_finite(), found.is_finite());
        if norm.is_finite() {
            prop_assert_eq!(norm.to_bits(), found.to_bits());
        }
    }

    #[test]
    fn what_was_left_out_comes_with_what_is_sent_next((world, values) in ordinary()) {
        let shard = values.len() / world;
        let mut residual = vec![0; residual_bytes(shard, world)];
        let mut total = vec![0.0_f64; values.len()];
        for _ in 0..8 {
            let before = residual.clone();
            let feedback = Rounding::Feedback { before: Some(&before), after: &mut residual };
            let pieces = sent(&values, 1.0, world, feedback);
            for (total, got) in total.iter_mut().zip(arrived(&pieces, values.len(), world)) {
                *total += f64::from(got);
            }
        }
        // eight times the value, but for what the last one has left out
        for ((total, value), step) in total.iter().zip(&values).zip(steps(&values, world)) {
            let lost = (total - 8.0 * f64::from(*value)).abs();
            prop_assert!(lost <= f64::from(step) * 0.51, "{value} became {}", total / 8.0);
        }
    }

    #[test]
    fn a_residual_is_read_where_it_is_written_to((world, values) in ordinary()) {
        let shard = values.len() / world;
        let mut first = vec![0; residual_bytes(shard, world)];
        sent(&values, 1.0, world, Rounding::Feedback { before: None, after: &mut first });
        let mut apart = vec![0xee; first.len()];
        let feedback = Rounding::Feedback { before: Some(&first), after: &mut apart };
        let expected = sent(&values, 1.0, world, feedback);
        let mut place = first.clone();
        let got = sent(&values, 1.0, world, Rounding::Feedback { before: None, after: &mut place });
        prop_assert_eq!(got, expected);
        prop_assert_eq!(place, apart);
    }

    #[test]
    fn random_rounding_goes_to_a_neighbour_and_is_the_same_again(
        (world, values) in ordinary(), seed in any::<u64>(),
    ) {
        let pieces = sent(&values, 1.0, world, Rounding::Stochastic(seed));
        prop_assert_eq!(&sent(&values, 1.0, world, Rounding::Stochastic(seed)), &pieces);
        let got = arrived(&pieces, values.len(), world);
        for ((got, value), step) in got.iter().zip(&values).zip(steps(&values, world)) {
            prop_assert!((got - value).abs() <= step * 1.0001, "{value} became {got}");
        }
    }
}

#[test]
fn random_rounding_is_right_on_average_and_differs_from_seed_to_seed() {
    let values: Vec<f32> = (0..GROUP).map(|index| index as f32 * 0.37 - 40.0).collect();
    let mut total = vec![0.0_f64; GROUP];
    let draws = 4000;
    let mut distinct = std::collections::BTreeSet::new();
    for seed in 0..draws {
        let seed = (seed + 1_u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let pieces = sent(&values, 1.0, 1, Rounding::Stochastic(seed));
        for (total, got) in total.iter_mut().zip(arrived(&pieces, GROUP, 1)) {
            *total += f64::from(got);
        }
        distinct.insert(pieces);
    }
    assert_eq!(distinct.len() as u64, draws);
    let step = 54.35 / 127.0; // of the last and largest
    for (total, value) in total.iter().zip(&values) {
        let mean = total / draws as f64;
        // the mean of 4000 draws of one or the other is within 1/2 / sqrt(4000) x 6 of a step
        let off = (mean - f64::from(*value)).abs();
        assert!(off < step * 0.05, "{value} became {mean}");
    }
}

#[test]
fn whole_steps_are_not_rounded_at_random() {
    let values: Vec<f32> = (-127..=127).map(|code| code as f32).chain([0.0]).collect();
    for seed in 0..50 {
        let pieces = sent(&values, 1.0, 1, Rounding::Stochastic((seed << 32) | (seed * 77)));
        assert_eq!(arrived(&pieces, GROUP, 1), values);
    }
}

#[test]
fn a_group_that_is_not_finite_leaves_nothing_and_takes_nothing_from_the_next() {
    let mut values = vec![0.3; 2 * GROUP];
    values[3] = f32::NAN;
    values[4] = f32::NEG_INFINITY;
    values[GROUP] = 100.0;
    let mut residual = vec![0xff; residual_bytes(2 * GROUP, 1)]; // units that are NaN
    let pieces = sent(&values, 1.0, 1, Rounding::Feedback { before: None, after: &mut residual });
    let got = arrived(&pieces, 2 * GROUP, 1);
    assert!(got[3].is_nan() && got[4] == f32::NEG_INFINITY && got[5] == 0.0);
    assert!(got[GROUP..].iter().all(|value| value.is_finite()));
    assert!(residual[..2 * GROUP].iter().all(|byte| *byte == 0));
    assert_eq!(residual[4 * GROUP..4 * GROUP + 4], [0; 4]);
    assert!(residual[2 * GROUP..4 * GROUP].iter().any(|byte| *byte != 0));
}

#[test]
fn what_is_too_small_for_a_scale_is_zero() {
    let tiny = f32::MIN_POSITIVE * 3.0;
    assert_eq!(arrived(&sent(&[tiny; 128], 1.0, 1, Rounding::Nearest), 128, 1), [0.0; 128]);
    let small = [1e-27; 128];
    let got = arrived(&sent(&small, 1.0, 1, Rounding::Nearest), 128, 1);
    assert!((got[0] - 1e-27).abs() < 1e-33);
}

#[test]
fn nothing_is_sent_as_nothing() {
    assert_eq!(quantize(&[], 1.0, 3, &mut [], Rounding::Nearest), Ok(()));
    assert_eq!(dequantize(&[], &mut [], 3), Ok(()));
    assert_eq!(sum_quantized(&[], 0, &mut [], 3, 1.0, Write::Onto), Ok(0.0));
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let values = [1.0; 256];
    let mut pieces = vec![9; 2 * piece_bytes(128)];
    let refused = |outcome: Result<(), ShapeError>| assert!(outcome.is_err());
    refused(quantize(&values, 1.0, 0, &mut pieces, Rounding::Nearest));
    refused(quantize(&values[1..], 1.0, 2, &mut pieces, Rounding::Nearest));
    refused(quantize(&values, 1.0, 2, &mut pieces[1..], Rounding::Nearest));
    let mut residual = vec![9; residual_bytes(128, 2)];
    let short = residual.clone();
    for (before, after) in [(None, &mut residual[1..]), (Some(&short[1..]), &mut short.clone()[..])]
    {
        refused(quantize(&values, 1.0, 2, &mut pieces, Rounding::Feedback { before, after }));
        assert!(after.iter().all(|byte| *byte == 9));
    }
    assert!(pieces.iter().all(|byte| *byte == 9));
    refused(dequantize(&pieces, &mut [0.0; 255], 2));
    refused(dequantize(&pieces[1..], &mut [0.0; 256], 2));
    for (stride, shard, world) in [(132, 128, 0), (132, 127, 2), (131, 128, 2), (133, 128, 2)] {
        let mut sum = vec![0.0; shard];
        assert!(sum_quantized(&pieces, stride, &mut sum, world, 1.0, Write::Over).is_err());
    }
}
