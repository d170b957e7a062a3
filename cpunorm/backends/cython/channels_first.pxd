# channels_first: (N, C, S), groups of C // G channels, affine along C.
#
# A unit is what one statistic covers: for instance and group norm the K planes of a group of one
# image, which lie side by side; for batch norm the N planes of a channel, C * S apart. Units are
# swept in chunks (some planes, or a piece of one). Many units are dealt to the team, so that each
# stays in its member's L2 between two sweeps; few are cut, their chunks dealt to the team. The
# bits are the same either way.
#
# Planes too short for vectors of their own belong to wider problems: a batch is then a matrix of N
# rows whose S neighbouring columns make a channel (strips.pxd), a group a stretch of K * S elements
# with weight and bias repeated S times along it (stretches.pxd).

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from .call cimport Call
from .stretches cimport Stretches, backward_stretches, normalize_stretches
from .strips cimport Images, apply_images, backward_images, images_of, normalize_images
from .sweeps cimport (
    affine, at, backward_affine, backward_sums, element, merge_moments, real, rstd_of, share,
    stream_fence, sum_parts, team, team_barrier, variance,
)
from .sweeps cimport moments as stretch_moments

cdef enum:
    CHUNK = 1 << 14         # elements, a multiple of the block of sweeps.h
    PARTS = 32              # at most, of the images in backward
    SHORT = 8               # elements of a plane that is too short


cdef struct Units:
    const Call* call
    Py_ssize_t K
    Py_ssize_t units
    Py_ssize_t planes, stride               # of a unit, from one to the next
    Py_ssize_t planes_per_chunk, pieces     # one of the two is 1; pieces of a plane
    Py_ssize_t chunks                       # of a unit
    bint batch
    # Scratch; of the whole team where units are cut, else a part for each member.
    double* scratch
    Py_ssize_t size
    # Of the backward pass.
    Py_ssize_t parts, entries
    double* sums                            # (parts, 2, C), or NULL
    bint frozen


cdef struct Chunk:
    Py_ssize_t first, planes
    Py_ssize_t start, length                # in each plane
    Py_ssize_t offset                       # in the unit


