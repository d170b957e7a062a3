"""columns: (N, D, S), statistics over D for every (n, s), affine along D.

Positions are taken in strips narrow enough for all D rows of one to stay in L2: one sweep for the
moments, one for the transform. For backward the strips are dealt to parts, each of which keeps its
own sums for the parameters, in float64.
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from .sweeps cimport (add, affine_columns, at, backward_columns, column_backward_sums,
                      column_moments, column_squares, data, is_float32, real, row_parameter_sums,
                      rstd_of, sum_parts, variance)

cnp.import_array()

cdef enum:
    WIDEST = 512        # positions in a strip
    NARROWEST = 64
    SLAB = 1 << 19      # bytes of a strip
    PARTS = 32          # at most, of the strips in backward


cdef Py_ssize_t _strip_width(Py_ssize_t D, Py_ssize_t S, Py_ssize_t itemsize) noexcept nogil:
    cdef Py_ssize_t fitting = SLAB // (D * itemsize) // NARROWEST * NARROWEST
    return min(S, max(<Py_ssize_t> NARROWEST, min(<Py_ssize_t> WIDEST, fitting)))


cdef inline void _normalize_strip(
    const real* x, const real* residual, real* total, const real* weight, const real* bias,
    real* y, Py_ssize_t D, Py_ssize_t S, Py_ssize_t width, double eps,
    real* mean, real* rstd,
) noexcept nogil:
    cdef:
        double mu[WIDEST]
        double m2[WIDEST]
        real pivot[WIDEST]
        real scale[WIDEST]
        real shift[WIDEST]
        double r
        Py_ssize_t d, s
    if total is not NULL:
        for d in range(D):
            add(x + d * S, residual + d * S, total + d * S, width)
        x = total
    if mean is not NULL:
        column_moments(x, D, S, width, mu, m2)
    else:
        memset(mu, 0, width * sizeof(double))
        memset(m2, 0, width * sizeof(double))
        column_squares(x, D, S, width, m2)
    for s in range(width):
        r = rstd_of(variance(m2[s], D), eps)
        rstd[s] = <real> r
        if mean is not NULL:
            mean[s] = <real> mu[s]
        pivot[s] = <real> mu[s]
        scale[s] = <real> r
        shift[s] = <real> ((pivot[s] - mu[s]) * r)
    for d in range(D):
        affine_columns(x + d * S, <const real*> NULL, y + d * S, width, pivot, scale, shift,
                       1 if weight is NULL else weight[d], 0 if bias is NULL else bias[d], 0)


cdef void _normalize(
    real _, cnp.ndarray x, residual, weight, bias, double eps, y, total, mean, rstd, int threads,
) except *:
    cdef:
        Py_ssize_t N = x.shape[0], D = x.shape[1], S = x.shape[2]
        const real* x_ = <const real*> data(x)
        const real* residual_ = <const real*> data(residual)
        const real* weight_ = <const real*> data(weight)
        const real* bias_ = <const real*> data(bias)
        real* y_ = <real*> data(y)
        real* total_ = <real*> data(total)
        real* mean_ = <real*> data(mean)
        real* rstd_ = <real*> data(rstd)
        Py_ssize_t width = _strip_width(D, S, sizeof(real)), strips = (S + width - 1) // width
        Py_ssize_t task, n, s
    for task in prange(N * strips, num_threads=threads, schedule="static", nogil=True):
        n = task // strips
        s = task % strips * width
        _normalize_strip(
            x_ + n * D * S + s, at(residual_, n * D * S + s), at(total_, n * D * S + s), weight_,
            bias_, y_ + n * D * S + s, D, S, min(width, S - s), eps, at(mean_, n * S + s),
            rstd_ + n * S + s)


def normalize(
    cnp.ndarray x, residual, weight, bias, double eps, y, total, mean, rstd, int threads
):
    if is_float32(x):
        _normalize(<float> 0, x, residual, weight, bias, eps, y, total, mean, rstd, threads)
    else:
        _normalize(<double> 0, x, residual, weight, bias, eps, y, total, mean, rstd, threads)


cdef inline void _backward_strip(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    const real* grad_total, real* grad_x, Py_ssize_t D, Py_ssize_t S, Py_ssize_t width,
    double* parameter_sums,
) noexcept nogil:
    """Adds to parameter_sums, (2, D), unless it is NULL."""
    cdef:
        double sums[3 * WIDEST]
        real pivot[WIDEST]
        real b[WIDEST]
        real c[WIDEST]
        real shift[WIDEST]
        double* g_sum = sums
        double* gx_sum = sums + WIDEST
        double* x_sum = sums + 2 * WIDEST
        double r, rest
        Py_ssize_t d, s
    memset(sums, 0, sizeof(sums))
    for s in range(width):
        pivot[s] = 0 if mean is NULL else mean[s]
    column_backward_sums(grad_y, x, weight, D, S, width, pivot, g_sum, gx_sum, x_sum)
    for s in range(width):
        r = rstd[s]
        # The mean arrives rounded: what was rounded away is the mean of what is left.
        rest = 0 if mean is NULL else x_sum[s] / D
        b[s] = <real> (-r * r * (gx_sum[s] - rest * g_sum[s]) / D)
        c[s] = 0 if mean is NULL else <real> (-g_sum[s] / D - b[s] * rest)
        shift[s] = <real> (-rest * r)
    for d in range(D):
        if parameter_sums is not NULL:
            row_parameter_sums(grad_y + d * S, x + d * S, width, pivot, rstd, shift,
                               parameter_sums + d, parameter_sums + D + d)
        if grad_x is not NULL:
            backward_columns(grad_y + d * S, x + d * S, <const real*> NULL,
                             1 if weight is NULL else weight[d], at(grad_total, d * S),
                             grad_x + d * S, width, pivot, rstd, b, c)


cdef inline void _backward_part(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    const real* grad_total, real* grad_x, Py_ssize_t first, Py_ssize_t last, Py_ssize_t strips,
    Py_ssize_t D, Py_ssize_t S, Py_ssize_t strip_width, double* parameter_sums,
) noexcept nogil:
    cdef Py_ssize_t task, s, here
    for task in range(first, last):
        s = task % strips * strip_width
        here = task // strips * D * S + s
        _backward_strip(
            grad_y + here, x + here, at(mean, task // strips * S + s),
            rstd + task // strips * S + s, weight, at(grad_total, here), at(grad_x, here), D, S,
            min(strip_width, S - s), parameter_sums)


cdef void _backward(
    real _, grad_y, cnp.ndarray x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias,
    int threads,
) except *:
    cdef:
        Py_ssize_t N = x.shape[0], D = x.shape[1], S = x.shape[2]
        const real* grad_y_ = <const real*> data(grad_y)
        const real* x_ = <const real*> data(x)
        const real* mean_ = <const real*> data(mean)
        const real* rstd_ = <const real*> data(rstd)
        const real* weight_ = <const real*> data(weight)
        const real* grad_total_ = <const real*> data(grad_total)
        real* grad_x_ = <real*> data(grad_x)
        real* grad_weight_ = <real*> data(grad_weight)
        real* grad_bias_ = <real*> data(grad_bias)
        Py_ssize_t width = _strip_width(D, S, sizeof(real)), strips = (S + width - 1) // width
        Py_ssize_t tasks = N * strips, parts = min(tasks, <Py_ssize_t> PARTS), p
        double* sums = NULL
    if grad_weight_ is not NULL or grad_bias_ is not NULL:
        sums = <double*> calloc(2 * parts * D, sizeof(double))
        if sums is NULL:
            raise MemoryError
    for p in prange(parts, num_threads=threads, schedule="static", nogil=True):
        _backward_part(grad_y_, x_, mean_, rstd_, weight_, grad_total_, grad_x_,
                       tasks * p // parts, tasks * (p + 1) // parts, strips, D, S, width,
                       at(sums, 2 * p * D))
    if sums is not NULL:
        sum_parts(sums, parts, D, grad_weight_, grad_bias_)
    free(sums)


def backward(
    grad_y, cnp.ndarray x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias,
    int threads,
):
    if is_float32(x):
        _backward(<float> 0, grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight,
                  grad_bias, threads)
    else:
        _backward(<double> 0, grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight,
                  grad_bias, threads)
