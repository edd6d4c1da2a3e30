//! What of a parameter is never cut: how buckets are laid out so, and what that takes.

mod arbitrary;

use std::num::NonZeroU64;

use arbitrary::{cost, ids, plan, spec};
use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::{
    Bucket, BucketId, BucketLayout, Cap, Dtype, Grain, Group, GroupId, Mesh, Param, ParamId,
    Partition, Plan, PlanError, PlanSpec, Rank, Stage, UnitId, WHOLE_PADDING, Way, WireId,
};

fn param(numel: u64, cost: u64) -> Param {
    let (group, wire) = (Some(GroupId(0)), WireId(0));
    Param { numel, dtype: Dtype::F32, group, wire, unit: None, grain: Grain::Whole, cost }
}

fn spec_of(params: Vec<Param>, world: u32) -> PlanSpec {
    PlanSpec {
        params,
        mesh: Mesh::flat(world).unwrap(),
        rules: Stage::Two.rules(),
        cap: Cap::Bytes(u64::MAX),
        window: None,
        whole_padding: WHOLE_PADDING,
    }
}

/// Parameters of these lengths and of no cost, in one bucket.
fn lengths(numels: &[u64], world: u32) -> PlanSpec {
    spec_of(numels.iter().map(|&numel| param(numel, 0)).collect(), world)
}

/// Lengths and costs.
fn matrices(sizes: &[(u64, u64)], world: u32) -> Plan {
    let params = sizes.iter().map(|&(numel, cost)| param(numel, cost)).collect();
    Plan::new(spec_of(params, world)).unwrap()
}

fn block(length: u64) -> Grain {
    Grain::Block(NonZeroU64::new(length).unwrap())
}

fn layout(plan: &Plan, bucket: u32) -> &Partition {
    plan.partition(BucketId(bucket)).unwrap()
}

/// Where parameters end when they follow one another, and the sum and the most of their lengths
/// rounded up to 64 bytes; ends and sums at least 1.
fn figures(plan: &Plan, bucket: &Bucket) -> (u64, u64, u64) {
    let align = bucket.dtype.align();
    let numels = || bucket.params.iter().map(|param| plan.params()[param.index()].numel);
    let padded = || numels().map(|numel| numel.next_multiple_of(align));
    let end = numels().fold(0, |end: u64, numel| end.next_multiple_of(align) + numel);
    (end.max(1), padded().sum::<u64>().max(1), padded().max().unwrap_or(0))
}

fn multiple_of_both(one: u64, other: u64) -> u64 {
    (1..=other).map(|times| times * one).find(|multiple| multiple % other == 0).unwrap()
}

