//! The list for 10^4 buckets.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use zerort_core::{BucketId, Schedule};

fn schedule(c: &mut Criterion) {
    let order: Vec<BucketId> = (0..10_000).map(BucketId).collect();
    c.bench_function("schedule of 1e4 buckets", |b| b.iter(|| Schedule::new(black_box(&order), 4)));
}

criterion_group!(benches, schedule);
criterion_main!(benches);
