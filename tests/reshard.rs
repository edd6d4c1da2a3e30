//! Shards of one plan from the shards of another, by actually moving data.

mod arbitrary;

use std::collections::HashMap;

use arbitrary::{dtype, grain, model, spec_of};
use proptest::prelude::*;
use zerort_core::{
    Bucket, BucketId, Cap, Dtype, Grain, GroupId, Mesh, Param, ParamId, Plan, PlanError, PlanSpec,
    Rank, Segment, Stage, WHOLE_PADDING, WireId, reshard,
};

/// All shards of a job. An element is (parameter, position in it), so that a misplaced one is seen;
/// padding is None.
type Shards = HashMap<(BucketId, Rank), Vec<Option<(ParamId, u64)>>>;

fn places(plan: &Plan) -> impl Iterator<Item = (&Bucket, Rank)> {
    plan.buckets().iter().flat_map(|bucket| (0..plan.world()).map(move |rank| (bucket, Rank(rank))))
}

fn empty_shard(plan: &Plan, bucket: BucketId) -> Vec<Option<(ParamId, u64)>> {
    vec![None; plan.partition(bucket).unwrap().shard_numel() as usize]
}

/// The shards of `plan`, filled from the parameters; `name` says what a parameter is called.
fn fill(plan: &Plan, name: impl Fn(ParamId) -> Option<ParamId>) -> Shards {
    let shard = |(bucket, rank): (&Bucket, Rank)| {
        let mut shard = empty_shard(plan, bucket.id);
        for fragment in plan.fragments(bucket.id, rank).unwrap() {
            for at in 0..fragment.length {
                let element = name(fragment.param).map(|name| (name, fragment.param_start + at));
                shard[(fragment.shard_start + at) as usize] = element;
            }
        }
        ((bucket.id, rank), shard)
    };
    places(plan).map(shard).collect()
}

/// Where the parameters of one bucket came from.
fn of_bucket(bucket: &Bucket, came_from: &[Option<ParamId>]) -> Vec<Option<ParamId>> {
    bucket.params.iter().map(|param| came_from[param.index()]).collect()
}

/// Moves every segment from `shards` of `source` into new shards of `target`.
fn carry(source: &Plan, target: &Plan, came_from: &[Option<ParamId>], shards: &Shards) -> Shards {
    let mut moved = Shards::new();
    for (bucket, rank) in places(target) {
        let mut shard = empty_shard(target, bucket.id);
        let origins = of_bucket(bucket, came_from);
        for segment in reshard(source, target, bucket.id, rank, &origins).unwrap() {
            let from = &shards[&(segment.source_bucket, segment.source_rank)];
            let (start, source_start) = (segment.start as usize, segment.source_start as usize);
            let length = segment.length as usize;
            shard[start..start + length]
                .copy_from_slice(&from[source_start..source_start + length]);
        }
        moved.insert((bucket.id, rank), shard);
    }
    moved
}

/// Two plans for the same parameters in different orders, dtypes, grains, worlds and caps; and who
/// came from where.
fn pair() -> impl Strategy<Value = (Plan, Plan, Vec<Option<ParamId>>)> {
    let order = |n: usize| Just((0..n as u32).map(ParamId).collect::<Vec<_>>()).prop_shuffle();
    let other = |params: Vec<Param>, order: Vec<ParamId>, kinds: Vec<(Dtype, Grain)>| {
        let moved = |(from, (dtype, grain)): (&ParamId, (Dtype, Grain))| Param {
            dtype,
            grain,
            ..params[from.index()]
        };
        spec_of(order.iter().zip(kinds).map(moved).collect())
    };
    model()
        .prop_flat_map(move |params| {
            let n = params.len();
            (Just(params), order(n), prop::collection::vec((dtype(), grain()), n))
        })
        .prop_flat_map(move |(params, order, kinds)| {
            (spec_of(params.clone()), other(params, order.clone(), kinds), Just(order))
        })
        .prop_map(|(source, target, order)| {
            (
                Plan::new(source).unwrap(),
                Plan::new(target).unwrap(),
                order.into_iter().map(Some).collect(),
            )
        })
}