proptest! {
    #[test]
    fn par_4_no_border_cuts_a_grain_but_where_it_is_exchanged(plan in plan()) {
        for bucket in plan.buckets() {
            let partition = plan.partition(bucket.id).unwrap();
            let way = plan.way(bucket.id).unwrap();
            prop_assert_eq!(way.is_some(), bucket.grain == Grain::Whole);
            let borders = (1..u64::from(plan.mesh().size(Group::Shard)))
                .map(|shard| shard * partition.shard_numel());
            let mut cuts = 0;
            for border in borders {
                for (&start, &numel) in partition.offsets().iter().zip(partition.numels()) {
                    let inside = start < border && border < start + numel;
                    match bucket.grain {
                        Grain::Element => {}
                        Grain::Block(length) =>
                            prop_assert!(!inside || (border - start) % length == 0),
                        Grain::Whole => cuts += u32::from(inside),
                    }
                }
            }
            prop_assert_eq!(cuts > 0, way == Some(Way::Exchanged));
        }
    }

    #[test]
    fn padding_stays_below_what_is_said_of_it(spec in spec()) {
        let padding = u128::from(spec.whole_padding);
        let plan = Plan::new(spec).unwrap();
        for bucket in plan.buckets() {
            let partition = plan.partition(bucket.id).unwrap();
            let (shards, numel) = (plan.mesh().size(Group::Shard), partition.numel());
            let even = Partition::new(
                &Bucket { grain: Grain::Element, ..bucket.clone() }, plan.params(), shards,
            );
            let (even, shards) = (even.unwrap().numel(), u64::from(shards));
            let (end, total, longest) = figures(&plan, bucket);
            let below = match bucket.grain {
                Grain::Element => end + 128 * shards,
                Grain::Block(length) =>
                    end + 2 * shards * multiple_of_both(128, length.get()),
                Grain::Whole => total + (shards - 1) * longest + 128 * shards,
            };
            prop_assert!(numel < below);
            let more = u128::from(numel - even) * 1_000_000;
            prop_assert!(bucket.grain != Grain::Whole || more <= u128::from(even) * padding);
        }
    }

    #[test]
    fn grains_mean_nothing_where_the_optimizer_is_replicated(mut spec in spec()) {
        spec.rules = Stage::Zero.rules();
        let mut plain = spec.clone();
        for param in &mut plain.params {
            (param.grain, param.cost) = (Grain::Element, 0);
        }
        let (one, other) = (Plan::new(spec).unwrap(), Plan::new(plain).unwrap());
        prop_assert_eq!(one.digest(), other.digest());
        prop_assert_eq!(one.buckets(), other.buckets());
    }

    #[test]
    fn a_bucket_of_one_rank_is_as_it_would_be_without_grains(mut spec in spec()) {
        spec.mesh = Mesh::flat(1).unwrap();
        for param in &mut spec.params {
            param.grain = Grain::Whole;
        }
        let whole = Plan::new(spec.clone()).unwrap();
        for param in &mut spec.params {
            param.grain = Grain::Element;
        }
        let plain = Plan::new(spec).unwrap();
        for (one, other) in whole.buckets().iter().zip(plain.buckets()) {
            prop_assert_eq!(&one.params, &other.params);
            prop_assert_eq!(whole.partition(one.id), plain.partition(other.id));
        }
    }

    #[test]
    fn an_owned_parameter_lies_whole_in_its_owners_shard(plan in plan()) {
        for bucket in plan.buckets() {
            let owned = plan.way(bucket.id).unwrap() == Some(Way::Owned);
            for shard in 0..plan.mesh().size(Group::Shard) {
                let rank = plan.mesh().holder(shard);
                for fragment in plan.fragments(bucket.id, rank).unwrap() {
                    let numel = plan.params()[fragment.param.index()].numel;
                    let owner = plan.owner(fragment.param).unwrap();
                    prop_assert!(!owned || (owner, fragment.length) == (Some(shard), numel));
                }
            }
            for &param in &bucket.params {
                prop_assert_eq!(plan.owner(param).unwrap().is_some(), bucket.grain == Grain::Whole);
            }
        }
    }

    #[test]
    fn within_a_shard_parameters_follow_one_another_in_reverse_registration_order(plan in plan()) {
        for bucket in plan.buckets() {
            let in_order = |rank| {
                let found: Vec<_> = plan.fragments(bucket.id, rank).unwrap().collect();
                found.is_sorted_by(|one, next| one.param > next.param)
            };
            let shards = 0..plan.mesh().size(Group::Shard);
            prop_assert!(shards.map(|shard| plan.mesh().holder(shard)).all(in_order));
        }
    }

    #[test]
    fn pck_2_what_ranks_cost_differs_by_no_more_than_in_one_bucket(
        costs in vec(vec(cost(), 6), 1..8), world in 1..5_u32,
    ) {
        // All as long as one another, six a bucket: buckets are owned whatever the world.
        let params: Vec<Param> = costs.concat().into_iter().map(|cost| param(128, cost)).collect();
        let mut spec = spec_of(params, world);
        (spec.cap, spec.whole_padding) = (Cap::Elements(6 * 128), u32::MAX);
        let plan = Plan::new(spec).unwrap();
        let spread = |costs: &[u128]| costs.iter().max().unwrap() - costs.iter().min().unwrap();
        let mut widest = 0;
        for bucket in plan.buckets() {
            prop_assert_eq!(plan.way(bucket.id).unwrap(), Some(Way::Owned));
            let mut costs = vec![0; world as usize];
            for param in &bucket.params {
                let owner = plan.owner(*param).unwrap().unwrap();
                costs[owner as usize] += u128::from(plan.params()[param.index()].cost);
            }
            widest = widest.max(spread(&costs));
        }
        prop_assert!(spread(plan.costs()) <= widest);
    }
}

#[test]
fn matrices_are_packed_whole_and_the_rest_is_padding() {
    let plan = Plan::new(lengths(&[640, 384, 384, 256], 2)).unwrap();
    let bucket = plan.bucket(BucketId(0)).unwrap();
    assert_eq!(plan.way(bucket.id), Ok(Some(Way::Owned)));
    assert_eq!(layout(&plan, 0).shard_numel(), 896, "1664 elements in all: 832 a rank at best");
    assert_eq!(bucket.params, ids(&[3, 0, 2, 1]));
    assert_eq!(layout(&plan, 0).offsets(), [0, 256, 896, 1280]);
    assert_eq!(layout(&plan, 0).numels(), [256, 640, 384, 384]);
}

