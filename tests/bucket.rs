//! Assignment of parameters to buckets.

mod arbitrary;

use std::cmp::Reverse;

use arbitrary::{cap, ids, model};
use proptest::prelude::*;
use zerort_core::bucket::assign;
use zerort_core::{Bucket, Cap, Dtype, Grain, GroupId, Kind, Param, ParamId, WireId};

fn param(numel: u64, dtype: Dtype, group: u32) -> Param {
    Param {
        numel,
        dtype,
        group: Some(GroupId(group)),
        wire: WireId(0),
        unit: None,
        grain: Grain::Element,
        cost: 0,
    }
}

fn f32(numel: u64) -> Param {
    param(numel, Dtype::F32, 0)
}

fn contents(params: &[Param], cap: Cap) -> Vec<Vec<ParamId>> {
    assign(params, cap).into_iter().map(|bucket| bucket.params).collect()
}

/// Length of the buffer up to the end of its last parameter.
fn length(params: &[Param], ids: &[ParamId]) -> u64 {
    ids.iter().fold(0, |end: u64, id| {
        let param = params[id.index()];
        end.next_multiple_of(64 / param.dtype.size()) + param.numel
    })
}

proptest! {
    #[test]
    fn every_parameter_is_in_exactly_one_bucket(params in model(), cap in cap()) {
        let mut all: Vec<ParamId> = contents(&params, cap).concat();
        all.sort_unstable();
        prop_assert_eq!(all, (0..params.len() as u32).map(ParamId).collect::<Vec<_>>());
    }

    #[test]
    fn a_bucket_holds_one_dtype_one_optimizer_group_and_one_wire_format(
        params in model(), cap in cap(),
    ) {
        for Bucket { dtype, group, wire, unit, grain, params: ids, .. } in assign(&params, cap) {
            let kind = Kind { dtype, group, wire, unit, grain };
            prop_assert!(ids.iter().all(|id| params[id.index()].kind() == kind));
        }
    }

    #[test]
    fn parameters_lie_in_reverse_registration_order(params in model(), cap in cap()) {
        prop_assert!(contents(&params, cap).iter().all(|ids| ids.is_sorted_by(|a, b| a > b)));
    }

    #[test]
    fn ids_follow_the_order_in_which_the_reverse_walk_completes_buckets(
        params in model(), cap in cap(),
    ) {
        let buckets = assign(&params, cap);
        let completed = |bucket: &Bucket| Reverse(bucket.params.last().copied());
        prop_assert!(buckets.is_sorted_by_key(completed));
        let ids: Vec<u32> = buckets.iter().map(|bucket| bucket.id.0).collect();
        prop_assert_eq!(ids, (0..buckets.len() as u32).collect::<Vec<_>>());
    }

    #[test]
    fn only_a_parameter_larger_than_the_cap_makes_a_bucket_longer_than_the_cap(
        params in model(), cap in cap(),
    ) {
        for bucket in assign(&params, cap) {
            let mut filled = bucket.params;
            filled.retain(|id| params[id.index()].numel > 0);
            let fits = length(&params, &filled) <= cap.elements(bucket.dtype);
            prop_assert!(fits || filled.len() == 1);
        }
    }

    #[test]
    fn a_bucket_is_closed_only_when_the_next_parameter_does_not_fit(
        params in model(), cap in cap(),
    ) {
        let buckets = assign(&params, cap);
        for (index, bucket) in buckets.iter().enumerate() {
            let kind = |bucket: &Bucket| params[bucket.params[0].index()].kind();
            let same_kind = |next: &&Bucket| kind(next) == kind(bucket);
            if let Some(next) = buckets[index + 1..].iter().find(same_kind) {
                let mut longer = bucket.params.clone();
                longer.push(next.params[0]);
                prop_assert!(length(&params, &longer) > cap.elements(bucket.dtype));
            }
        }
    }
}

#[test]
fn a_cap_in_bytes_is_one_in_elements_of_the_dtype() {
    let halves = [param(64, Dtype::BF16, 0); 4];
    assert_eq!(contents(&halves, Cap::Bytes(256)), contents(&halves, Cap::Elements(128)));
    assert_eq!(contents(&halves, Cap::Bytes(256)), [ids(&[3, 2]), ids(&[1, 0])]);
}

#[test]
fn the_space_between_parameters_counts_towards_the_cap() {
    assert_eq!(contents(&[f32(1); 3], Cap::Elements(17)), [ids(&[2, 1]), ids(&[0])]);
}

#[test]
fn a_parameter_larger_than_the_cap_has_a_bucket_of_its_own() {
    let params = [f32(16), f32(1000), f32(16)];
    assert_eq!(contents(&params, Cap::Elements(64)), [ids(&[2]), ids(&[1]), ids(&[0])]);
}

#[test]
fn kinds_do_not_interrupt_each_other() {
    let low = Param { wire: WireId(1), ..f32(16) };
    let params =
        [f32(16), param(16, Dtype::F64, 0), low, f32(16), param(16, Dtype::F32, 1), low, f32(16)];
    assert_eq!(
        contents(&params, Cap::Elements(1000)),
        [ids(&[4]), ids(&[5, 2]), ids(&[1]), ids(&[6, 3, 0])]
    );
}

#[test]
fn empty_parameters_go_wherever_their_neighbours_are() {
    let params = [f32(0), f32(16), f32(0), f32(16), f32(0)];
    assert_eq!(contents(&params, Cap::Elements(16)), [ids(&[4, 3, 2]), ids(&[1, 0])]);
    assert_eq!(
        contents(&[f32(0), f32(10)], Cap::Elements(10)),
        [ids(&[1, 0])],
        "even where the next start is behind the cap"
    );
}

#[test]
fn lengths_beyond_any_memory_do_not_wrap_around() {
    let params = [f32(u64::MAX), f32(u64::MAX), f32(16)];
    assert_eq!(contents(&params, Cap::Elements(u64::MAX - 1)), [ids(&[2]), ids(&[1]), ids(&[0])]);
}
