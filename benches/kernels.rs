//! Kernels in bytes per second, beside a plain copy that moves as many bytes in the same run.
//!
//! 32 MB of chunks. `bytes` counts what is read and what is written once each, for the copy as
//! well.

use std::hint::black_box;
use std::mem::size_of;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use half::{bf16, f16};
use zerort_core::kernels::{Element, Real, Write, first_nonfinite, reduce, squared_norm};

const CHUNKS_BYTES: usize = 32 << 20;

fn copy(group: &mut BenchmarkGroup<'_, WallTime>, parameter: &str, moved: usize) {
    let source = vec![1.0_f32; moved / 2 / size_of::<f32>()];
    let mut target = vec![0.0_f32; source.len()];
    group.bench_function(BenchmarkId::new("copy", parameter), |bench| {
        bench.iter(|| black_box(&mut target).copy_from_slice(black_box(&source)));
    });
}

fn reduced<E: Element>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    world: usize,
    write: Write,
    one: E,
) {
    let chunks = vec![one; CHUNKS_BYTES / size_of::<E>()];
    let mut accum = vec![E::Sum::ZERO; chunks.len() / world];
    let passes = match write {
        Write::Over => 1,
        Write::Onto => 2,
    };
    let moved = CHUNKS_BYTES + passes * size_of_val(accum.as_slice());
    let parameter = format!("{name}/N={world}/{write:?}");
    group.throughput(Throughput::Bytes(moved as u64));
    copy(group, &parameter, moved);
    let scale = E::Sum::from_f64(1e-3);
    group.bench_function(BenchmarkId::new("reduce", &parameter), |bench| {
        bench.iter(|| reduce(black_box(&chunks), black_box(&mut accum), world, scale, write));
    });
}

fn sums(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kernels");
    group.sample_size(20);
    for world in [2, 4] {
        for write in [Write::Over, Write::Onto] {
            reduced(&mut group, "f32", world, write, 1.0_f32);
        }
        reduced(&mut group, "bf16", world, Write::Over, bf16::ONE);
        reduced(&mut group, "f16", world, Write::Over, f16::ONE);
        reduced(&mut group, "f64", world, Write::Over, 1.0_f64);
    }
    group.finish();
}

fn scans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scans");
    group.sample_size(20).throughput(Throughput::Bytes(CHUNKS_BYTES as u64));
    copy(&mut group, "f32", CHUNKS_BYTES);
    let single = vec![1.0_f32; CHUNKS_BYTES / size_of::<f32>()];
    let brain = vec![bf16::ONE; CHUNKS_BYTES / size_of::<bf16>()];
    group.bench_function("squared_norm/f32", |bench| {
        bench.iter(|| squared_norm(black_box(&single)));
    });
    group.bench_function("squared_norm/bf16", |bench| {
        bench.iter(|| squared_norm(black_box(&brain)));
    });
    group.bench_function("first_nonfinite/f32", |bench| {
        bench.iter(|| first_nonfinite(black_box(&single)));
    });
    group.bench_function("first_nonfinite/bf16", |bench| {
        bench.iter(|| first_nonfinite(black_box(&brain)));
    });
    group.finish();
}

criterion_group!(benches, sums, scans);
criterion_main!(benches);
