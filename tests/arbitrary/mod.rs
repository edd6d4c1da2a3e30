//! Generators of valid models and plans, shared by the tests.
#![allow(dead_code, reason = "every test file takes what it needs")]

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::{
    Cap, Dtype, Group, GroupId, Mesh, Param, ParamId, Plan, PlanSpec, Rank, Stage, WireId,
};

/// A length: empty, scalar, small, or larger than most caps.
pub fn numel() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), 2..300_u64, 300..4000_u64]
}

pub fn dtype() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::BF16), Just(Dtype::F64)]
}

pub fn param() -> impl Strategy<Value = Param> {
    (numel(), dtype(), 0..3_u32, 0..2_u32).prop_map(|(numel, dtype, group, wire)| Param {
        numel,
        dtype,
        group: GroupId(group),
        wire: WireId(wire),
        unit: None,
    })
}

pub fn model() -> impl Strategy<Value = Vec<Param>> {
    vec(param(), 1..24)
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
    (Just(params), mesh(), 0..=3_u8, cap(), prop::option::of(1..5_u32)).prop_map(
        |(params, mesh, stage, cap, window)| {
            let rules = Stage::new(stage).unwrap().rules();
            PlanSpec { params, mesh, rules, cap, window }
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
    let params =
        vec![
            Param { numel: 16, dtype: Dtype::F32, group: GroupId(0), wire: WireId(0), unit: None };
            n
        ];
    let cap = Cap::Elements(16 * per_bucket as u64);
    let (mesh, rules) = (Mesh::flat(2).unwrap(), Stage::Two.rules());
    Arc::new(Plan::new(PlanSpec { params, mesh, rules, cap, window }).unwrap())
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
