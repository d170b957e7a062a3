# columns: (N, D, S), statistics over D for every (n, s), affine along D.
#
# Positions are taken in strips narrow enough for all D rows of one to stay in L2: one sweep for
# the moments, one for the transform. For backward the strips are dealt to parts, each of which
# keeps its own sums for the parameters, in float64.

from libc.stdlib cimport calloc, free
from libc.string cimport memset

from .call cimport Call
from .sweeps cimport (
    add, affine_block, at, backward_block, column_backward_sums, column_moments, column_squares,
    element, real, row_parameter_sums, rstd_of, share, stream_fence, sum_parts, team, team_barrier,
    variance,
)

cdef enum:
    WIDEST = 512        # positions in a strip
    NARROWEST = 64
    PARTS = 32          # at most, of the strips in backward


cdef struct Columns:
    const Call* call
    Py_ssize_t width, strips    # of an image
    Py_ssize_t parts
    double* sums                # (parts, 2, D), or NULL


cdef inline Columns _columns(const Call* call) noexcept nogil:
    cdef:
        Columns work
        Py_ssize_t fitting = call.slab // (call.D * sizeof(element)) // NARROWEST * NARROWEST
    work.call = call
    work.width = min(call.S, max(<Py_ssize_t> NARROWEST, min(<Py_ssize_t> WIDEST, fitting)))
    work.strips = (call.S + work.width - 1) // work.width
    work.parts = min(call.N * work.strips, <Py_ssize_t> PARTS)
    work.sums = NULL
    return work


cdef inline void _normalize_strip(const Call* call, Py_ssize_t n, Py_ssize_t s,
                                  Py_ssize_t width) noexcept nogil:
    cdef:
        double mu[WIDEST]
        double m2[WIDEST]
        real pivot[WIDEST]
        real scale[WIDEST]
        real shift[WIDEST]
        double r
        Py_ssize_t D = call.D, S = call.S, here = n * D * S + s, statistic = n * S + s, d
        const element* x = <const element*> call.x + here
        const element* residual = <const element*> call.residual
        element* total = at(<element*> call.total, here)
        real* mean = at(<real*> call.mean, statistic)
        real* rstd = <real*> call.rstd + statistic
    if total is not NULL:
        for d in range(D):
            add(x + d * S, residual + here + d * S, total + d * S, width)
        x = total
    if mean is not NULL:
        column_moments(x, D, S, width, mu, m2)
    else:
        memset(mu, 0, width * sizeof(double))
        memset(m2, 0, width * sizeof(double))
        column_squares(x, D, S, width, m2)
    for s in range(width):
        r = rstd_of(variance(m2[s], D), call.eps)
        rstd[s] = <real> r
        if mean is not NULL:
            mean[s] = <real> mu[s]
        pivot[s] = <real> mu[s]
        scale[s] = <real> r
        shift[s] = <real> ((pivot[s] - mu[s]) * r)
    affine_block(x, <const element*> NULL, <element*> call.y + here, D, S, width, pivot, scale,
                 shift, <const real*> call.weight, <const real*> call.bias, 0, call.streaming,
                 False)


cdef inline void _normalize(void* work, int member, int members) noexcept nogil:
    cdef:
        const Columns* columns = <const Columns*> work
        Py_ssize_t tasks = columns.call.N * columns.strips, task, s
    for task in range(share(tasks, member, members), share(tasks, member + 1, members)):
        s = task % columns.strips * columns.width
        _normalize_strip(columns.call, task // columns.strips, s,
                         min(columns.width, columns.call.S - s))
    if columns.call.streaming:
        stream_fence()


cdef inline int normalize(const Call* call) noexcept nogil:
    cdef Columns work = _columns(call)
    team(_normalize, &work, call.threads)
    return 0


cdef inline void _backward_strip(const Call* call, Py_ssize_t n, Py_ssize_t s, Py_ssize_t width,
                                 double* parameter_sums) noexcept nogil:
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
        Py_ssize_t D = call.D, S = call.S, here = n * D * S + s, statistic = n * S + s
        const element* grad_y = <const element*> call.grad_y + here
        const element* x = <const element*> call.x + here
        const real* mean = at(<const real*> call.mean, statistic)
        const real* rstd = <const real*> call.rstd + statistic
        const real* weight = <const real*> call.weight
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
    if parameter_sums is not NULL:
        row_parameter_sums(grad_y, x, D, S, width, pivot, rstd, shift, parameter_sums,
                           parameter_sums + D)
    if call.grad_x is not NULL:
        backward_block(grad_y, x, at(<const element*> call.grad_total, here),
                       <element*> call.grad_x + here, D, S, width, pivot, rstd, b, c,
                       <const real*> NULL, weight, call.streaming, False)


cdef inline void _backward(void* work, int member, int members) noexcept nogil:
    cdef:
        const Columns* columns = <const Columns*> work
        const Call* call = columns.call
        Py_ssize_t tasks = call.N * columns.strips, parts = columns.parts, D = call.D, p, task, s
    for p in range(share(parts, member, members), share(parts, member + 1, members)):
        for task in range(tasks * p // parts, tasks * (p + 1) // parts):
            s = task % columns.strips * columns.width
            _backward_strip(call, task // columns.strips, s, min(columns.width, call.S - s),
                            at(columns.sums, 2 * p * D))
    if call.streaming:
        stream_fence()
    if columns.sums is not NULL:
        team_barrier(members)
        sum_parts(columns.sums, parts, D, share(D, member, members), share(D, member + 1, members),
                  <real*> call.grad_weight, <real*> call.grad_bias)


cdef inline int backward(const Call* call) noexcept nogil:
    cdef Columns work = _columns(call)
    if call.grad_weight is not NULL or call.grad_bias is not NULL:
        work.sums = <double*> calloc(2 * work.parts * call.D, sizeof(double))
        if work.sums is NULL:
            return -1
    team(_backward, &work, call.threads)
    free(work.sums)
    return 0
