//! Predicting a step of a large model on a large job: 10^5 parameters, 16 384 ranks.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use zerort_core::cost::{
    Algorithm, Fabric, Link, Machine, Network, Rates, Workload, choose, simulate,
};
use zerort_core::{
    Cap, Dtype, Grain, GroupId, Mesh, Param, Plan, PlanSpec, Stage, UnitId, WHOLE_PADDING, WireId,
};

const PARAMS: u32 = 100_000;
const WORLD: u32 = 16_384;

/// Matrices and vectors, as in a transformer; at stage 3 a unit of 100 parameters each.
fn spec(stage: Stage) -> PlanSpec {
    let param = |index| {
        let (numel, group) = if index % 3 == 0 { (1 << 20, 0) } else { (1 << 10, 1) };
        Param {
            numel,
            dtype: Dtype::BF16,
            group: Some(GroupId(group)),
            wire: WireId(0),
            unit: (stage == Stage::Three).then_some(UnitId(index / 100)),
            grain: Grain::Element,
            cost: 0,
        }
    };
    PlanSpec {
        params: (0..PARAMS).map(param).collect(),
        mesh: Mesh::flat(WORLD).unwrap(),
        rules: stage.rules(),
        cap: Cap::Bytes(25 << 20),
        window: Some(4),
        whole_padding: WHOLE_PADDING,
    }
}

fn machine(hosts: u32) -> Machine {
    let link = |alpha_ns, byte_ns| Link {
        algorithm: Algorithm::Best,
        alpha_ns,
        byte_ns,
        message_ns: None,
    };
    let fabric = |link| Fabric { scatter: link, gather: link, lanes: 1 };
    let (outer, inner) = (link(20_000.0, 0.04), link(5000.0, 0.004));
    Machine {
        network: Network { outer: fabric(outer), inner: fabric(inner), control: outer, hosts },
        rates: Rates { sum_byte_ns: 0.001, update_element_ns: 0.006, ..Rates::default() },
        blocks: false,
        sums_pieces: false,
        overlap: None,
        wires: Vec::new(),
        room: 10_000_000_000,
        depth: 2,
    }
}

fn workload() -> Workload {
    let (forward_ns, backward_ns) = (1_000_000_000, 2_000_000_000);
    let at = |id: u32| backward_ns * u64::from(PARAMS - id) / u64::from(PARAMS);
    let arrivals = (0..PARAMS).map(at).collect();
    Workload { forward_ns, backward_ns, arrivals, micro_batches: 1, other_ns: 0 }
}

fn cost(c: &mut Criterion) {
    let work = workload();
    let observed = work.observed();
    for (name, stage, hosts) in [
        ("stage 0", Stage::Zero, 0),
        ("stage 2", Stage::Two, 0),
        ("stage 2 on 2048 hosts", Stage::Two, 2048),
        ("stage 3", Stage::Three, 0),
    ] {
        let (spec, machine) = (spec(stage), machine(hosts));
        c.bench_function(&format!("1e5 parameters, 16384 ranks, {name}: plan, simulate"), |b| {
            b.iter_batched(
                || spec.clone(),
                |spec| {
                    let plan = Plan::new(spec).unwrap().reordered(&observed).unwrap();
                    simulate(&plan, &work, &machine).unwrap().total_ns
                },
                BatchSize::LargeInput,
            );
        });
    }
    let (large, machine) = (spec(Stage::Two), machine(0));
    let plan = Plan::new(large.clone()).unwrap();
    c.bench_function("simulate alone", |b| {
        b.iter(|| simulate(black_box(&plan), &work, &machine).unwrap().total_ns);
    });
    let mut group = c.benchmark_group("slow");
    group.sample_size(10);
    group.bench_function("choose a bucket size", |b| {
        b.iter(|| choose(&large, &work, &machine, &[None], &[]).unwrap().cap);
    });
    group.finish();
}

criterion_group!(benches, cost);
criterion_main!(benches);
