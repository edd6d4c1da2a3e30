//! Plans: what is refused, what the digest covers, what an observed order changes.

mod arbitrary;

use std::num::NonZeroU64;

use arbitrary::{ids, plan, spec, uniform};
use proptest::prelude::*;
use proptest::sample::Index;
use zerort_core::{
    Bucket, BucketId, BucketLayout, Cap, Dtype, Grain, Group, GroupId, Mesh, Param, ParamId,
    Placement, Plan, PlanError, PlanSpec, Rank, Rules, Stage, WHOLE_PADDING, WireId,
};

fn sample() -> PlanSpec {
    let param = |numel, dtype, group| Param {
        numel,
        dtype,
        group: Some(GroupId(group)),
        wire: WireId(0),
        unit: None,
        grain: Grain::Element,
        cost: 0,
    };
    let params = vec![
        param(1000, Dtype::F32, 0),
        param(0, Dtype::F32, 0),
        param(1, Dtype::BF16, 1),
        param(300, Dtype::F32, 0),
        param(64, Dtype::BF16, 1),
    ];
    PlanSpec {
        params,
        mesh: Mesh::flat(2).unwrap(),
        rules: Stage::Two.rules(),
        cap: Cap::Elements(512),
        window: Some(2),
        whole_padding: WHOLE_PADDING,
    }
}

fn changed(change: impl FnOnce(&mut PlanSpec)) -> Result<Plan, PlanError> {
    let mut spec = sample();
    change(&mut spec);
    Plan::new(spec)
}

/// The ranks of each host of each copy of the model state.
fn mesh<const COPIES: usize, const HOSTS: usize>(copies: [[&[u32]; HOSTS]; COPIES]) -> Mesh {
    let host = |ranks: &[u32]| ranks.iter().copied().map(Rank).collect();
    Mesh::new(&copies.map(|hosts| hosts.map(host).to_vec())).unwrap()
}

fn block(length: u64) -> Grain {
    Grain::Block(NonZeroU64::new(length).unwrap())
}

fn launches(plan: &Plan) -> Vec<u32> {
    plan.schedule().launches().map(|bucket| bucket.0).collect()
}

#[test]
fn a_stage_is_three_placements() {
    use Placement::{Replicated as R, Sharded as S};
    let table = [(0, [R, R, R]), (1, [S, R, R]), (2, [S, S, R]), (3, [S, S, S])];
    for (stage, [optimizer, gradient, parameter]) in table {
        assert_eq!(Stage::new(stage).unwrap().rules(), Rules { optimizer, gradient, parameter });
    }
    assert_eq!(Stage::new(4), Err(PlanError::BadStage { stage: 4 }));
}

#[test]
fn when_gradients_are_reduced_follows_from_the_placements() {
    let rules = [Stage::Zero, Stage::One, Stage::Two, Stage::Three].map(Stage::rules);
    assert_eq!(rules.map(Rules::reduces_every_micro_batch), [false, false, true, true]);
    assert_eq!(rules.map(Rules::gathers_gradient), [true, false, false, false]);
    assert_eq!(rules.map(Rules::gathers_parameter), [false, true, true, false]);
}

#[test]
fn a_specification_without_sense_is_refused() {
    let error = |change: fn(&mut PlanSpec)| changed(change).unwrap_err();
    assert_eq!(error(|spec| spec.cap = Cap::Bytes(0)), PlanError::BadCap);
    assert_eq!(error(|spec| spec.cap = Cap::Elements(0)), PlanError::BadCap);
    assert_eq!(error(|spec| spec.window = Some(0)), PlanError::BadWindow);
    assert_eq!(
        error(|spec| spec.params[3].numel = u64::MAX),
        PlanError::TooLarge { param: ParamId(3) }
    );
}