#[test]
fn longest_first_is_mended_by_swaps() {
    // Longest first makes 3+2+2 and 3+2; 3+3 and 2+2+2 are equal.
    let plan = Plan::new(lengths(&[384, 256, 384, 256, 256], 2)).unwrap();
    assert_eq!(plan.way(BucketId(0)), Ok(Some(Way::Owned)));
    assert_eq!(layout(&plan, 0).shard_numel(), 768);
}

/// Attention and feed-forward of a Llama of 8 billion parameters, so many layers of it.
fn llama(layers: usize) -> Vec<u64> {
    let layer = [4096, 1024, 1024, 4096, 14336, 14336, 14336].map(|rows: u64| rows * 4096);
    layer.repeat(layers)
}

#[test]
fn four_matrices_a_rank_take_a_tenth_at_most_and_more_ranks_than_matrices_take_many_times_all() {
    let percent = |layers, world| {
        let mut spec = lengths(&llama(layers), world);
        spec.whole_padding = u32::MAX;
        let numel = layout(&Plan::new(spec).unwrap(), 0).numel();
        let total: u64 = llama(layers).iter().sum();
        (numel - total) * 100 / total
    };
    let cases = [(1, 2), (4, 8), (32, 2), (32, 8), (32, 64), (32, 1024)];
    let found = cases.map(|(layers, world)| percent(layers, world));
    assert_eq!(found, [7, 7, 0, 0, 7, 761]);
}

#[test]
fn more_ranks_than_matrices_leave_shards_that_own_nothing() {
    let mut spec = lengths(&[300, 200], 4);
    spec.whole_padding = u32::MAX;
    let plan = Plan::new(spec).unwrap();
    let owned = |rank| plan.fragments(BucketId(0), Rank(rank)).unwrap().count();
    assert_eq!([0, 1, 2, 3].map(owned), [1, 1, 0, 0]);
    assert_eq!((layout(&plan, 0).offsets(), layout(&plan, 0).shard_numel()), (&[0, 384][..], 384));
}

#[test]
fn what_would_take_too_much_padding_is_cut_and_exchanged() {
    let padded = |padding| {
        let mut spec = lengths(&[1024; 9], 2); // five on one rank: 10240 instead of 9216
        spec.whole_padding = padding;
        let plan = Plan::new(spec).unwrap();
        (plan.way(BucketId(0)).unwrap(), layout(&plan, 0).numel())
    };
    assert_eq!(padded(0), (Some(Way::Exchanged), 9216));
    assert_eq!(padded(111_111), (Some(Way::Exchanged), 9216));
    assert_eq!(padded(111_112), (Some(Way::Owned), 10240));
    assert_eq!(padded(u32::MAX), (Some(Way::Owned), 10240));
}

#[test]
fn what_is_as_short_as_when_it_is_cut_evenly_is_owned_without_an_allowance() {
    let mut spec = lengths(&[100, 100, 7], 3); // 128 elements a rank are the least
    spec.whole_padding = 0;
    assert_eq!(Plan::new(spec).unwrap().way(BucketId(0)), Ok(Some(Way::Owned)));
}

#[test]
fn costs_are_balanced_where_lengths_do_not_care() {
    let costs = |sizes| matrices(sizes, 2).costs().to_vec();
    assert_eq!(costs(&[(256, 9), (256, 9), (256, 1), (256, 1)]), [10, 10]);
    // Whatever makes both as long: the two of 256 go apart, and the dear one without the others.
    assert_eq!(costs(&[(256, 5), (256, 0), (128, 3), (128, 2), (128, 0), (128, 0)]), [5, 5]);
}

#[test]
fn what_costs_most_goes_to_the_rank_that_has_least_to_do_so_far() {
    let mut spec = spec_of(vec![param(128, 5), param(128, 1), param(128, 5), param(128, 1)], 2);
    spec.cap = Cap::Elements(256);
    let plan = Plan::new(spec).unwrap();
    assert_eq!(plan.costs(), [6, 6]);
}

