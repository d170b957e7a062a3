# channels_first: (N, C, S), groups of C // G channels, affine along C.
#
# A unit is what one statistic covers: for instance and group norm the K planes of a group of one
# image, which lie side by side; for batch norm the N planes of a channel, C * S apart. A slab is a
# few neighbouring units, enough for long runs of memory. Many slabs are dealt to the team, so that
# each stays in its member's L2 between two sweeps; where there are few, the chunks of one unit
# after the other (some planes, or a piece of one) are. The bits are the same either way.
#
# Planes too short for vectors of their own belong to wider problems: a batch is then a matrix of N
# rows whose S neighbouring columns make a channel (strips.pxd), a group a stretch of K * S elements
# with weight and bias repeated S times along it (groups.pxd).

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from .call cimport Call
from .groups cimport (
    backward_groups_as_stretches, normalize_groups_as_stretches, short_images, too_few_to_lay_out,
)
from .strips cimport Images, apply_images, backward_images, images_of, normalize_images
from .sweeps cimport (
    LANES, LINE_BYTES, UNITS, affine, at, backward_affine, combine_channels, element, end_seam,
    image_parts, merge_moments, new_lines, open_seam, own_lines, plane_backward_sums, plane_moments,
    real, seam, settle, share, stretch_moments, stretches_backward_sums, sum_parts, take_rstd, team,
    team_barrier, worth_dealing,
)

cdef enum:
    CHUNK = 1 << 14         # elements, a multiple of the block of sweeps.h
    RUN = 1 << 12           # bytes of a slab that should lie side by side,
    LARGER = 8              # though it be so many times too large for L2: the last cache is near
    SMALL = 1 << 14         # bytes of a slab of groups that stay in L1,
    NEAR = 1 << 15          # and of one so near that the next may be fetched meanwhile
    BRIEF = 1 << 11         # bytes of a unit whose y no processor foresees
    MANY = 1 << 9           # units of a slab of groups in backward
    SLABS = 4               # slabs of a tensor that L2 does not hold
    SHORT = 8               # elements of a plane that is too short,
    LONGEST = 4             # and vectors of one that is where there are many,
    SHORT_IMAGE = 1 << 12   # or elements of images that are short, and then of a plane
    NEAR_PLANE = 1 << 7     # in the caches
    FAR_PLANE = 1 << 9      # or past L2


cdef struct Units:
    const Call* call
    Py_ssize_t K
    Py_ssize_t planes, stride               # of a unit, from one to the next
    Py_ssize_t planes_per_chunk, pieces     # one of the two is 1; pieces of a plane
    Py_ssize_t chunks                       # of a unit
    bint batch
    Py_ssize_t some, images                 # units of an image in a slab, images in one
    Py_ssize_t slabs                        # of an image
    # Scratch; of the whole team where units are cut, else a part for each member.
    double* scratch
    Py_ssize_t size
    # Of the backward pass.
    Py_ssize_t parts
    double* sums                            # (parts, 2, C), or NULL
    bint frozen


cdef struct Chunk:
    Py_ssize_t first, planes
    Py_ssize_t start, length                # in each plane
    Py_ssize_t offset                       # in the unit


cdef inline Py_ssize_t unit_bytes(const Units* u) noexcept nogil:
    return u.planes * u.call.S * sizeof(element)


cdef inline Py_ssize_t ending_lines(Py_ssize_t count, Py_ssize_t S) noexcept nogil:
    """At most `count` planes, and so many that they end with a line; of too few, all."""
    cdef Py_ssize_t line = LINE_BYTES // sizeof(element), step = line
    while step % 2 == 0 and step // 2 * S % line == 0:
        step //= 2
    return count // step * step if count >= step else count