#[test]
fn a_question_about_something_that_is_not_there_is_an_error() {
    let plan = Plan::new(sample()).unwrap();
    let (param, bucket, rank) = (ParamId(5), BucketId(9), Rank(2));
    let buckets = plan.buckets().len();
    assert_eq!(plan.home(param), Err(PlanError::UnknownParam { param, params: 5 }));
    assert_eq!(plan.bucket(bucket), Err(PlanError::UnknownBucket { bucket, buckets }));
    assert_eq!(plan.partition(bucket), Err(PlanError::UnknownBucket { bucket, buckets }));
    assert_eq!(
        plan.fragments(bucket, Rank(0)).err(),
        Some(PlanError::UnknownBucket { bucket, buckets })
    );
    assert_eq!(
        plan.fragments(BucketId(0), rank).err(),
        Some(PlanError::UnknownRank { rank, world: 2 })
    );
    assert_eq!(plan.reordered(&[param]).err(), Some(PlanError::UnknownParam { param, params: 5 }));
}

#[test]
fn a_window_is_at_most_all_buckets_and_all_of_them_when_left_out() {
    let all = Plan::new(sample()).unwrap().buckets().len() as u32;
    let window = |window| changed(|spec| spec.window = window).unwrap().window();
    assert_eq!([window(None), window(Some(u32::MAX)), window(Some(1))], [all, all, 1]);
}

#[test]
fn a_plan_of_nothing_is_an_empty_list() {
    let plan = changed(|spec| spec.params.clear()).unwrap();
    assert_eq!((plan.buckets().len(), plan.units().len(), launches(&plan)), (0, 0, vec![]));
    let restored = Plan::restore(vec![], vec![], 2, Stage::Two.rules()).unwrap();
    assert_eq!(restored.schedule(), plan.reordered(&[]).unwrap().schedule());
}

#[test]
fn a_digest_is_the_same_on_every_platform_and_in_every_release() {
    let plan = Plan::new(sample()).unwrap();
    assert_eq!((plan.layout_digest(), plan.digest()), (LAYOUT_DIGEST, DIGEST));
}
const LAYOUT_DIGEST: u64 = 0xf8a4_3072_1141_9809;
const DIGEST: u64 = 0xf850_fe96_f475_1645;

#[test]
fn packing_and_owners_are_the_same_on_every_platform() {
    let param = |index: u64| Param {
        numel: 3000 + index * index % 7001,
        dtype: Dtype::BF16,
        group: Some(GroupId(0)),
        wire: WireId(0),
        unit: None,
        grain: Grain::Whole,
        cost: index * 37 % 11,
    };
    let digest = |whole_padding| {
        let plan = changed(|spec| {
            spec.params = (0..40).map(param).collect();
            spec.mesh = Mesh::flat(3).unwrap();
            spec.cap = Cap::Elements(60_000);
            spec.whole_padding = whole_padding;
        });
        plan.unwrap().layout_digest()
    };
    assert_eq!([digest(u32::MAX), digest(0)], [PACKED_DIGEST, EXCHANGED_DIGEST]);
}
const PACKED_DIGEST: u64 = 0x020e_a97b_8406_c826;
const EXCHANGED_DIGEST: u64 = 0x6347_d390_2c8f_52e9;

#[test]
fn a_digest_covers_everything_that_a_plan_is_made_from() {
    let changes: [fn(&mut PlanSpec); 21] = [
        |_| {},
        |spec| spec.params[3].numel += 1,
        |spec| spec.params[1].dtype = Dtype::F64,
        |spec| spec.params[1].group = Some(GroupId(7)),
        |spec| spec.params[1].group = None,
        |spec| spec.params[1].wire = WireId(7),
        |spec| spec.params.swap(0, 3),
        |spec| spec.mesh = Mesh::flat(4).unwrap(),
        |spec| spec.mesh = mesh([[&[0, 1]], [&[2, 3]]]), // two copies of two shards
        |spec| spec.mesh = mesh([[&[0, 1], &[2, 3]]]),   // four shards on two hosts
        |spec| spec.mesh = mesh([[&[0, 2], &[1, 3]]]),   // other ranks on the hosts
        |spec| spec.mesh = mesh([[&[1, 0]]]),            // the other rank has shard 0
        |spec| spec.rules = Stage::One.rules(),
        |spec| spec.cap = Cap::Elements(4096),
        |spec| spec.window = Some(1),
        |spec| spec.params[1].grain = block(1),
        |spec| spec.params[1].grain = block(2),
        |spec| spec.params[1].grain = Grain::Whole,
        |spec| {
            spec.params[1].grain = Grain::Whole;
            spec.params[1].cost = 1;
        },
        |spec| spec.params[0].grain = Grain::Whole, // alone in its bucket, and cut
        |spec| {
            spec.params[0].grain = Grain::Whole;
            spec.whole_padding = u32::MAX;
        },
    ];
    let mut digests: Vec<u64> = changes.map(|change| changed(change).unwrap().digest()).to_vec();
    digests.sort_unstable();
    digests.dedup();
    assert_eq!(digests.len(), changes.len());
}

