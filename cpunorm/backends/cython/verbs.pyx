"""The verbs of backends/__init__.py: arrays in, pointers and sizes down.

Which instruction set they run on is settled when `install` is called.
"""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.string cimport memset

from ..._threads import IMAGE_BYTES

cnp.import_array()

cdef int bfloat16_number = -1  # NumPy's number for the type of ml_dtypes, once one was seen
image_bytes = IMAGE_BYTES


def install(capsules, Py_ssize_t slab, Py_ssize_t far, stream, bint fetches):
    """Take the tables of the element types, in the order of `Element`, and what the machine is."""
    global slab_bytes, far_bytes, fetching
    for i, capsule in enumerate(capsules):
        tables[i] = <Table*> PyCapsule_GetPointer(capsule, "cpunorm.Table")
    slab_bytes, far_bytes, fetching = slab, far, fetches
    stream_bytes[0], stream_bytes[1] = stream


cdef int element_of(cnp.ndarray x) except -1:
    global bfloat16_number
    cdef int number = cnp.PyArray_TYPE(x)
    if number == cnp.NPY_FLOAT32:
        return FLOAT32
    if number == cnp.NPY_FLOAT64:
        return FLOAT64
    if number == cnp.NPY_FLOAT16:
        return FLOAT16
    if number == bfloat16_number:
        return BFLOAT16
    if x.dtype.name == "bfloat16":
        bfloat16_number = number
        return BFLOAT16
    raise TypeError(f"no kernels for {x.dtype}")


cdef Call new_call(Py_ssize_t nbytes, bint backward, int threads) noexcept nogil:
    """A call on an x of so many bytes."""
    cdef Call call
    memset(&call, 0, sizeof(call))
    call.threads = threads
    call.slab, call.fetching = slab_bytes, fetching
    call.far = nbytes >= far_bytes
    call.streaming = nbytes >= stream_bytes[backward]
    return call


cdef int solve(Verb verb, Call* call) noexcept nogil:
    """Run a kernel; a result that takes the place of an input stays in the cache with it."""
    if call.y is not NULL and (call.y == call.x or call.y == call.residual):
        call.streaming = False
    return verb(call)


cdef int run(Verb verb, Call* call) except -1:
    """`solve`, without the GIL."""
    cdef int failed
    with nogil:
        failed = solve(verb, call)
    if failed:
        raise MemoryError
    return 0


cdef int run_briefly(Verb verb, Call* call) except -1:
    """`solve`, when it takes no longer than to let go of the GIL and take it again."""
    if solve(verb, call):
        raise MemoryError
    return 0


cdef inline void* data(object array):
    """The memory of an array, NULL for None."""
    return NULL if array is None else cnp.PyArray_DATA(<cnp.ndarray> array)


cdef Call normalize_call(cnp.ndarray x, residual, weight, bias, double eps, int activation, y,
                         total, mean, var, rstd, int threads):
    cdef Call call = new_call(cnp.PyArray_NBYTES(x), False, threads)
    call.x, call.residual, call.y, call.total = data(x), data(residual), data(y), data(total)
    call.weight, call.bias = data(weight), data(bias)
    call.mean, call.var, call.rstd = data(mean), data(var), data(rstd)
    call.eps, call.activation = eps, activation
    return call


cdef Call backward_call(grad_y, cnp.ndarray x, mean, rstd, weight, grad_total, grad_x,
                        grad_weight, grad_bias, int threads):
    cdef Call call = new_call(cnp.PyArray_NBYTES(x), True, threads)
    call.grad_y, call.x, call.grad_total = data(grad_y), data(x), data(grad_total)
    call.mean, call.rstd, call.weight = data(mean), data(rstd), data(weight)
    call.grad_x, call.grad_weight, call.grad_bias = data(grad_x), data(grad_weight), data(grad_bias)
    return call


# ------------------------------------------------------------------------------ rows and columns


def rows_normalize(cnp.ndarray x, residual, weight, bias, double eps, y, total, mean, rstd,
                   int threads):
    cdef Call call = normalize_call(x, residual, weight, bias, eps, 0, y, total, mean, None, rstd,
                                    threads)
    call.M, call.D = x.shape[0], x.shape[1]
    run(tables[element_of(x)].rows_normalize, &call)


