# columns: (N, D, S), statistics over D for every (n, s), affine along D.
#
# Positions are taken in strips narrow enough for all D rows of one to stay in L2: one sweep for
# the moments, one for the transform. For backward the strips are dealt to parts, each of which
# keeps its own sums for the parameters, in float64.

from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from .call cimport Call
from .sweeps cimport (
    LANES, add, affine_strip, at, backward_strip, column_backward_sums, column_moments,
    column_reals, column_squares, element, end_seam, finish_backward, new_lines, open_seam, real,
    seam, set_columns, settle, share, sum_parts, team,
)

cdef enum:
    WIDEST = 512        # positions in a strip
    NARROWEST = 64
    PARTS = 32          # at most, of the strips in backward
    NEAR = 16           # slabs that the caches of the machine hold between them


cdef struct Columns:
    const Call* call
    Py_ssize_t width, strips    # of an image
    bint near                   # whether nothing need be fetched ahead
    Py_ssize_t parts
    double* sums                # (parts, 2, D), or NULL


cdef inline Columns _columns(const Call* call, Py_ssize_t arrays) noexcept nogil:
    cdef:
        Columns work
        Py_ssize_t nbytes = call.N * call.D * call.S * <Py_ssize_t> sizeof(element)
        Py_ssize_t fitting = call.slab // (call.D * sizeof(element))
    work.call = call
    # As wide as fits, and all about as wide as each other.
    work.width = min(max(<Py_ssize_t> NARROWEST, fitting) * 5 // 4, <Py_ssize_t> WIDEST)
    work.strips = (call.S + work.width - 1) // work.width
    work.width = (call.S + work.strips - 1) // work.strips
    work.width = min(call.S, (work.width + LANES - 1) // LANES * LANES)
    work.strips = (call.S + work.width - 1) // work.width
    work.near = arrays * nbytes <= NEAR * call.slab
    work.parts = min(call.N * work.strips, <Py_ssize_t> PARTS)
    work.sums = NULL
    return work


cdef inline Py_ssize_t _ahead(const Columns* columns, Py_ssize_t n, Py_ssize_t s,
                              Py_ssize_t width) noexcept nogil:
    """How far away the next strip lies, 0 where that does not matter or there is none."""
    if columns.near or (n == columns.call.N - 1 and s + 2 * width > columns.call.S):
        return 0
    return width if s + width < columns.call.S else columns.call.D * columns.call.S - s


cdef inline Py_ssize_t _turn(const Columns* columns, Py_ssize_t s, Py_ssize_t half,
                             Py_ssize_t* rows) noexcept nogil:
    """Where the upper or lower part of the rows begins or, of every other strip, the other one, and
    how many there are.

    Two threads side by side would write the same lines where their strips meet, row by row.
    """
    cdef Py_ssize_t D = columns.call.D
    if (s // columns.width + half) % 2:
        rows[0] = D - D // 2
        return D // 2
    rows[0] = D // 2
    return 0


cdef inline void _normalize_strip(const Columns* columns, Py_ssize_t n, Py_ssize_t s,
                                  Py_ssize_t width, seam* past) noexcept nogil:
    cdef:
        double mu[WIDEST]
        double m2[WIDEST]
        double r[WIDEST]
        column_reals pivot
        column_reals scale
        column_reals shift
        const Call* call = columns.call
        Py_ssize_t D = call.D, S = call.S, here = n * D * S + s, statistic = n * S + s
        Py_ssize_t d, half, rows
        const element* x = <const element*> call.x + here
        const element* residual = <const element*> call.residual
        element* total = at(<element*> call.total, here)
    if total is not NULL:
        for d in range(D):
            add(x + d * S, residual + here + d * S, total + d * S, width)
        x = total
    if call.mean is not NULL:
        column_moments(x, D, S, width, call.far, mu, m2)
    else:
        memset(mu, 0, width * sizeof(double))
        memset(m2, 0, width * sizeof(double))
        column_squares(x, D, S, width, m2)
    settle(mu, m2, width, D, call.eps, r, at(<real*> call.mean, statistic), <real*> NULL,
           <real*> call.rstd + statistic)
    set_columns(1, mu, r, <const real*> NULL, <const real*> NULL, width, pivot, scale, shift)
    for half in range(2):
        d = _turn(columns, s, half, &rows)
        affine_strip(x + d * S, <element*> call.y + here + d * S, rows, S, width, pivot, scale,
                     shift, at(<const real*> call.weight, d), at(<const real*> call.bias, d),
                     past, _ahead(columns, n, s, width))


cdef inline void _normalize(void* work, int member, int members) noexcept nogil:
    cdef:
        const Columns* columns = <const Columns*> work
        Py_ssize_t tasks = columns.call.N * columns.strips, task, s
        seam joint
        seam* past = open_seam(&joint, columns.call.streaming)
    for task in range(share(tasks, member, members), share(tasks, member + 1, members)):
        s = task % columns.strips * columns.width
        _normalize_strip(columns, task // columns.strips, s,
                         min(columns.width, columns.call.S - s), past)
    end_seam(past)


cdef inline int normalize(const Call* call) noexcept nogil:
    cdef Columns work = _columns(call, 2)
    team(_normalize, &work, call.threads)
    return 0


cdef inline void _backward_strip(const Columns* columns, Py_ssize_t n, Py_ssize_t s,
                                 Py_ssize_t width, double* parameter_sums,
                                 seam* past) noexcept nogil:
    """Adds to parameter_sums, (2, D), unless it is NULL."""
    cdef:
        double sums[3 * WIDEST]
        column_reals mean
        column_reals rstd
        column_reals shift
        column_reals b
        column_reals c
        double* g_sum = sums
        double* gx_sum = sums + WIDEST
        double* x_sum = sums + 2 * WIDEST
        const Call* call = columns.call
        bint centred = call.mean is not NULL
        Py_ssize_t D = call.D, S = call.S, here = n * D * S + s, statistic = n * S + s
        Py_ssize_t d, half, rows
        const element* grad_y = <const element*> call.grad_y + here
        const element* x = <const element*> call.x + here
        const real* weight = <const real*> call.weight
    memcpy(rstd, <const real*> call.rstd + statistic, width * sizeof(real))
    if centred:
        memcpy(mean, <const real*> call.mean + statistic, width * sizeof(real))
    else:
        memset(mean, 0, width * sizeof(real))
    memset(sums, 0, sizeof(sums))
    column_backward_sums(grad_y, x, weight, D, S, width, call.far, mean, g_sum, gx_sum, x_sum)
    finish_backward(g_sum, gx_sum, x_sum, width, D, rstd, centred, shift, b, c)
    for half in range(2):
        d = _turn(columns, s, half, &rows)
        backward_strip(grad_y + d * S, x + d * S, at(weight, d),
                       at(<const element*> call.grad_total, here + d * S),
                       at(<element*> call.grad_x, here + d * S), rows, S, width, mean, rstd, shift,
                       b, c, at(parameter_sums, d), at(parameter_sums, D + d), past,
                       _ahead(columns, n, s, width))


cdef inline void _backward(void* work, int member, int members) noexcept nogil:
    cdef:
        const Columns* columns = <const Columns*> work
        const Call* call = columns.call
        Py_ssize_t tasks = call.N * columns.strips, parts = columns.parts, D = call.D, p, task, s
        seam joint
        seam* past = open_seam(&joint, call.streaming)
    for p in range(share(parts, member, members), share(parts, member + 1, members)):
        if columns.sums is not NULL:
            memset(columns.sums + 2 * p * D, 0, 2 * D * sizeof(double))
        for task in range(tasks * p // parts, tasks * (p + 1) // parts):
            s = task % columns.strips * columns.width
            _backward_strip(columns, task // columns.strips, s, min(columns.width, call.S - s),
                            at(columns.sums, 2 * p * D), past)
    end_seam(past)
    sum_parts(columns.sums, parts, D, member, members, <real*> call.grad_weight,
              <real*> call.grad_bias)


cdef inline int backward(const Call* call) noexcept nogil:
    cdef Columns work = _columns(call, 3)
    if call.grad_weight is not NULL or call.grad_bias is not NULL:
        work.sums = <double*> new_lines(2 * work.parts * call.D * sizeof(double))
        if work.sums is NULL:
            return -1
    team(_backward, &work, call.threads)
    free(work.sums)
    return 0
