"""Arrays of other libraries, read where they lie: through DLPack, or NumPy's array interface.

NumPy does most of it. What it does not take is bfloat16, which is no type of its own: such a tensor
is handed to it as one of unsigned integers, and viewed as what it is afterwards.
"""

import ctypes
from typing import Any, Protocol

import numpy as np

from ._frame import Array


class SupportsDLPack(Protocol):
    """What exports its memory by DLPack."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class SupportsArrayAPI(Protocol):
    """What is an array of the array API standard, and so has `__dlpack_device__` too.

    JAX's arrays do have it; their stubs do not say so.
    """

    def __array_namespace__(self, *, api_version: None = ...) -> Any: ...

    def __dlpack__(self) -> Any: ...


class SupportsArrayInterface(Protocol):
    """What exports its memory by NumPy's array interface."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


Readable = Array | SupportsDLPack | SupportsArrayAPI | SupportsArrayInterface

# The beginning of DLPack's structures, https://dmlc.github.io/dlpack/latest/c_api.html.


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
    )


class _VersionedTensor(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_UNSIGNED, _BFLOAT = 1, 4  # type codes
_ON_CPU = (1, 3, 11, 13)  # types of devices: the CPU, and what CUDA and ROCm let it read

_name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Relay:
    """Exports what another array exports, bfloat16 as integers."""

    def __init__(self, source: SupportsDLPack) -> None:
        self.source = source
        self.is_bfloat16 = False

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.source.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.source.__dlpack__(**options)
        name = _name_of(capsule)
        address = _address_of(capsule, name)
        if name == b"dltensor_versioned":
            address += _VersionedTensor.tensor.offset
        dtype = _Tensor.from_address(address).dtype
        # The capsule was made for this call, and is NumPy's from here on.
        self.is_bfloat16 = (dtype.code, dtype.bits, dtype.lanes) == (_BFLOAT, 16, 1)
        if self.is_bfloat16:
            dtype.code = _UNSIGNED
        return capsule


def is_foreign(a: object) -> bool:
    """Whether `read` knows how to ask for the memory of `a`, which is no array of NumPy."""
    return hasattr(type(a), "__dlpack__") or hasattr(a, "__array_interface__")


def read(a: Any) -> Array:
    """Return the memory of `a` as an array of NumPy, without a copy, or raise what says why not."""
    if not hasattr(type(a), "__dlpack__"):
        return np.asarray(a)
    device, _ = a.__dlpack_device__()
    if device not in _ON_CPU:
        raise BufferError(f"it does not lie in the memory of the CPU (DLPack device {device})")
    if hasattr(a, "is_neg") and a.is_neg():
        # torch exports these without their sign.
        raise BufferError("it is negated only when it is read; use resolve_neg() first")
    relay = _Relay(a)
    array = np.from_dlpack(relay)
    return as_bfloat16(array) if relay.is_bfloat16 else array


def as_bfloat16(array: Array) -> Array:
    """View 16 bits of another name as what they are."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise BufferError("bfloat16 needs `pip install 'cpunorm[bfloat16]'`") from None
    return array.view(bfloat16)