cdef inline Units units_of(const Call* call) noexcept nogil:
    cdef Units u
    memset(&u, 0, sizeof(u))
    u.call = call
    u.K = call.C // call.G
    u.units = call.B * call.G
    u.batch = call.B < call.N
    u.planes = call.N // call.B * u.K
    u.stride = call.C * call.S if u.batch else call.S
    u.planes_per_chunk = max(1, CHUNK // call.S)
    u.pieces = (call.S + CHUNK - 1) // CHUNK
    u.chunks = (u.planes + u.planes_per_chunk - 1) // u.planes_per_chunk * u.pieces
    return u


cdef inline bint worth_dealing(Py_ssize_t tasks, int threads) noexcept nogil:
    """Whether no member of the team would have much less to do than the others."""
    return threads == 1 or tasks % threads == 0 or tasks >= 8 * threads


cdef inline Py_ssize_t unit_at(const Units* u, Py_ssize_t unit) noexcept nogil:
    """Where the unit-th of the B * G units begins in x."""
    return unit * (u.call.S if u.batch else u.planes * u.stride)


cdef inline Chunk chunk_of(const Units* u, Py_ssize_t index) noexcept nogil:
    cdef Chunk chunk
    chunk.first = index // u.pieces * u.planes_per_chunk
    chunk.planes = min(u.planes_per_chunk, u.planes - chunk.first)
    chunk.start = index % u.pieces * CHUNK
    chunk.length = min(<Py_ssize_t> CHUNK, u.call.S - chunk.start)
    chunk.offset = chunk.first * u.stride + chunk.start
    return chunk


# -------------------------------------------------------------------------------------- forward


cdef inline Py_ssize_t measure_chunk(const Units* u, Py_ssize_t unit, Py_ssize_t index,
                                     double* mean, double* m2) noexcept nogil:
    """Return how many values there are."""
    cdef:
        Chunk chunk = chunk_of(u, index)
        const element* x = <const element*> u.call.x + unit_at(u, unit) + chunk.offset
        Py_ssize_t count = chunk.planes * chunk.length
    if u.batch:
        stretch_moments(x, chunk.planes, u.stride, chunk.length, mean, m2)
    else:
        stretch_moments(x, 1, 0, count, mean, m2)
    return count


cdef inline void finish(const Units* u, Py_ssize_t unit, double mu, double m2,
                        double* r) noexcept nogil:
    cdef double v = variance(m2, u.planes * u.call.S)
    (<real*> u.call.mean)[unit] = <real> mu
    (<real*> u.call.var)[unit] = <real> v
    if u.call.rstd is not NULL:
        r[0] = rstd_of(v, u.call.eps)
        (<real*> u.call.rstd)[unit] = <real> r[0]


cdef inline void transform_chunk(const Units* u, Py_ssize_t unit, Py_ssize_t index, double mean,
                                 double rstd) noexcept nogil:
    cdef:
        const Call* call = u.call
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t here = unit_at(u, unit) + chunk.offset
        Py_ssize_t c = unit % call.G * u.K + (0 if u.batch else chunk.first)
    affine(<const element*> call.x + here, at(<const element*> call.residual, here),
           <element*> call.y + here, chunk.planes, u.stride, chunk.length, &mean, &rstd, 0,
           at(<const real*> call.weight, c), at(<const real*> call.bias, c),
           0 if u.batch else 1, call.activation, call.streaming)


cdef inline void _normalize_dealt(void* work, int member, int members) noexcept nogil:
    cdef:
        const Units* u = <const Units*> work
        Py_ssize_t unit, q, n, count
        double mean, m2, r, chunk_mean, chunk_m2
    for unit in range(share(u.units, member, members), share(u.units, member + 1, members)):
        n = measure_chunk(u, unit, 0, &mean, &m2)
        for q in range(1, u.chunks):
            count = measure_chunk(u, unit, q, &chunk_mean, &chunk_m2)
            merge_moments(n, &mean, &m2, count, chunk_mean, chunk_m2)
            n += count
        finish(u, unit, mean, m2, &r)
        if u.call.y is not NULL:
            # Backwards, to meet what the first sweep left in the cache.
            for q in range(u.chunks - 1, -1, -1):
                transform_chunk(u, unit, q, mean, r)
    if u.call.streaming:
        stream_fence()


cdef inline void _normalize_cut(void* work, int member, int members) noexcept nogil:
    cdef:
        const Units* u = <const Units*> work
        Py_ssize_t first = share(u.chunks, member, members)
        Py_ssize_t last = share(u.chunks, member + 1, members), unit, q, n, count
        double* chunk_mean
        double* chunk_m2
        double mean, m2, r
        Chunk chunk
    for unit in range(u.units):
        # By turns, so that nobody has to wait before the next unit.
        chunk_mean = u.scratch + (unit % 2) * 2 * u.chunks
        chunk_m2 = chunk_mean + u.chunks
        for q in range(first, last):
            measure_chunk(u, unit, q, chunk_mean + q, chunk_m2 + q)
        team_barrier(members)
        mean, m2, n = chunk_mean[0], chunk_m2[0], 0
        for q in range(u.chunks):
            chunk = chunk_of(u, q)
            count = chunk.planes * chunk.length
            if q > 0:
                merge_moments(n, &mean, &m2, count, chunk_mean[q], chunk_m2[q])
            n += count
        finish(u, unit, mean, m2, &r)
        if u.call.y is not NULL:
            for q in range(last - 1, first - 1, -1):
                transform_chunk(u, unit, q, mean, r)
    if u.call.streaming:
        stream_fence()


cdef inline Stretches _stretches(const Units* u) noexcept nogil:
    cdef:
        const Call* call = u.call
        Stretches s
    memset(&s, 0, sizeof(s))
    s.M, s.D, s.period = u.units, u.K * call.S, call.G
    s.x, s.y = <const element*> call.x, <element*> call.y
    s.residual = <const element*> call.residual
    s.weight, s.bias = <const real*> call.weight, <const real*> call.bias
    s.mean, s.var, s.rstd = <real*> call.mean, <real*> call.var, <real*> call.rstd
    s.eps, s.activation, s.streaming = call.eps, call.activation, call.streaming
    return s


cdef inline real* _repeated(const real* parameter, const Call* call, real* out) noexcept nogil:
    """Weight or bias as stretches want them: S times each."""
    cdef Py_ssize_t c, s
    if parameter is NULL:
        return NULL
    for c in range(call.C):
        for s in range(call.S):
            out[c * call.S + s] = parameter[c]
    return out


cdef inline int _normalize_short(const Units* u) noexcept nogil:
    """Groups of short planes."""
    cdef:
        Stretches s = _stretches(u)
        Py_ssize_t length = u.call.C * u.call.S
        real* repeated = NULL
    if u.call.S > 1:
        repeated = <real*> malloc(2 * length * sizeof(real))
        if repeated is NULL:
            return -1
        s.weight = _repeated(s.weight, u.call, repeated)
        s.bias = _repeated(s.bias, u.call, repeated + length)
    normalize_stretches(&s, u.call.threads)
    free(repeated)
    return 0


cdef inline int normalize(const Call* call) noexcept nogil:
    cdef:
        Units u = units_of(call)
        Images images
    if call.S <= SHORT and u.batch:
        images = images_of(call, 1, call.N, call.S)
        return normalize_images(&images)
    if call.S <= SHORT and call.y is not NULL:
        return _normalize_short(&u)
    if worth_dealing(u.units, call.threads):
        team(_normalize_dealt, &u, call.threads)
        return 0
    u.scratch = <double*> malloc(4 * u.chunks * sizeof(double))
    if u.scratch is NULL:
        return -1
    team(_normalize_cut, &u, call.threads)
    free(u.scratch)
    return 0


cdef inline int moments(const Call* call) noexcept nogil:
    """As normalize, with no y and no rstd."""
    return normalize(call)


cdef inline void _apply(void* work, int member, int members) noexcept nogil:
    """Planes in the order of memory: there is nothing to wait for."""
    cdef:
        const Units* u = <const Units*> work
        const Call* call = u.call
        Py_ssize_t C = call.C, S = call.S, planes = call.N * C, plane, last, c, run, unit, here, start
        Py_ssize_t pieces = 1 if planes >= 8 * members else u.pieces, q
        const double* mean = u.scratch
        const double* rstd = mean + u.units
    q = share(planes * pieces, member, members)
    last = share(planes * pieces, member + 1, members)
    while q < last:
        plane = q // pieces
        c = plane % C
        # Neighbouring planes of one image that have a statistic each, or share one.
        run = 1 if pieces > 1 else min(last - q, C - c if u.K == 1 else u.K - c % u.K)
        start = 0 if pieces == 1 else q % pieces * CHUNK
        here = plane * S + start
        unit = c // u.K if u.batch else plane // u.K
        affine(<const element*> call.x + here, at(<const element*> call.residual, here),
               <element*> call.y + here, run, S,
               S if pieces == 1 else min(<Py_ssize_t> CHUNK, S - start), mean + unit, rstd + unit,
               1 if u.K == 1 else 0, at(<const real*> call.weight, c),
               at(<const real*> call.bias, c), 1, call.activation, call.streaming)
        q += run
    if call.streaming:
        stream_fence()


cdef inline int apply(const Call* call) noexcept nogil:
    cdef:
        Units u = units_of(call)
        Images images
        Py_ssize_t i
    if call.S <= SHORT and call.B == 1 and u.K == 1:
        images = images_of(call, 1, call.N, call.S)
        return apply_images(&images)
    u.scratch = <double*> malloc(2 * u.units * sizeof(double))
    if u.scratch is NULL:
        return -1
    for i in range(u.units):
        u.scratch[i] = (<const real*> call.mean)[i]
        u.scratch[u.units + i] = (<const real*> call.rstd)[i]
    team(_apply, &u, call.threads)
    free(u.scratch)
    return 0


# ------------------------------------------------------------------------------------- backward


cdef inline void sum_chunk(const Units* u, Py_ssize_t unit, Py_ssize_t index,
                           double* sums) noexcept nogil:
    """The backward sums of a chunk of a batch, or of every plane or piece of one of a group."""
    cdef:
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t here = unit_at(u, unit) + chunk.offset
        Py_ssize_t entry = index if u.batch else chunk.first * u.pieces + index % u.pieces
    backward_sums(<const element*> u.call.grad_y + here, <const element*> u.call.x + here,
                  <const real*> NULL, chunk.planes, u.stride, chunk.length,
                  (<const real*> u.call.mean)[unit], sums + 3 * entry, 0 if u.batch else 3)


cdef inline void differentiate_chunk(const Units* u, Py_ssize_t unit, Py_ssize_t index, double b,
                                     double c) noexcept nogil:
    cdef:
        const Call* call = u.call
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t here = unit_at(u, unit) + chunk.offset
        Py_ssize_t channel = unit % call.G * u.K + (0 if u.batch else chunk.first)
    backward_affine(<const element*> call.grad_y + here,
                    NULL if u.frozen else <const element*> call.x + here,
                    <element*> call.grad_x + here, chunk.planes, u.stride, chunk.length,
                    (<const real*> call.mean)[unit], (<const real*> call.rstd)[unit],
                    at(<const real*> call.weight, channel), 0 if u.batch else 1, b, c,
                    call.streaming)


cdef inline void first_sweep(const Units* u, Py_ssize_t unit, Py_ssize_t first, Py_ssize_t last,
                             double* sums) noexcept nogil:
    """The sums of some chunks; past constant statistics it is the only sweep."""
    cdef Py_ssize_t q
    for q in range(first, last):
        if not u.frozen or u.sums is not NULL:
            sum_chunk(u, unit, q, sums)
        if u.frozen and u.call.grad_x is not NULL:
            differentiate_chunk(u, unit, q, 0, 0)


cdef inline void combine(const Units* u, Py_ssize_t unit, const double* sums, double* grad_weight,
                         double* grad_bias, double* b, double* c) noexcept nogil:
    """b and c from the sums of a unit; adds to grad_weight and grad_bias, unless NULL."""
    cdef:
        const Call* call = u.call
        const real* weight = at(<const real*> call.weight, unit % call.G * u.K)
        double n = u.planes * call.S, rest = 0, g_sum = 0, gx_sum = 0, g, gx, w
        double rstd = (<const real*> call.rstd)[unit]
        Py_ssize_t i, k
    if not u.frozen:
        # The mean arrives rounded: what was rounded away is the mean of what is left.
        for i in range(u.entries):
            rest += sums[3 * i + 2] / n
    for i in range(u.entries):
        k = 0 if u.batch else i // u.pieces
        w = 1 if weight is NULL else weight[k]
        g, gx = sums[3 * i], sums[3 * i + 1] - rest * sums[3 * i]
        g_sum += w * g
        gx_sum += w * gx
        if grad_weight is not NULL:
            grad_weight[k] += rstd * gx
            grad_bias[k] += g
    b[0] = -rstd * rstd * gx_sum / n
    c[0] = -g_sum / n - b[0] * rest


cdef inline void _backward_dealt(void* work, int member, int members) noexcept nogil:
    """A task is one group of a part of the images."""
    cdef:
        const Units* u = <const Units*> work
        const Call* call = u.call
        double* sums = u.scratch + member * u.size
        Py_ssize_t tasks = u.parts * call.G, task, part, g, image, unit, q
        double b, c
    for task in range(share(tasks, member, members), share(tasks, member + 1, members)):
        part, g = task // call.G, task % call.G
        for image in range(call.B * part // u.parts, call.B * (part + 1) // u.parts):
            unit = image * call.G + g
            memset(sums, 0, u.size * sizeof(double))
            first_sweep(u, unit, 0, u.chunks, sums)
            combine(u, unit, sums, at(u.sums, 2 * part * call.C + g * u.K),
                    at(u.sums, (2 * part + 1) * call.C + g * u.K), &b, &c)
            if not u.frozen and call.grad_x is not NULL:
                for q in range(u.chunks - 1, -1, -1):
                    differentiate_chunk(u, unit, q, b, c)
    if call.streaming:
        stream_fence()
    if u.sums is not NULL:
        team_barrier(members)
        sum_parts(u.sums, u.parts, call.C, share(call.C, member, members),
                  share(call.C, member + 1, members), <real*> call.grad_weight,
                  <real*> call.grad_bias)


cdef inline void _backward_cut(void* work, int member, int members) noexcept nogil:
    cdef:
        const Units* u = <const Units*> work
        const Call* call = u.call
        Py_ssize_t first = share(u.chunks, member, members)
        Py_ssize_t last = share(u.chunks, member + 1, members), part, image, g, unit, q
        double* sums
        double* kept
        double b, c
    for part in range(u.parts):
        for image in range(call.B * part // u.parts, call.B * (part + 1) // u.parts):
            for g in range(call.G):
                unit = image * call.G + g
                # By turns, so that nobody has to wait before the next unit.
                sums = u.scratch + (unit % 2) * u.size
                if member == 0 and unit >= 2:
                    memset(sums, 0, u.size * sizeof(double))
                if unit >= 2:
                    team_barrier(members)
                first_sweep(u, unit, first, last, sums)
                team_barrier(members)
                kept = u.sums if member == 0 else NULL
                combine(u, unit, sums, at(kept, 2 * part * call.C + g * u.K),
                        at(kept, (2 * part + 1) * call.C + g * u.K), &b, &c)
                if not u.frozen and call.grad_x is not NULL:
                    for q in range(last - 1, first - 1, -1):
                        differentiate_chunk(u, unit, q, b, c)
    if call.streaming:
        stream_fence()
    if u.sums is not NULL and member == 0:
        sum_parts(u.sums, u.parts, call.C, 0, call.C, <real*> call.grad_weight,
                  <real*> call.grad_bias)


cdef inline int _backward_short(const Units* u) noexcept nogil:
    """Groups of short planes; the parameters' gradients come S to a channel."""
    cdef:
        const Call* call = u.call
        Stretches s = _stretches(u)
        Py_ssize_t length = call.C * call.S, c, i
        double weight_sum, bias_sum
        real* scratch = <real*> malloc(3 * length * sizeof(real))
        int failed
    if scratch is NULL:
        return -1
    s.weight = _repeated(s.weight, call, scratch)
    s.grad_y, s.grad_x = <const element*> call.grad_y, <element*> call.grad_x
    s.grad_weight = NULL if call.grad_weight is NULL else scratch + length
    s.grad_bias = NULL if call.grad_bias is NULL else scratch + 2 * length
    failed = backward_stretches(&s, call.threads)
    if not failed:
        for c in range(call.C):
            weight_sum = bias_sum = 0
            for i in range(c * call.S, (c + 1) * call.S):
                weight_sum += 0 if s.grad_weight is NULL else s.grad_weight[i]
                bias_sum += 0 if s.grad_bias is NULL else s.grad_bias[i]
            if s.grad_weight is not NULL:
                (<real*> call.grad_weight)[c] = <real> weight_sum
            if s.grad_bias is not NULL:
                (<real*> call.grad_bias)[c] = <real> bias_sum
    free(scratch)
    return failed


cdef inline int _backward(const Call* call, bint frozen) noexcept nogil:
    cdef:
        Units u = units_of(call)
        Images images
        bint dealt
    if call.S <= SHORT and u.batch:
        images = images_of(call, 1, call.N, call.S)
        return backward_images(&images, frozen)
    if call.S <= SHORT and not frozen:
        return _backward_short(&u)
    u.frozen = frozen
    u.parts = min(call.B, <Py_ssize_t> PARTS)
    u.entries = u.chunks if u.batch else u.planes * u.pieces
    u.size = 3 * u.entries
    dealt = worth_dealing(u.parts * call.G, call.threads)
    u.scratch = <double*> calloc(u.size * (call.threads if dealt else 2), sizeof(double))
    if u.scratch is NULL:
        return -1
    if call.grad_weight is not NULL or call.grad_bias is not NULL:
        u.sums = <double*> calloc(2 * u.parts * call.C, sizeof(double))
        if u.sums is NULL:
            free(u.scratch)
            return -1
    team(_backward_dealt if dealt else _backward_cut, &u, call.threads)
    free(u.sums)
    free(u.scratch)
    return 0


cdef inline int backward(const Call* call) noexcept nogil:
    return _backward(call, False)


cdef inline int backward_apply(const Call* call) noexcept nogil:
    return _backward(call, True)