def rows_backward(grad_y, cnp.ndarray x, mean, rstd, weight, grad_total, grad_x, grad_weight,
                  grad_bias, int threads):
    cdef Call call = backward_call(grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight,
                                   grad_bias, threads)
    call.M, call.D = x.shape[0], x.shape[1]
    run(tables[element_of(x)].rows_backward, &call)


def columns_normalize(cnp.ndarray x, residual, weight, bias, double eps, y, total, mean, rstd,
                      int threads):
    cdef Call call = normalize_call(x, residual, weight, bias, eps, 0, y, total, mean, None, rstd,
                                    threads)
    call.N, call.D, call.S = x.shape[0], x.shape[1], x.shape[2]
    run(tables[element_of(x)].columns_normalize, &call)


def columns_backward(grad_y, cnp.ndarray x, mean, rstd, weight, grad_total, grad_x, grad_weight,
                     grad_bias, int threads):
    cdef Call call = backward_call(grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight,
                                   grad_bias, threads)
    call.N, call.D, call.S = x.shape[0], x.shape[1], x.shape[2]
    run(tables[element_of(x)].columns_backward, &call)


# --------------------------------------------------------------------------------------- channels


cdef void set_channels(Call* call, cnp.ndarray x, cnp.ndarray mean, bint last):
    call.N, call.C, call.S = x.shape[0], x.shape[2 if last else 1], x.shape[1 if last else 2]
    call.B, call.G = mean.shape[0], mean.shape[1]


def channels_normalize(bint last, cnp.ndarray x, residual, weight, bias, double eps,
                       int activation, y, mean, var, rstd, int threads):
    cdef Call call = normalize_call(x, residual, weight, bias, eps, activation, y, None, mean, var,
                                    rstd, threads)
    set_channels(&call, x, mean, last)
    run(tables[element_of(x)].channels[last].normalize, &call)


def channels_apply(bint last, cnp.ndarray x, residual, weight, bias, int activation, y, mean,
                   rstd, int threads):
    cdef Call call = normalize_call(x, residual, weight, bias, 0, activation, y, None, mean, None,
                                    rstd, threads)
    set_channels(&call, x, mean, last)
    run(tables[element_of(x)].channels[last].apply, &call)


def channels_moments(bint last, cnp.ndarray x, mean, var, int threads):
    channels_normalize(last, x, None, None, None, 0, 0, None, mean, var, None, threads)


def channels_backward(bint last, grad_y, cnp.ndarray x, mean, rstd, weight, grad_x, grad_weight,
                      grad_bias, int threads):
    cdef Call call = backward_call(grad_y, x, mean, rstd, weight, None, grad_x, grad_weight,
                                   grad_bias, threads)
    set_channels(&call, x, mean, last)
    run(tables[element_of(x)].channels[last].backward, &call)


def channels_backward_apply(bint last, grad_y, cnp.ndarray x, mean, rstd, weight, grad_x,
                            grad_weight, grad_bias, int threads):
    cdef Call call = backward_call(grad_y, x, mean, rstd, weight, None, grad_x, grad_weight,
                                   grad_bias, threads)
    set_channels(&call, x, mean, last)
    run(tables[element_of(x)].channels[last].backward_apply, &call)


# -------------------------------------------------------------------------------- speed of memory


def copy(cnp.ndarray x, cnp.ndarray y, int threads):
    """y = x, with the stores the kernels would use."""
    cdef Call call = new_call(cnp.PyArray_NBYTES(x), False, threads)
    call.M, call.x, call.y = cnp.PyArray_SIZE(x), data(x), data(y)
    run(tables[element_of(x)].copy, &call)


def triad(cnp.ndarray grad_y, cnp.ndarray x, cnp.ndarray grad_x, int threads):
    """grad_x = grad_y - x, with the stores the kernels would use."""
    cdef Call call = new_call(cnp.PyArray_NBYTES(x), True, threads)
    call.M = cnp.PyArray_SIZE(x)
    call.grad_y, call.x, call.grad_x = data(grad_y), data(x), data(grad_x)
    run(tables[element_of(x)].triad, &call)
