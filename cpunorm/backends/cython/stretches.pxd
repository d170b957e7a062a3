# Stretches: M stretches of D contiguous elements, each with a statistic of its own.
#
# These are the rows of layer and RMS norm, and the groups of an NCHW array whose planes are too
# short for loops of their own. Weight and bias run along the stretch; they are `period` * D long,
# and the m-th stretch takes the (m % period)-th part.
#
#   many stretches      parallel over m; each is swept from cache: moments, then transform
#   few, long ones      parallel over pieces of one stretch at a time, moments merged between
#   backward            parallel over parts of the stretches; for each its sums, then grad_x; for
#                       GROUP at a time the parameters' sums, which each part keeps in float64

from cython.parallel cimport prange
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from .sweeps cimport (add, affine_along, at, backward_affine, backward_sums, merge_moments, moments,
                      parameter_sums, real, rstd_of, sum_of_squares, sum_parts,
                      variance)

cdef enum:
    LONG = 1 << 17      # elements from which a stretch is worth cutting
    PIECES = 64         # at most, of one stretch
    PARTS = 32          # at most, of the rows in backward
    GROUP = 8           # rows that stay in cache between their sums and the parameters'
    FLUSH = 2           # groups (times period) summed in the type of x before they go to float64


cdef inline void _finish(double m2, bint centred, double* mu, Py_ssize_t D, double eps,
                         Py_ssize_t m, real* mean, real* var, real* rstd,
                         double* r) noexcept nogil:
    cdef double v = variance(m2, D)
    r[0] = rstd_of(v, eps)
    rstd[m] = <real> r[0]
    if centred:
        mean[m] = <real> mu[0]
    if var is not NULL:
        var[m] = <real> v


cdef inline void _measure(const real* x, const real* addend, real* total, Py_ssize_t n,
                          bint centred, double* mu, double* m2) noexcept nogil:
    if addend is not NULL:
        add(x, addend, total, n)
        x = total
    if centred:
        moments(x, n, mu, m2)
    else:
        mu[0] = 0
        m2[0] = sum_of_squares(x, n)


cdef inline void _normalize_one(
    const real* x, const real* addend, real* total, const real* weight, const real* bias,
    const real* residual, real* y, Py_ssize_t D, double eps, int activation, Py_ssize_t m,
    Py_ssize_t period, real* mean, real* var, real* rstd,
) noexcept nogil:
    cdef double mu, m2, r
    cdef Py_ssize_t here = m * D, along = (m % period) * D
    _measure(x + here, at(addend, here), at(total, here), D, mean is not NULL, &mu, &m2)
    _finish(m2, mean is not NULL, &mu, D, eps, m, mean, var, rstd, &r)
    affine_along((x if total is NULL else total) + here, at(weight, along), at(bias, along),
                 at(residual, here), y + here, D, mu, r, activation)