cdef inline Units units_of(const Call* call, bint backward) noexcept nogil:
    cdef:
        Units u
        Py_ssize_t tasks = 8 * call.threads
    memset(&u, 0, sizeof(u))
    u.call = call
    u.K = call.C // call.G
    u.batch = call.B < call.N
    u.planes = call.N // call.B * u.K
    u.stride = call.C * call.S if u.batch else call.S
    u.planes_per_chunk = max(1, CHUNK // call.S)
    u.pieces = (call.S + CHUNK - 1) // CHUNK
    u.chunks = (u.planes + u.planes_per_chunk - 1) // u.planes_per_chunk * u.pieces
    if u.batch:
        u.some = min(RUN // (call.S * <Py_ssize_t> sizeof(element)),
                     LARGER * call.slab // unit_bytes(&u))
        u.some = min(u.some, <Py_ssize_t> UNITS)
    elif backward and u.chunks == 1:
        # Of two arrays, runs so short as those that stay in L1 cost more than L2 does, but where
        # the processor foresees them.
        u.some = (call.slab // 2 if call.fetching else <Py_ssize_t> SMALL) // unit_bytes(&u)
        u.some = min(u.some, <Py_ssize_t> MANY)
    else:
        u.some = min(SMALL // unit_bytes(&u), <Py_ssize_t> UNITS)
    u.some = max(1, min(u.some, (call.B * call.G + tasks - 1) // tasks))
    if u.batch and call.streaming:
        u.some = ending_lines(u.some, call.S)
    u.images = max(1, u.some // call.G)
    u.some = min(u.some, call.G)
    u.slabs = (call.G + u.some - 1) // u.some
    return u


cdef inline Py_ssize_t unit_at(const Units* u, Py_ssize_t unit) noexcept nogil:
    """Where the unit-th of the B * G units begins in x."""
    return unit * (u.call.S if u.batch else u.planes * u.stride)


cdef inline Py_ssize_t next_slab(const Units* u, Py_ssize_t unit, Py_ssize_t count) noexcept nogil:
    """How far away is what is fetched while a slab is transformed, 0 where that is nothing."""
    cdef const Call* call = u.call
    cdef Py_ssize_t length = unit_at(u, count), units = call.B * call.G
    if units * unit_bytes(u) < SLABS * call.slab or unit + 2 * count > units:
        return 0
    if u.batch:
        return length if call.fetching else 0
    # What lies side by side any processor foresees, but not while it writes.
    return length if length * <Py_ssize_t> sizeof(element) <= NEAR else 0


cdef inline Chunk chunk_of(const Units* u, Py_ssize_t index) noexcept nogil:
    cdef Chunk chunk
    chunk.first = index // u.pieces * u.planes_per_chunk
    chunk.planes = min(u.planes_per_chunk, u.planes - chunk.first)
    chunk.start = index % u.pieces * CHUNK
    chunk.length = min(<Py_ssize_t> CHUNK, u.call.S - chunk.start)
    chunk.offset = chunk.first * u.stride + chunk.start
    return chunk


cdef inline bint short_planes(const Call* call, Py_ssize_t longest) noexcept nogil:
    """Whether they are, at most `longest`; or images so short that no few planes of them, which lie
    side by side, are a long run of memory."""
    cdef Py_ssize_t image = call.C * call.S, most = LONGEST * <Py_ssize_t> LANES
    if image <= SHORT_IMAGE:
        most = NEAR_PLANE
        if call.N * image * <Py_ssize_t> sizeof(element) >= SLABS * call.slab:
            most = FAR_PLANE
    return call.S <= SHORT or call.S <= min(longest, most)


cdef inline bint short_groups(const Units* u, bint backward) noexcept nogil:
    """Whether groups, or the channels of images that have few, are stretches."""
    cdef const Call* call = u.call
    if short_images(call, backward):
        return True
    if u.K == 1 and (u.batch or call.C >= LANES):
        return False
    if too_few_to_lay_out(call, backward):
        return False
    return call.S <= SHORT or call.S < LANES


# -------------------------------------------------------------------------------------- forward


cdef inline Py_ssize_t measure_chunk(const Units* u, Py_ssize_t unit, Py_ssize_t count,
                                     Py_ssize_t index, double* mean, double* m2) noexcept nogil:
    """The moments of a chunk of `count` units. Return how many values each has."""
    cdef:
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t here = unit_at(u, unit) + chunk.offset
        const element* x = <const element*> u.call.x + here
        const element* y = NULL
    if not u.call.streaming and (u.call.fetching or unit_bytes(u) <= BRIEF):
        y = at(<const element*> u.call.y, here)
    if u.batch:
        plane_moments(x, chunk.planes, u.stride, count, chunk.length, mean, m2)
    else:
        # Units of more than one chunk come one at a time.
        stretch_moments(x, count, chunk.planes * chunk.length, mean, m2, y)
    return chunk.planes * chunk.length


cdef inline void finish(const Units* u, Py_ssize_t unit, Py_ssize_t count, const double* mu,
                        const double* m2, double* r) noexcept nogil:
    """The statistics of `count` units."""
    settle(mu, m2, count, u.planes * u.call.S, u.call.eps, r, <real*> u.call.mean + unit,
           <real*> u.call.var + unit, at(<real*> u.call.rstd, unit))


cdef inline void transform_planes(
    const Units* u, Py_ssize_t here, Py_ssize_t planes, Py_ssize_t length, Py_ssize_t c,
    const double* mean, const double* rstd, Py_ssize_t ahead, seam* past,
) noexcept nogil:
    """Planes side by side, or a piece of one, of channels from c on, statistics from the first."""
    cdef const Call* call = u.call
    affine(<const element*> call.x + here, at(<const element*> call.residual, here),
           <element*> call.y + here, planes, length, u.K, mean, rstd,
           at(<const real*> call.weight, c), at(<const real*> call.bias, c), call.activation,
           past, ahead)


cdef inline void transform_chunk(const Units* u, Py_ssize_t unit, Py_ssize_t count,
                                 Py_ssize_t index, const double* mean, const double* rstd,
                                 seam* past) noexcept nogil:
    """A chunk of `count` units; what comes next is the same of the units after them."""
    cdef:
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t here = unit_at(u, unit) + chunk.offset, c = unit % u.call.G * u.K, p
        Py_ssize_t ahead = next_slab(u, unit, count)
    if u.batch:
        for p in range(chunk.planes - 1, -1, -1):
            transform_planes(u, here + p * u.stride, count, chunk.length, c, mean, rstd, ahead,
                             past)
    else:
        # Units of more than one chunk come one at a time.
        transform_planes(u, here, count * chunk.planes, chunk.length, c + chunk.first, mean, rstd,
                         ahead, past)


cdef inline void normalize_slab(const Units* u, Py_ssize_t unit, Py_ssize_t count,
                                seam* past) noexcept nogil:
    cdef:
        double mean[UNITS]
        double m2[UNITS]
        double rstd[UNITS]
        double chunk_mean[UNITS]
        double chunk_m2[UNITS]
        Py_ssize_t q, k, n, more
    n = measure_chunk(u, unit, count, 0, mean, m2)
    for q in range(1, u.chunks):
        more = measure_chunk(u, unit, count, q, chunk_mean, chunk_m2)
        for k in range(count):
            merge_moments(n, mean + k, m2 + k, more, chunk_mean[k], chunk_m2[k])
        n += more
    finish(u, unit, count, mean, m2, rstd)
    if u.call.y is not NULL:
        # Backwards, to meet what the first sweep left in the cache.
        for q in range(u.chunks - 1, -1, -1):
            transform_chunk(u, unit, count, q, mean, rstd, past)


cdef inline void _normalize_dealt(void* work, int member, int members) noexcept nogil:
    cdef:
        const Units* u = <const Units*> work
        Py_ssize_t tasks = u.call.B * u.slabs, task, g
        seam joint
        seam* past = open_seam(&joint, u.call.streaming)
    for task in range(share(tasks, member, members), share(tasks, member + 1, members)):
        g = task % u.slabs * u.some
        normalize_slab(u, task // u.slabs * u.call.G + g, min(u.some, u.call.G - g), past)
    end_seam(past)


cdef inline void _normalize_cut(void* work, int member, int members) noexcept nogil:
    cdef:
        const Units* u = <const Units*> work
        Py_ssize_t first = share(u.chunks, member, members)
        Py_ssize_t last = share(u.chunks, member + 1, members), unit, q, n, count
        double* chunk_mean
        double* chunk_m2
        double mean, m2, r
        Chunk chunk
        seam joint
        seam* past = open_seam(&joint, u.call.streaming)
    for unit in range(u.call.B * u.call.G):
        # By turns, so that nobody has to wait before the next unit.
        chunk_mean = u.scratch + (unit % 2) * 2 * u.chunks
        chunk_m2 = chunk_mean + u.chunks
        for q in range(first, last):
            measure_chunk(u, unit, 1, q, chunk_mean + q, chunk_m2 + q)
        team_barrier(members)
        mean, m2, n = chunk_mean[0], chunk_m2[0], 0
        for q in range(u.chunks):
            chunk = chunk_of(u, q)
            count = chunk.planes * chunk.length
            if q > 0:
                merge_moments(n, &mean, &m2, count, chunk_mean[q], chunk_m2[q])
            n += count
        finish(u, unit, 1, &mean, &m2, &r)
        if u.call.y is not NULL:
            for q in range(last - 1, first - 1, -1):
                transform_chunk(u, unit, 1, q, &mean, &r, past)
    end_seam(past)


cdef inline int normalize(const Call* call) noexcept nogil:
    """Of moments alone, there is no y."""
    cdef:
        Units u = units_of(call, False)
        Images images
    if u.batch and short_planes(call, 2 * call.N):
        images = images_of(call, 1, call.N, call.S)
        return normalize_images(&images)
    if short_groups(&u, False) and call.y is not NULL:
        return normalize_groups_as_stretches(call, call.S)
    if worth_dealing(call.B * u.slabs, unit_bytes(&u), call.threads):
        team(_normalize_dealt, &u, call.threads)
        return 0
    u.scratch = <double*> malloc(4 * u.chunks * sizeof(double))
    if u.scratch is NULL:
        return -1
    team(_normalize_cut, &u, call.threads)
    free(u.scratch)
    return 0


cdef inline void _apply(void* work, int member, int members) noexcept nogil:
    """Planes in the order of memory: there is nothing to wait for."""
    cdef:
        const Units* u = <const Units*> work
        const Call* call = u.call
        Py_ssize_t C = call.C, S = call.S, planes = call.N * C, plane, c, run, unit, start
        Py_ssize_t pieces = 1 if planes >= 8 * members else u.pieces
        Py_ssize_t q = share(planes * pieces, member, members)
        Py_ssize_t last = share(planes * pieces, member + 1, members)
        const double* mean = u.scratch
        const double* rstd = mean + call.B * call.G
        seam joint
        seam* past = open_seam(&joint, u.call.streaming)
    while q < last:
        plane = q // pieces
        c = plane % C
        # Neighbouring planes of one image that have a statistic each, or share one.
        run = 1 if pieces > 1 else min(last - q, C - c if u.K == 1 else u.K - c % u.K)
        start = 0 if pieces == 1 else q % pieces * CHUNK
        unit = c // u.K if u.batch else plane // u.K
        transform_planes(u, plane * S + start, run,
                         S if pieces == 1 else min(<Py_ssize_t> CHUNK, S - start), c, mean + unit,
                         rstd + unit, 0, past)
        q += run
    end_seam(past)


cdef inline int apply(const Call* call) noexcept nogil:
    cdef:
        Units u = units_of(call, False)
        Images images
        Py_ssize_t units = call.B * call.G, i
        real* rstd
    if (call.B == 1 and u.K == 1 and call.S < 2 * <Py_ssize_t> LANES
            and short_planes(call, 16 * call.N)):
        images = images_of(call, 1, call.N, call.S)
        return apply_images(&images)
    u.scratch = <double*> malloc(units * (2 * sizeof(double) + sizeof(real)))
    if u.scratch is NULL:
        return -1
    rstd = <real*> (u.scratch + 2 * units)
    take_rstd(call, 0, units, rstd)
    for i in range(units):
        u.scratch[i], u.scratch[units + i] = (<const real*> call.mean)[i], rstd[i]
    team(_apply, &u, call.threads)
    free(u.scratch)
    return 0


# ------------------------------------------------------------------------------------- backward


cdef inline Py_ssize_t width_of(const Units* u, Py_ssize_t count) noexcept nogil:
    """Channels of `count` units; of a batch, K is 1."""
    return count * u.K


cdef inline void sum_chunk(const Units* u, Py_ssize_t unit, Py_ssize_t count, Py_ssize_t index,
                           double* sums, Py_ssize_t pieces) noexcept nogil:
    """Add the backward sums of a chunk to sums, (3, channels, pieces); with one piece, that is
    where all chunks go."""
    cdef:
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t here = unit_at(u, unit) + chunk.offset, length = width_of(u, count) * pieces
        const element* grad_y = <const element*> u.call.grad_y + here
        const element* x = <const element*> u.call.x + here
        const real* mean = <const real*> u.call.mean + unit
    if u.batch:
        sums += index % pieces
        plane_backward_sums(grad_y, x, chunk.planes, u.stride, count, chunk.length, mean,
                            u.call.fetching, sums, sums + length, sums + 2 * length)
    else:
        # Units of more than one chunk come one at a time.
        sums += chunk.first * pieces + index % pieces
        stretches_backward_sums(grad_y, x, count * chunk.planes, chunk.length, mean, u.K, sums,
                                sums + length, sums + 2 * length)


cdef inline void differentiate_planes(
    const Units* u, Py_ssize_t here, Py_ssize_t planes, Py_ssize_t length, Py_ssize_t c,
    Py_ssize_t unit, const real* b, const real* c_, Py_ssize_t ahead, seam* past,
) noexcept nogil:
    """Planes as `transform_planes` has them, with the statistics from those of a unit on."""
    cdef const Call* call = u.call
    backward_affine(<const element*> call.grad_y + here,
                    NULL if u.frozen else <const element*> call.x + here,
                    <element*> call.grad_x + here, planes, length, u.K,
                    <const real*> call.mean + unit, <const real*> call.rstd + unit, b, c_,
                    at(<const real*> call.weight, c), past, ahead)


cdef inline void differentiate_chunk(const Units* u, Py_ssize_t unit, Py_ssize_t count,
                                     Py_ssize_t index, const real* b, const real* c_,
                                     seam* past) noexcept nogil:
    cdef:
        Chunk chunk = chunk_of(u, index)
        Py_ssize_t here = unit_at(u, unit) + chunk.offset, c = unit % u.call.G * u.K, p
        Py_ssize_t ahead
    if u.batch:
        ahead = next_slab(u, unit, count)
        for p in range(chunk.planes - 1, -1, -1):
            differentiate_planes(u, here + p * u.stride, count, chunk.length, c, unit, b, c_, ahead,
                                 past)
    else:
        differentiate_planes(u, here, count * chunk.planes, chunk.length, c + chunk.first, unit, b,
                             c_, 0, past)


cdef inline void first_sweep(const Units* u, Py_ssize_t unit, Py_ssize_t count, Py_ssize_t first,
                             Py_ssize_t last, double* sums, Py_ssize_t pieces,
                             seam* past) noexcept nogil:
    """The sums of some chunks; past constant statistics it is the only sweep."""
    cdef Py_ssize_t q
    for q in range(first, last):
        if not u.frozen or u.sums is not NULL:
            sum_chunk(u, unit, count, q, sums, pieces)
        if u.frozen and u.call.grad_x is not NULL:
            differentiate_chunk(u, unit, count, q, NULL, NULL, past)


cdef inline void combine(const Units* u, Py_ssize_t unit, Py_ssize_t count, const double* sums,
                         double* grad_weight, double* grad_bias, real* b, real* c_) noexcept nogil:
    """b and c of some units; adds to grad_weight and grad_bias, unless NULL."""
    cdef Py_ssize_t length = width_of(u, count), c = unit % u.call.G * u.K
    if u.frozen and grad_weight is NULL:
        return
    combine_channels(u.K, count, sums, sums + length, sums + 2 * length,
                     at(<const real*> u.call.weight, c), u.planes * u.call.S, not u.frozen,
                     <const real*> u.call.rstd + unit, at(grad_weight, c), at(grad_bias, c), b, c_)


cdef inline void backward_slab(const Units* u, Py_ssize_t unit, Py_ssize_t count,
                               Py_ssize_t images, double* sums, double* grad_weight,
                               double* grad_bias, seam* past) noexcept nogil:
    """`count` units of each of some images."""
    cdef:
        real b[MANY]
        real c[MANY]
        Py_ssize_t G = u.call.G, image, q
    for image in range(images):
        memset(sums, 0, 3 * width_of(u, count) * sizeof(double))
        first_sweep(u, unit + image * G, count, 0, u.chunks, sums, 1, past)
        combine(u, unit + image * G, count, sums, grad_weight, grad_bias, b + image * count,
                c + image * count)
    if u.frozen or u.call.grad_x is NULL:
        return
    for image in range(images - 1, -1, -1):
        for q in range(u.chunks - 1, -1, -1):
            differentiate_chunk(u, unit + image * G, count, q, b + image * count,
                                c + image * count, past)


cdef inline void _backward_dealt(void* work, int member, int members) noexcept nogil:
    """A task is the units of one slab in a part of the images."""
    cdef:
        const Units* u = <const Units*> work
        const Call* call = u.call
        double* sums = u.scratch + member * u.size
        Py_ssize_t tasks = u.parts * u.slabs, C = call.C, task, part, g, count, image, last
        double* grad_weight
        double* grad_bias
        seam joint
        seam* past = open_seam(&joint, u.call.streaming)
    for task in range(share(tasks, member, members), share(tasks, member + 1, members)):
        part, g = task // u.slabs, task % u.slabs * u.some
        count = min(u.some, call.G - g)
        image, last = call.B * part // u.parts, call.B * (part + 1) // u.parts
        grad_weight = at(u.sums, 2 * part * C)
        grad_bias = at(grad_weight, C)
        if u.sums is not NULL:
            memset(grad_weight + g * u.K, 0, width_of(u, count) * sizeof(double))
            memset(grad_bias + g * u.K, 0, width_of(u, count) * sizeof(double))
        while image < last:
            backward_slab(u, image * call.G + g, count, min(u.images, last - image), sums,
                          grad_weight, grad_bias, past)
            image += u.images
    end_seam(past)
    sum_parts(u.sums, u.parts, C, member, members, <real*> call.grad_weight,
              <real*> call.grad_bias)


cdef inline void _backward_cut(void* work, int member, int members) noexcept nogil:
    cdef:
        const Units* u = <const Units*> work
        const Call* call = u.call
        Py_ssize_t first = share(u.chunks, member, members)
        Py_ssize_t last = share(u.chunks, member + 1, members), C = call.C, unit, part, q
        Py_ssize_t pieces = u.chunks if u.batch else u.pieces, width = width_of(u, 1), i
        double* sums
        double* own = u.scratch + 2 * u.size + member * own_lines(3 * width)
        double* kept = u.sums if member == 0 else NULL
        real b, c
        seam joint
        seam* past = open_seam(&joint, u.call.streaming)
    if kept is not NULL:
        memset(kept, 0, 2 * u.parts * C * sizeof(double))
    for unit in range(call.B * call.G):
        # The part whose images end after this one.
        part = ((unit // call.G + 1) * u.parts - 1) // call.B
        # By turns, so that nobody has to wait for those who still read.
        sums = u.scratch + (unit % 2) * u.size
        if unit >= 2:
            if member == 0:
                memset(sums, 0, u.size * sizeof(double))
            team_barrier(members)
        first_sweep(u, unit, 1, first, last, sums, pieces, past)
        team_barrier(members)
        for i in range(3 * width):
            own[i] = 0
            for q in range(i * pieces, (i + 1) * pieces):
                own[i] += sums[q]
        combine(u, unit, 1, own, at(kept, 2 * part * C), at(kept, (2 * part + 1) * C), &b, &c)
        if not u.frozen and call.grad_x is not NULL:
            for q in range(last - 1, first - 1, -1):
                differentiate_chunk(u, unit, 1, q, &b, &c, past)
    end_seam(past)
    if member == 0:
        sum_parts(u.sums, u.parts, C, 0, 1, <real*> call.grad_weight, <real*> call.grad_bias)


cdef inline int _backward(const Call* call, bint frozen) noexcept nogil:
    cdef:
        Units u = units_of(call, True)
        Images images
        Py_ssize_t doubles
        bint dealt
    if u.batch and short_planes(call, 2 * call.N):
        images = images_of(call, 1, call.N, call.S)
        return backward_images(&images, frozen)
    if short_groups(&u, True) and not frozen:
        return backward_groups_as_stretches(call, call.S)
    u.frozen = frozen
    u.parts = image_parts(call.B, call.S)
    dealt = worth_dealing(u.parts * u.slabs, unit_bytes(&u), call.threads)
    if dealt:
        u.size = own_lines(3 * width_of(&u, u.some))
        doubles = u.size * call.threads
    else:
        u.size = own_lines(3 * (u.chunks if u.batch else u.K * u.pieces))
        doubles = 2 * u.size + own_lines(3 * width_of(&u, 1)) * call.threads
    u.scratch = <double*> calloc(doubles, sizeof(double))
    if u.scratch is NULL:
        return -1
    if call.grad_weight is not NULL or call.grad_bias is not NULL:
        u.sums = <double*> new_lines(2 * u.parts * call.C * sizeof(double))
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
