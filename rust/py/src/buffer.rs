//! `Buffer`: a flat piece of a tensor's memory, and the door through which the partition's pieces
//! go back to torch.
//!
//! The core keeps the partition's books, so it also cuts: `shard` and `fragment` are buffers over
//! the same memory, and `torch.from_dlpack` makes tensors of them. The memory and its rules are in
//! [`crate::dlpack`].

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use zerort_core::{BucketId, Group, ParamId, Rank};

use crate::descriptor::ElementType;
use crate::dlpack::Memory;
use crate::errors::LayoutError;
use crate::ids::number;
use crate::plan::Plan;

/// A flat, contiguous, one-dimensional piece of a tensor's memory, taken over by DLPack without a
/// copy.
#[pyclass(frozen, module = "zerort._core")]
pub struct Buffer {
    memory: Memory,
    layout: Option<Layout>,
}

/// The bucket that lies in a buffer, padding included.
struct Layout {
    plan: Arc<zerort_core::Plan>,
    bucket: BucketId,
}

/// Where a bucket's buffer starts. The partition puts every parameter on this, given that the
/// buffer is on it.
const ALIGNMENT: usize = 64;

impl Layout {
    /// Believes that `memory` holds the bucket if it is as long, aligned, and of numbers.
    ///
    /// The dtype may be another than the bucket's: an accumulator is fp32, whatever its gradients
    /// are sent in.
    fn new(plan: &Plan, bucket: i64, memory: &Memory) -> PyResult<Self> {
        let bucket = BucketId(number("bucket", bucket).map_err(LayoutError::new_err)?);
        let plan = Arc::clone(plan.inner());
        let numel = plan.partition(bucket).map_err(refused)?.numel();
        if memory.numel() as u64 != numel {
            return Err(LayoutError::new_err(format!(
                "bucket {} has {numel} elements, padding included; got {}",
                bucket.0,
                memory.numel()
            )));
        }
        if memory.dtype() == ElementType::U8 {
            return Err(LayoutError::new_err("a bucket holds numbers; got uint8"));
        }
        if !memory.address().is_multiple_of(ALIGNMENT) {
            return Err(LayoutError::new_err(format!(
                "misaligned: a bucket starts on {ALIGNMENT} bytes; got address {:#x}",
                memory.address()
            )));
        }
        Ok(Self { plan, bucket })
    }
}

fn refused(error: zerort_core::PlanError) -> PyErr {
    LayoutError::new_err(error.to_string())
}

impl Buffer {
    /// Over memory that was not imported.
    pub const fn of(memory: Memory) -> Self {
        Self { memory, layout: None }
    }

    /// The memory, for a kernel.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    fn layout(&self) -> PyResult<&Layout> {
        self.layout.as_ref().ok_or_else(|| {
            LayoutError::new_err(
                "a buffer without a bucket has no shards or fragments: give plan and bucket",
            )
        })
    }

    fn part(&self, start: u64, length: u64) -> PyResult<Self> {
        let inside =
            || self.memory.part(usize::try_from(start).ok()?, usize::try_from(length).ok()?);
        let memory = inside().ok_or_else(|| {
            let numel = self.memory.numel();
            LayoutError::new_err(format!(
                "{length} elements from {start} on are not in a buffer of {numel}"
            ))
        })?;
        Ok(Self { memory, layout: None })
    }
}

#[pymethods]
impl Buffer {
    #[new]
    #[pyo3(signature = (source, plan=None, bucket=None))]
    fn new(
        source: &Bound<'_, PyAny>,
        plan: Option<&Bound<'_, Plan>>,
        bucket: Option<i64>,
    ) -> PyResult<Self> {
        let memory = Memory::import(source)?;
        let layout = match (plan, bucket) {
            (Some(plan), Some(bucket)) => Some(Layout::new(plan.get(), bucket, &memory)?),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return Err(LayoutError::new_err(
                    "plan and bucket go together: one was given without the other",
                ));
            }
        };
        Ok(Self { memory, layout })
    }

    #[getter]
    fn data_ptr(&self) -> usize {
        self.memory.address()
    }

    #[getter]
    fn numel(&self) -> usize {
        self.memory.numel()
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.memory.dtype().name()
    }

    /// DLPack's (device type, device id).
    #[getter]
    fn device(&self) -> (i32, i32) {
        let device = self.memory.device();
        (device.kind, device.id)
    }

    fn slice(&self, start: i64, length: i64) -> PyResult<Self> {
        match (u64::try_from(start), u64::try_from(length)) {
            (Ok(start), Ok(length)) => self.part(start, length),
            (Err(_), _) | (_, Err(_)) => Err(LayoutError::new_err(format!(
                "a slice counts from 0; got {length} elements from {start} on"
            ))),
        }
    }

    fn shard(&self, rank: i64) -> PyResult<Self> {
        let Layout { plan, bucket } = self.layout()?;
        let rank = Rank(number("rank", rank).map_err(LayoutError::new_err)?);
        let shard = plan.mesh().position(Group::Shard, rank).map_err(refused)?;
        let length = plan.partition(*bucket).map_err(refused)?.shard_numel();
        self.part(u64::from(shard) * length, length)
    }

    /// The whole of one parameter in a bucket's buffer.
    fn fragment(&self, param: i64) -> PyResult<Self> {
        let Layout { plan, bucket } = self.layout()?;
        let param = ParamId(number("parameter", param).map_err(LayoutError::new_err)?);
        let (home, start) = plan.home(param).map_err(refused)?;
        if home != *bucket {
            return Err(LayoutError::new_err(format!(
                "parameter {} lies in bucket {}, not in bucket {}",
                param.0, home.0, bucket.0
            )));
        }
        self.part(start, plan.params()[param.index()].numel)
    }

    /// The array API's export. `stream` asks for nothing here: see the limitations of
    /// [`crate::dlpack`].
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let _ = stream;
        if copy == Some(true) {
            return Err(LayoutError::new_err(
                "a buffer shares its memory and makes no copy; clone the tensor instead",
            ));
        }
        if let Some(wanted) = dl_device.filter(|&wanted| wanted != self.device()) {
            return Err(LayoutError::new_err(format!(
                "a buffer stays on its device {:?} (type, id); got a request for {wanted:?}",
                self.device()
            )));
        }
        self.memory.export(py, max_version.is_some_and(|(major, _)| major >= 1))
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        self.device()
    }
}
