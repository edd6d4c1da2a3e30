//! Assignment of parameters to buckets.

mod arbitrary;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;

use arbitrary::{cap, ids, model};
use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::bucket::assign;
use zerort_core::{Bucket, Cap, Dtype, Grain, GroupId, Kind, Param, ParamId, UnitId, WireId};

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
    fn a_bucket_is_closed_only_when_what_comes_next_does_not_fit(
        params in model(), cap in cap(),
    ) {
        for (kind, buckets) in by_kind(&params, cap) {
            let most = cap.elements(kind.dtype);
            let short = has_short_ends(&params, &buckets, most);
            for (index, pair) in buckets.windows(2).enumerate() {
                let [bucket, next] = pair else { unreachable!() };
                if short && index + 2 == buckets.len() {
                    continue; // the last one is cut off from behind
                }
                let most = if short && index == 0 { most / 2 } else { most };
                let longer = |count: &usize| {
                    let all: Vec<ParamId> = bucket.iter().chain(&next[..*count]).copied().collect();
                    length(&params, &all) > most
                };
                let count = (1..=next.len()).find(longer);
                prop_assert!(count.is_some(), "{next:?} would fit behind {bucket:?}");
                let (opens, with) = next[..count.unwrap()].split_last().unwrap();
                let with: u64 = with.iter().map(|id| params[id.index()].numel).sum();
                prop_assert!(with <= params[opens.index()].numel / 16);
            }
        }
    }

    #[test]
    fn where_there_are_many_the_first_and_the_last_are_short(
        params in vec(param_of(1..400), 8..60), cap in 200..2000_u64,
    ) {
        let cap = Cap::Elements(cap);
        for (kind, buckets) in by_kind(&params, cap) {
            let most = cap.elements(kind.dtype);
            if has_short_ends(&params, &buckets, most) {
                let whole = buckets.iter().all(|ids| length(&params, ids) <= most);
                prop_assert!(!whole || buckets.len() >= 4);
                for end in [&buckets[0], &buckets[buckets.len() - 1]] {
                    let (last, with) = end.split_last().unwrap();
                    let with: u64 = with.iter().map(|id| params[id.index()].numel).sum();
                    let one = with <= params[last.index()].numel / 16;
                    prop_assert!(one || length(&params, end) <= most / 2);
                }
            }
        }
    }
}

/// The buckets of each kind, in their order.
fn by_kind(params: &[Param], cap: Cap) -> BTreeMap<Kind, Vec<Vec<ParamId>>> {
    let mut kinds: BTreeMap<Kind, Vec<Vec<ParamId>>> = BTreeMap::new();
    for bucket in assign(params, cap) {
        kinds.entry(params[bucket.params[0].index()].kind()).or_default().push(bucket.params);
    }
    kinds
}

/// Whether what these buckets hold fills four of them.
fn has_short_ends(params: &[Param], buckets: &[Vec<ParamId>], cap: u64) -> bool {
    length(params, &buckets.concat()) / 4 >= cap
}

fn param_of(numel: Range<u64>) -> impl Strategy<Value = Param> {
    (numel, 0..2_u32).prop_map(|(numel, group)| param(numel, Dtype::F32, group))
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

#[test]
fn a_bias_goes_with_its_weight() {
    // weight and bias of three layers, as they are registered
    let layers = [f32(1600), f32(64), f32(1600), f32(64), f32(1600), f32(64)];
    assert_eq!(
        contents(&layers, Cap::Elements(1800)),
        [ids(&[5, 4]), ids(&[3, 2]), ids(&[1, 0])],
        "where a layer fits alone"
    );
    assert_eq!(
        contents(&[f32(1600), f32(64), f32(1000)], Cap::Elements(1620)),
        [ids(&[2, 1]), ids(&[0])],
        "but not where both do not fit the next bucket"
    );
    let wide = [f32(1600), f32(128), f32(1600), f32(128), f32(1600)];
    assert_eq!(
        contents(&wide, Cap::Elements(1800)),
        [ids(&[4, 3]), ids(&[2, 1]), ids(&[0])],
        "nor where it is not small beside it"
    );
    assert_eq!(
        contents(&[f32(5000), f32(16), f32(64)], Cap::Elements(1000)),
        [ids(&[2, 1]), ids(&[0])],
        "nor where the weight has a bucket of its own"
    );
}

#[test]
fn the_first_and_the_last_of_many_are_half_as_long() {
    let many = [f32(16); 16];
    assert_eq!(
        contents(&many, Cap::Elements(64)),
        [
            ids(&[15, 14]),
            ids(&[13, 12, 11, 10]),
            ids(&[9, 8, 7, 6]),
            ids(&[5, 4, 3, 2]),
            ids(&[1, 0])
        ]
    );
    let few = contents(&many[1..], Cap::Elements(64));
    assert_eq!(few.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 4, 3]);
    let unit = [Param { unit: Some(UnitId(0)), ..f32(16) }; 16];
    assert!(contents(&unit, Cap::Elements(64)).iter().all(|ids| ids.len() == 4), "of a unit");
}

#[test]
fn an_end_has_one_parameter_where_half_a_bucket_has_no_room_for_it() {
    let mut long = vec![f32(60); 6];
    assert_eq!(contents(&long, Cap::Elements(64)).len(), 6);
    long.extend([f32(16), f32(16)]);
    assert_eq!(
        contents(&long, Cap::Elements(64))[..2],
        [ids(&[7, 6]), ids(&[5])],
        "the others are as they were"
    );
    long[6..].copy_from_slice(&[f32(40), f32(2)]);
    assert_eq!(contents(&long, Cap::Elements(64))[0], ids(&[7, 6]), "and its bias");
}
