//! The layout of a bucket and its cut among ranks.

mod arbitrary;

use arbitrary::{holders, ids, plan};
use proptest::prelude::*;
use zerort_core::{
    Bucket, BucketId, Dtype, Fragment, Grain, Group, GroupId, Param, ParamId, Partition, Plan,
    PlanError, Rank, WireId,
};

fn fragments(plan: &Plan, bucket: BucketId, rank: Rank) -> Vec<Fragment> {
    plan.fragments(bucket, rank).unwrap().collect()
}

/// Lays out one bucket that holds all of `numels`, the first one first.
fn lay_out(numels: &[u64], dtype: Dtype, world: u32) -> Result<(Bucket, Partition), PlanError> {
    let params: Vec<Param> = numels
        .iter()
        .map(|&numel| Param {
            numel,
            dtype,
            group: Some(GroupId(0)),
            wire: WireId(0),
            unit: None,
            grain: Grain::Element,
            cost: 0,
        })
        .collect();
    let order = (0..numels.len() as u32).map(ParamId).collect();
    let bucket = Bucket {
        id: BucketId(0),
        dtype,
        group: Some(GroupId(0)),
        wire: WireId(0),
        unit: None,
        grain: Grain::Element,
        params: order,
    };
    let partition = Partition::new(&bucket, &params, world)?;
    Ok((bucket, partition))
}

proptest! {
    #[test]
    fn par_1_fragments_tile_every_parameter(plan in plan()) {
        let mut covered = vec![0; plan.params().len()];
        for bucket in plan.buckets() {
            for fragment in holders(&plan).flat_map(|rank| fragments(&plan, bucket.id, rank)) {
                prop_assert_eq!(fragment.param_start, covered[fragment.param.index()]);
                prop_assert!(fragment.length > 0);
                covered[fragment.param.index()] += fragment.length;
            }
        }
        prop_assert_eq!(covered, plan.params().iter().map(|param| param.numel).collect::<Vec<_>>());
    }

    #[test]
    fn par_1_a_fragment_lies_where_its_parameter_lies(plan in plan()) {
        for bucket in plan.buckets() {
            let shard_numel = plan.partition(bucket.id).unwrap().shard_numel();
            for fragment in holders(&plan).flat_map(|rank| fragments(&plan, bucket.id, rank)) {
                let (home, offset) = plan.home(fragment.param).unwrap();
                prop_assert_eq!(home, bucket.id);
                let in_bucket = u64::from(fragment.shard) * shard_numel + fragment.shard_start;
                prop_assert_eq!(in_bucket, offset + fragment.param_start);
                prop_assert!(fragment.shard_start + fragment.length <= shard_numel);
            }
        }
    }

    #[test]
    fn par_2_shards_are_equal_multiples_of_128_elements(plan in plan()) {
        for bucket in plan.buckets() {
            let partition = plan.partition(bucket.id).unwrap();
            let shards = u64::from(plan.mesh().size(Group::Shard));
            prop_assert_eq!(partition.shard_numel() * shards, partition.numel());
            prop_assert_eq!(partition.shard_numel() % 128, 0);
            prop_assert!(partition.shard_numel() > 0);
        }
    }

    #[test]
    fn par_2_parameters_start_on_64_bytes_and_do_not_overlap(plan in plan()) {
        for bucket in plan.buckets() {
            let partition = plan.partition(bucket.id).unwrap();
            let mut end = 0;
            for (&offset, &numel) in partition.offsets().iter().zip(partition.numels()) {
                prop_assert_eq!(offset * bucket.dtype.size() % 64, 0);
                prop_assert!(offset >= end);
                end = offset + numel;
            }
            prop_assert!(end <= partition.numel());
        }
    }

    #[test]
    fn par_2_elementwise_padding_is_less_than_one_unit(plan in plan()) {
        for bucket in plan.buckets().iter().filter(|bucket| bucket.grain == Grain::Element) {
            let partition = plan.partition(bucket.id).unwrap();
            let end = partition.offsets().last().unwrap() + partition.numels().last().unwrap();
            let shards = u64::from(plan.mesh().size(Group::Shard));
            prop_assert!(partition.numel() - end.max(1) < 128 * shards);
        }
    }
}

#[test]
fn a_parameter_across_a_boundary_is_cut_there() {
    let (bucket, partition) = lay_out(&[100, 200], Dtype::F32, 2).unwrap();
    assert_eq!(
        (partition.offsets(), partition.numel(), partition.shard_numel()),
        (&[0, 112][..], 512, 256)
    );
    let cut = |shard| partition.fragments(&bucket, shard).collect::<Vec<_>>();
    let fragment = |param, shard, param_start, shard_start, length| Fragment {
        param: ParamId(param),
        bucket: BucketId(0),
        shard,
        param_start,
        shard_start,
        length,
    };
    assert_eq!(cut(0), [fragment(0, 0, 0, 0, 100), fragment(1, 0, 0, 112, 144)]);
    assert_eq!(cut(1), [fragment(1, 1, 144, 0, 56)]);
}

#[test]
fn an_empty_parameter_has_a_place_and_no_fragment() {
    let (bucket, partition) = lay_out(&[128, 0, 0, 5, 0], Dtype::F32, 2).unwrap();
    assert_eq!(partition.offsets(), [0, 128, 128, 128, 144]);
    let found: Vec<ParamId> =
        (0..2).flat_map(|shard| partition.fragments(&bucket, shard)).map(|f| f.param).collect();
    assert_eq!(found, ids(&[0, 3]));
}

#[test]
fn a_bucket_of_empty_parameters_is_not_empty() {
    let (bucket, partition) = lay_out(&[0, 0], Dtype::BF16, 3).unwrap();
    assert_eq!((partition.numel(), partition.shard_numel()), (384, 128));
    assert_eq!(partition.fragments(&bucket, 2).count(), 0);
}

#[test]
fn a_shard_beyond_the_last_has_no_fragments() {
    for numel in [1000, 1 << 60] {
        let (bucket, partition) = lay_out(&[numel], Dtype::F32, 2).unwrap();
        assert_eq!(partition.fragments(&bucket, 2).count(), 0);
        assert_eq!(partition.fragments(&bucket, u32::MAX).count(), 0);
    }
}

#[test]
fn a_buffer_beyond_the_address_space_is_refused_by_the_parameter_that_passes_the_limit() {
    let limit = i64::MAX as u64 / 4;
    let error = PlanError::TooLarge { param: ParamId(1) };
    assert_eq!(lay_out(&[16, limit], Dtype::F32, 1).unwrap_err(), error);
    assert_eq!(lay_out(&[16, u64::MAX], Dtype::F32, 1).unwrap_err(), error);
    assert_eq!(lay_out(&[limit / 2, limit / 2 + 1, 1], Dtype::F32, 1).unwrap_err(), error);
    assert!(lay_out(&[limit / 2, limit / 4], Dtype::F32, 1).is_ok());
}

#[test]
fn as_many_shards_as_there_can_be_are_laid_out() {
    let (bucket, partition) = lay_out(&[1], Dtype::F32, u32::MAX).unwrap();
    assert_eq!(partition.shard_numel(), 128);
    assert_eq!(partition.fragments(&bucket, 0).count(), 1);
    assert_eq!(partition.fragments(&bucket, u32::MAX - 1).count(), 0);
}