/// `came_from` of the way back.
fn inverse(came_from: &[Option<ParamId>], params: usize) -> Vec<Option<ParamId>> {
    let mut back = vec![None; params];
    for (index, origin) in came_from.iter().enumerate() {
        if let Some(origin) = origin {
            back[origin.index()] = Some(ParamId(index as u32));
        }
    }
    back
}

fn small(numels: &[u64], world: u32) -> Plan {
    let params = numels
        .iter()
        .map(|&numel| Param {
            numel,
            dtype: Dtype::F32,
            group: Some(GroupId(0)),
            wire: WireId(0),
            unit: None,
            grain: Grain::Element,
            cost: 0,
        })
        .collect();
    let (mesh, rules) = (Mesh::flat(world).unwrap(), Stage::Two.rules());
    Plan::new(PlanSpec {
        params,
        mesh,
        rules,
        cap: Cap::Elements(1 << 20),
        window: None,
        whole_padding: WHOLE_PADDING,
    })
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn par_3_there_and_back_is_the_identity((source, target, came_from) in pair()) {
        let before = fill(&source, Some);
        let there = carry(&source, &target, &came_from, &before);
        prop_assert_eq!(&there, &fill(&target, |param| came_from[param.index()]));
        let back = carry(&target, &source, &inverse(&came_from, source.params().len()), &there);
        prop_assert_eq!(back, before);
    }

    #[test]
    fn what_the_source_lacks_and_padding_is_not_listed(
        (source, target, mut came_from) in pair(),
        lacks in prop::collection::vec(any::<bool>(), 24),
    ) {
        for (origin, _) in came_from.iter_mut().zip(lacks).filter(|(_, lacks)| *lacks) {
            *origin = None;
        }
        let there = carry(&source, &target, &came_from, &fill(&source, Some));
        prop_assert_eq!(there, fill(&target, |param| came_from[param.index()]));
    }

    #[test]
    fn segments_are_in_order_and_stay_inside_both_shards((source, target, came_from) in pair()) {
        for (bucket, rank) in places(&target) {
            let mut end = 0;
            let origins = of_bucket(bucket, &came_from);
            for segment in reshard(&source, &target, bucket.id, rank, &origins).unwrap() {
                let held = source.partition(segment.source_bucket).unwrap().shard_numel();
                prop_assert!(segment.length > 0 && segment.start >= end);
                prop_assert!(segment.source_rank.0 < source.world());
                prop_assert!(segment.source_start + segment.length <= held);
                end = segment.start + segment.length;
            }
            prop_assert!(end <= target.partition(bucket.id).unwrap().shard_numel());
        }
    }
}

#[test]
fn a_segment_ends_where_a_shard_of_the_source_ends() {
    let (source, target) = (small(&[200], 2), small(&[200], 1));
    let segment = |start, rank, length| Segment {
        start,
        source_rank: Rank(rank),
        source_bucket: BucketId(0),
        source_start: 0,
        length,
    };
    let segments = reshard(&source, &target, BucketId(0), Rank(0), &[Some(ParamId(0))]).unwrap();
    assert_eq!(segments, [segment(0, 0, 128), segment(128, 1, 72)]);
}

#[test]
fn plans_that_do_not_fit_together_are_refused() {
    let (source, target) = (small(&[200, 30], 2), small(&[200], 3));
    let refused = |bucket, rank, came_from: &[Option<ParamId>]| {
        reshard(&source, &target, BucketId(bucket), Rank(rank), came_from).unwrap_err()
    };
    let zero = Some(ParamId(0));
    assert_eq!(refused(0, 0, &[]), PlanError::WrongLength { params: 1, got: 0 });
    assert_eq!(
        refused(1, 0, &[zero]),
        PlanError::UnknownBucket { bucket: BucketId(1), buckets: 1 }
    );
    assert_eq!(refused(0, 3, &[zero]), PlanError::UnknownRank { rank: Rank(3), world: 3 });
    assert_eq!(
        refused(0, 0, &[Some(ParamId(2))]),
        PlanError::UnknownParam { param: ParamId(2), params: 2 }
    );
    let mismatch = PlanError::Mismatch { param: ParamId(0), expected: 200, got: 30 };
    assert_eq!(refused(0, 0, &[Some(ParamId(1))]), mismatch);
}
