"""channels_first: (N, C, S), groups of C // G channels, affine along C.

A unit is what one statistic covers: for instance and group norm the K planes of a group of one
image, which lie side by side; for batch norm the N planes of a channel, C * S apart. Small units
are dealt to the threads whole and stay in L2 between their two sweeps; a large one is cut into
chunks (some planes, or a piece of one) on which all threads work together. The bits are the same
either way.

Planes too short for loops of their own belong to wider problems: a batch is then a matrix of N rows
whose S neighbouring columns make a channel (strips.pxd), a group a stretch of K * S elements with
weight and bias repeated S times along it (stretches.pxd).
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stdlib cimport calloc, free, malloc

import numpy as np

from .stretches cimport backward_stretches, normalize_stretches
from .strips cimport (Cut, apply_image, backward_image, cut_image, normalize_image,
                      strip_moments)
from .sweeps cimport (affine, at, backward_affine, backward_sums, data, is_float32, merge_moments,
                      moments as stretch_moments, real, rstd_of, sum_parts, variance)

cnp.import_array()

cdef enum:
    SLAB = 1 << 19          # bytes of a unit that one thread takes
    CHUNK = 1 << 16         # elements, a multiple of the block of sweeps.h
    PARTS = 32              # at most, of the images in backward
    SHORT_IN_BATCH = 128    # elements of a plane that is too short
    SHORT_IN_GROUP = 16


cdef struct Units:
    Py_ssize_t B, G, K, C, S
    Py_ssize_t planes                       # of a unit
    Py_ssize_t planes_per_chunk, pieces     # one of the two is 1; pieces of a plane
    Py_ssize_t chunks                       # of a unit


cdef Units units_of(cnp.ndarray x, cnp.ndarray mean):
    cdef Units u
    u.C, u.S = x.shape[1], x.shape[2]
    u.B, u.G = mean.shape[0], mean.shape[1]
    u.K = u.C // u.G
    u.planes = x.shape[0] // u.B * u.K
    u.planes_per_chunk = max(1, CHUNK // u.S)
    u.pieces = (u.S + CHUNK - 1) // CHUNK
    u.chunks = (u.planes + u.planes_per_chunk - 1) // u.planes_per_chunk * u.pieces
    return u


cdef inline bint dealt_whole(const Units* u, Py_ssize_t units, Py_ssize_t itemsize,
                             int threads) noexcept nogil:
    return units >= 2 * threads and u.planes * u.S * itemsize <= SLAB


cdef inline Py_ssize_t unit_at(const Units* u, Py_ssize_t unit) noexcept nogil:
    """Where the unit-th of the B * G units begins in x."""
    return (unit // u.G * (u.planes // u.K) * u.C + unit % u.G * u.K) * u.S


cdef inline Py_ssize_t plane_at(const Units* u, Py_ssize_t plane) noexcept nogil:
    """Where a plane begins in its unit."""
    return (plane // u.K * u.C + plane % u.K) * u.S


cdef struct Chunk:
    Py_ssize_t first, last      # planes
    Py_ssize_t start, length    # in each plane


cdef inline Chunk chunk_of(const Units* u, Py_ssize_t index) noexcept nogil:
    cdef Chunk chunk
    chunk.first = index // u.pieces * u.planes_per_chunk
    chunk.last = min(chunk.first + u.planes_per_chunk, u.planes)
    chunk.start = index % u.pieces * CHUNK if u.pieces > 1 else 0
    chunk.length = min(<Py_ssize_t> CHUNK, u.S - chunk.start) if u.pieces > 1 else u.S
    return chunk


# -------------------------------------------------------------------------------------- forward


cdef inline void measure_chunk(const real* x, const Units* u, Py_ssize_t index, double* mean,
                               double* m2) noexcept nogil:
    cdef:
        Chunk chunk = chunk_of(u, index)
        double plane_mean, plane_m2
        Py_ssize_t p
    if u.planes == u.K:
        # The planes of one image lie side by side.
        stretch_moments(x + plane_at(u, chunk.first) + chunk.start,
                        (chunk.last - chunk.first - 1) * u.S + chunk.length, mean, m2)
        return
    stretch_moments(x + plane_at(u, chunk.first) + chunk.start, chunk.length, mean, m2)
    for p in range(chunk.first + 1, chunk.last):
        stretch_moments(x + plane_at(u, p) + chunk.start, chunk.length, &plane_mean, &plane_m2)
        merge_moments((p - chunk.first) * chunk.length, mean, m2, chunk.length, plane_mean,
                      plane_m2)


cdef inline int measure_unit(const real* x, const Units* u, double* mean, double* var,
                             int threads) noexcept nogil:
    """-1 if out of memory."""
    cdef:
        double* chunk_mean
        double* chunk_m2
        double m2, n = 0, count
        Chunk chunk
        Py_ssize_t q
    if u.chunks == 1:
        measure_chunk(x, u, 0, mean, &m2)
        var[0] = variance(m2, u.planes * u.S)
        return 0
    chunk_mean = <double*> malloc(2 * u.chunks * sizeof(double))
    chunk_m2 = chunk_mean + u.chunks
    if chunk_mean is NULL:
        return -1
    if threads == 1:
        for q in range(u.chunks):
            measure_chunk(x, u, q, chunk_mean + q, chunk_m2 + q)
    else:
        for q in prange(u.chunks, num_threads=threads, schedule="static"):
            measure_chunk(x, u, q, chunk_mean + q, chunk_m2 + q)
    for q in range(u.chunks):
        chunk = chunk_of(u, q)
        count = (chunk.last - chunk.first) * chunk.length
        if q == 0:
            mean[0], m2 = chunk_mean[0], chunk_m2[0]
        else:
            merge_moments(n, mean, &m2, count, chunk_mean[q], chunk_m2[q])
        n += count
    var[0] = variance(m2, u.planes * u.S)
    free(chunk_mean)
    return 0


cdef inline void transform_chunk(
    const real* x, const real* residual, const real* weight, const real* bias, int activation,
    real* y, const Units* u, Py_ssize_t index, double mean, double rstd,
) noexcept nogil:
    cdef:
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t p, here
    for p in range(chunk.last - 1, chunk.first - 1, -1):
        here = plane_at(u, p) + chunk.start
        affine(x + here, at(residual, here), y + here, chunk.length, mean,
               rstd * (1 if weight is NULL else weight[p % u.K]),
               0 if bias is NULL else bias[p % u.K], activation)


cdef inline void transform_unit(
    const real* x, const real* residual, const real* weight, const real* bias, int activation,
    real* y, const Units* u, Py_ssize_t unit, double mean, double rstd, int threads,
) noexcept nogil:
    """Backwards, to meet what the first sweep left in the cache."""
    cdef Py_ssize_t here = unit_at(u, unit), c = unit % u.G * u.K, q
    x, y, residual = x + here, y + here, at(residual, here)
    weight, bias = at(weight, c), at(bias, c)
    if threads == 1:
        for q in range(u.chunks - 1, -1, -1):
            transform_chunk(x, residual, weight, bias, activation, y, u, q, mean, rstd)
    else:
        for q in prange(u.chunks - 1, -1, -1, num_threads=threads, schedule="static"):
            transform_chunk(x, residual, weight, bias, activation, y, u, q, mean, rstd)


cdef inline int normalize_unit(
    const real* x, const real* residual, const real* weight, const real* bias, double eps,
    int activation, real* y, const Units* u, Py_ssize_t unit, real* mean, real* var, real* rstd,
    int threads,
) noexcept nogil:
    cdef double mu, v, r
    if measure_unit(x + unit_at(u, unit), u, &mu, &v, threads):
        return -1
    r = rstd_of(v, eps)
    mean[unit], var[unit], rstd[unit] = <real> mu, <real> v, <real> r
    transform_unit(x, residual, weight, bias, activation, y, u, unit, mu, r, threads)
    return 0


cdef void _normalize(
    real _, x, residual, weight, bias, double eps, int activation, y, mean, var, rstd, Units u,
    int threads,
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
        Py_ssize_t units = u.B * u.G, i
        Cut cut
        int failed = 0
    with nogil:
        if u.planes > u.K and u.S <= SHORT_IN_BATCH:
            cut = cut_image(u.planes, u.C, u.S, u.G, sizeof(real))
            failed = normalize_image[real](x_, residual_, weight_, bias_, eps, activation, y_,
                                           &cut, mean_, var_, rstd_, threads)
        elif u.planes == u.K and u.S <= SHORT_IN_GROUP:
            normalize_stretches[real](x_, NULL, NULL, weight_, bias_, residual_, y_, units,
                                      u.K * u.S, eps, activation, u.G, mean_, var_, rstd_, threads)
        elif dealt_whole(&u, units, sizeof(real), threads):
            for i in prange(units, num_threads=threads, schedule="static"):
                failed += normalize_unit(x_, residual_, weight_, bias_, eps, activation, y_, &u,
                                         i, mean_, var_, rstd_, 1)
        else:
            for i in range(units):
                failed += normalize_unit(x_, residual_, weight_, bias_, eps, activation, y_, &u,
                                         i, mean_, var_, rstd_, threads)
    if failed:
        raise MemoryError


cdef along_stretches(parameter, Units u):
    """Weight or bias as stretches of short planes want them: repeated along each plane."""
    if parameter is None or u.S == 1 or u.planes > u.K or u.S > SHORT_IN_GROUP:
        return parameter
    return np.repeat(parameter, u.S)


def normalize(
    cnp.ndarray x, residual, weight, bias, double eps, int activation, y, cnp.ndarray mean, var,
    rstd, int threads,
):
    cdef Units u = units_of(x, mean)
    weight, bias = along_stretches(weight, u), along_stretches(bias, u)
    if is_float32(x):
        _normalize(<float> 0, x, residual, weight, bias, eps, activation, y, mean, var, rstd, u,
                   threads)
    else:
        _normalize(<double> 0, x, residual, weight, bias, eps, activation, y, mean, var, rstd, u,
                   threads)


cdef void _apply(
    real _, x, residual, weight, bias, int activation, y, mean, rstd, Units u, int threads
) except *:
    cdef:
        const real* x_ = <const real*> data(x)
        const real* residual_ = <const real*> data(residual)
        const real* weight_ = <const real*> data(weight)
        const real* bias_ = <const real*> data(bias)
        real* y_ = <real*> data(y)
        const real* mean_ = <const real*> data(mean)
        const real* rstd_ = <const real*> data(rstd)
        Py_ssize_t tasks = u.B * (u.planes // u.K) * u.C * u.pieces, q
        Cut cut
        int failed = 0
    with nogil:
        if u.B == 1 and u.K == 1 and u.S <= SHORT_IN_BATCH:
            cut = cut_image(u.planes, u.C, u.S, u.G, sizeof(real))
            failed = apply_image[real](x_, residual_, weight_, bias_, activation, y_, &cut, mean_,
                                       rstd_, threads)
        else:
            for q in prange(tasks, num_threads=threads, schedule="static"):
                apply_piece(x_, residual_, weight_, bias_, activation, y_, mean_, rstd_, &u, q)
    if failed:
        raise MemoryError


cdef inline void apply_piece(
    const real* x, const real* residual, const real* weight, const real* bias, int activation,
    real* y, const real* mean, const real* rstd, const Units* u, Py_ssize_t index,
) noexcept nogil:
    """One piece of one plane, in the order of memory: there is nothing to wait for."""
    cdef:
        Py_ssize_t plane = index // u.pieces, start = index % u.pieces * CHUNK
        Py_ssize_t c = plane % u.C, here = plane * u.S + start
        Py_ssize_t unit = plane // u.C // (u.planes // u.K) * u.G + c // u.K
    affine(x + here, at(residual, here), y + here, min(<Py_ssize_t> CHUNK, u.S - start), mean[unit],
           rstd[unit] * (1 if weight is NULL else <double> weight[c]),
           0 if bias is NULL else bias[c], activation)


def apply(
    cnp.ndarray x, residual, weight, bias, int activation, y, cnp.ndarray mean, rstd, int threads
):
    cdef Units u = units_of(x, mean)
    if is_float32(x):
        _apply(<float> 0, x, residual, weight, bias, activation, y, mean, rstd, u, threads)
    else:
        _apply(<double> 0, x, residual, weight, bias, activation, y, mean, rstd, u, threads)


cdef void _moments(real _, x, mean, var, Units u, int threads) except *:
    cdef:
        const real* x_ = <const real*> data(x)
        real* mean_ = <real*> data(mean)
        real* var_ = <real*> data(var)
        double* mu = <double*> malloc(2 * u.B * u.G * sizeof(double))
        double* v = mu + u.B * u.G
        Py_ssize_t units = u.B * u.G, i
        Cut cut
        int failed = 0
    if mu is NULL:
        raise MemoryError
    with nogil:
        if u.planes > u.K and u.S <= SHORT_IN_BATCH:
            cut = cut_image(u.planes, u.C, u.S, u.G, sizeof(real))
            failed = strip_moments(x_, &cut, mu, v, threads)
        elif dealt_whole(&u, units, sizeof(real), threads):
            for i in prange(units, num_threads=threads, schedule="static"):
                failed += measure_unit(x_ + unit_at(&u, i), &u, mu + i, v + i, 1)
        else:
            for i in range(units):
                failed += measure_unit(x_ + unit_at(&u, i), &u, mu + i, v + i, threads)
        for i in range(units):
            mean_[i], var_[i] = <real> mu[i], <real> v[i]
    free(mu)
    if failed:
        raise MemoryError


def moments(cnp.ndarray x, cnp.ndarray mean, var, int threads):
    cdef Units u = units_of(x, mean)
    if is_float32(x):
        _moments(<float> 0, x, mean, var, u, threads)
    else:
        _moments(<double> 0, x, mean, var, u, threads)


# ------------------------------------------------------------------------------------- backward


cdef inline void sum_chunk(const real* grad_y, const real* x, const Units* u, Py_ssize_t index,
                           double mean, double* sums) noexcept nogil:
    """The backward sums of every plane or piece of a chunk; sums is (planes, pieces, 3)."""
    cdef:
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t p, here
    for p in range(chunk.first, chunk.last):
        here = plane_at(u, p) + chunk.start
        backward_sums(grad_y + here, x + here, <const real*> NULL, chunk.length, <real> mean,
                      sums + 3 * (p * u.pieces + index % u.pieces))


cdef inline void differentiate_chunk(
    const real* grad_y, const real* x, const real* weight, real* grad_x, const Units* u,
    Py_ssize_t index, double mean, double rstd, double b, double c,
) noexcept nogil:
    cdef:
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t p, here
    for p in range(chunk.last - 1, chunk.first - 1, -1):
        here = plane_at(u, p) + chunk.start
        backward_affine(grad_y + here, at(x, here), <const real*> NULL, <const real*> NULL,
                        grad_x + here, chunk.length, <real> mean,
                        1 if weight is NULL else weight[p % u.K], rstd, b, c)


cdef inline void sweep_chunk(
    const real* grad_y, const real* x, const real* weight, real* grad_x, const Units* u,
    Py_ssize_t index, double mean, double rstd, bint frozen, bint wanted, double* sums,
) noexcept nogil:
    """The first sweep over a chunk; past constant statistics it is the only one."""
    if wanted:
        sum_chunk(grad_y, x, u, index, mean, sums)
    if frozen and grad_x is not NULL:
        differentiate_chunk(grad_y, <const real*> NULL, weight, grad_x, u, index, mean, rstd, 0, 0)


cdef inline int backward_unit(
    const real* grad_y, const real* x, double mean, double rstd, const real* weight, real* grad_x,
    double* grad_weight, double* grad_bias, bint frozen, const Units* u, int threads,
) noexcept nogil:
    """Adds to grad_weight and grad_bias, (K,), unless NULL. -1 if out of memory."""
    cdef:
        double n = u.planes * u.S, rest = 0, g_sum = 0, gx_sum = 0, w, b, c
        Py_ssize_t sweeps = u.planes * u.pieces, q, i, k
        bint wanted = grad_weight is not NULL or not frozen
        double* sums = <double*> calloc(3 * sweeps, sizeof(double))
    if sums is NULL:
        return -1
    if threads == 1:
        for q in range(u.chunks):
            sweep_chunk(grad_y, x, weight, grad_x, u, q, mean, rstd, frozen, wanted, sums)
    else:
        for q in prange(u.chunks, num_threads=threads, schedule="static"):
            sweep_chunk(grad_y, x, weight, grad_x, u, q, mean, rstd, frozen, wanted, sums)
    if not frozen:
        # The mean arrives rounded: what was rounded away is the mean of what is left.
        for i in range(sweeps):
            rest += sums[3 * i + 2] / n
    for i in range(sweeps):
        k = i // u.pieces % u.K
        w = 1 if weight is NULL else weight[k]
        sums[3 * i + 1] -= rest * sums[3 * i]
        g_sum += w * sums[3 * i]
        gx_sum += w * sums[3 * i + 1]
        if grad_weight is not NULL:
            grad_weight[k] += rstd * sums[3 * i + 1]
            grad_bias[k] += sums[3 * i]
    free(sums)
    if frozen or grad_x is NULL:
        return 0
    b = -rstd * rstd * gx_sum / n
    c = -g_sum / n - b * rest
    if threads == 1:
        for q in range(u.chunks - 1, -1, -1):
            differentiate_chunk(grad_y, x, weight, grad_x, u, q, mean, rstd, b, c)
    else:
        for q in prange(u.chunks - 1, -1, -1, num_threads=threads, schedule="static"):
            differentiate_chunk(grad_y, x, weight, grad_x, u, q, mean, rstd, b, c)
    return 0


cdef inline int backward_task(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, double* sums, bint frozen, Py_ssize_t parts, Py_ssize_t task, const Units* u,
    int threads,
) noexcept nogil:
    """One group of one part of the images; sums is (parts, 2, C), or NULL."""
    cdef:
        Py_ssize_t part = task // u.G, g = task % u.G, c = g * u.K, b, unit, here
        int failed = 0
    for b in range(u.B * part // parts, u.B * (part + 1) // parts):
        unit = b * u.G + g
        here = unit_at(u, unit)
        failed += backward_unit(
            grad_y + here, x + here, mean[unit], rstd[unit], at(weight, c), at(grad_x, here),
            at(sums, 2 * part * u.C + c), at(sums, (2 * part + 1) * u.C + c), frozen, u, threads)
    return failed


cdef void _backward(
    real _, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, bint frozen, Units u,
    int threads,
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
        Py_ssize_t parts = min(u.B, <Py_ssize_t> PARTS), q
        double* sums = NULL
        Cut cut
        int failed = 0
    if grad_weight_ is not NULL or grad_bias_ is not NULL:
        sums = <double*> calloc(2 * parts * u.C, sizeof(double))
        if sums is NULL:
            raise MemoryError
    with nogil:
        if u.planes > u.K and u.S <= SHORT_IN_BATCH:
            cut = cut_image(u.planes, u.C, u.S, u.G, sizeof(real))
            failed = backward_image[real](grad_y_, x_, mean_, rstd_, weight_, grad_x_, sums,
                                          at(sums, u.C), frozen, &cut, threads)
        elif dealt_whole(&u, parts * u.G, sizeof(real), threads):
            for q in prange(parts * u.G, num_threads=threads, schedule="static"):
                failed += backward_task(grad_y_, x_, mean_, rstd_, weight_, grad_x_, sums, frozen,
                                        parts, q, &u, 1)
        else:
            for q in range(parts * u.G):
                failed += backward_task(grad_y_, x_, mean_, rstd_, weight_, grad_x_, sums, frozen,
                                        parts, q, &u, threads)
        if sums is not NULL:
            sum_parts(sums, parts, u.C, grad_weight_, grad_bias_)
    free(sums)
    if failed:
        raise MemoryError


cdef void _backward_short(
    real _, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, Units u, int threads
) except *:
    """Short planes of groups, as stretches; the parameters' gradients come S to a channel."""
    cdef:
        const real* grad_y_ = <const real*> data(grad_y)
        const real* x_ = <const real*> data(x)
        const real* mean_ = <const real*> data(mean)
        const real* rstd_ = <const real*> data(rstd)
        const real* weight_ = <const real*> data(weight)
        real* grad_x_ = <real*> data(grad_x)
        real* grad_weight_ = <real*> data(grad_weight)
        real* grad_bias_ = <real*> data(grad_bias)
        int failed
    with nogil:
        failed = backward_stretches[real](
            grad_y_, x_, mean_, rstd_, weight_, NULL, grad_x_, grad_weight_, grad_bias_,
            u.B * u.G, u.K * u.S, u.G, threads)
    if failed:
        raise MemoryError


