//! What was written into parameters: found by bits, element by element.

use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::kernels::{BLOCK, Published, take_writes};

/// A value as `half` casts it: the definition.
trait Cast: Published {
    fn cast(master: f32) -> Self;
    fn of_bits(bits: u16) -> Self;
}

impl Cast for bf16 {
    fn cast(master: f32) -> Self {
        Self::from_f32(master)
    }

    fn of_bits(bits: u16) -> Self {
        Self::from_bits(bits)
    }
}

impl Cast for f16 {
    fn cast(master: f32) -> Self {
        Self::from_f32(master)
    }

    fn of_bits(bits: u16) -> Self {
        Self::from_bits(bits)
    }
}

/// Masters of random bits (every kind of number is among them), around the ends of a block.
fn masters() -> impl Strategy<Value = Vec<f32>> {
    let length = prop_oneof![0..40_usize, BLOCK - 2..BLOCK + 3, 2 * BLOCK - 1..2 * BLOCK + 18];
    length.prop_flat_map(|length| vec(any::<u32>().prop_map(f32::from_bits), length))
}

fn published<E: Cast>(master: &[f32]) -> Vec<E> {
    master.iter().map(|value| E::cast(*value)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn untouched<E: Cast>(master: &[f32]) {
    let mut after = master.to_owned();
    assert_eq!(take_writes(&published::<E>(master), &mut after), 0);
    assert_eq!(bits(master), bits(&after));
}

fn written<E: Cast>(master: &[f32], writes: &[(usize, u16)]) {
    let mut values = published::<E>(master);
    for (index, value) in writes {
        if let Some(slot) = values.get_mut(*index) {
            *slot = E::of_bits(*value);
        }
    }
    let mut after = master.to_owned();
    let taken = take_writes(&values, &mut after);
    let mut expected = 0;
    for ((value, old), new) in values.iter().zip(master).zip(&after) {
        let both_nan = old.is_nan() && value.widen().is_nan();
        if both_nan || value.bits() == E::cast(*old).bits() {
            assert_eq!(new.to_bits(), old.to_bits());
        } else {
            expected += 1;
            assert_eq!(new.to_bits(), value.widen().to_bits());
        }
    }
    assert_eq!(taken, expected);
}

proptest! {
    #[test]
    fn what_was_published_is_left_to_the_masters(master in masters()) {
        untouched::<bf16>(&master);
        untouched::<f16>(&master);
    }

    #[test]
    fn only_elements_that_were_written_are_taken(
        master in masters(),
        writes in vec((0..2 * BLOCK, any::<u16>()), 0..20),
    ) {
        written::<bf16>(&master, &writes);
        written::<f16>(&master, &writes);
    }

    #[test]
    fn a_master_is_published_as_the_nearest_value_ties_to_even(bits in any::<u32>()) {
        let master = f32::from_bits(bits);
        prop_assume!(!master.is_nan());
        assert_eq!(bf16::publish(master), bf16::cast(master).bits());
        assert_eq!(f16::publish(master), f16::cast(master).bits());
    }
}

#[test]
fn every_number_is_published_as_itself() {
    for bits in 0..=u16::MAX {
        let (brain, half) = (bf16::from_bits(bits), f16::from_bits(bits));
        assert!(brain.is_nan() || bf16::publish(brain.to_f32()) == brain.bits());
        assert!(half.is_nan() || f16::publish(half.to_f32()) == half.bits());
    }
}

#[test]
fn the_smallest_fp16_numbers_round_to_even() {
    for quarters in 0..4096_u16 {
        let master = f32::from(quarters) / 4.0 * 2.0_f32.powi(-24);
        assert_eq!(f16::publish(master), f16::cast(master).bits(), "{quarters} quarters");
        assert_eq!(f16::publish(-master), f16::cast(-master).bits(), "{quarters} quarters");
    }
}

#[test]
fn a_zero_of_the_other_sign_and_a_nan_are_writes() {
    let mut master = [-1e-30_f32, 1.0, f32::NAN];
    let values = [f16::from_f32(0.0), f16::NAN, f16::from_bits(0xffff)];
    assert_eq!(take_writes(&values, &mut master), 2);
    assert_eq!(master[0].to_bits(), 0);
    assert!(master[1].is_nan());
}
