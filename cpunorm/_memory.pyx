"""Memory for results: aligned to cache lines, and used again.

Fresh memory from the system costs a page fault for every page, several times what a normalization
takes, and blocks of some KiB, which the C library joins with their neighbours whenever one is
freed, a good part of a short call. A block that is given back therefore waits in a pool for a
request of the same size. It gets there only when NumPy frees it, once no array refers to it any
more. There is a pool for small blocks, which hold little, and one for those of LARGE bytes or more,
which holds CPUNORM_POOL_BYTES at most (256 MiB unless set, 0 turns both off); what has waited
longest goes first.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

import os

cnp.import_array()


cdef extern from *:
    """
    #include <stdlib.h>
    #include <malloc.h>
    #include <sys/mman.h>

    static void *aligned(size_t alignment, size_t size)
    {
        void *block = NULL;
        return posix_memalign(&block, alignment, size) ? NULL : block;
    }

    static size_t usable(void *block)
    {
    #ifdef __GLIBC__
        return malloc_usable_size(block);
    #else
        return 0;
    #endif
    }

    static void advise_huge_pages(void *block, size_t size)
    {
    #ifdef MADV_HUGEPAGE
        madvise(block, size, MADV_HUGEPAGE);
    #endif
    }

    static void set_handler(PyArrayObject *array, PyObject *handler)
    {
        ((PyArrayObject_fields *)array)->mem_handler = handler;
    }
    """
    void* aligned(size_t alignment, size_t size) noexcept
    size_t usable(void* block) noexcept
    void advise_huge_pages(void* block, size_t size) noexcept
    void set_handler(cnp.ndarray array, object handler)


cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void* ctx
        void* (*malloc)(void* ctx, size_t size) noexcept
        void* (*calloc)(void* ctx, size_t count, size_t size) noexcept
        void* (*realloc)(void* ctx, void* block, size_t size) noexcept
        void (*free)(void* ctx, void* block, size_t size) noexcept

    ctypedef struct PyDataMem_Handler:
        char name[127]
        unsigned char version
        PyDataMemAllocator allocator

    object PyArray_NewFromDescr(type subtype, cnp.dtype dtype, int ndim, const cnp.npy_intp* shape,
                                const cnp.npy_intp* strides, void* data, int flags, object base)


cdef enum:
    LINE = 64
    SMALL = 1 << 10     # below it the C library is quick
    LARGE = 1 << 16
    PLACES = 32
    SMALL_BYTES = 1 << 19

cdef struct Block:
    void* data
    size_t size

cdef struct Pool:
    Block blocks[PLACES]    # the one that has waited longest first; the GIL guards it
    int count
    size_t nbytes, limit

cdef Pool small_pool, large_pool


cdef inline Pool* pool_of(size_t size) noexcept:
    return &large_pool if size >= LARGE else &small_pool


cdef void* take(void* ctx, size_t size) noexcept:
    cdef:
        Pool* pool = pool_of(size)
        int place = pool.count - 1 if size >= SMALL else -1
        size_t huge_page = 1 << 21
        void* block
    while place >= 0 and pool.blocks[place].size != size:
        place -= 1
    if place < 0:
        block = aligned(huge_page if size >= huge_page else LINE, size)
        if block is not NULL and size >= huge_page:
            advise_huge_pages(block, size)
        return block
    return drop(pool, place)


cdef void* drop(Pool* pool, int place) noexcept:
    """The block that waits in a place; it does so no longer."""
    cdef void* block = pool.blocks[place].data
    cdef int i
    pool.nbytes -= pool.blocks[place].size
    pool.count -= 1
    for i in range(place, pool.count):
        pool.blocks[i] = pool.blocks[i + 1]
    return block


cdef void give(void* ctx, void* block, size_t size) noexcept:
    cdef Pool* pool = pool_of(size)
    if size < SMALL or size > pool.limit:
        free(block)
        return
    while pool.count == PLACES or pool.nbytes + size > pool.limit:
        free(drop(pool, 0))
    pool.blocks[pool.count].data, pool.blocks[pool.count].size = block, size
    pool.count += 1
    pool.nbytes += size


cdef void* take_zeroed(void* ctx, size_t count, size_t size) noexcept:
    cdef void* block = take(ctx, count * size)
    if block is not NULL:
        memset(block, 0, count * size)
    return block


cdef void* resize(void* ctx, void* block, size_t size) noexcept:
    """Only ndarray.resize comes here."""
    cdef void* other = take(ctx, size)
    if other is not NULL:
        memcpy(other, block, min(size, usable(block)))
        free(block)
    return other


cdef PyDataMem_Handler handler
memcpy(handler.name, b"cpunorm", 8)
handler.version = 1
handler.allocator = PyDataMemAllocator(NULL, take, take_zeroed, resize, give)

cdef object capsule = PyCapsule_New(&handler, "mem_handler", NULL)

_limit = os.environ.get("CPUNORM_POOL_BYTES", "")
large_pool.limit = int(_limit) if _limit.isdecimal() else 256 << 20
small_pool.limit = min(large_pool.limit, SMALL_BYTES)


cdef cnp.ndarray new(cnp.dtype dtype, int ndim, const cnp.npy_intp* shape,
                     const cnp.npy_intp* strides, size_t size):
    cdef:
        void* data = take(NULL, size)
        cnp.ndarray array
    if data is NULL:
        raise MemoryError(f"no memory for a result of {size} bytes")
    Py_INCREF(dtype)
    array = PyArray_NewFromDescr(cnp.ndarray, dtype, ndim, shape, strides, data,
                                 cnp.NPY_ARRAY_WRITEABLE, None)
    Py_INCREF(capsule)
    set_handler(array, capsule)
    cnp.PyArray_ENABLEFLAGS(array, cnp.NPY_ARRAY_OWNDATA)
    return array


cdef cnp.ndarray empty(cnp.dtype dtype, int ndim, const cnp.npy_intp* shape):
    """An array in C order whose shape has no zero."""
    cdef size_t size = dtype.itemsize
    cdef int i
    for i in range(ndim):
        size *= shape[i]
    return new(dtype, ndim, shape, NULL, size)


cdef cnp.ndarray empty_as(cnp.ndarray x):
    """An array with the strides of x, which has no gaps and no zero size."""
    return new(x.dtype, cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x),
               cnp.PyArray_STRIDES(x), cnp.PyArray_NBYTES(x))


def empty_like(cnp.ndarray x):
    """An uninitialised array as x, which must have no gaps; its strides are x's."""
    return empty_as(x) if cnp.PyArray_SIZE(x) else x.copy(order="K")


def clear():
    """Give back to the system what waits in the pools."""
    while small_pool.count:
        free(drop(&small_pool, 0))
    while large_pool.count:
        free(drop(&large_pool, 0))


def waiting():
    """The number of bytes that wait in the pools."""
    return small_pool.nbytes + large_pool.nbytes
