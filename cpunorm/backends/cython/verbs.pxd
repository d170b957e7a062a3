cimport numpy as cnp

from .call cimport Call, Table, Verb

cdef enum Element:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16
    ELEMENTS

cdef Table* tables[ELEMENTS]

# Sizes in bytes, set once when the backend is loaded.
cdef Py_ssize_t slab_bytes, far_bytes
cdef Py_ssize_t stream_bytes[2]   # forward, backward
cdef Py_ssize_t image_bytes
cdef bint fetching

cdef inline Py_ssize_t work_of(Py_ssize_t nbytes, bint backward,
                               Py_ssize_t images) noexcept nogil:
    """As in _threads.py."""
    return (2 * nbytes if backward else nbytes) + image_bytes * images

cdef int element_of(cnp.ndarray x) except -1
cdef Call new_call(Py_ssize_t nbytes, bint backward, int threads) noexcept nogil
cdef int solve(Verb verb, Call* call) noexcept nogil
cdef int run(Verb verb, Call* call) except -1
cdef int run_briefly(Verb verb, Call* call) except -1
