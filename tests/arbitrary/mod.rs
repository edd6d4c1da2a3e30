//! Generators of valid models and plans, shared by the tests.
#![allow(dead_code, reason = "every test file takes what it needs")]

use std::num::NonZeroU64;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::{
    BucketId, Cap, Dtype, Grain, Group, GroupId, Key, Mesh, Param, ParamId, PassKind, Plan,
    PlanSpec, Rank, Route, Stage, Stop, UnitId, WHOLE_PADDING, WireId,
};

/// A length: empty, scalar, small, or larger than most caps.
pub fn numel() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), 2..300_u64, 300..4000_u64]
}

pub fn dtype() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::BF16), Just(Dtype::F64)]
}

pub fn grain() -> impl Strategy<Value = Grain> {
    let block = prop_oneof![1..9_u64, 1..700_u64, Just(128), Just(2048)];
    let block = block.prop_map(|length| Grain::Block(NonZeroU64::new(length).unwrap()));
    prop_oneof![4 => Just(Grain::Element), 1 => block, 3 => Just(Grain::Whole)]
}

/// Mostly cheap, sometimes free, sometimes as dear as can be.
pub fn cost() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..1000_u64, 1 => Just(0), 1 => Just(u64::MAX)]
}

/// A grain of each group, as optimizers have one, or of each parameter.
pub fn model() -> impl Strategy<Value = Vec<Param>> {
    let of_groups = (vec(grain(), 4), any::<bool>());
    (vec(param(), 1..24), of_groups).prop_map(|(mut params, (grains, alike))| {
        for param in params.iter_mut().filter(|_| alike) {
            param.grain = grains[param.group.map_or(3, |group| group.0 as usize)];
        }
        params
    })
}

pub fn param() -> impl Strategy<Value = Param> {
    let group = prop::option::weighted(0.8, 0..3_u32);
    (numel(), dtype(), group, 0..2_u32, grain(), cost()).prop_map(
        |(numel, dtype, group, wire, grain, cost)| Param {
            numel,
            dtype,
            group: group.map(GroupId),
            wire: WireId(wire),
            unit: None,
            grain,
            cost,
        },
    )
}

pub fn cap() -> impl Strategy<Value = Cap> {
    prop_oneof![(1..20_000_u64).prop_map(Cap::Bytes), (1..5_000_u64).prop_map(Cap::Elements)]
}

/// Copies of a model state, hosts a copy, ranks a host.
pub fn shape() -> impl Strategy<Value = (u32, u32, u32)> {
    prop_oneof![(Just(1), Just(1), 1..=6_u32), (1..=3_u32, 1..=3_u32, 1..=3_u32)]
}

/// Ranks in any order, by host and copy.
pub fn copies() -> impl Strategy<Value = Vec<Vec<Vec<Rank>>>> {
    shape().prop_flat_map(|(copies, hosts, inner)| {
        let ranks: Vec<Rank> = (0..copies * hosts * inner).map(Rank).collect();
        Just(ranks).prop_shuffle().prop_map(move |ranks| {
            let copy = ranks.chunks((hosts * inner) as usize);
            copy.map(|copy| copy.chunks(inner as usize).map(<[Rank]>::to_vec).collect()).collect()
        })
    })
}

pub fn mesh() -> impl Strategy<Value = Mesh> {
    copies().prop_map(|copies| Mesh::new(&copies).unwrap())
}

/// A specification for `params`, everything else at random.
pub fn spec_of(params: Vec<Param>) -> impl Strategy<Value = PlanSpec> {
    let padding = prop_oneof![Just(0), Just(WHOLE_PADDING), Just(1_000_000), Just(u32::MAX)];
    (Just(params), mesh(), 0..=3_u8, cap(), prop::option::of(1..5_u32), padding).prop_map(
        |(params, mesh, stage, cap, window, whole_padding)| {
            let rules = Stage::new(stage).unwrap().rules();
            PlanSpec { params, mesh, rules, cap, window, whole_padding }
        },
    )
}

/// One rank for each shard, in the order of the shards.
pub fn holders(plan: &Plan) -> impl Iterator<Item = Rank> {
    (0..plan.mesh().size(Group::Shard)).map(|shard| plan.mesh().holder(shard))
}

pub fn spec() -> impl Strategy<Value = PlanSpec> {
    model().prop_flat_map(spec_of)
}

pub fn plan() -> impl Strategy<Value = Plan> {
    spec().prop_map(|spec| Plan::new(spec).unwrap())
}

/// `n` parameters of equal length in one group; `per_bucket` of them fill a bucket.
pub fn uniform(n: usize, per_bucket: usize, window: Option<u32>) -> Arc<Plan> {
    let params = vec![
        Param {
            numel: 16,
            dtype: Dtype::F32,
            group: Some(GroupId(0)),
            wire: WireId(0),
            unit: None,
            grain: Grain::Element,
            cost: 0
        };
        n
    ];
    let cap = Cap::Elements(16 * per_bucket as u64);
    let (mesh, rules) = (Mesh::flat(2).unwrap(), Stage::Two.rules());
    Arc::new(
        Plan::new(PlanSpec { params, mesh, rules, cap, window, whole_padding: WHOLE_PADDING })
            .unwrap(),
    )
}

pub fn ids(ids: &[u32]) -> Vec<ParamId> {
    ids.iter().copied().map(ParamId).collect()
}

