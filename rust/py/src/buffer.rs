//! `Buffer`: a flat piece of a tensor's memory, and the door through which the partition's pieces go back to torch.
//!
//! The core keeps the partition's books, so it also cuts: `shard` and `fragment` are buffers over the same memory, and
//! `torch.from_dlpack` makes tensors of them. The memory and its rules are in [`crate::dlpack`].

use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use crate::dlpack::Memory;
use crate::errors::LayoutError;

/// A flat, contiguous, one-dimensional piece of a tensor's memory, taken over by DLPack without a copy.
#[pyclass(frozen, module = "zerort._core")]
pub struct Buffer {
    memory: Memory,
}

impl Buffer {
    /// The memory, for a kernel.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    fn part(&self, start: usize, length: usize) -> PyResult<Self> {
        let memory = self.memory.part(start, length).ok_or_else(|| {
            LayoutError::new_err(format!(
                "{length} elements from {start} on are not in a buffer of {}",
                self.memory.numel()
            ))
        })?;
        Ok(Self { memory })
    }
}

#[pymethods]
impl Buffer {
    #[new]
    fn new(source: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self {
            memory: Memory::import(source)?,
        })
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

    fn slice(&self, start: usize, length: usize) -> PyResult<Self> {
        self.part(start, length)
    }

    /// The array API's export. `stream` asks for nothing here: see the limitations of [`crate::dlpack`].
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
        self.memory
            .export(py, max_version.is_some_and(|(major, _)| major >= 1))
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        self.device()
    }
}
