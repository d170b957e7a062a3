# Stretches: M stretches of D contiguous elements, each with a statistic of its own.
#
# These are the rows of layer and RMS norm, and the groups of an NCHW array whose planes are too
# short for loops of their own. Weight and bias run along the stretch; they are `period` * D long,
# and the m-th stretch takes the (m % period)-th part.
#
#   many stretches      dealt to the team; each is swept from cache: moments, then transform, of
#                       long ones from the last piece to the first
#   few, long ones      one at a time, cut into pieces for the whole team, moments merged between
#   short ones          of RMS norm and of groups: one at a time, in registers; of a few values,
#                       several at a time
#   backward            dealt to the team in parts; a PAIR of stretches has its sums taken, then
#                       grad_x and the parameters' gradients, which each part keeps in float64;
#                       short ones stay in registers

from libc.stdint cimport uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from .sweeps cimport (
    BACKWARD_ROWS, BACKWARD_SHORT, BLOCK, LANES, LINE_BYTES, PAIR, SHORT_VECTORS, UNITS, add,
    affine_along, at, backward_affine_along, backward_short, element, end_seam, flush_reals,
    merge_moments, new_lines, normalize_short, open_seam, own_lines, pair_backward_sums, real,
    rows_aligned, seam, set_columns, settle, several_a_vector, share, stretch_moments,
    stretch_squares, sum_parts, team, team_barrier, whole_lines,
)

cdef enum:
    CLOSE = 1 << 13     # bytes of a stretch that stay in L1 with as many of weight and of y
    LONG = 1 << 14      # elements from which a stretch is worth cutting
    FEW = 32            # stretches that are dealt too unevenly to be left whole
    PIECES = 64         # at most, of one stretch
    PARTS = 32          # at most, of the stretches in backward
    ROWS = 32           # stretches of a part, at least; of one of the first FEW_PARTS,
    FEW_ROWS = 8
    FEW_PARTS = 4
    PAIR_ROWS = 4       # and of one of the first two
    SPLITS = 8          # of a period where the parts are fewer
    LINED = 64          # stretches that are worth a copy of parameters that begin no line


cdef struct Stretches:
    Py_ssize_t M, D, period
    const element* x
    const element* addend       # comes before the normalization; the sum goes to total
    const element* residual     # comes after it
    element* y
    element* total
    const real* weight
    const real* bias
    real* mean                  # NULL for RMS norm
    real* var                   # or NULL
    real* rstd
    double eps
    int activation
    bint far, streaming
    # Of the backward pass.
    const element* grad_y
    const element* grad_total
    element* grad_x
    real* grad_weight
    real* grad_bias
    Py_ssize_t parts, splits    # of the stretches, and of each period
    bint fetching               # whether grad_x and what is read next are fetched early
    # Scratch of the whole team.
    Py_ssize_t piece
    double* wide
    real* sums                  # (members, 2, pitch)
    Py_ssize_t pitch
    real* lined


cdef struct Terms:
    real pivot[UNITS]
    real scale[UNITS]
    real shift[UNITS]


cdef inline void _finish(const Stretches* s, Py_ssize_t m, Py_ssize_t count, const double* mu,
                         const double* m2, Terms* terms) noexcept nogil:
    """The statistics of `count` stretches, and the terms of their transform."""
    cdef double r[UNITS]
    settle(mu, m2, count, s.D, s.eps, r, at(s.mean, m), at(s.var, m), s.rstd + m)
    set_columns(1, mu, r, <const real*> NULL, <const real*> NULL, count, terms.pivot, terms.scale,
                terms.shift)


cdef inline void _measure(const Stretches* s, Py_ssize_t start, Py_ssize_t count, Py_ssize_t n,
                          double* mu, double* m2) noexcept nogil:
    """`count` stretches of n elements."""
    cdef const element* x = s.x + start
    cdef const element* y = s.y + start
    cdef Py_ssize_t k
    if s.streaming or s.D * <Py_ssize_t> sizeof(element) > CLOSE:
        y = NULL
    if s.addend is not NULL:
        add(x, s.addend + start, s.total + start, count * n)
        x = s.total + start
    if s.mean is not NULL:
        stretch_moments(x, count, n, mu, m2, y)
    else:
        stretch_squares(x, count, n, m2, y)
        for k in range(count):
            mu[k] = 0


cdef inline void _transform(const Stretches* s, Py_ssize_t m, Py_ssize_t start, Py_ssize_t count,
                            Py_ssize_t n, const Terms* terms, seam* past,
                            Py_ssize_t ahead) noexcept nogil:
    """`count` stretches, or from `start` on n elements of one."""
    cdef Py_ssize_t here = m * s.D + start, along = (m % s.period) * s.D + start
    affine_along((s.x if s.total is NULL else s.total) + here, s.weight, s.bias,
                 at(s.residual, here), s.y + here, count, n, along, s.period * s.D, terms.pivot,
                 terms.scale, terms.shift, s.activation, s.far, past, ahead)