#[test]
fn what_elementwise_updates_cost_is_no_part_of_a_digest() {
    let digest = |cost| changed(|spec| spec.params[3].cost = cost).unwrap().digest();
    assert_eq!((digest(0), digest(7)), (DIGEST, DIGEST));
}

#[test]
fn buckets_are_launched_as_observed_gradients_fill_them() {
    let plan = uniform(6, 2, None); // b0 = {5, 4}, b1 = {3, 2}, b2 = {1, 0}
    let order = |observed: &[u32]| launches(&plan.reordered(&ids(observed)).unwrap());
    assert_eq!(launches(&plan), [0, 1, 2]);
    assert_eq!(order(&[0, 1, 2, 3, 4, 5]), [2, 1, 0]);
    assert_eq!(order(&[5, 0, 3, 1, 2, 4]), [2, 1, 0]);
    assert_eq!(
        order(&[4, 5, 0, 1, 2, 3, 5]),
        [2, 1, 0],
        "where a parameter is listed twice, the last place counts"
    );
    assert_eq!(order(&[0, 1, 5, 3, 2]), [2, 1, 0], "a bucket that was not filled goes last");
    assert_eq!(order(&[5, 3, 0, 1]), [2, 0, 1], "two of them in layout order");
    assert_eq!(order(&[]), [0, 1, 2]);
}

#[test]
fn sch_1_what_no_optimizer_has_lies_in_buckets_of_its_own_and_is_never_launched() {
    let plan = changed(|spec| {
        spec.params[3].group = None;
        spec.params[0].group = None;
        spec.cap = Cap::Elements(4096);
    });
    let plan = plan.unwrap(); // b0 = {4, 2} of bf16, b1 = {1}, b2 = {3, 0}, held
    let makeup: Vec<_> =
        plan.buckets().iter().map(|bucket| (bucket.is_trained(), bucket.params.len())).collect();
    assert_eq!(makeup, [(true, 2), (true, 1), (false, 2)]);
    assert_eq!((launches(&plan), plan.window()), (vec![0, 1], 2));
    let order = plan.reordered(&ids(&[3, 0, 1, 2, 4])).unwrap();
    assert_eq!(launches(&order), [1, 0], "in whatever order gradients came");
}

#[test]
fn another_launch_order_keeps_the_layout_and_changes_the_digest() {
    let plan = uniform(6, 2, Some(1));
    let other = plan.reordered(&ids(&[0, 1, 2, 3, 4, 5])).unwrap();
    assert_eq!(other.layout_digest(), plan.layout_digest());
    assert_ne!(other.digest(), plan.digest());
    assert_eq!((other.buckets(), other.window()), (plan.buckets(), plan.window()));
}

proptest! {
    #[test]
    fn sch_3_the_same_specification_makes_the_same_plan(spec in spec()) {
        let (one, two) = (Plan::new(spec.clone()).unwrap(), Plan::new(spec).unwrap());
        prop_assert_eq!(one.digest(), two.digest());
        prop_assert_eq!(one.schedule(), two.schedule());
        prop_assert_eq!(one.buckets(), two.buckets());
    }

    #[test]
    fn sch_3_equal_digests_mean_equal_lists(
        plan in plan(), arrivals in prop::collection::vec(any::<Index>(), 0..48),
    ) {
        let params = plan.params().len();
        let param = |at: &Index| ParamId(at.index(params) as u32);
        let observed: Vec<ParamId> = arrivals.iter().map(param).collect();
        let other = plan.reordered(&observed).unwrap();
        prop_assert_eq!(plan.layout_digest(), other.layout_digest());
        prop_assert_eq!(plan.digest() == other.digest(), plan.schedule() == other.schedule());
        let mut launched = launches(&other);
        launched.sort_unstable();
        let trained = plan.buckets().iter().filter(|bucket| bucket.is_trained());
        prop_assert_eq!(launched, trained.map(|bucket| bucket.id.0).collect::<Vec<_>>());
        prop_assert_eq!(plan.buckets().iter().all(|bucket| {
            let hops = plan.hops(bucket.id).unwrap();
            bucket.is_trained() != (hops.reduce.is_empty() && hops.publish.is_empty())
        }), true, "what is only held has no hops");
    }
}

