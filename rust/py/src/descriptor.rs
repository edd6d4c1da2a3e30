//! What a DLPack descriptor says, checked before anyone believes it.
//!
//! Safe code: [`crate::dlpack`] reads the C structure and hands its fields over as a
//! [`Descriptor`]; what comes back is a [`Region`] that fits in the address space, or a
//! `LayoutError` that says what was expected and what was found.

use pyo3::PyResult;

use crate::errors::LayoutError;

/// DLPack's device: its type and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    pub kind: i32,
    pub id: i32,
}

impl Device {
    pub const CPU: i32 = 1;
    pub const CUDA_HOST: i32 = 3;
    pub const ROCM_HOST: i32 = 11;

    /// Whether a CPU may follow a pointer into the memory. Any other kind is opaque: described and
    /// passed on.
    pub const fn is_host(self) -> bool {
        matches!(self.kind, Self::CPU | Self::CUDA_HOST | Self::ROCM_HOST)
    }

    fn check(self) -> PyResult<()> {
        if self.kind > 0 {
            return Ok(());
        }
        Err(LayoutError::new_err(format!(
            "a device type is a positive number; got DLPack device type {}",
            self.kind
        )))
    }
}

/// Element type of a buffer: what a parameter may be, and the bytes of a compressed wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    F32,
    F16,
    BF16,
    F64,
    U8,
}

impl ElementType {
    /// The name used in Python.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F64 => "f64",
            Self::U8 => "u8",
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// DLPack's type code and bits; lanes are always 1.
    pub const fn code_and_bits(self) -> (u8, u8) {
        match self {
            Self::U8 => (UNSIGNED, 8),
            Self::F16 => (FLOAT, 16),
            Self::F32 => (FLOAT, 32),
            Self::F64 => (FLOAT, 64),
            Self::BF16 => (BFLOAT, 16),
        }
    }

    fn from_descriptor(code: u8, bits: u8, lanes: u16) -> PyResult<Self> {
        match (code, bits, lanes) {
            (UNSIGNED, 8, 1) => Ok(Self::U8),
            (FLOAT, 16, 1) => Ok(Self::F16),
            (FLOAT, 32, 1) => Ok(Self::F32),
            (FLOAT, 64, 1) => Ok(Self::F64),
            (BFLOAT, 16, 1) => Ok(Self::BF16),
            _ => Err(LayoutError::new_err(format!(
                "the dtype must be fp32, fp16, bf16, fp64 or uint8; got DLPack type code {code} of \
                 {bits} bits, {lanes} lanes"
            ))),
        }
    }
}

const UNSIGNED: u8 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// The fields of a descriptor, as they were found.
pub struct Descriptor<'a> {
    pub data: *mut u8,
    pub byte_offset: u64,
    pub device: Device,
    /// Type code, bits, lanes.
    pub dtype: (u8, u8, u16),
    pub shape: &'a [i64],
    /// None means contiguous.
    pub strides: Option<&'a [i64]>,
}

/// A flat run of elements at an aligned address, all of it inside the address space.
pub struct Region {
    pub data: *mut u8,
    pub numel: usize,
    pub dtype: ElementType,
    pub device: Device,
}

impl Descriptor<'_> {
    /// Believes the descriptor, or says in a `LayoutError` why not.
    pub fn check(&self) -> PyResult<Region> {
        self.device.check()?;
        let (code, bits, lanes) = self.dtype;
        let dtype = ElementType::from_descriptor(code, bits, lanes)?;
        let numel = self.numel()?;
        self.check_contiguous(numel)?;
        let offset = self.offset_of(numel, dtype)?;
        let data = self.data.wrapping_add(offset);
        if !data.addr().is_multiple_of(dtype.size()) {
            return Err(LayoutError::new_err(format!(
                "misaligned: {} lies on multiples of {} bytes; got address {:#x}",
                dtype.name(),
                dtype.size(),
                data.addr()
            )));
        }
        Ok(Region { data, numel, dtype, device: self.device })
    }

    fn numel(&self) -> PyResult<usize> {
        let shape = self.shape;
        if shape.iter().any(|&extent| extent < 0) {
            return Err(LayoutError::new_err(format!(
                "a shape has no negative extent; got {shape:?}"
            )));
        }
        if shape.contains(&0) {
            return Ok(0);
        }
        let product = shape.iter().try_fold(1_i64, |product, &extent| product.checked_mul(extent));
        product.and_then(|numel| usize::try_from(numel).ok()).ok_or_else(|| {
            LayoutError::new_err(format!(
                "the shape {shape:?} has more elements than memory has addresses"
            ))
        })
    }

    fn check_contiguous(&self, numel: usize) -> PyResult<()> {
        let (Some(strides), true) = (self.strides, numel > 0) else {
            return Ok(());
        };
        let mut expected = 1_i64;
        for (&extent, &stride) in self.shape.iter().zip(strides).rev() {
            // The stride of an extent of one is never used, and libraries write anything there.
            if extent != 1 && stride != expected {
                return Err(LayoutError::new_err(format!(
                    "the memory must be contiguous; got shape {:?} with strides {strides:?}",
                    self.shape
                )));
            }
            expected *= extent; // no overflow: it divides the product of the whole shape
        }
        Ok(())
    }

    /// The byte offset, once all of the region is known to have addresses.
    fn offset_of(&self, numel: usize, dtype: ElementType) -> PyResult<usize> {
        if self.data.is_null() && numel > 0 {
            return Err(LayoutError::new_err(format!("{numel} elements at a null pointer")));
        }
        let fits = || {
            let bytes = numel.checked_mul(dtype.size())?;
            isize::try_from(bytes).ok()?;
            let offset = usize::try_from(self.byte_offset).ok()?;
            self.data.addr().checked_add(offset)?.checked_add(bytes)?;
            Some(offset)
        };
        fits().ok_or_else(|| {
            LayoutError::new_err(format!(
                "{numel} elements of {} at byte offset {} reach past the last address",
                dtype.name(),
                self.byte_offset
            ))
        })
    }
}
