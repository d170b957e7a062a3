"""channels_last: (N, S, C), groups of C // G channels, affine along C.

A statistic covers S positions and the channels of a group; batch norm is one image of N * S
positions. Small images are dealt to the threads whole and stay in L2 between their two sweeps; a
large one is cut into tasks (strips.pxd) on which all threads work together. The bits are the same
either way.
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stdlib cimport calloc, free, malloc

from .strips cimport (Cut, apply_image, backward_image, cut_image, normalize_image,
                      strip_moments)
from .sweeps cimport at, data, is_float32, real, sum_parts

cnp.import_array()

cdef enum:
    SLAB = 1 << 19      # bytes of an image that one thread takes
    PARTS = 32          # at most, of the images in backward


cdef inline bint _dealt_whole(Py_ssize_t N, Py_ssize_t nbytes, int threads) noexcept nogil:
    return N >= 2 * threads and nbytes <= SLAB


cdef inline int _normalize_one(
    const real* x, const real* residual, const real* weight, const real* bias, double eps,
    int activation, real* y, real* mean, real* var, real* rstd, Py_ssize_t n, const Cut* cut,
    int threads,
) noexcept nogil:
    cdef Py_ssize_t here = n * cut.rows * cut.channels
    n *= cut.groups
    return normalize_image(x + here, at(residual, here), weight, bias, eps, activation, y + here,
                           cut, mean + n, var + n, rstd + n, threads)


cdef void _normalize(
    real _, x, residual, weight, bias, double eps, int activation, y, cnp.ndarray mean, var, rstd,
    Py_ssize_t rows, Py_ssize_t channels, int threads,
) except *:
    cdef:
        const real* x_ = <const real*> data(x)
        const real* residual_ = <const real*> data(residual)
        const real* weight_ = <const real*> data(weight)
        const real* bias_ = <const real*> data(bias)
        real* y_ = <real*> data(y)
        real* mean_ = <real*> data(mean)
        real* var_ = <real*> data(var)
        real* rstd_ = <real*> data(rstd)
        Py_ssize_t N = mean.shape[0], n
        Cut cut = cut_image(rows, channels, 1, mean.shape[1], sizeof(real))
        int failed = 0
    with nogil:
        if _dealt_whole(N, rows * channels * sizeof(real), threads):
            for n in prange(N, num_threads=threads, schedule="static"):
                failed += _normalize_one(x_, residual_, weight_, bias_, eps, activation, y_,
                                         mean_, var_, rstd_, n, &cut, 1)
        else:
            for n in range(N):
                failed += _normalize_one(x_, residual_, weight_, bias_, eps, activation, y_,
                                         mean_, var_, rstd_, n, &cut, threads)
    if failed:
        raise MemoryError


def normalize(
    cnp.ndarray x, residual, weight, bias, double eps, int activation, y, cnp.ndarray mean, var,
    rstd, int threads,
):
    cdef Py_ssize_t rows = x.shape[0] * x.shape[1] // mean.shape[0]
    if is_float32(x):
        _normalize(<float> 0, x, residual, weight, bias, eps, activation, y, mean, var, rstd,
                   rows, x.shape[2], threads)
    else:
        _normalize(<double> 0, x, residual, weight, bias, eps, activation, y, mean, var, rstd,
                   rows, x.shape[2], threads)


cdef inline int _apply_one(
    const real* x, const real* residual, const real* weight, const real* bias, int activation,
    real* y, const real* mean, const real* rstd, Py_ssize_t n, const Cut* cut, int threads,
) noexcept nogil:
    cdef Py_ssize_t here = n * cut.rows * cut.channels
    n *= cut.groups
    return apply_image(x + here, at(residual, here), weight, bias, activation, y + here, cut,
                       mean + n, rstd + n, threads)


cdef void _apply(
    real _, x, residual, weight, bias, int activation, y, cnp.ndarray mean, rstd,
    Py_ssize_t rows, Py_ssize_t channels, int threads,
) except *:
    cdef:
        const real* x_ = <const real*> data(x)
        const real* residual_ = <const real*> data(residual)
        const real* weight_ = <const real*> data(weight)
        const real* bias_ = <const real*> data(bias)
        real* y_ = <real*> data(y)
        const real* mean_ = <const real*> data(mean)
        const real* rstd_ = <const real*> data(rstd)
        Py_ssize_t N = mean.shape[0], n
        Cut cut = cut_image(rows, channels, 1, mean.shape[1], sizeof(real))
        int failed = 0
    with nogil:
        if _dealt_whole(N, rows * channels * sizeof(real), threads):
            for n in prange(N, num_threads=threads, schedule="static"):
                failed += _apply_one(x_, residual_, weight_, bias_, activation, y_, mean_, rstd_,
                                     n, &cut, 1)
        else:
            for n in range(N):
                failed += _apply_one(x_, residual_, weight_, bias_, activation, y_, mean_, rstd_,
                                     n, &cut, threads)
    if failed:
        raise MemoryError


def apply(
    cnp.ndarray x, residual, weight, bias, int activation, y, cnp.ndarray mean, rstd, int threads
):
    cdef Py_ssize_t rows = x.shape[0] * x.shape[1] // mean.shape[0]
    if is_float32(x):
        _apply(<float> 0, x, residual, weight, bias, activation, y, mean, rstd, rows, x.shape[2],
               threads)
    else:
        _apply(<double> 0, x, residual, weight, bias, activation, y, mean, rstd, rows, x.shape[2],
               threads)


cdef inline int _moments_one(const real* x, real* mean, real* var, Py_ssize_t n, const Cut* cut,
                             int threads) noexcept nogil:
    cdef:
        Py_ssize_t G = cut.groups, g
        double* mu = <double*> malloc(2 * G * sizeof(double))
        int failed
    if mu is NULL:
        return -1
    failed = strip_moments(x + n * cut.rows * cut.channels, cut, mu, mu + G, threads)
    for g in range(G):
        mean[n * G + g], var[n * G + g] = <real> mu[g], <real> mu[G + g]
    free(mu)
    return failed


cdef void _moments(
    real _, x, cnp.ndarray mean, var, Py_ssize_t rows, Py_ssize_t channels, int threads
) except *:
    cdef:
        const real* x_ = <const real*> data(x)
        real* mean_ = <real*> data(mean)
        real* var_ = <real*> data(var)
        Py_ssize_t N = mean.shape[0], n
        Cut cut = cut_image(rows, channels, 1, mean.shape[1], sizeof(real))
        int failed = 0
    with nogil:
        if _dealt_whole(N, rows * channels * sizeof(real), threads):
            for n in prange(N, num_threads=threads, schedule="static"):
                failed += _moments_one(x_, mean_, var_, n, &cut, 1)
        else:
            for n in range(N):
                failed += _moments_one(x_, mean_, var_, n, &cut, threads)
    if failed:
        raise MemoryError


def moments(cnp.ndarray x, cnp.ndarray mean, var, int threads):
    cdef Py_ssize_t rows = x.shape[0] * x.shape[1] // mean.shape[0]
    if is_float32(x):
        _moments(<float> 0, x, mean, var, rows, x.shape[2], threads)
    else:
        _moments(<double> 0, x, mean, var, rows, x.shape[2], threads)


cdef inline int _backward_part(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, double* grad_weight, double* grad_bias, bint frozen, Py_ssize_t first,
    Py_ssize_t last, const Cut* cut, int threads,
) noexcept nogil:
    cdef:
        Py_ssize_t n, here
        int failed = 0
    for n in range(first, last):
        here = n * cut.rows * cut.channels
        failed += backward_image(
            grad_y + here, x + here, mean + n * cut.groups, rstd + n * cut.groups, weight,
            at(grad_x, here), grad_weight, grad_bias, frozen, cut, threads)
    return failed


cdef void _backward(
    real _, grad_y, x, cnp.ndarray mean, rstd, weight, grad_x, grad_weight, grad_bias, bint frozen,
    Py_ssize_t rows, Py_ssize_t channels, int threads,
) except *:
    cdef:
        const real* grad_y_ = <const real*> data(grad_y)
        const real* x_ = <const real*> data(x)
        const real* mean_ = <const real*> data(mean)
        const real* rstd_ = <const real*> data(rstd)
        const real* weight_ = <const real*> data(weight)
        real* grad_x_ = <real*> data(grad_x)
        real* grad_weight_ = <real*> data(grad_weight)
        real* grad_bias_ = <real*> data(grad_bias)
        Py_ssize_t N = mean.shape[0], parts = min(N, <Py_ssize_t> PARTS), p
        Cut cut = cut_image(rows, channels, 1, mean.shape[1], sizeof(real))
        double* sums = NULL
        int failed = 0
    if grad_weight_ is not NULL or grad_bias_ is not NULL:
        sums = <double*> calloc(2 * parts * channels, sizeof(double))
        if sums is NULL:
            raise MemoryError
    with nogil:
        if _dealt_whole(N, rows * channels * sizeof(real), threads):
            for p in prange(parts, num_threads=threads, schedule="static"):
                failed += _backward_part(
                    grad_y_, x_, mean_, rstd_, weight_, grad_x_, at(sums, 2 * p * channels),
                    at(sums, (2 * p + 1) * channels), frozen, N * p // parts,
                    N * (p + 1) // parts, &cut, 1)
        else:
            for p in range(parts):
                failed += _backward_part(
                    grad_y_, x_, mean_, rstd_, weight_, grad_x_, at(sums, 2 * p * channels),
                    at(sums, (2 * p + 1) * channels), frozen, N * p // parts,
                    N * (p + 1) // parts, &cut, threads)
        if sums is not NULL:
            sum_parts(sums, parts, channels, grad_weight_, grad_bias_)
    free(sums)
    if failed:
        raise MemoryError


def backward(
    grad_y, cnp.ndarray x, cnp.ndarray mean, rstd, weight, grad_x, grad_weight, grad_bias,
    int threads, bint frozen=False,
):
    cdef Py_ssize_t rows = x.shape[0] * x.shape[1] // mean.shape[0]
    if is_float32(x):
        _backward(<float> 0, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, frozen,
                  rows, x.shape[2], threads)
    else:
        _backward(<double> 0, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias,
                  frozen, rows, x.shape[2], threads)


def backward_apply(
    grad_y, cnp.ndarray x, cnp.ndarray mean, rstd, weight, grad_x, grad_weight, grad_bias,
    int threads,
):
    backward(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, threads, frozen=True)
