//! The lists of a model of 10^4 units: forward, both backwards, evaluation.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use zerort_core::{
    BucketId, Cap, Dtype, Grain, GroupId, Key, Mesh, Param, PassKind, Plan, PlanSpec, Route, Stage,
    Stop, UnitId, WHOLE_PADDING, WireId,
};

const UNITS: u32 = 10_000;

fn plan() -> Plan {
    let (dtype, group, wire) = (Dtype::BF16, Some(GroupId(0)), WireId(0));
    let param = |unit| Param {
        numel: 1 << 20,
        dtype,
        group,
        wire,
        unit: Some(UnitId(unit)),
        grain: Grain::Element,
        cost: 0,
    };
    Plan::new(PlanSpec {
        params: (0..UNITS).map(param).collect(),
        mesh: Mesh::flat(8).unwrap(),
        rules: Stage::Three.rules(),
        cap: Cap::Bytes(25 << 20),
        window: Some(4),
        whole_padding: WHOLE_PADDING,
    })
    .unwrap()
}

fn routes() -> [Route; 3] {
    let stop = |unit| Stop { units: vec![UnitId(unit)], held: Vec::new() };
    let forward: Vec<Stop> = (0..UNITS).map(stop).collect();
    let backward: Vec<Stop> = (0..UNITS).rev().map(stop).collect();
    let route = |kind, key, then, stops, fills| Route { kind, key: Key(key), then, stops, fills };
    let fills = (0..UNITS).map(|bucket| (BucketId(bucket), bucket)).collect();
    [
        route(PassKind::Forward, 1, Some(Key(2)), forward.clone(), Vec::new()),
        route(PassKind::Backward, 2, None, backward, fills),
        route(PassKind::Evaluation, 3, None, forward, Vec::new()),
    ]
}

fn route(c: &mut Criterion) {
    let (plan, routes) = (plan(), routes());
    for units in [3_u64, u64::from(UNITS) / 3, u64::from(UNITS)] {
        c.bench_function(&format!("lists of 1e4 units, room for {units}"), |b| {
            b.iter(|| plan.routed(black_box(&routes), units << 20, 2).unwrap().digest());
        });
    }
}

criterion_group!(benches, route);
criterion_main!(benches);
