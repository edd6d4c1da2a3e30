//! Memory shared with torch by DLPack. With [`crate::mapping`], [`crate::futex`],
//! [`crate::streaming`] and [`crate::wide`] this is the only file of the project with `unsafe` code.
//!
//! A [`Memory`] is a flat run of elements that some other library owns. [`Memory::import`] takes it
//! out of a capsule, and [`Memory::export`] hands it, or a [`Memory::part`] of it, on. Nothing is
//! copied either way.
//!
//! # Guarantees
//!
//! * *Ownership is trusted.* The producer's deleter is called exactly once: when the last
//!   [`Memory`] and the last tensor exported from it are gone, or at once if the import is refused.
//!   Until then the memory stays allocated.
//! * *The descriptor is not.* [`crate::descriptor`] checks everything it says before anything is
//!   read through its pointer.
//! * A slice is given out only of host memory and only for the life of a [`Hold`] on its addresses,
//!   so that two kernels never have one of them mutably.
//!
//! # Rationale
//!
//! Torch sees the same bytes and can write to them at any time. No type of ours prevents that, as
//! none does in any library that shares arrays with Python. What makes a slice acceptable here:
//! elements are plain numbers, for which every bit pattern is a value; a slice lives for one kernel
//! and never across calls; and among kernels [`crate::borrow`] keeps Rust's own rule.
//!
//! # Limitations
//!
//! * Others that write during a kernel are not noticed (see [`crate::borrow`]).
//! * Memory of an accelerator, of whatever kind, is described and passed on, never touched. No work
//!   is enqueued on it here, so an import asks for no stream order and an export has none to add:
//!   whoever wrote last must be ordered before whoever reads next, exactly as if the tensor had been
//!   passed directly.

use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;

use half::{bf16, f16};
use pyo3::exceptions::{PyException, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

use crate::abi::{DlTensor, Managed, Unversioned, Versioned};
use crate::borrow::{Access, Hold};
use crate::descriptor::{Descriptor, Device, ElementType, Region};
use crate::errors::LayoutError;

impl DlTensor {
    /// The fields in Rust's terms.
    ///
    /// # Safety
    /// `shape` and `strides`, where they are not null, must point to `ndim` numbers that live as
    /// long as `self`.
    unsafe fn describe(&self) -> PyResult<Descriptor<'_>> {
        let ndim = usize::try_from(self.ndim).map_err(|_| {
            LayoutError::new_err(format!(
                "a tensor has no negative number of dimensions; got {}",
                self.ndim
            ))
        })?;
        // SAFETY: not null by the check, and of that length by the caller's promise.
        let numbers = |at: *mut i64| {
            (!at.is_null()).then(|| unsafe { slice::from_raw_parts(at.cast_const(), ndim) })
        };
        let shape = match numbers(self.shape) {
            Some(shape) => shape,
            None if ndim == 0 => &[],
            None => {
                return Err(LayoutError::new_err(format!(
                    "a descriptor of {ndim} dimensions without a shape"
                )));
            }
        };
        Ok(Descriptor {
            data: self.data.cast(),
            byte_offset: self.byte_offset,
            device: Device { kind: self.device_type, id: self.device_id },
            dtype: (self.code, self.bits, self.lanes),
            shape,
            strides: numbers(self.strides),
        })
    }
}

/// A producer's structure that was taken out of its capsule. Dropping it gives the memory back.
struct Taken<M: Managed>(NonNull<M>);

// SAFETY: the structure is not changed after it was made, and DLPack allows its deleter on any
// thread.
unsafe impl<M: Managed> Send for Taken<M> {}
// SAFETY: a shared `Taken` allows nothing at all; it is kept only to be dropped.
unsafe impl<M: Managed> Sync for Taken<M> {}

impl<M: Managed> Taken<M> {
    /// Takes the structure and marks the capsule as used; None if the capsule holds none of this
    /// kind.
    fn from_capsule(capsule: &Bound<'_, PyCapsule>) -> PyResult<Option<Self>> {
        if !capsule.is_valid_checked(Some(M::NAME)) {
            return Ok(None);
        }
        let managed = capsule.pointer_checked(Some(M::NAME))?;
        // SAFETY: a capsule, the GIL is held, and the name lives for ever.
        if unsafe { ffi::PyCapsule_SetName(capsule.as_ptr(), M::USED.as_ptr()) } != 0 {
            return Err(PyErr::fetch(capsule.py()));
        }
        Ok(Some(Self(managed.cast())))
    }

