//! Planning a large model for a large job: 10^5 parameters, 1024 ranks.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use zerort_core::{
    Bucket, BucketId, Cap, Dtype, Grain, GroupId, Mesh, Param, ParamId, Plan, PlanSpec, Rank,
    Stage, WHOLE_PADDING, Way, WireId, reshard,
};

const PARAMS: u32 = 100_000;

/// Matrices, and vectors in a group of their own, as in a transformer.
fn spec(world: u32) -> PlanSpec {
    let param = |index| {
        let (numel, group) = if index % 3 == 0 { (1 << 20, 0) } else { (1 << 10, 1) };
        Param {
            numel,
            dtype: Dtype::BF16,
            group: Some(GroupId(group)),
            wire: WireId(0),
            unit: None,
            grain: Grain::Element,
            cost: 0,
        }
    };
    let params = (0..PARAMS).map(param).collect();
    PlanSpec {
        params,
        mesh: Mesh::flat(world).unwrap(),
        rules: Stage::Two.rules(),
        cap: Cap::Bytes(25 << 20),
        window: Some(4),
        whole_padding: WHOLE_PADDING,
    }
}

/// 10^4 matrices of a few shapes that may not be cut, for 1024 ranks.
fn whole(cap: Cap, whole_padding: u32) -> PlanSpec {
    let shapes = [(4096_u64, 4096_u64), (14336, 4096), (4096, 1024), (4096, 4096)];
    let param = |index: usize| {
        let (rows, columns) = shapes[index % shapes.len()];
        let (dtype, group, wire) = (Dtype::BF16, Some(GroupId(0)), WireId(0));
        let (numel, grain) = (rows * columns + index as u64 % 7, Grain::Whole);
        Param { numel, dtype, group, wire, unit: None, grain, cost: numel * rows.min(columns) }
    };
    let (mesh, rules) = (Mesh::flat(1024).unwrap(), Stage::Two.rules());
    let params = (0..10_000).map(param).collect();
    PlanSpec { params, mesh, rules, cap, window: Some(4), whole_padding }
}

fn matrices(c: &mut Criterion) {
    let specs = [
        ("packed into one bucket", whole(Cap::Bytes(u64::MAX), 1_000_000), Way::Owned),
        ("exchanged in one bucket", whole(Cap::Bytes(u64::MAX), 0), Way::Exchanged),
        ("exchanged in buckets of 400 MB", whole(Cap::Bytes(400 << 20), 0), Way::Exchanged),
        ("exchanged in buckets of their own", whole(Cap::Bytes(1), 0), Way::Exchanged),
    ];
    for (name, spec, way) in specs {
        assert_eq!(Plan::new(spec.clone()).unwrap().way(BucketId(0)), Ok(Some(way)));
        c.bench_function(&format!("1e4 matrices for 1024 ranks, {name}"), |b| {
            b.iter_batched(
                || spec.clone(),
                |spec| Plan::new(spec).unwrap().digest(),
                BatchSize::LargeInput,
            );
        });
    }
    let plan = Plan::new(whole(Cap::Bytes(u64::MAX), 0)).unwrap();
    c.bench_function("exchanges of one rank of 1024", |b| {
        b.iter(|| plan.exchanges(black_box(Rank(511))).unwrap().len());
    });
}

fn plan(c: &mut Criterion) {
    let large = spec(1024);
    c.bench_function("plan of 1e5 parameters for 1024 ranks", |b| {
        b.iter_batched(
            || large.clone(),
            |spec| Plan::new(spec).unwrap().digest(),
            BatchSize::LargeInput,
        );
    });

    let plan = Plan::new(large).unwrap();
    let observed: Vec<ParamId> = (0..PARAMS).map(ParamId).collect();
    c.bench_function("reordered by 1e5 arrivals", |b| {
        b.iter(|| plan.reordered(black_box(&observed)).unwrap().digest());
    });

    c.bench_function("all fragments of one rank of 1024", |b| {
        let rank = black_box(Rank(511));
        let count =
            || plan.buckets().iter().map(|bucket| plan.fragments(bucket.id, rank).unwrap().count());
        b.iter(|| count().sum::<usize>());
    });

    let source = Plan::new(spec(768)).unwrap();
    let came_from: Vec<Option<ParamId>> = (0..PARAMS).map(|id| Some(ParamId(id))).collect();
    c.bench_function("segments of one rank of 1024 from 768", |b| {
        let segments = |bucket: &Bucket| {
            let origins: Vec<_> = bucket.params.iter().map(|p| came_from[p.index()]).collect();
            reshard(&source, &plan, bucket.id, black_box(Rank(511)), &origins).unwrap().len()
        };
        b.iter(|| plan.buckets().iter().map(segments).sum::<usize>());
    });
}

criterion_group!(benches, plan, matrices);
criterion_main!(benches);
