"""Tensors as arrays, by DLPack's C exchange API: the same memory, in a tenth of a microsecond.

torch hangs the API, a table of C functions, on its class of tensors from version 2.10 on;
https://dmlc.github.io/dlpack/latest/python_spec.html describes it. Where it is missing this module
cannot be imported, and `_memory.py` goes another way.
"""

cimport numpy as cnp
from cpython.object cimport PyObject, PyObject_TypeCheck, PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

import numpy as np
import torch

cnp.import_array()

cdef enum:
    MAJOR_VERSION = 1
    CPU = 1
    MOST_AXES = 16

cdef struct DLTensor:
    char* data
    int32_t device_type, device_id
    int32_t ndim
    uint8_t code, bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides            # in elements
    uint64_t byte_offset

cdef struct ExchangeAPI:
    uint32_t major, minor
    void* older
    void* allocate
    void* export_owned
    void* import_owned
    int (*export_view)(PyObject* tensor, DLTensor* out) except -1
    void* stream

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(type subtype, cnp.dtype dtype, int ndim, const cnp.npy_intp* shape,
                                const cnp.npy_intp* strides, void* data, int flags, object base)

cdef:
    object Tensor = torch.Tensor
    const ExchangeAPI* api = NULL
    # By DLPack's code and the number of bits.
    dict dtypes = {(2, 16): np.dtype("e"), (2, 32): np.dtype("f"), (2, 64): np.dtype("d")}

try:
    api = <const ExchangeAPI*> PyCapsule_GetPointer(Tensor.__dlpack_c_exchange_api__,
                                                    "dlpack_exchange_api")
except AttributeError as error:
    raise ImportError("this torch has no DLPack exchange API") from error
if api.major != MAJOR_VERSION or api.export_view is NULL:
    raise ImportError("this torch has another version of the DLPack exchange API")

try:
    from ml_dtypes import bfloat16
except ImportError:
    pass
else:
    dtypes[4, 16] = np.dtype(bfloat16)


def array(tensor):
    """A CPU tensor's memory as an array; None if there is more to it, or no kernel for it."""
    cdef:
        DLTensor view
        cnp.npy_intp strides[MOST_AXES]
        cnp.dtype dtype
        object found
        int i
    if not PyObject_TypeCheck(tensor, <PyTypeObject*> Tensor):
        raise TypeError(f"expected a tensor, got {type(tensor).__name__}")
    api.export_view(<PyObject*> tensor, &view)
    dtype = dtypes.get((view.code, view.bits))
    if view.device_type != CPU or dtype is None or view.ndim > MOST_AXES or tensor.is_neg():
        return None
    for i in range(view.ndim):
        strides[i] = view.strides[i] * dtype.itemsize
    Py_INCREF(dtype)
    found = PyArray_NewFromDescr(cnp.ndarray, dtype, view.ndim, <const cnp.npy_intp*> view.shape,
                                 strides, view.data + view.byte_offset,
                                 cnp.NPY_ARRAY_WRITEABLE, None)
    Py_INCREF(tensor)
    cnp.PyArray_SetBaseObject(found, tensor)
    return found
