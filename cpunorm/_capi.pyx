"""The C API: the compiled kernels for code that is compiled itself. See docs/cython.md."""

from libc.math cimport isfinite
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from ._channels cimport Channels, place_axes
from .backends.cython.call cimport Call, Table
from .backends.cython.verbs cimport FLOAT32, FLOAT64, new_call, solve, tables, work_of

import os

from . import _dispatch, _threads

if not _dispatch.is_available("cython"):  # which fills the tables
    raise ImportError("cpunorm's compiled backend is missing; see cpunorm.show_config()")

cdef:
    Py_ssize_t serial_bytes = _threads.SERIAL_BYTES
    Py_ssize_t bytes_per_thread = _threads.BYTES_PER_THREAD
    int most_threads = _threads.MOST_THREADS
    bint forked = False


def _after_fork_in_child():
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


cdef inline const Table* table_of(const real* x) noexcept nogil:
    return tables[<int> FLOAT32 if real is float else <int> FLOAT64]


cdef Call call_for(Py_ssize_t nbytes, bint backward, Py_ssize_t images,
                   int threads) noexcept nogil:
    """A call on an x of so many bytes, on as many threads as have enough to do."""
    cdef Py_ssize_t work = work_of(nbytes, backward, images)
    if forked or work < serial_bytes:
        threads = 1
    else:
        threads = min(threads, <int> min(work // bytes_per_thread, most_threads))
    return new_call(nbytes, backward, threads)


cdef inline bint is_number(double eps) noexcept nogil:
    return eps >= 0 and isfinite(eps)


# ------------------------------------------------------------------------- layer norm and RMS norm


cdef int normalize_rows(const real* x, const real* weight, const real* bias, real* y, real* mean,
                        real* rstd, bint center, Py_ssize_t rows, Py_ssize_t length, double eps,
                        int threads) noexcept nogil:
    cdef:
        Call call
        real* scratch = NULL
        int failed
    if rows < 0 or length < 0 or threads < 1 or not is_number(eps):
        return BAD_ARGUMENT
    if rows == 0 or length == 0:
        return 0
    if rstd is NULL or (center and mean is NULL):
        scratch = <real*> malloc(2 * rows * sizeof(real))
        if scratch is NULL:
            return NO_MEMORY
    call = call_for(rows * length * sizeof(real), False, 0, threads)
    call.M, call.D, call.eps = rows, length, eps
    call.x, call.weight, call.bias, call.y = x, weight, bias, y
    call.rstd = scratch if rstd is NULL else rstd
    if center:
        call.mean = scratch + rows if mean is NULL else mean
    failed = solve(table_of(x).rows_normalize, &call)
    free(scratch)
    return NO_MEMORY if failed else 0


cdef int layer_norm(
    const real* x, const real* weight, const real* bias, real* y, real* mean, real* rstd,
    Py_ssize_t rows, Py_ssize_t length, double eps, int threads,
) noexcept nogil:
    return normalize_rows(x, weight, bias, y, mean, rstd, True, rows, length, eps, threads)


cdef int rms_norm(
    const real* x, const real* weight, real* y, real* rstd,
    Py_ssize_t rows, Py_ssize_t length, double eps, int threads,
) noexcept nogil:
    return normalize_rows(x, weight, <const real*> NULL, y, <real*> NULL, rstd, False, rows,
                          length, eps, threads)


cdef int layer_norm_backward(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight, real* grad_bias,
    Py_ssize_t rows, Py_ssize_t length, int threads,
) noexcept nogil:
    cdef Call call
    if rows < 0 or length < 0 or threads < 1:
        return BAD_ARGUMENT
    if rows == 0 or length == 0:
        return no_gradients(grad_weight, grad_bias, length)
    call = call_for(rows * length * sizeof(real), True, 0, threads)
    call.M, call.D = rows, length
    call.grad_y, call.x, call.weight = grad_y, x, weight
    call.mean, call.rstd = <void*> mean, <void*> rstd
    call.grad_x, call.grad_weight, call.grad_bias = grad_x, grad_weight, grad_bias
    return NO_MEMORY if solve(table_of(x).rows_backward, &call) else 0


cdef int rms_norm_backward(
    const real* grad_y, const real* x, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight,
    Py_ssize_t rows, Py_ssize_t length, int threads,
) noexcept nogil:
    return layer_norm_backward(grad_y, x, <const real*> NULL, rstd, weight, grad_x, grad_weight,
                               <real*> NULL, rows, length, threads)


cdef int no_gradients(real* grad_weight, real* grad_bias, Py_ssize_t count) noexcept nogil:
    """The gradients of the parameters where x is empty."""
    if grad_weight is not NULL:
        memset(grad_weight, 0, count * sizeof(real))
    if grad_bias is not NULL:
        memset(grad_bias, 0, count * sizeof(real))
    return 0


# ----------------------------------------------------------- batch norm, instance norm, group norm


cdef int channels_of(Channels* c, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, Py_ssize_t groups,
                     bint per_image, bint channels_last, int threads) noexcept nogil:
    if N < 0 or C < 0 or S < 0 or groups < 0 or threads < 1:
        return BAD_ARGUMENT
    if C and (groups == 0 or C % groups):
        return BAD_ARGUMENT
    c.N, c.C, c.S, c.per_image, c.last = N, C, S, per_image, channels_last
    c.stats[0], c.stats[1] = N if per_image else 1, groups
    place_axes(c)
    return 0


cdef inline void set_channels(Call* call, const Channels* c) noexcept nogil:
    call.N, call.C, call.S, call.B, call.G = c.N, c.C, c.S, c.stats[0], c.stats[1]


cdef int normalize_channels(
    const real* x, real* running_mean, real* running_var, const real* weight, const real* bias,
    real* y, real* mean, real* rstd, const Channels* c, double momentum, double eps, int threads,
) noexcept nogil:
    cdef:
        Py_ssize_t size = c.N * c.C * c.S, count = c.stats[0] * c.stats[1]
        const Table* table = table_of(x)
        Call call
        real* scratch
        int failed
    if size == 0:
        return 0
    scratch = <real*> malloc(3 * count * sizeof(real))
    if scratch is NULL:
        return NO_MEMORY
    call = call_for(size * sizeof(real), False, c.stats[0], threads)
    set_channels(&call, c)
    call.x, call.weight, call.bias, call.y, call.eps = x, weight, bias, y, eps
    call.mean = scratch if mean is NULL else mean
    call.var = scratch + count
    call.rstd = scratch + 2 * count if rstd is NULL else rstd
    failed = solve(table.channels[c.last].normalize, &call)
    if running_mean is not NULL and not failed:
        call.running_mean, call.running_var, call.momentum = running_mean, running_var, momentum
        failed = solve(table.move_running, &call)
    free(scratch)
    return NO_MEMORY if failed else 0


cdef int differentiate_channels(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight, real* grad_bias, const Channels* c, bint frozen, int threads,
) noexcept nogil:
    cdef:
        Py_ssize_t size = c.N * c.C * c.S
        const Table* table = table_of(x)
        Call call
        int failed
    if size == 0:
        return no_gradients(grad_weight, grad_bias, c.C)
    call = call_for(size * sizeof(real), True, c.stats[0], threads)
    set_channels(&call, c)
    call.grad_y, call.x, call.weight = grad_y, x, weight
    call.mean, call.rstd = <void*> mean, <void*> rstd
    call.grad_x, call.grad_weight, call.grad_bias = grad_x, grad_weight, grad_bias
    if frozen:
        failed = solve(table.channels[c.last].backward_apply, &call)
    else:
        failed = solve(table.channels[c.last].backward, &call)
    return NO_MEMORY if failed else 0


cdef int group_norm(
    const real* x, const real* weight, const real* bias, real* y, real* mean, real* rstd,
    Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, Py_ssize_t groups, double eps,
    bint channels_last, int threads,
) noexcept nogil:
    cdef Channels c
    if channels_of(&c, N, C, S, groups, True, channels_last, threads) or not is_number(eps):
        return BAD_ARGUMENT
    return normalize_channels(x, <real*> NULL, <real*> NULL, weight, bias, y, mean, rstd, &c, 0.0,
                              eps, threads)


cdef int group_norm_backward(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight, real* grad_bias,
    Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, Py_ssize_t groups,
    bint channels_last, int threads,
) noexcept nogil:
    cdef Channels c
    if channels_of(&c, N, C, S, groups, True, channels_last, threads):
        return BAD_ARGUMENT
    return differentiate_channels(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias,
                                  &c, False, threads)


cdef int batch_norm(
    const real* x, real* running_mean, real* running_var, const real* weight, const real* bias,
    real* y, real* mean, real* rstd,
    Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, bint training, double momentum, double eps,
    bint channels_last, int threads,
) noexcept nogil:
    cdef:
        Channels c
        Call call
        const Table* table = table_of(x)
        bint running = running_mean is not NULL
    if (channels_of(&c, N, C, S, C, False, channels_last, threads) or not is_number(eps)
            or running != (running_var is not NULL) or not (running or training)
            or (training and N * S == 1)):
        return BAD_ARGUMENT
    if training:
        return normalize_channels(x, running_mean, running_var, weight, bias, y, mean, rstd, &c,
                                  momentum, eps, threads)
    if N * C * S == 0:
        return 0
    call = call_for(N * C * S * sizeof(real), False, 1, threads)
    set_channels(&call, &c)
    call.x, call.weight, call.bias, call.y, call.eps = x, weight, bias, y, eps
    call.mean, call.var, call.rstd = running_mean, running_var, rstd
    if mean is not NULL:
        memcpy(mean, running_mean, C * sizeof(real))
    return NO_MEMORY if solve(table.channels[c.last].apply, &call) else 0


cdef int batch_norm_backward(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight, real* grad_bias,
    Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, bint training,
    bint channels_last, int threads,
) noexcept nogil:
    cdef Channels c
    if channels_of(&c, N, C, S, C, False, channels_last, threads):
        return BAD_ARGUMENT
    return differentiate_channels(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias,
                                  &c, not training, threads)
