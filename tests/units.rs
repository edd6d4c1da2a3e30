//! How units are cut from a tree of modules, and what a plan makes of them.

mod arbitrary;

use arbitrary::ids;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use zerort_core::{
    Cap, Dtype, Grain, Group, GroupId, Mesh, Module, Param, ParamId, Placement, Plan, PlanError,
    PlanSpec, Stage, UnitId, WHOLE_PADDING, WireId, units,
};

fn module(parent: Option<usize>, params: &[u32]) -> Module {
    Module { parent, params: ids(params) }
}

/// The units by parameter, `-` for none.
fn cut(modules: &[Module], numels: &[u64], cap: u64) -> String {
    let numels: Vec<Option<u64>> = numels.iter().map(|&n| (n != u64::MAX).then_some(n)).collect();
    let units = units::cut(modules, &numels, cap).unwrap();
    units.iter().map(|unit| unit.map_or("-".to_owned(), |unit| unit.0.to_string())).collect()
}

/// A root with an embedding, two blocks of two layers each, and a head.
fn tree() -> Vec<Module> {
    vec![
        module(None, &[]),
        module(Some(0), &[0]),
        module(Some(0), &[]),
        module(Some(2), &[]),
        module(Some(3), &[1]),
        module(Some(3), &[2]),
        module(Some(2), &[]),
        module(Some(6), &[3]),
        module(Some(6), &[4]),
        module(Some(0), &[5]),
    ]
}

#[test]
fn a_subtree_that_fits_is_not_torn_and_runs_fill_a_unit() {
    let numels = [4, 3, 3, 3, 3, 4];
    assert_eq!(cut(&tree(), &numels, 100), "000000");
    assert_eq!(cut(&tree(), &numels, 10), "000111");
    assert_eq!(cut(&tree(), &numels, 9), "011223", "a block does not go with the embedding");
    assert_eq!(cut(&tree(), &numels, 6), "011223");
    assert_eq!(cut(&tree(), &numels, 5), "012345", "a block is torn where it does not fit");
    assert_eq!(cut(&tree(), &numels, 1), "012345");
}

#[test]
fn a_shared_parameter_belongs_to_the_first_module_that_has_it() {
    let mut modules = tree();
    modules[9].params = ids(&[5, 0]);
    assert_eq!(cut(&modules, &[4, 3, 3, 3, 3, 4], 6), "011223");
}

#[test]
fn what_stays_whole_and_what_no_module_lists_has_no_unit() {
    assert_eq!(cut(&tree(), &[4, u64::MAX, 3, 3, 3, 4, 9], 6), "0-1223-");
}

#[test]
fn a_modules_own_parameters_are_one_unit_however_long() {
    let modules = [module(None, &[0, 1]), module(Some(0), &[2])];
    assert_eq!(cut(&modules, &[50, 50, 1], 10), "001");
}

#[test]
fn a_tree_that_is_none_is_refused() {
    let error = |modules: &[Module], cap| units::cut(modules, &[Some(1)], cap).unwrap_err();
    assert_eq!(error(&[module(Some(0), &[])], 1), PlanError::BadModule { module: 0 });
    assert_eq!(
        error(&[module(Some(1), &[]), module(None, &[])], 1),
        PlanError::BadModule { module: 0 }
    );
    let unknown = PlanError::UnknownParam { param: ParamId(1), params: 1 };
    assert_eq!(error(&[module(None, &[1])], 1), unknown);
    assert_eq!(error(&[], 0), PlanError::BadCap);
}

fn spec(units: &[Option<u32>]) -> PlanSpec {
    let (dtype, group, wire) = (Dtype::F32, Some(GroupId(0)), WireId(0));
    let param = |unit: &Option<u32>| Param {
        numel: 600,
        dtype,
        group,
        wire,
        unit: unit.map(UnitId),
        grain: Grain::Element,
        cost: 0,
    };
    PlanSpec {
        params: units.iter().map(param).collect(),
        mesh: Mesh::flat(2).unwrap(),
        rules: Stage::Three.rules(),
        cap: Cap::Elements(1300),
        window: Some(2),
        whole_padding: WHOLE_PADDING,
    }
}