def backward(
    grad_y, cnp.ndarray x, cnp.ndarray mean, rstd, weight, grad_x, grad_weight, grad_bias,
    int threads, bint frozen=False,
):
    cdef Units u = units_of(x, mean)
    if u.planes == u.K and u.S <= SHORT_IN_GROUP and not frozen:
        weight = along_stretches(weight, u)
        long_weight, long_bias = (
            None if grad is None else np.empty(u.C * u.S, grad.dtype)
            for grad in (grad_weight, grad_bias)
        )
        if is_float32(x):
            _backward_short(<float> 0, grad_y, x, mean, rstd, weight, grad_x, long_weight,
                            long_bias, u, threads)
        else:
            _backward_short(<double> 0, grad_y, x, mean, rstd, weight, grad_x, long_weight,
                            long_bias, u, threads)
        for grad, long_grad in ((grad_weight, long_weight), (grad_bias, long_bias)):
            if grad is not None:
                grad[...] = long_grad.reshape(u.C, u.S).sum(axis=1, dtype=np.float64)
    elif is_float32(x):
        _backward(<float> 0, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, frozen,
                  u, threads)
    else:
        _backward(<double> 0, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias,
                  frozen, u, threads)


def backward_apply(
    grad_y, cnp.ndarray x, cnp.ndarray mean, rstd, weight, grad_x, grad_weight, grad_bias,
    int threads,
):
    backward(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, threads, frozen=True)