    /// The memory, if its descriptor holds what it says; else it is given back at once.
    fn memory(self) -> PyResult<Memory> {
        // SAFETY: the capsule's name vouches for the structure, which is ours until its deleter is
        // called.
        let tensor = unsafe { self.0.as_ref() }.admitted()?;
        // SAFETY: of a structure of this version, DLPack says that of shape and strides.
        let region = unsafe { tensor.describe() }?.check()?;
        Ok(Memory { region, owner: Arc::new(self) })
    }
}

impl<M: Managed> Drop for Taken<M> {
    fn drop(&mut self) {
        // SAFETY: the structure is ours, and this is the only place that gives it back.
        unsafe {
            if let Some(delete) = self.0.as_ref().deleter() {
                delete(self.0.as_ptr());
            }
        }
    }
}

/// A flat, contiguous, aligned run of elements, kept allocated by what it came from.
pub struct Memory {
    region: Region,
    owner: Arc<dyn Send + Sync>,
}

// SAFETY: the pointer is followed only by `Reading` and `Writing`, which hold their addresses while
// they do.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Takes over the memory of `source`: an object with `__dlpack__`, or a capsule.
    pub fn import(source: &Bound<'_, PyAny>) -> PyResult<Self> {
        let capsule = match source.cast::<PyCapsule>() {
            Ok(capsule) => capsule.clone(),
            Err(_) => request(source)?,
        };
        if let Some(taken) = Taken::<Versioned>::from_capsule(&capsule)? {
            return taken.memory();
        }
        if let Some(taken) = Taken::<Unversioned>::from_capsule(&capsule)? {
            return taken.memory();
        }
        let used = [Versioned::USED, Unversioned::USED]
            .iter()
            .any(|name| capsule.is_valid_checked(Some(name)));
        Err(LayoutError::new_err(if used {
            "the capsule has been used: its memory belongs to whoever took it"
        } else {
            "the capsule is not one of DLPack's"
        }))
    }

    /// `length` bytes of host memory that nobody has described.
    ///
    /// # Safety
    /// They must be readable and writable as long as `owner` lives.
    pub unsafe fn of_bytes(data: *mut u8, length: usize, owner: Arc<dyn Send + Sync>) -> Self {
        let device = Device { kind: Device::CPU, id: 0 };
        Self { region: Region { data, numel: length, dtype: ElementType::U8, device }, owner }
    }

    /// `length` elements from `start` on, which share the owner; None if they are not all inside.
    pub fn part(&self, start: usize, length: usize) -> Option<Self> {
        if start.checked_add(length)? > self.region.numel {
            return None;
        }
        let data = self.region.data.wrapping_add(start * self.region.dtype.size());
        let region = Region { data, numel: length, ..self.region };
        Some(Self { region, owner: Arc::clone(&self.owner) })
    }

    /// Address of the first element.
    pub fn address(&self) -> usize {
        self.region.data.addr()
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.region.numel
    }

    /// Element type.
    pub fn dtype(&self) -> ElementType {
        self.region.dtype
    }

    /// Where the memory is.
    pub fn device(&self) -> Device {
        self.region.device
    }

    /// A capsule of the memory, one-dimensional and writable, that keeps the owner alive.
    pub fn export<'py>(&self, py: Python<'py>, versioned: bool) -> PyResult<Bound<'py, PyCapsule>> {
        if versioned {
            Exported::<Versioned>::capsule(self, py)
        } else {
            Exported::<Unversioned>::capsule(self, py)
        }
    }

    /// The elements, for a kernel that reads them.
    pub fn read(&self) -> PyResult<Reading<'_>> {
        Ok(Reading { memory: self, _hold: self.hold(Access::Shared)? })
    }

    /// The elements, for a kernel that writes them.
    pub fn write(&self) -> PyResult<Writing<'_>> {
        Ok(Writing { memory: self, _hold: self.hold(Access::Exclusive)? })
    }

    fn hold(&self, access: Access) -> PyResult<Hold> {
        if !self.device().is_host() {
            return Err(LayoutError::new_err(format!(
                "a buffer that is not in host memory was given to a CPU kernel: DLPack device type \
                 {}, device {}",
                self.device().kind,
                self.device().id
            )));
        }
        let start = self.address();
        let end = start + self.numel() * self.dtype().size();
        Hold::take(start..end, access).ok_or_else(|| {
            LayoutError::new_err(
                "a kernel writes here while another uses the memory: do the two buffers overlap?",
            )
        })
    }

    /// The elements as a slice.
    ///
    /// # Safety
    /// `T` must be the element type, the memory on the host, and its addresses held while the slice
    /// lives.
    unsafe fn slice<T>(&self) -> &[T] {
        if self.numel() == 0 {
            return &[]; // the pointer of an empty tensor may be null
        }
        // SAFETY: aligned, inside the address space (checked on import), allocated while `owner`
        // lives.
        unsafe { slice::from_raw_parts(self.region.data.cast_const().cast(), self.numel()) }
    }

    /// The elements as a slice that is written to.
    ///
    /// # Safety
    /// As for [`Memory::slice`], and the addresses held exclusively.
    #[allow(clippy::mut_from_ref)] // what makes it the only one is the hold, not the borrow
    unsafe fn slice_mut<T>(&self) -> &mut [T] {
        if self.numel() == 0 {
            return &mut [];
        }
        // SAFETY: as for `slice`; no other kernel has a reference, because the hold is exclusive.
        unsafe { slice::from_raw_parts_mut(self.region.data.cast(), self.numel()) }
    }
}