cdef inline void _normalize_long(
    const real* x, const real* addend, real* total, const real* weight, const real* bias,
    const real* residual, real* y, Py_ssize_t D, double eps, int activation, Py_ssize_t m,
    Py_ssize_t period, real* mean, real* var, real* rstd, int threads,
) noexcept nogil:
    cdef:
        double piece_mu[PIECES]
        double piece_m2[PIECES]
        double mu, m2, r
        # Whole blocks of sweeps.h.
        Py_ssize_t size = ((D + PIECES - 1) // PIECES + 4095) // 4096 * 4096
        Py_ssize_t pieces = (D + size - 1) // size
        Py_ssize_t start = m * D, along = (m % period) * D, p
        bint centred = mean is not NULL
    for p in prange(pieces, num_threads=threads, schedule="static"):
        _measure(x + start + p * size, at(addend, start + p * size), at(total, start + p * size),
                 min(size, D - p * size), centred, &piece_mu[p], &piece_m2[p])
    mu, m2 = piece_mu[0], piece_m2[0]
    for p in range(1, pieces):
        if centred:
            merge_moments(p * size, &mu, &m2, min(size, D - p * size), piece_mu[p], piece_m2[p])
        else:
            m2 += piece_m2[p]
    _finish(m2, centred, &mu, D, eps, m, mean, var, rstd, &r)
    if total is not NULL:
        x = total
    # Backwards, to meet what the first sweep left in the cache.
    for p in prange(pieces - 1, -1, -1, num_threads=threads, schedule="static"):
        affine_along(x + start + p * size, at(weight, along + p * size),
                     at(bias, along + p * size), at(residual, start + p * size),
                     y + start + p * size, min(size, D - p * size), mu, r, activation)


cdef inline void normalize_stretches(
    const real* x, const real* addend, real* total, const real* weight, const real* bias,
    const real* residual, real* y, Py_ssize_t M, Py_ssize_t D, double eps, int activation,
    Py_ssize_t period, real* mean, real* var, real* rstd, int threads,
) noexcept nogil:
    """mean is NULL for RMS norm; addend comes before the normalization, residual after it."""
    cdef Py_ssize_t m
    if D >= LONG and M < PIECES:
        for m in range(M):
            _normalize_long(x, addend, total, weight, bias, residual, y, D, eps, activation, m,
                            period, mean, var, rstd, threads)
    else:
        for m in prange(M, num_threads=threads, schedule="static"):
            _normalize_one(x, addend, total, weight, bias, residual, y, D, eps, activation, m,
                           period, mean, var, rstd)


cdef inline void _grad_x_one(
    const real* grad_y, const real* x, const real* weight, const real* grad_total, real* grad_x,
    Py_ssize_t D, bint centred, double mean, double rstd, double* exact_mean,
) noexcept nogil:
    """grad_x of one stretch; the mean, which arrives rounded, goes out as it should have been."""
    cdef:
        double sums[3]
        double rest, b, c = 0
    sums[0] = sums[1] = sums[2] = 0
    backward_sums(grad_y, x, weight, D, <real> mean, sums)
    rest = sums[2] / D if centred else 0
    exact_mean[0] = mean + rest
    b = -rstd * rstd * (sums[1] - rest * sums[0]) / D
    if centred:
        c = -sums[0] / D - b * rest
    if grad_x is not NULL:
        backward_affine(grad_y, x, weight, grad_total, grad_x, D, <real> mean, 1, rstd, b, c)


cdef inline int _backward_part(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    const real* grad_total, real* grad_x, Py_ssize_t start, Py_ssize_t end, Py_ssize_t D,
    Py_ssize_t period, double* grad_weight, double* grad_bias,
) noexcept nogil:
    """Stretches start to end; grad_weight and grad_bias are this part's own sums, or NULL."""
    cdef:
        double mu[GROUP]
        double r[GROUP]
        Py_ssize_t length = period * D, groups = (end - start + GROUP - 1) // GROUP
        Py_ssize_t group, m, k, count, i
        real* sums = NULL
    if grad_weight is not NULL:
        sums = <real*> calloc(2 * length, sizeof(real))
        if sums is NULL:
            return -1
    for group in range(groups):
        m = start + group * GROUP
        count = min(<Py_ssize_t> GROUP, end - m)
        for k in range(count):
            r[k] = rstd[m + k]
            _grad_x_one(grad_y + (m + k) * D, x + (m + k) * D,
                        at(weight, ((m + k) % period) * D), at(grad_total, (m + k) * D),
                        at(grad_x, (m + k) * D), D, mean is not NULL,
                        0 if mean is NULL else mean[m + k], r[k], &mu[k])
        if sums is NULL:
            continue
        if period == 1:
            parameter_sums(grad_y + m * D, x + m * D, count, D, D, mu, r, sums, sums + length)
        else:
            for k in range(count):
                i = ((m + k) % period) * D
                parameter_sums(grad_y + (m + k) * D, x + (m + k) * D, 1, D, D, &mu[k], &r[k],
                               sums + i, sums + length + i)
        if group % (FLUSH * period) == FLUSH * period - 1 or group == groups - 1:
            for i in range(length):
                grad_weight[i] += sums[i]
                grad_bias[i] += sums[length + i]
            memset(sums, 0, 2 * length * sizeof(real))
    free(sums)
    return 0


cdef inline int backward_stretches(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    const real* grad_total, real* grad_x, real* grad_weight, real* grad_bias, Py_ssize_t M,
    Py_ssize_t D, Py_ssize_t period, int threads,
) noexcept nogil:
    """grad_weight and grad_bias, where wanted, are `period` * D long. -1 if out of memory."""
    cdef:
        Py_ssize_t length = period * D, p
        # A part keeps sums of 2 * length, and should see as many elements.
        Py_ssize_t parts = max(1, min(min((M + 2 * period - 1) // (2 * period),
                                          <Py_ssize_t> PARTS), M * D // 8192))
        bint parameters = grad_weight is not NULL or grad_bias is not NULL
        double* sums = NULL
        int failed = 0
    if parameters:
        sums = <double*> calloc(2 * parts * length, sizeof(double))
        if sums is NULL:
            return -1
    for p in prange(parts, num_threads=threads, schedule="static"):
        failed += _backward_part(
            grad_y, x, mean, rstd, weight, grad_total, grad_x, M * p // parts,
            M * (p + 1) // parts, D, period, at(sums, 2 * p * length),
            at(sums, (2 * p + 1) * length))
    if parameters and not failed:
        sum_parts(sums, parts, length, grad_weight, grad_bias)
    free(sums)
    return -1 if failed else 0