#[test]
fn a_unit_is_whole_buckets_and_what_has_none_is_published() {
    let plan = Plan::new(spec(&[Some(0), Some(0), Some(0), Some(1), None])).unwrap();
    let contents: Vec<_> = plan.buckets().iter().map(|b| (b.unit, b.params.clone())).collect();
    let (zero, one) = (Some(UnitId(0)), Some(UnitId(1)));
    assert_eq!(
        contents,
        [(None, ids(&[4])), (one, ids(&[3])), (zero, ids(&[2, 1])), (zero, ids(&[0]))]
    );
    let numels: Vec<u64> = plan.units().iter().map(|unit| unit.numel).collect();
    assert_eq!(numels, [1280 + 768, 768]);
    for bucket in plan.buckets() {
        let published = !plan.hops(bucket.id).unwrap().publish.is_empty();
        assert_eq!(published, bucket.parameter() == Placement::Replicated);
        assert_eq!(published, bucket.unit.is_none());
    }
}

#[test]
fn units_are_part_of_the_layout_and_of_its_digest() {
    let digest = |units: &[Option<u32>]| Plan::new(spec(units)).unwrap().layout_digest();
    assert_eq!(digest(&[Some(0), Some(1)]), digest(&[Some(0), Some(1)]));
    let kinds = [[Some(0), Some(1)], [Some(1), Some(0)], [Some(0), None], [None, None]];
    let mut digests = kinds.map(|units| digest(&units)).to_vec();
    digests.sort_unstable();
    digests.dedup();
    assert_eq!(digests.len(), kinds.len());
}

#[test]
fn units_where_parameters_are_not_sharded_are_refused() {
    let error = |spec| Plan::new(spec).unwrap_err();
    let mut at_stage_two = spec(&[None, Some(0)]);
    at_stage_two.rules = Stage::Two.rules();
    assert_eq!(error(at_stage_two), PlanError::UnitNotSharded { param: ParamId(1) });
    let (param, unit) = (ParamId(0), UnitId(2));
    assert_eq!(error(spec(&[Some(2), None])), PlanError::UnknownUnit { param, unit });
    assert_eq!(
        error(spec(&[Some(u32::MAX)])),
        PlanError::UnknownUnit { param, unit: UnitId(u32::MAX) }
    );
}

/// A tree of up to 12 modules over up to 16 parameters, some of them shared or whole.
fn any_tree() -> impl Strategy<Value = (Vec<Module>, Vec<Option<u64>>)> {
    let modules = vec((any::<Index>(), vec(0..16_u32, 0..4)), 1..12);
    (modules, vec(prop::option::weighted(0.9, 0..50_u64), 16)).prop_map(|(modules, numels)| {
        // A module's parent is the one before it, or one that holds that.
        let mut above: Vec<usize> = Vec::new();
        let module = |(index, (level, params)): (usize, (Index, Vec<u32>))| {
            above.truncate(if index > 0 { 1 + level.index(above.len()) } else { 0 });
            let parent = above.last().copied();
            above.push(index);
            Module { parent, params: ids(&params) }
        };
        (modules.into_iter().enumerate().map(module).collect(), numels)
    })
}

proptest! {
    #[test]
    fn units_are_runs_in_registration_order_and_fit_where_they_can(
        (modules, numels) in any_tree(), cap in 1..80_u64,
    ) {
        let units = units::cut(&modules, &numels, cap).unwrap();
        let mut listed: Vec<ParamId> = Vec::new();
        for param in modules.iter().flat_map(|module| &module.params) {
            if !listed.contains(param) {
                listed.push(*param);
            }
        }
        let sharded = |param: &&ParamId| numels[param.index()].is_some();
        for index in 0..numels.len() as u32 {
            let (param, numel) = (ParamId(index), numels[index as usize]);
            prop_assert_eq!(
                units[param.index()].is_some(), numel.is_some() && listed.contains(&param)
            );
        }
        let numbers: Vec<u32> =
            listed.iter().filter(sharded).map(|param| units[param.index()].unwrap().0).collect();
        prop_assert!(numbers.first().is_none_or(|&first| first == 0));
        prop_assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] || pair[1] == pair[0] + 1));
    }

    #[test]
    fn every_bucket_of_a_plan_is_in_one_unit(
        choice in vec(prop::option::of(0..4_u32), 4..20), cap in 1..4000_u64, world in 1..5_u32,
    ) {
        let mut spec = spec(&choice);
        (spec.cap, spec.mesh) = (Cap::Elements(cap), Mesh::flat(world).unwrap());
        let plan = Plan::new(spec).unwrap();
        for bucket in plan.buckets() {
            for param in &bucket.params {
                prop_assert_eq!(choice[param.index()].map(UnitId), bucket.unit);
            }
        }
        let of_units = plan.units().iter().flat_map(|unit| &unit.buckets).count();
        let sharded = plan.buckets().iter().filter(|bucket| bucket.unit.is_some()).count();
        prop_assert_eq!(of_units, sharded);
        prop_assert_eq!(plan.mesh().size(Group::Shard), world);
    }
}
