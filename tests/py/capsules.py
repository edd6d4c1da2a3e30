"""DLPack capsules made by hand with ctypes: descriptors that no library would write, and deleters
that count.

Reads capsules as well, so that a test can look at what an export says without a library that
understands it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

CPU, CUDA, CUDA_HOST, ROCM, ROCM_HOST, ONE_API = 1, 2, 3, 10, 11, 14
SIGNED, UNSIGNED, FLOAT, BFLOAT = 0, 1, 2, 4
READ_ONLY = 1


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Unversioned(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_api.PyCapsule_GetName.restype = ctypes.c_char_p
_api.PyCapsule_GetName.argtypes = [ctypes.py_object]
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]

# A capsule keeps a pointer to its name, not a copy.
_NAMES = {Unversioned: b"dltensor", Versioned: b"dltensor_versioned"}


@dataclass
class Made:
    """A producer: its capsule, its memory, and how often it was told to free that."""

    address: int = 0
    deleted: int = 0
    capsule: Any = None
    kept: list[Any] = field(default_factory=list)


def make(
    *,
    numel: int = 16,
    address: int | None = None,
    device: tuple[int, int] = (CPU, 0),
    dtype: tuple[int, int, int] = (FLOAT, 32, 1),
    shape: list[int] | None = None,
    strides: list[int] | None = None,
    ndim: int | None = None,
    byte_offset: int = 0,
    version: tuple[int, int] | None = (1, 0),
    flags: int = 0,
) -> Made:
    """A capsule over memory of its own, or over `address`; without `version` unversioned."""
    made = Made()
    block = ctypes.create_string_buffer(numel * 8 + 64)
    made.address = -(-ctypes.addressof(block) // 64) * 64
    shape = [numel] if shape is None else shape
    extents = (ctypes.c_int64 * len(shape))(*shape)
    steps = (ctypes.c_int64 * len(strides))(*strides) if strides is not None else None

    def delete(_: int) -> None:
        made.deleted += 1

    structure = Unversioned() if version is None else Versioned()
    structure.deleter = Deleter(delete)
    if version is not None:
        structure.major, structure.minor = version
        structure.flags = flags
    tensor = structure.tensor
    tensor.data = made.address if address is None else address
    tensor.device_type, tensor.device_id = device
    tensor.code, tensor.bits, tensor.lanes = dtype
    tensor.ndim = len(shape) if ndim is None else ndim
    tensor.shape = extents
    tensor.strides = steps
    tensor.byte_offset = byte_offset
    made.kept = [block, extents, steps, structure]
    made.capsule = _api.PyCapsule_New(ctypes.addressof(structure), _NAMES[type(structure)], None)
    return made


def name(capsule: Any) -> str:
    return str(_api.PyCapsule_GetName(capsule).decode())


def read(capsule: Any) -> Tensor:
    """The descriptor in a capsule that nobody has taken. It lives as long as the capsule."""
    kind = {"dltensor": Unversioned, "dltensor_versioned": Versioned}[name(capsule)]
    structure = kind.from_address(_api.PyCapsule_GetPointer(capsule, _NAMES[kind]))
    tensor: Tensor = structure.tensor
    return tensor
