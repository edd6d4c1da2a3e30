//! The C structures of DLPack 1.0, and the two forms in which a capsule holds them.
//!
//! Declarations only: nothing here follows a pointer. [`crate::dlpack`] does.

use std::ffi::{CStr, c_void};
use std::ptr;

use pyo3::PyResult;

use crate::errors::LayoutError;

/// `DLTensor` of dlpack.h, with its device and dtype written out.
#[repr(C)]
pub struct DlTensor {
    pub data: *mut c_void,
    pub device_type: i32,
    pub device_id: i32,
    pub ndim: i32,
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
    pub shape: *mut i64,
    pub strides: *mut i64,
    pub byte_offset: u64,
}

/// `DLManagedTensor`: what a capsule named `dltensor` holds.
#[repr(C)]
pub struct Unversioned {
    pub tensor: DlTensor,
    pub context: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// `DLManagedTensorVersioned`: what a capsule named `dltensor_versioned` holds. Up to `flags` every
/// version is alike.
#[repr(C)]
pub struct Versioned {
    pub major: u32,
    pub minor: u32,
    pub context: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut Self)>,
    pub flags: u64,
    pub tensor: DlTensor,
}

const READ_ONLY: u64 = 1;

/// What the two structures have in common.
pub trait Managed: Sized + 'static {
    /// Name of a capsule that still owns its structure.
    const NAME: &'static CStr;
    /// Name of a capsule whose structure has been taken.
    const USED: &'static CStr;

    fn new(tensor: DlTensor, deleter: unsafe extern "C" fn(*mut Self)) -> Self;
    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)>;
    /// The tensor, if this code understands the structure and may write to the memory.
    fn admitted(&self) -> PyResult<&DlTensor>;
    fn tensor_mut(&mut self) -> &mut DlTensor;
}

impl Managed for Unversioned {
    const NAME: &'static CStr = c"dltensor";
    const USED: &'static CStr = c"used_dltensor";

    fn new(tensor: DlTensor, deleter: unsafe extern "C" fn(*mut Self)) -> Self {
        Self { tensor, context: ptr::null_mut(), deleter: Some(deleter) }
    }

    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)> {
        self.deleter
    }

    fn admitted(&self) -> PyResult<&DlTensor> {
        Ok(&self.tensor)
    }

    fn tensor_mut(&mut self) -> &mut DlTensor {
        &mut self.tensor
    }
}

impl Managed for Versioned {
    const NAME: &'static CStr = c"dltensor_versioned";
    const USED: &'static CStr = c"used_dltensor_versioned";

    fn new(tensor: DlTensor, deleter: unsafe extern "C" fn(*mut Self)) -> Self {
        Self {
            major: 1,
            minor: 0,
            context: ptr::null_mut(),
            deleter: Some(deleter),
            flags: 0,
            tensor,
        }
    }

    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)> {
        self.deleter
    }

    fn admitted(&self) -> PyResult<&DlTensor> {
        if self.major != 1 {
            let version = format!("{}.{}", self.major, self.minor);
            return Err(LayoutError::new_err(format!(
                "the capsule must be of DLPack version 1; got {version}"
            )));
        }
        if self.flags & READ_ONLY != 0 {
            return Err(LayoutError::new_err(
                "the memory is read-only, and a buffer is written to",
            ));
        }
        Ok(&self.tensor)
    }

    fn tensor_mut(&mut self) -> &mut DlTensor {
        &mut self.tensor
    }
}
