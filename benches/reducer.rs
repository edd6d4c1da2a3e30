//! What one gradient costs: a pass over 8000 parameters, in time per `grad_ready`.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use zerort_core::{
    Cap, Dtype, Grain, GroupId, Mesh, Param, ParamId, Plan, PlanSpec, Reducer, Stage,
    WHOLE_PADDING, WireId,
};

const PARAMS: u32 = 8000;

fn plan(per_bucket: u64) -> Arc<Plan> {
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
        PARAMS as usize
    ];
    let (mesh, rules) = (Mesh::flat(8).unwrap(), Stage::Two.rules());
    let cap = Cap::Elements(16 * per_bucket);
    Arc::new(
        Plan::new(PlanSpec {
            params,
            mesh,
            rules,
            cap,
            window: Some(4),
            whole_padding: WHOLE_PADDING,
        })
        .unwrap(),
    )
}

/// In a pass of the given order, the one that observes behind it.
fn begun(plan: &Arc<Plan>, order: &[ParamId]) -> Reducer {
    let mut reducer = Reducer::new(Arc::clone(plan));
    reducer.begin().unwrap();
    run(&mut reducer, order);
    reducer.finish().unwrap();
    reducer.begin().unwrap();
    reducer
}

fn run(reducer: &mut Reducer, order: &[ParamId]) -> usize {
    order.iter().filter_map(|&param| reducer.grad_ready(black_box(param)).unwrap()).count()
}

fn reducer(c: &mut Criterion) {
    let backward: Vec<ParamId> = (0..PARAMS).rev().map(ParamId).collect();
    // A fixed stride visits every parameter once, far from the one before: 8000 and 3001 have no
    // common divisor.
    let scattered: Vec<ParamId> = (0..PARAMS).map(|step| ParamId(step * 3001 % PARAMS)).collect();

    let mut group = c.benchmark_group("grad_ready");
    group.throughput(Throughput::Elements(u64::from(PARAMS)));
    let orders = [("backward order", &backward), ("scattered", &scattered)];
    for (name, order) in orders {
        for per_bucket in [4, 400] {
            let plan = plan(per_bucket);
            group.bench_function(format!("{name}, {per_bucket} a bucket"), |b| {
                let setup = || begun(&plan, order);
                b.iter_batched_ref(setup, |reducer| run(reducer, order), BatchSize::LargeInput);
            });
        }
    }
    group.finish();

    let plan = plan(400);
    c.bench_function("begin and finish of 8000 parameters", |b| {
        let mut reducer = begun(&plan, &backward);
        b.iter(|| {
            let finished = reducer.finish().unwrap();
            reducer.begin().unwrap();
            finished.hi
        });
    });
}

criterion_group!(benches, reducer);
criterion_main!(benches);
