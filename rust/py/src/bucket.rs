//! `Bucket`, `Hop` and `Fragment`: what a plan is made of, read-only.

use pyo3::prelude::*;
use zerort_core::{BucketId, Group, Hops, Op, Partition, Placement, Way};

use crate::errors::refused;
use crate::exchange::way_name;
use crate::grain::Grain;
use crate::names::dtype_name;

/// Parameters reduced together in one flat buffer; all offsets and lengths are in elements.
#[pyclass(frozen, module = "zerort._core")]
pub struct Bucket {
    inner: zerort_core::Bucket,
    partition: Partition,
    hops: Hops,
    way: Option<Way>,
}

impl Bucket {
    /// One bucket of a plan.
    pub fn of(plan: &zerort_core::Plan, id: BucketId) -> PyResult<Self> {
        let inner = plan.bucket(id).map_err(refused)?.clone();
        let partition = plan.partition(id).map_err(refused)?.clone();
        let hops = plan.hops(id).map_err(refused)?.clone();
        let way = plan.way(id).map_err(refused)?;
        Ok(Self { inner, partition, hops, way })
    }
}

#[pymethods]
impl Bucket {
    #[getter]
    fn id(&self) -> u32 {
        self.inner.id.0
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        dtype_name(self.inner.dtype)
    }

    /// Optimizer parameter group the bucket belongs to; None where it is only held.
    #[getter]
    fn group(&self) -> Option<u32> {
        self.inner.group.map(|group| group.0)
    }

    /// How its gradients are encoded.
    #[getter]
    fn wire(&self) -> u32 {
        self.inner.wire.0
    }

    /// The unit it belongs to; None where every rank keeps its parameters whole.
    #[getter]
    fn unit(&self) -> Option<u32> {
        self.inner.unit.map(|unit| unit.0)
    }

    /// Whether its parameters are sharded between their uses.
    #[getter]
    fn sharded(&self) -> bool {
        self.inner.parameter() == Placement::Sharded
    }

    /// What of its parameters no border between shards cuts.
    #[getter]
    fn grain(&self) -> Grain {
        self.inner.grain.into()
    }

    /// How whole gradients reach their owners; None where its parameters may be cut.
    #[getter]
    fn way(&self) -> Option<&'static str> {
        self.way.map(way_name)
    }

    /// Parameter ids in the order in which they lie in the buffer.
    #[getter]
    fn params(&self) -> Vec<u32> {
        self.inner.params.iter().map(|param| param.0).collect()
    }

    /// Start of each parameter of `params`; every one is on 64 bytes.
    #[getter]
    fn offsets(&self) -> Vec<u64> {
        self.partition.offsets().to_vec()
    }

    #[getter]
    fn numels(&self) -> Vec<u64> {
        self.partition.numels().to_vec()
    }

    /// Padded length: a multiple of world x 128.
    #[getter]
    fn numel(&self) -> u64 {
        self.partition.numel()
    }

    #[getter]
    fn shard_numel(&self) -> u64 {
        self.partition.shard_numel()
    }

    /// From a rank's own gradient to what its optimizer needs.
    #[getter]
    fn reduce_hops(&self) -> Vec<Hop> {
        self.hops.reduce.iter().copied().map(Hop).collect()
    }

    /// From a rank's updated shard to the parameters that it computes with.
    #[getter]
    fn publish_hops(&self) -> Vec<Hop> {
        self.hops.publish.iter().copied().map(Hop).collect()
    }

    /// From shards to whole parameters, where they are sharded between their uses.
    #[getter]
    fn gather_hops(&self) -> Vec<Hop> {
        self.hops.gather.iter().copied().map(Hop).collect()
    }
}

/// One collective of a bucket.
#[pyclass(frozen, module = "zerort._core")]
pub struct Hop(zerort_core::Hop);

#[pymethods]
impl Hop {
    #[getter]
    fn op(&self) -> &'static str {
        match self.0.op {
            Op::ReduceScatter => "reduce_scatter",
            Op::AllReduce => "all_reduce",
            Op::AllGather => "all_gather",
            Op::Copy => "copy",
        }
    }

    /// Whom with.
    #[getter]
    fn group(&self) -> &'static str {
        match self.0.group {
            Group::Shard => "shard",
            Group::Replica => "replica",
            Group::Inner => "inner",
            Group::Outer => "outer",
            Group::Job => "job",
            Group::Own => "own",
        }
    }

    /// The number of the wire format; None is as it lies in memory.
    #[getter]
    fn wire(&self) -> Option<u32> {
        self.0.wire.map(|wire| wire.0)
    }
}

/// A parameter's part inside one rank's shard, in elements.
#[pyclass(frozen, module = "zerort._core")]
pub struct Fragment(pub(crate) zerort_core::Fragment);

#[pymethods]
impl Fragment {
    #[getter]
    fn param(&self) -> u32 {
        self.0.param.0
    }

    #[getter]
    fn param_start(&self) -> u64 {
        self.0.param_start
    }

    #[getter]
    fn shard_start(&self) -> u64 {
        self.0.shard_start
    }

    #[getter]
    fn length(&self) -> u64 {
        self.0.length
    }
}