/// Asks a producer for a capsule: versioned if it knows how, and without stream order, since no
/// work is enqueued here.
fn request<'py>(source: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyCapsule>> {
    if !source.hasattr("__dlpack__")? {
        let kind = source.get_type().name()?;
        return Err(LayoutError::new_err(format!(
            "a buffer is made from an object with __dlpack__; got a {kind}"
        )));
    }
    ask(source).map_err(|error| refusal(source.py(), error))
}

fn ask<'py>(source: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyCapsule>> {
    let (kind, id): (i32, i32) = source.call_method0("__dlpack_device__")?.extract()?;
    let options = PyDict::new(source.py());
    if !(Device { kind, id }).is_host() {
        options.set_item("stream", -1)?;
    }
    options.set_item("max_version", (1, 0))?;
    let answer = match source.call_method("__dlpack__", (), Some(&options)) {
        Err(error) if error.is_instance_of::<PyTypeError>(source.py()) => {
            options.del_item("max_version")?; // a producer from before version 1
            source.call_method("__dlpack__", (), Some(&options))?
        }
        answer => answer?,
    };
    Ok(answer.cast_into()?)
}

/// A producer's own refusal (a tensor that requires grad, say) as a `LayoutError` that quotes it.
fn refusal(py: Python<'_>, error: PyErr) -> PyErr {
    if !error.is_instance_of::<PyException>(py) {
        return error; // KeyboardInterrupt and its like
    }
    let refused =
        LayoutError::new_err(format!("the source does not share its memory: {}", error.value(py)));
    refused.set_cause(py, Some(error));
    refused
}

/// Elements that a kernel reads.
pub struct Reading<'a> {
    memory: &'a Memory,
    _hold: Hold,
}

/// Elements that a kernel writes.
pub struct Writing<'a> {
    memory: &'a Memory,
    _hold: Hold,
}

/// A slice by its element type.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    F64(&'a [f64]),
    U8,
}

/// A slice of what sums are taken in; the others are not written here.
pub enum Sums<'a> {
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
    Other(ElementType),
}