/// The layout of `plan`, as a file would hold it.
fn written(plan: &Plan) -> Vec<BucketLayout> {
    let layout = |bucket: &Bucket| {
        let partition = plan.partition(bucket.id).unwrap();
        let params =
            bucket.params.iter().copied().zip(partition.offsets().iter().copied()).collect();
        BucketLayout { params, numel: partition.numel() }
    };
    plan.buckets().iter().map(layout).collect()
}

fn restored(change: impl FnOnce(&mut Vec<BucketLayout>)) -> Result<Plan, PlanError> {
    let mut layouts = written(&Plan::new(sample()).unwrap());
    change(&mut layouts);
    Plan::restore(sample().params, layouts, 2, sample().rules)
}

proptest! {
    #[test]
    fn a_layout_that_was_written_down_is_restored_as_it_was(plan in plan()) {
        let shards = plan.mesh().size(Group::Shard);
        let (params, layouts) = (plan.params().to_vec(), written(&plan));
        let again = Plan::restore(params, layouts, shards, plan.rules()).unwrap();
        let flat = plan.mesh() == &Mesh::flat(shards).unwrap();
        prop_assert_eq!(again.layout_digest() == plan.layout_digest(), flat);
        for bucket in plan.buckets() {
            let partitions = [&again, &plan].map(|plan| plan.partition(bucket.id).unwrap());
            prop_assert_eq!(partitions[0], partitions[1]);
            prop_assert_eq!(again.bucket(bucket.id).unwrap(), bucket);
        }
    }
}

#[test]
fn par_1_a_written_layout_that_does_not_tile_is_refused() {
    let error = |change: fn(&mut Vec<BucketLayout>)| restored(change).unwrap_err();
    // The sample's buckets: {4, 2} of bf16, {3, 1} and {0} of fp32.
    let (zero, one) = (BucketId(0), BucketId(1));
    assert_eq!(error(|all| all[2].params.clear()), PlanError::NotOnce { param: ParamId(0) });
    assert_eq!(
        error(|all| all[0].params[0].0 = ParamId(2)),
        PlanError::NotOnce { param: ParamId(2) }
    );
    let unknown = PlanError::UnknownParam { param: ParamId(9), params: 5 };
    assert_eq!(error(|all| all[0].params[0].0 = ParamId(9)), unknown);
    let overlap = PlanError::Overlap { bucket: zero, param: ParamId(2) };
    assert_eq!(error(|all| all[0].params[1].1 = 63), overlap);
    assert_eq!(error(|all| all[0].params[1].1 = u64::MAX), overlap);
    assert_eq!(error(|all| all[0].params[1].1 = all[0].numel), overlap);
    let uneven = |numel| PlanError::UnevenBucket { bucket: zero, numel, world: 2 };
    assert_eq!(error(|all| all[0].numel = 0), uneven(0));
    assert_eq!(error(|all| all[0].numel += 1), uneven(257));
    assert_eq!(error(|all| all[0].numel = u64::MAX - 1), uneven(u64::MAX - 1));
    assert_eq!(
        error(|all| all.push(BucketLayout { params: vec![], numel: 2 })),
        PlanError::EmptyBucket { bucket: BucketId(3) }
    );
    let moved = error(|all| {
        let stray = all[0].params.pop().unwrap();
        all[1].params.push((stray.0, 400));
    });
    assert_eq!(moved, PlanError::MixedBucket { bucket: one, param: ParamId(2) });
}
