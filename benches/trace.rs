//! What an event costs: to keep it in the ring, and to write it.

use std::hint::black_box;
use std::num::NonZeroUsize;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use zerort_core::ids::Rank;
use zerort_core::trace::{Arg, Args, Trace};

const CAPACITY: u32 = 10_000;

fn full_ring() -> Trace {
    let mut trace = Trace::new(Rank(0), NonZeroUsize::MIN.saturating_add(CAPACITY as usize - 1));
    let row = trace.track("bucket");
    for at in 0..i64::from(CAPACITY) {
        trace.async_span(row, "bucket 3", at.unsigned_abs(), (at, at + 1000), life_args());
    }
    trace
}

fn life_args() -> Args {
    vec![
        ("bytes".into(), Arg::Int(25 << 20)),
        ("dtype".into(), Arg::Text("f32".into())),
        ("params".into(), Arg::Int(12)),
        ("last".into(), Arg::Text("layers.7.mlp.fc.weight".into())),
    ]
}

fn recording(criterion: &mut Criterion) {
    let mut trace = full_ring();
    let row = trace.track("main");
    let mut group = criterion.benchmark_group("record into a full ring");
    group.throughput(Throughput::Elements(1));
    group.bench_function("span", |b| {
        b.iter(|| trace.span(row, black_box("forward"), 0, 10, Args::new()));
    });
    group.bench_function("counter", |b| {
        b.iter(|| trace.counter(black_box("bytes in flight"), 0, 1.0));
    });
    group.bench_function("async span, 4 args", |b| {
        b.iter(|| trace.async_span(row, black_box("bucket 3"), 7, (0, 10), life_args()));
    });
    group.finish();
}

fn writing(criterion: &mut Criterion) {
    let trace = full_ring();
    let mut group = criterion.benchmark_group("write");
    group.throughput(Throughput::Elements(u64::from(CAPACITY)));
    group.sample_size(20);
    group.bench_function("async span, 4 args", |b| {
        b.iter(|| {
            let mut out = Vec::new();
            trace.write(&mut out).map(|()| out.len())
        });
    });
    group.finish();
}

criterion_group!(benches, recording, writing);
criterion_main!(benches);