impl Reading<'_> {
    /// The elements.
    pub fn values(&self) -> Values<'_> {
        // SAFETY: the type is that of the arm, `Memory::hold` checked the device, and the hold
        // lives as long as `self`.
        unsafe {
            match self.memory.dtype() {
                ElementType::F32 => Values::F32(self.memory.slice()),
                ElementType::F16 => Values::F16(self.memory.slice()),
                ElementType::BF16 => Values::BF16(self.memory.slice()),
                ElementType::F64 => Values::F64(self.memory.slice()),
                ElementType::U8 => Values::U8,
            }
        }
    }

    /// The elements of what is bytes on a wire.
    pub fn bytes(&self) -> Option<&[u8]> {
        if self.memory.dtype() != ElementType::U8 {
            return None;
        }
        // SAFETY: as in `values`.
        Some(unsafe { self.memory.slice() })
    }
}

impl Writing<'_> {
    /// The elements.
    pub fn sums(&mut self) -> Sums<'_> {
        // SAFETY: as in `Reading::values`; the hold is exclusive, and `&mut self` gives one slice
        // at a time.
        unsafe {
            match self.memory.dtype() {
                ElementType::F32 => Sums::F32(self.memory.slice_mut()),
                ElementType::F64 => Sums::F64(self.memory.slice_mut()),
                other @ (ElementType::F16 | ElementType::BF16 | ElementType::U8) => {
                    Sums::Other(other)
                }
            }
        }
    }

    /// The elements of what is bytes on a wire.
    pub fn bytes(&mut self) -> Option<&mut [u8]> {
        if self.memory.dtype() != ElementType::U8 {
            return None;
        }
        // SAFETY: as in `sums`.
        Some(unsafe { self.memory.slice_mut() })
    }
}

/// What a capsule of ours points to: the structure first, then what it points to itself.
#[repr(C)]
struct Exported<M: Managed> {
    managed: M,
    shape: i64,
    stride: i64,
    owner: Arc<dyn Send + Sync>,
}

impl<M: Managed> Exported<M> {
    fn capsule<'py>(memory: &Memory, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        let exported = Self {
            managed: M::new(tensor_of(&memory.region), Self::delete),
            shape: i64::try_from(memory.numel())?,
            stride: 1,
            owner: Arc::clone(&memory.owner),
        };
        let exported = NonNull::from(Box::leak(Box::new(exported)));
        // SAFETY: nobody else has the box yet, and its address does not change again.
        unsafe {
            let at = exported.as_ptr();
            let (shape, strides) = (&raw mut (*at).shape, &raw mut (*at).stride);
            let tensor = (*at).managed.tensor_mut();
            (tensor.shape, tensor.strides) = (shape, strides);
        }
        // SAFETY: the box lives until its deleter is called: by who takes it from the capsule, or
        // else by `discard`.
        let capsule = unsafe {
            PyCapsule::new_with_pointer_and_destructor(
                py,
                exported.cast(),
                M::NAME,
                Some(Self::discard),
            )
        };
        // SAFETY: without a capsule nobody else has the box.
        capsule.inspect_err(|_| unsafe { Self::delete(exported.as_ptr().cast()) })
    }

    /// The structure's deleter.
    ///
    /// # Safety
    /// `managed` must come from [`Exported::capsule`], and this must be the only call.
    unsafe extern "C" fn delete(managed: *mut M) {
        // SAFETY: `managed` is the first field of the box, so it has the box's address.
        drop(unsafe { Box::from_raw(managed.cast::<Self>()) });
    }

    /// The capsule's destructor: the structure is still its own if nobody renamed it.
    ///
    /// # Safety
    /// Called by Python on a capsule made by [`Exported::capsule`].
    unsafe extern "C" fn discard(capsule: *mut ffi::PyObject) {
        // SAFETY: a capsule of this name holds a structure that has not been taken.
        unsafe {
            if ffi::PyCapsule_IsValid(capsule, M::NAME.as_ptr()) != 0 {
                Self::delete(ffi::PyCapsule_GetPointer(capsule, M::NAME.as_ptr()).cast());
            }
        }
    }
}

/// The descriptor of a region, without its shape.
fn tensor_of(region: &Region) -> DlTensor {
    let (code, bits) = region.dtype.code_and_bits();
    DlTensor {
        data: region.data.cast(),
        device_type: region.device.kind,
        device_id: region.device.id,
        ndim: 1,
        code,
        bits,
        lanes: 1,
        shape: ptr::null_mut(),
        strides: ptr::null_mut(),
        byte_offset: 0, // some readers ignore it, so the pointer itself is moved
    }
}