cdef inline void _transform_back(const Stretches* s, Py_ssize_t m, Py_ssize_t first,
                                 Py_ssize_t last, const Terms* terms, seam* past,
                                 Py_ssize_t ahead) noexcept nogil:
    """Pieces of a stretch, backwards, to meet what the first sweep left in the cache."""
    cdef Py_ssize_t p
    for p in range(last - 1, first - 1, -1):
        _transform(s, m, p * s.piece, 1, min(s.piece, s.D - p * s.piece), terms, past, ahead)


cdef inline void _normalize_whole(void* work, int member, int members) noexcept nogil:
    """A few stretches at a time: many sums are under way at once, and all is still in L1."""
    cdef:
        const Stretches* s = <const Stretches*> work
        Py_ssize_t m = share(s.M, member, members), last = share(s.M, member + 1, members)
        Py_ssize_t some = max(1, min(<Py_ssize_t> UNITS, BLOCK // (2 * s.D))), count, ahead
        Py_ssize_t pieces = (s.D + s.piece - 1) // s.piece
        double mu[UNITS]
        double m2[UNITS]
        Terms terms
        seam joint
        seam* past = open_seam(&joint, s.streaming)
    while m < last:
        count = min(some, last - m)
        _measure(s, m * s.D, count, s.D, mu, m2)
        _finish(s, m, count, mu, m2, &terms)
        ahead = count * s.D if m + 2 * count <= s.M else 0
        if pieces > 1:
            _transform_back(s, m, 0, pieces, &terms, past, ahead)
        else:
            _transform(s, m, 0, count, s.D, &terms, past, ahead)
        m += count
    end_seam(past)


cdef inline void _normalize_short(void* work, int member, int members) noexcept nogil:
    """A few stretches at a time, so that what is added up is still in cache."""
    cdef:
        const Stretches* s = <const Stretches*> work
        Py_ssize_t first = share(s.M, member, members), last = share(s.M, member + 1, members)
        Py_ssize_t some = last - first if s.addend is NULL else BLOCK // s.D, m, count, here
        const element* x = s.x if s.addend is NULL else s.total
        seam joint
        seam* past = open_seam(&joint, s.streaming)
    m = first
    while m < last:
        count, here = min(some, last - m), m * s.D
        if s.addend is not NULL:
            add(s.x + here, s.addend + here, s.total + here, count * s.D)
        normalize_short(x + here, s.weight, s.bias, s.y + here, count, s.D, m % s.period * s.D,
                        s.period * s.D, s.eps, at(s.mean, m), at(s.var, m), s.rstd + m, past)
        m += count
    end_seam(past)


cdef inline void _normalize_pieces(void* work, int member, int members) noexcept nogil:
    cdef:
        const Stretches* s = <const Stretches*> work
        Py_ssize_t pieces = (s.D + s.piece - 1) // s.piece
        Py_ssize_t first = share(pieces, member, members)
        Py_ssize_t last = share(pieces, member + 1, members), m, p
        double* piece_mu
        double* piece_m2
        double mu, m2
        Terms terms
        seam joint
        seam* past = open_seam(&joint, s.streaming)
    for m in range(s.M):
        # By turns, so that nobody has to wait before the next stretch.
        piece_mu = s.wide + (m % 2) * 2 * PIECES
        piece_m2 = piece_mu + PIECES
        for p in range(first, last):
            _measure(s, m * s.D + p * s.piece, 1, min(s.piece, s.D - p * s.piece), piece_mu + p,
                     piece_m2 + p)
        team_barrier(members)
        mu, m2 = piece_mu[0], piece_m2[0]
        for p in range(1, pieces):
            if s.mean is not NULL:
                merge_moments(p * s.piece, &mu, &m2, min(s.piece, s.D - p * s.piece), piece_mu[p],
                              piece_m2[p])
            else:
                m2 += piece_m2[p]
        _finish(s, m, 1, &mu, &m2, &terms)
        _transform_back(s, m, first, last, &terms, past, 0)
    end_seam(past)


cdef inline Py_ssize_t _piece(Py_ssize_t D) noexcept nogil:
    return ((D + PIECES - 1) // PIECES + BLOCK - 1) // BLOCK * BLOCK


cdef inline bint _begins_line(const real* parameter) noexcept nogil:
    return <uintptr_t> parameter % LINE_BYTES == 0


cdef inline const real* _lined(const real* parameter, real* copy, Py_ssize_t length) noexcept nogil:
    """The same, beginning a line."""
    if _begins_line(parameter):
        return parameter
    return <const real*> memcpy(copy, parameter, length * sizeof(real))


cdef inline void _line_up(Stretches* s) noexcept nogil:
    """Weight and bias, or NULL, are read for every few stretches; `lined` is to be freed."""
    cdef Py_ssize_t length = s.period * s.D, pitch = whole_lines(length)
    s.lined = NULL
    if s.M >= LINED * s.period and not (_begins_line(s.weight) and _begins_line(s.bias)):
        s.lined = <real*> new_lines(2 * pitch * sizeof(real))
    if s.lined is not NULL:
        s.weight = _lined(s.weight, s.lined, length)
        s.bias = _lined(s.bias, s.lined + pitch, length)


cdef inline void normalize_stretches(Stretches* s, int threads) noexcept nogil:
    cdef double wide[4 * PIECES]
    _line_up(s)
    if s.D >= LONG and s.M < FEW:
        s.wide = wide
        s.piece = _piece(s.D)
        team(_normalize_pieces, s, threads)
    elif (s.D <= SHORT_VECTORS * LANES and s.residual is NULL and not s.activation
          and (s.mean is NULL or s.period > 1 or several_a_vector(s.D))):
        team(_normalize_short, s, threads)
    else:
        # The hardware fetches what is far away better from the first element to the last.
        s.piece = s.D if s.far or s.streaming else CLOSE // <Py_ssize_t> sizeof(element)
        team(_normalize_whole, s, threads)
    free(s.lined)


cdef inline void _backward_together(const Stretches* s, Py_ssize_t m, Py_ssize_t count,
                                    real* grad_weight, real* grad_bias, seam* past) noexcept nogil:
    """Up to PAIR stretches; grad_weight and grad_bias are added to, unless NULL."""
    cdef:
        double sums[3 * PAIR]
        Py_ssize_t here = m * s.D, along = (m % s.period) * s.D
    pair_backward_sums(s.grad_y + here, s.x + here, at(s.weight, along), count, s.D, at(s.mean, m),
                       sums, at(s.grad_x, here) if s.fetching and not s.streaming else NULL)
    backward_affine_along(s.grad_y + here, s.x + here, at(s.weight, along),
                          at(s.grad_total, here), at(s.grad_x, here), count, s.D, at(s.mean, m),
                          s.rstd + m, sums, 1.0 / s.D, grad_weight, grad_bias, past,
                          s.fetching and m + count + PAIR <= s.M)


cdef inline bint in_registers(const Stretches* s) noexcept nogil:
    """Whether stretches stay there between their sums and grad_x, and add to `wide` themselves."""
    return s.D <= BACKWARD_SHORT * LANES


cdef inline void _backward_part(const Stretches* s, Py_ssize_t part, Py_ssize_t split,
                                real* sums, seam* past) noexcept nogil:
    """`sums` are this member's, zero before and after."""
    cdef:
        Py_ssize_t repeats = s.M // s.period, length = s.period * s.D, m, g, count, some
        Py_ssize_t first = repeats * part // s.parts * s.period
        Py_ssize_t last = repeats * (part + 1) // s.parts * s.period
        # Of each period.
        Py_ssize_t g_first = s.period * split // s.splits
        Py_ssize_t g_last = s.period * (split + 1) // s.splits
        Py_ssize_t along = g_first * s.D, n = (g_last - g_first) * s.D, here
        double* wide = at(s.wide, 2 * part * length)
    if wide is not NULL:
        memset(wide + along, 0, n * sizeof(double))
        memset(wide + length + along, 0, n * sizeof(double))
    m = first
    if in_registers(s):
        some = last - first if s.period == 1 else BACKWARD_ROWS * s.period
        while m < last:
            for g in range(g_first, g_last):
                here = (m + g) * s.D
                backward_short(s.grad_y + here, s.x + here, at(s.weight, g * s.D),
                               at(s.grad_total, here), at(s.grad_x, here),
                               min(some, last - m) // s.period, s.D, s.period, at(s.mean, m + g),
                               s.rstd + m + g, at(wide, g * s.D), at(wide, length + g * s.D), past)
            m += some
        return
    some = PAIR if s.period == 1 else s.period
    while m < last:
        count = min(some, last - m) if s.period == 1 else 1
        for g in range(g_first, g_last):
            _backward_together(s, m + g, count, at(sums, g * s.D), at(sums, s.pitch + g * s.D),
                               past)
        m += some
        if wide is not NULL and (m >= last or (m - first) % (BACKWARD_ROWS * s.period) == 0):
            flush_reals(wide + along, sums + along, n)
            flush_reals(wide + length + along, sums + s.pitch + along, n)


cdef inline void _backward_whole(void* work, int member, int members) noexcept nogil:
    cdef:
        const Stretches* s = <const Stretches*> work
        Py_ssize_t length = s.period * s.D, tasks = s.parts * s.splits, p
        real* sums = at(s.sums, member * own_lines(2 * s.pitch))
        seam joint
        seam* past = open_seam(&joint, s.streaming)
    if sums is not NULL and not in_registers(s):
        memset(sums, 0, 2 * s.pitch * sizeof(real))
    for p in range(share(tasks, member, members), share(tasks, member + 1, members)):
        _backward_part(s, p // s.splits, p % s.splits, sums, past)
    end_seam(past)
    sum_parts(s.wide, s.parts, length, member, members, s.grad_weight, s.grad_bias)


cdef inline void _backward_pieces(void* work, int member, int members) noexcept nogil:
    """One stretch at a time; each piece keeps the gradients of its own parameters in `sums`."""
    cdef:
        const Stretches* s = <const Stretches*> work
        Py_ssize_t pieces = (s.D + s.piece - 1) // s.piece
        Py_ssize_t first = share(pieces, member, members)
        Py_ssize_t last = share(pieces, member + 1, members), m, p, n, start, here, i
        Py_ssize_t own = min(last * s.piece, s.D) - first * s.piece
        double* sums
        double total[3]
        seam joint
        seam* past = open_seam(&joint, s.streaming)
    if s.sums is not NULL and own > 0:
        memset(s.sums + first * s.piece, 0, own * sizeof(real))
        memset(s.sums + s.pitch + first * s.piece, 0, own * sizeof(real))
    for m in range(s.M):
        sums = s.wide + (m % 2) * 3 * PIECES
        for p in range(first, last):
            start = p * s.piece
            here = m * s.D + start
            pair_backward_sums(s.grad_y + here, s.x + here, at(s.weight, start), 1,
                               min(s.piece, s.D - start), at(s.mean, m), sums + 3 * p,
                               <const element*> NULL)
        team_barrier(members)
        total[0] = total[1] = total[2] = 0
        for i in range(3 * pieces):
            total[i % 3] += sums[i]
        for p in range(last - 1, first - 1, -1):
            start = p * s.piece
            here = m * s.D + start
            backward_affine_along(s.grad_y + here, s.x + here, at(s.weight, start),
                                  at(s.grad_total, here), at(s.grad_x, here), 1,
                                  min(s.piece, s.D - start), at(s.mean, m), s.rstd + m, total,
                                  1.0 / s.D, at(s.sums, start), at(s.sums, s.pitch + start),
                                  past, False)
    end_seam(past)
    for p in range(first, last):
        start = p * s.piece
        n = min(s.piece, s.D - start)
        for i in range(start, start + n):
            if s.grad_weight is not NULL:
                s.grad_weight[i] = s.sums[i]
            if s.grad_bias is not NULL:
                s.grad_bias[i] = s.sums[s.pitch + i]


cdef inline int backward_stretches(Stretches* s, Py_ssize_t slab, int threads) noexcept nogil:
    """grad_weight and grad_bias, where wanted, are `period` * D long. -1 if out of memory."""
    cdef:
        Py_ssize_t length = s.period * s.D, repeats = s.M // s.period
        Py_ssize_t row_bytes = s.D * sizeof(element), at_work
        bint parameters = s.grad_weight is not NULL or s.grad_bias is not NULL
        bint pieces = s.D >= LONG and s.M < FEW and s.period == 1
        size_t nbytes, wide_bytes
        double wide[6 * PIECES]
    s.wide, s.sums, s.pitch = NULL, NULL, whole_lines(length)
    s.parts = max(1, min(repeats // PAIR_ROWS, <Py_ssize_t> 2),
                  min(repeats // FEW_ROWS, <Py_ssize_t> FEW_PARTS),
                  min(repeats // ROWS, <Py_ssize_t> PARTS))
    s.splits = min(s.period, <Py_ssize_t> SPLITS) if s.parts < FEW_PARTS else 1
    # To turn vectors costs more than stores past the caches bring where much is still in them.
    s.streaming = s.streaming and (s.far or rows_aligned(s.grad_x, s.D))
    # Not what stays in the team's caches, nor what would push out the rows at work.
    at_work = s.D * (5 * PAIR * sizeof(element) + 3 * sizeof(real))
    s.fetching = 3 * row_bytes * s.M > slab * threads and at_work <= 2 * slab
    if parameters:
        nbytes = own_lines(2 * s.pitch) * (1 if pieces else threads) * sizeof(real)
        # One block: of several, free might give back what the next call would fault in again.
        wide_bytes = 0 if pieces else 2 * s.parts * length * sizeof(double)
        s.sums = <real*> new_lines(nbytes + wide_bytes)
        if s.sums is NULL:
            return -1
        s.wide = <double*> (<char*> s.sums + nbytes)
    _line_up(s)
    if pieces:
        s.wide = wide
        s.piece = _piece(s.D)
        team(_backward_pieces, s, threads)
    else:
        team(_backward_whole, s, threads)
    free(s.lined)
    free(s.sums)
    return 0