/// All orders of `0..n`.
pub fn permutations(n: u32) -> Vec<Vec<ParamId>> {
    let Some(last) = n.checked_sub(1) else { return vec![Vec::new()] };
    let places = 0..=last as usize;
    let insert = |order: Vec<ParamId>| {
        places.clone().map(move |place| {
            let mut order = order.clone();
            order.insert(place, ParamId(last));
            order
        })
    };
    permutations(last).into_iter().flat_map(insert).collect()
}

/// `n` units of one parameter each, 256 elements long with their padding, over two ranks. Unit n-1
/// is bucket 0.
pub fn sharded(n: u32, window: Option<u32>) -> Plan {
    sharded_over(n, window, 2)
}

/// [`sharded`], over so many ranks.
pub fn sharded_over(n: u32, window: Option<u32>, world: u32) -> Plan {
    partly_trained(&vec![Makeup::Trained; n as usize], window, world)
}

/// What of a unit an optimizer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Makeup {
    Trained,
    /// Nothing.
    Held,
    /// One of its two parameters.
    Both,
}

/// [`sharded_over`], where some units are only held, or have a second parameter that is: behind all
/// others, so that unit n's own has number n.
pub fn partly_trained(units: &[Makeup], window: Option<u32>, world: u32) -> Plan {
    let (dtype, wire, trained) = (Dtype::F32, WireId(0), Some(GroupId(0)));
    let param = |unit, group| Param {
        numel: 200,
        dtype,
        group,
        wire,
        unit: Some(UnitId(unit)),
        grain: Grain::Element,
        cost: 0,
    };
    let own = (0..).zip(units);
    let own = own.map(|(unit, &kind)| param(unit, trained.filter(|_| kind != Makeup::Held)));
    let second = (0..).zip(units).filter(|&(_, &kind)| kind == Makeup::Both);
    let params = own.chain(second.map(|(unit, _)| param(unit, None))).collect();
    let (mesh, rules) = (Mesh::flat(world).unwrap(), Stage::Three.rules());
    Plan::new(PlanSpec {
        params,
        mesh,
        rules,
        cap: Cap::Elements(256),
        window,
        whole_padding: WHOLE_PADDING,
    })
    .unwrap()
}

/// A plan of stage 3, routes of its passes in the order in which they ran, and bounds.
#[derive(Clone, Debug)]
pub struct Walk {
    pub plan: Plan,
    pub routes: Vec<Route>,
    pub room: u64,
    pub depth: u32,
}

/// A few units of different lengths, and a few parameters without one; some are only held.
fn unit_plan() -> impl Strategy<Value = Plan> {
    let group = prop::option::weighted(0.7, Just(GroupId(0)));
    let param = (1..900_u64, prop::option::weighted(0.9, 0..6_u32), group);
    (vec(param, 6..14), 1..4_u32, 100..600_u64, prop::option::of(1..4_u32)).prop_map(
        |(params, world, cap, window)| {
            let (dtype, wire) = (Dtype::F32, WireId(0));
            let param = |(numel, unit, group): (u64, Option<u32>, Option<GroupId>)| Param {
                numel,
                dtype,
                group,
                wire,
                unit: unit.map(UnitId),
                grain: Grain::Element,
                cost: 0,
            };
            let params = params.into_iter().map(param).collect();
            let (mesh, rules) = (Mesh::flat(world).unwrap(), Stage::Three.rules());
            let cap = Cap::Elements(cap);
            Plan::new(PlanSpec { params, mesh, rules, cap, window, whole_padding: WHOLE_PADDING })
                .unwrap()
        },
    )
}

fn some_stops(units: u32) -> impl Strategy<Value = Vec<Stop>> {
    let units = units.max(1);
    let set = move |most| prop::collection::btree_set(0..units, 0..=most);
    let stop = (set(2), set(2)).prop_map(|(needed, held)| Stop {
        held: held.difference(&needed).copied().map(UnitId).collect(),
        units: needed.into_iter().map(UnitId).collect(),
    });
    vec(stop, 0..12)
}

/// Forward, backward and evaluation with any stops, any room and any depth.
pub fn walk() -> impl Strategy<Value = Walk> {
    unit_plan().prop_flat_map(|plan| {
        let (units, buckets) = (plan.units().len() as u32, plan.buckets().len() as u32);
        let fills = vec((0..buckets, 0..14_u32), 0..buckets as usize);
        let parts = (some_stops(units), some_stops(units), some_stops(units), fills);
        let whole: u64 = plan.units().iter().map(|unit| unit.numel).sum();
        (Just(plan), parts, 1..=whole + 1, 0..5_u32).prop_map(|(plan, parts, room, depth)| {
            let (forth, back, check, fills) = parts;
            let route = |kind, key, then, stops: Vec<Stop>| {
                let stops = if plan.units().is_empty() { Vec::new() } else { stops };
                Route { kind, key: Key(key), then, stops, fills: Vec::new() }
            };
            let mut backward = route(PassKind::Backward, 8, None, back);
            let last = (backward.stops.len() as u32).saturating_sub(1);
            backward.fills =
                fills.into_iter().map(|(b, stop)| (BucketId(b), stop.min(last))).collect();
            let routes = vec![
                route(PassKind::Forward, 7, Some(Key(8)), forth),
                backward,
                route(PassKind::Evaluation, 9, None, check),
            ];
            Walk { plan, routes, room, depth }
        })
    })
}