#[test]
fn a_block_is_not_cut_and_only_what_would_be_is_moved() {
    let with = |grain, numels: &[u64]| {
        let params = numels.iter().map(|&numel| Param { grain, ..param(numel, 0) }).collect();
        Plan::new(spec_of(params, 2)).unwrap()
    };
    // From the end: 100 elements, then 400 that a border at 256 would cut after 144.
    let uncut = with(Grain::Element, &[400, 100]);
    assert_eq!((layout(&uncut, 0).offsets(), layout(&uncut, 0).numel()), (&[0, 112][..], 512));
    for (length, start, numel) in
        [(16, 112, 512), (128, 128, 768), (64, 128, 768), (256, 112, 1024)]
    {
        let plan = with(block(length), &[400, 100]);
        assert_eq!((layout(&plan, 0).offsets()[1], layout(&plan, 0).numel()), (start, numel));
        assert_eq!((plan.way(BucketId(0)), plan.owner(ParamId(0))), (Ok(None), Ok(None)));
    }
    let plan = with(block(3), &[400, 100]); // shards are multiples of 384 elements
    assert_eq!((layout(&plan, 0).offsets(), layout(&plan, 0).numel()), (&[0, 144][..], 768));
}

#[test]
fn a_block_as_long_as_can_be_counted_is_refused_by_name() {
    let params = vec![Param { grain: block(u64::MAX), ..param(10, 0) }];
    let error = Plan::new(spec_of(params, 2)).unwrap_err();
    assert_eq!(error, PlanError::TooLarge { param: ParamId(0) });
}

#[test]
fn a_length_that_can_not_be_padded_further_is_cut() {
    let most = i64::MAX as u64 / 4;
    let mut spec = lengths(&[most / 2, most / 3], 2);
    spec.whole_padding = u32::MAX;
    let plan = Plan::new(spec).unwrap();
    assert_eq!(plan.way(BucketId(0)), Ok(Some(Way::Exchanged)), "most / 2 rounded up is too much");
    assert_eq!(plan.exchanges(Rank(0)).unwrap().len(), 1);
}

#[test]
fn grains_of_one_group_lie_in_buckets_of_their_own_and_so_do_units() {
    let grains = [Grain::Element, Grain::Whole, Grain::Element, block(128), Grain::Whole];
    let params = grains.map(|grain| Param { grain, ..param(100, 0) }).to_vec();
    let plan = Plan::new(spec_of(params.clone(), 2)).unwrap();
    let makeup: Vec<_> = plan.buckets().iter().map(|b| (b.grain, b.params.clone())).collect();
    assert_eq!(
        makeup,
        [(block(128), ids(&[3])), (Grain::Whole, ids(&[4, 1])), (Grain::Element, ids(&[2, 0]))]
    );
    let mut spec = spec_of(params, 2);
    spec.rules = Stage::Three.rules();
    for (index, param) in (0..).zip(&mut spec.params) {
        param.unit = Some(UnitId(index / 4));
    }
    let plan = Plan::new(spec).unwrap();
    let units: Vec<_> = plan.units().iter().map(|unit| unit.buckets.len()).collect();
    assert_eq!(units, [3, 1]);
}

#[test]
fn what_no_optimizer_has_has_no_grain() {
    let params = vec![Param { group: None, ..param(300, 7) }];
    let plan = Plan::new(spec_of(params, 2)).unwrap();
    assert_eq!((plan.buckets()[0].grain, plan.owner(ParamId(0))), (Grain::Element, Ok(None)));
}

#[test]
fn a_restored_layout_says_by_itself_which_way_it_is() {
    let restore = |grain, offsets: [u64; 2]| {
        let params = vec![Param { grain, ..param(200, 3) }; 2];
        let places = offsets.into_iter().enumerate();
        let params_at = places.map(|(id, start)| (ParamId(id as u32), start)).collect();
        let layouts = vec![BucketLayout { params: params_at, numel: 512 }];
        Plan::restore(params, layouts, 2, Stage::Two.rules())
    };
    let way = |offsets| restore(Grain::Whole, offsets).unwrap().way(BucketId(0)).unwrap();
    assert_eq!(way([0, 256]), Some(Way::Owned));
    assert_eq!(way([0, 208]), Some(Way::Exchanged));
    let cut = PlanError::CutBlock { bucket: BucketId(0), param: ParamId(1) };
    assert_eq!(restore(block(64), [0, 208]).err(), Some(cut));
    assert!(restore(block(48), [0, 208]).is_ok());
    assert!(restore(Grain::Element, [0, 208]).is_ok());
    // The first border is 64 elements behind the parameter's start, the second 160.
    let layout = BucketLayout { params: vec![(ParamId(0), 32)], numel: 3 * 96 };
    let params = vec![Param { grain: block(64), ..param(200, 0) }];
    let cut = PlanError::CutBlock { bucket: BucketId(0), param: ParamId(0) };
    let error = Plan::restore(params, vec![layout], 3, Stage::Two.rules()).unwrap_err();
    assert_eq!(error, cut);
}
