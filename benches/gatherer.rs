//! What a need costs: of the current set, and of the next one along a list of 1000 units.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use zerort_core::roll::OWN;
use zerort_core::{
    At, Cap, Dtype, Gatherer, Grain, GroupId, Key, Mesh, Param, PassKind, Plan, PlanSpec, Rank,
    Reading, Reducer, Route, SetId, Stage, Stop, UnitId, WHOLE_PADDING, WireId,
};

const UNITS: u32 = 1000;
const ROOM: u64 = 100 << 10;

fn plan() -> Plan {
    let (dtype, group, wire) = (Dtype::F32, Some(GroupId(0)), WireId(0));
    let param = |unit| Param {
        numel: 1 << 10,
        dtype,
        group,
        wire,
        unit: Some(UnitId(unit)),
        grain: Grain::Element,
        cost: 0,
    };
    let spec = PlanSpec {
        params: (0..UNITS).map(param).collect(),
        mesh: Mesh::flat(1).unwrap(),
        rules: Stage::Three.rules(),
        cap: Cap::Elements(1 << 10),
        window: Some(4),
        whole_padding: WHOLE_PADDING,
    };
    Plan::new(spec).unwrap()
}

/// A gatherer whose list for an evaluation needs one unit after the other, and the sets.
fn taught() -> (Gatherer, Reducer, Vec<SetId>) {
    let plan = plan();
    let mut reducer = Reducer::new(Arc::new(plan.clone()));
    let mut gatherer = Gatherer::new(Arc::new(plan.clone()), Rank(0), ROOM);
    let set = |unit| gatherer.set_of(&[UnitId(unit)]).unwrap();
    let sets: Vec<SetId> = (0..UNITS).map(set).collect();
    gatherer.open(At::Pass(PassKind::Evaluation), 0, 0).unwrap();
    let key = gatherer.row(&reducer, [0; OWN]).unwrap().key;
    gatherer.close(&mut reducer, false);
    let stop = |unit| Stop { units: vec![UnitId(unit)], held: Vec::new() };
    let stops = (0..UNITS).map(stop).collect();
    let route = Route { kind: PassKind::Evaluation, key, then: None, stops, fills: Vec::new() };
    assert_ne!(key, Key(0));
    let plan = Arc::new(plan.routed(&[route], ROOM, 2).unwrap());
    reducer.reorder(Arc::clone(&plan)).unwrap();
    gatherer.load(plan).unwrap();
    (gatherer, reducer, sets)
}

fn begin(gatherer: &mut Gatherer, reducer: &mut Reducer) {
    gatherer.close(reducer, false);
    gatherer.open(At::Pass(PassKind::Evaluation), 0, 0).unwrap();
    let row = gatherer.row(reducer, [0; OWN]).unwrap();
    let reading = gatherer.read(&[row]).unwrap();
    assert!(matches!(reading, Reading::Together { ready: true, .. }));
    gatherer.begin().unwrap();
}

fn need(gatherer: &mut Gatherer, reducer: &mut Reducer, set: SetId) -> usize {
    let answer = gatherer.need(reducer, black_box(set), None).unwrap();
    let Some(answer) = answer else { return 0 };
    gatherer.arrived(set).unwrap();
    answer.actions.len()
}

fn gatherer(c: &mut Criterion) {
    let (mut gatherer, mut reducer, sets) = taught();
    begin(&mut gatherer, &mut reducer);
    need(&mut gatherer, &mut reducer, sets[0]);
    c.bench_function("need of the current set", |b| {
        b.iter(|| need(&mut gatherer, &mut reducer, sets[0]));
    });
    c.bench_function("acquire and release", |b| {
        b.iter(|| {
            let held = gatherer.acquire(black_box(sets[0]), Some(7)).unwrap();
            gatherer.release(sets[0]).unwrap();
            held
        });
    });

    let mut group = c.benchmark_group("need along a list");
    group.throughput(Throughput::Elements(u64::from(UNITS)));
    group.bench_function("1000 units, each once", |b| {
        let setup = || {
            let (mut gatherer, mut reducer, sets) = taught();
            begin(&mut gatherer, &mut reducer);
            (gatherer, reducer, sets)
        };
        b.iter_batched_ref(
            setup,
            |(gatherer, reducer, sets)| -> usize {
                sets.iter().map(|&set| need(gatherer, reducer, set)).sum()
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, gatherer);
criterion_main!(benches);
