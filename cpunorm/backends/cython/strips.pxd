# Strips: an image is a matrix of `rows` rows and channels * inner columns, `inner` neighbouring
# columns to a channel; a statistic covers all rows of the K channels of a group.
#
# These are NHWC images (inner = 1); a whole NHWC batch under batch norm; and a whole NCHW batch
# whose planes are too short for vectors of their own (a row is then an image, inner = S).
#
# The matrix is cut into chunks of rows and strips of channels, by shape alone. A task is one
# chunk of one strip: its columns are measured straight down, with vectors of columns in
# registers, and folded into channels; or, where the channels of a group fill vectors, along the
# rows, group by group. Such cells are merged over the chunks, then into groups, in float64. Where
# images are small, a few groups at a time are done at once, from their sums to what is written. A
# member of the team transforms the tasks it has measured, backwards, to meet what is left in its
# cache. Many images are dealt to the team whole; the bits are the same either way. Inference
# needs no strips: where wide rows end within lines, past the caches, there is one.
#
# Rows of few columns are taken side by side: `abreast` of them fill a measured strip, and
# `in_line` a row of the transform.

from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from .call cimport Call
from .sweeps cimport (
    FEW_CHANNELS, GAPPED_ROWS, LANES, LINE_BYTES, NARROW_ROWS, STRIP_COLUMNS, TOGETHER, UNITS,
    affine_block, at, backward_block, backward_groups, column_backward_sums, column_moments,
    column_reals, combine_channels, element, end_seam, evenness, fold_moments, fold_sums,
    image_parts, in_vectors, merge_columns, new_lines, normalize_groups, open_seam, own_lines,
    plane_moments, real, repeat_each, rows_aligned, seam, set_columns, set_given_columns, settle,
    share, stretch_moments, sum_parts, survives, take_rstd, team, team_barrier, whole_lines,
    worth_dealing,
)

cdef enum:
    NARROW = 64             # columns worth measuring side by side
    LINE = 128              # columns worth transforming in one row,
    IN_LINE_ROWS = 32       # where there are so many rows for each that is put beside another
    CHUNK_BYTES = 1 << 17
    CHUNKS = 64             # at most
    ROWS = 64               # of a chunk, at least
    MANY = 8                # strips that are enough for the team, or tasks for each of it
    FEW_STRIPS = 4          # that are enough for it
    FEW_ROWS = 16           # too few to measure columns,
    NEAR = 1 << 14          # of strips of so many bytes, which stay in L1


cdef struct Images:
    const Call* call
    Py_ssize_t count, size                  # of images; elements of one
    Py_ssize_t rows, channels, inner, groups
    Py_ssize_t chunk_rows, chunks           # of one chunk, nobody waits for anybody
    Py_ssize_t strip_channels, strips
    Py_ssize_t per_cell, cells              # channels measured as one
    Py_ssize_t abreast, in_line
    bint at_once                            # each few groups of a strip, from sums to output:
    bint plain                              # forward, where nothing follows
    bint dealt                              # whole, to a member each
    bint cached                             # whether a second sweep finds everything in L2
    # Scratch: of one image, or of one for each member where they are dealt.
    double* wide
    real* terms
    Py_ssize_t wide_size, terms_size
    Py_ssize_t pitch                        # of the terms, from one to the next
    # Of the backward pass.
    Py_ssize_t parts
    double* sums                            # (parts, 2, C), or NULL
    bint frozen


cdef inline Images images_of(const Call* call, Py_ssize_t count, Py_ssize_t rows,
                             Py_ssize_t inner) noexcept nogil:
    """`inner` is at most STRIP_COLUMNS, and 1 where a group has several channels."""
    cdef:
        Images im
        Py_ssize_t width = call.C * inner, K = call.C // call.G, row_bytes, step, work
        bint few        # rows, of groups that fill vectors
    memset(&im, 0, sizeof(im))
    im.call, im.count, im.size = call, count, rows * width
    im.rows, im.channels, im.inner, im.groups = rows, call.C, inner, call.G
    im.abreast = im.in_line = 1
    if rows >= 2 * NARROW:
        while im.abreast * width < NARROW:
            im.abreast *= 2
    while im.in_line * width < LINE and IN_LINE_ROWS * im.in_line <= rows:
        im.in_line *= 2
    few = rows < FEW_ROWS and 1 < K <= FEW_CHANNELS and 2 * K >= LANES
    if K == call.C or K >= 4 * LANES or (few and K >= 2 * LANES):
        im.per_cell = K
    else:
        im.per_cell = 1
    im.cells = call.C // im.per_cell
    # Whole groups.
    im.strip_channels = min(call.C, max(<Py_ssize_t> 1, STRIP_COLUMNS // inner // K) * K)
    if few and not call.streaming:
        im.strip_channels = min(im.strip_channels,
                                max(<Py_ssize_t> 1, NEAR // (rows * K * sizeof(element))) * K)
    im.strips = (call.C + im.strip_channels - 1) // im.strip_channels
    work = im.size * <Py_ssize_t> sizeof(element) * (1 if call.grad_y is NULL else 2)
    if count == 1 and rows <= ROWS and call.G >= FEW_STRIPS and work >= CHUNK_BYTES:
        # One chunk, of which each of the team is to have as much, in whole lines.
        im.strips = max(im.strips, min(<Py_ssize_t> FEW_STRIPS, width // LINE))
        step = K
        while step % LANES and 2 * step * im.strips <= call.C:
            step *= 2
        im.strip_channels = min(im.strip_channels, ((call.C + im.strips - 1) // im.strips
                                                    + step - 1) // step * step)
        im.strips = (call.C + im.strip_channels - 1) // im.strip_channels
    row_bytes = im.strip_channels * inner * <Py_ssize_t> sizeof(element)
    if im.strips >= MANY and 2 * rows * row_bytes <= call.slab:
        im.chunks = 1
    else:
        im.chunk_rows = max(CHUNK_BYTES // row_bytes, (rows + CHUNKS - 1) // CHUNKS)
        im.chunk_rows = (im.chunk_rows + ROWS - 1) // ROWS * ROWS
        im.chunks = (rows + im.chunk_rows - 1) // im.chunk_rows
    # All of a size, so that nobody has much more to do, and of whole rows side by side.
    step = max(<Py_ssize_t> TOGETHER, max(im.abreast, im.in_line))
    im.chunk_rows = ((rows + im.chunks - 1) // im.chunks + step - 1) // step * step
    im.chunks = (rows + im.chunk_rows - 1) // im.chunk_rows
    return im


cdef inline bint is_small(const Images* im) noexcept nogil:
    """Whether groups may be done at once."""
    cdef:
        Py_ssize_t K = im.channels // im.groups
        bint gaps = LANES % K != 0 and K % LANES != 0
    return im.inner == 1 and K <= FEW_CHANNELS and im.rows <= (GAPPED_ROWS if gaps else NARROW_ROWS)


cdef inline bint is_near(const Images* im) noexcept nogil:
    return im.size * <Py_ssize_t> sizeof(element) <= 2 * NEAR


cdef struct Task:
    Py_ssize_t rows, first_channel, channels, offset


cdef inline Task task_of(const Images* im, Py_ssize_t index) noexcept nogil:
    cdef:
        Task task
        Py_ssize_t first_row = index // im.strips * im.chunk_rows
    task.rows = min(im.chunk_rows, im.rows - first_row)
    task.first_channel = index % im.strips * im.strip_channels
    task.channels = min(im.strip_channels, im.channels - task.first_channel)
    task.offset = (first_row * im.channels + task.first_channel) * im.inner
    return task


cdef inline void deal(Images* im, Py_ssize_t lots, Py_ssize_t arrays) noexcept nogil:
    """Settle whether a member takes images whole, of which there are so many lots, and if what it
    has before it then, of so many arrays, stays in its L2."""
    cdef:
        int threads = im.call.threads
        Py_ssize_t nbytes = im.size * <Py_ssize_t> sizeof(element)
    im.dealt = im.count > 1 and (
        worth_dealing(lots, nbytes, threads)
        or evenness(lots, threads) >= evenness(im.chunks * im.strips, threads))
    im.cached = arrays * nbytes <= im.call.slab * (1 if im.dealt else threads)


cdef struct Turn:
    Py_ssize_t first, last      # lots of images
    int member, members         # of those who share an image
    double* wide                # their scratch
    real* terms


cdef inline Turn turn_of(const Images* im, Py_ssize_t lots, int member,
                         int members) noexcept nogil:
    """What a member of the team takes part in."""
    cdef Turn turn
    if im.dealt:
        turn.first, turn.last = share(lots, member, members), share(lots, member + 1, members)
        turn.member, turn.members = 0, 1
        turn.wide = im.wide + member * im.wide_size
        turn.terms = im.terms + member * im.terms_size
    else:
        turn.first, turn.last = 0, lots
        turn.member, turn.members = member, members
        turn.wide, turn.terms = im.wide, im.terms
    return turn


cdef inline const real* columns_of(const Images* im, const real* per_channel,
                                   const Task* task, Py_ssize_t copies,
                                   real* columns) noexcept nogil:
    """A value per channel for the columns of a strip in `copies` (2^k) rows side by side."""
    cdef Py_ssize_t width = task.channels * im.inner
    per_channel += task.first_channel
    if im.inner == 1 and copies == 1:
        return per_channel
    repeat_each(per_channel, task.channels, im.inner, columns)
    while copies > 1:
        memcpy(columns + width, columns, width * sizeof(real))
        width, copies = 2 * width, copies // 2
    return columns


cdef inline void _measure_columns(const element* x, Py_ssize_t rows, Py_ssize_t channels,
                                  Py_ssize_t abreast, const Images* im, double* mean,
                                  double* m2) noexcept nogil:
    """Moments per channel of some rows of a strip, `abreast` rows taken as one."""
    cdef:
        double column_mean[STRIP_COLUMNS]
        double column_m2[STRIP_COLUMNS]
        Py_ssize_t width = channels * im.inner, stride = im.channels * im.inner
    if abreast == 1 and im.inner == 1:
        column_moments(x, rows, stride, width, im.call.far, mean, m2)
        return
    column_moments(x, rows // abreast, stride * abreast, width * abreast, im.call.far, column_mean,
                   column_m2)
    fold_moments(rows // abreast, column_mean, column_m2, abreast, channels, im.inner, mean, m2)


cdef inline void _measure_cells(const element* x, const element* y, const Task* task,
                                const Images* im, double* mean, double* m2) noexcept nogil:
    """While memory is fetched for what will be written to y, if there is one and it stays."""
    cdef Py_ssize_t K = im.per_cell, cells = task.channels // K, i = 0
    if cells == im.cells == 1:
        # The rows lie side by side.
        stretch_moments(x, 1, task.rows * K, mean, m2, y)
        return
    while i < cells:
        plane_moments(x + i * K, task.rows, im.channels, min(<Py_ssize_t> UNITS, cells - i), K,
                      mean + i, m2 + i)
        i += UNITS


cdef inline void _measure(const Images* im, Py_ssize_t start, Py_ssize_t index, double* mean,
                          double* m2) noexcept nogil:
    """Moments of the cells of one task, written to the chunk's part of mean and m2."""
    cdef:
        Task task = task_of(im, index)
        Py_ssize_t here = index // im.strips * im.cells + task.first_channel // im.per_cell
        Py_ssize_t left = task.rows % im.abreast, whole = task.rows - left
        double left_mean[STRIP_COLUMNS]
        double left_m2[STRIP_COLUMNS]
        const element* x = <const element*> im.call.x
        const element* y
    start += task.offset
    if im.per_cell > 1:
        y = at(<const element*> im.call.y, start)
        _measure_cells(x + start, y if im.cached and not im.call.streaming else NULL, &task, im,
                       mean + here, m2 + here)
        return
    x += start
    if whole:
        _measure_columns(x, whole, task.channels, im.abreast, im, mean + here, m2 + here)
    if left and whole:
        _measure_columns(x + whole * im.channels * im.inner, left, task.channels, 1, im,
                         left_mean, left_m2)
        merge_columns(whole * im.inner, mean + here, m2 + here, left * im.inner, left_mean,
                      left_m2, task.channels)
    elif left:
        _measure_columns(x, left, task.channels, 1, im, mean + here, m2 + here)


# -------------------------------------------------------------------------------------- forward


cdef inline void _merge(const Images* im, Py_ssize_t first, Py_ssize_t last, double* mean,
                        double* m2) noexcept nogil:
    """Merge the chunks of some cells into the first chunk."""
    cdef Py_ssize_t i, per_row = im.inner * im.per_cell
    for i in range(1, im.chunks):
        merge_columns(i * im.chunk_rows * per_row, mean + first, m2 + first,
                      min(im.chunk_rows, im.rows - i * im.chunk_rows) * per_row,
                      mean + i * im.cells + first, m2 + i * im.cells + first, last - first)


cdef inline void _set_terms(const Images* im, Py_ssize_t g, Py_ssize_t count, const double* mean,
                            const double* rstd, real* terms) noexcept nogil:
    """pivot, scale and shift of the channels of `count` groups; terms is (3, pitch)."""
    cdef Py_ssize_t K = im.channels // im.groups, c = g * K
    set_columns(K, mean, rstd, at(<const real*> im.call.weight, c),
                at(<const real*> im.call.bias, c), count, terms + c, terms + im.pitch + c,
                terms + 2 * im.pitch + c)


cdef inline void _finish(const Images* im, Py_ssize_t image, Py_ssize_t first, Py_ssize_t last,
                         double* mean, double* m2, real* terms) noexcept nogil:
    """The statistics of some groups, from the moments of their cells, and the terms of the
    transform."""
    cdef:
        Py_ssize_t in_group = im.cells // im.groups, count, start
        Py_ssize_t n = im.rows * im.inner * im.per_cell
        double group_mean[STRIP_COLUMNS]
        double group_m2[STRIP_COLUMNS]
        double r[STRIP_COLUMNS]
        double* mu
        double* v
        const Call* call = im.call
    _merge(im, first * in_group, last * in_group, mean, m2)
    while first < last:
        count = min(last - first, <Py_ssize_t> STRIP_COLUMNS)
        mu, v = mean + first * in_group, m2 + first * in_group
        if in_group > 1:
            fold_moments(n, mu, v, 1, count, in_group, group_mean, group_m2)
            mu, v = group_mean, group_m2
        start = image * im.groups + first
        settle(mu, v, count, n * in_group, call.eps, r, <real*> call.mean + start,
               <real*> call.var + start, at(<real*> call.rstd, start))
        if call.y is not NULL:
            _set_terms(im, first, count, mu, r, terms)
        first += count


cdef inline void _normalize_groups(const Images* im, Py_ssize_t image, const Task* task,
                                   real* terms, seam* past) noexcept nogil:
    """What `_measure` and `_finish` find and, where it is plain, y of the groups of a strip."""
    cdef:
        const Call* call = im.call
        Py_ssize_t K = im.channels // im.groups, c = task.first_channel
        Py_ssize_t here = image * im.size + c, g = image * im.groups + c // K
        element* y = <element*> call.y + here if im.plain else NULL
    normalize_groups(<const element*> call.x + here, y, im.rows, im.channels, K,
                     task.channels // K, call.eps, at(<const real*> call.weight, c),
                     at(<const real*> call.bias, c), past, <real*> call.mean + g,
                     at(<real*> call.var, g), at(<real*> call.rstd, g), terms + c,
                     terms + im.pitch + c, terms + 2 * im.pitch + c)


cdef inline void _transform(const Images* im, Py_ssize_t start, Py_ssize_t index,
                            const real* terms, seam* past) noexcept nogil:
    cdef:
        column_reals column_pivot
        column_reals column_scale
        column_reals column_shift
        const Call* call = im.call
        Task task = task_of(im, index)
        Py_ssize_t stride = im.channels * im.inner * im.in_line
        Py_ssize_t width = task.channels * im.inner * im.in_line
        Py_ssize_t here = start + task.offset, rows = task.rows // im.in_line
        const real* pivot = columns_of(im, terms, &task, im.in_line, column_pivot)
        const real* scale = columns_of(im, terms + im.pitch, &task, im.in_line, column_scale)
        const real* shift = columns_of(im, terms + 2 * im.pitch, &task, im.in_line, column_shift)
    affine_block(<const element*> call.x + here, at(<const element*> call.residual, here),
                 <element*> call.y + here, rows, stride, width, pivot, scale, shift,
                 call.activation, past, im.cached)
    if task.rows % im.in_line:
        here += rows * stride
        affine_block(<const element*> call.x + here, at(<const element*> call.residual, here),
                     <element*> call.y + here, 1, stride,
                     task.rows % im.in_line * task.channels * im.inner, pivot, scale, shift,
                     call.activation, past, im.cached)


cdef inline void _normalize_image(const Images* im, Py_ssize_t image, double* wide, real* terms,
                                  int member, int members, seam* past) noexcept nogil:
    """wide is (2, chunks, cells), terms (3, pitch); both are left alone by who is done."""
    cdef:
        Py_ssize_t K = im.channels // im.groups, tasks = im.chunks * im.strips
        Py_ssize_t first = share(tasks, member, members), last = share(tasks, member + 1, members)
        Py_ssize_t start = image * im.size, q
        bint transformed = im.call.y is not NULL
        double* mean = wide
        double* m2 = wide + im.chunks * im.cells
        Task task
    if im.chunks == 1:
        for q in range(first, last):
            task = task_of(im, q)
            if im.at_once:
                _normalize_groups(im, image, &task, terms, past)
            else:
                _measure(im, start, q, mean, m2)
                _finish(im, image, task.first_channel // K,
                        (task.first_channel + task.channels) // K, mean, m2, terms)
            if transformed and not im.plain:
                _transform(im, start, q, terms, past)
        return
    for q in range(first, last):
        _measure(im, start, q, mean, m2)
    team_barrier(members)
    _finish(im, image, share(im.groups, member, members), share(im.groups, member + 1, members),
            mean, m2, terms)
    team_barrier(members)
    if transformed:
        for q in range(last - 1, first - 1, -1):
            _transform(im, start, q, terms, past)


cdef inline void _normalize(void* work, int member, int members) noexcept nogil:
    cdef:
        const Images* im = <const Images*> work
        Turn turn = turn_of(im, im.count, member, members)
        Py_ssize_t n
        seam joint
        seam* past = open_seam(&joint, im.call.streaming)
    for n in range(turn.first, turn.last):
        _normalize_image(im, n, turn.wide, turn.terms, turn.member, turn.members, past)
    end_seam(past)


cdef inline int normalize_images(Images* im) noexcept nogil:
    """Moments and, where there is a y, the transform. -1 if out of memory."""
    cdef:
        const Call* call = im.call
        Py_ssize_t K = im.channels // im.groups
        int places
    im.at_once = is_small(im) and is_near(im) and K <= LANES and survives(call.eps)
    im.plain = (im.at_once and call.y is not NULL and call.residual is NULL and not call.activation
                and (not call.streaming or in_vectors(<element*> call.y, im.channels, K)))
    deal(im, im.count, 1)
    places = im.call.threads if im.dealt else 1
    im.wide_size = own_lines(2 * im.chunks * im.cells)
    im.pitch = whole_lines(im.channels)
    im.terms_size = own_lines(3 * im.pitch)
    im.wide = <double*> new_lines(places * (im.wide_size * sizeof(double)
                                            + im.terms_size * sizeof(real)))
    if im.wide is NULL:
        return -1
    im.terms = <real*> (im.wide + places * im.wide_size)
    team(_normalize, im, im.call.threads)
    free(im.wide)
    return 0


cdef inline void _take_terms(const Images* im, Py_ssize_t first, Py_ssize_t last,
                             real* terms) noexcept nogil:
    """The terms of some of the B * G groups whose statistics are given."""
    cdef:
        Py_ssize_t K = im.channels // im.groups, g, c, count
        real* of_image
        column_reals rstd
        const Call* call = im.call
    while first < last:
        g = first % im.groups
        count = min(min(last - first, im.groups - g), <Py_ssize_t> STRIP_COLUMNS)
        c, of_image = g * K, terms + first // im.groups * im.terms_size
        take_rstd(call, first, count, rstd)
        set_given_columns(K, <const real*> call.mean + first, rstd,
                          at(<const real*> call.weight, c), at(<const real*> call.bias, c), count,
                          of_image + c, of_image + im.pitch + c, of_image + 2 * im.pitch + c)
        first += count


cdef inline void _apply(void* work, int member, int members) noexcept nogil:
    cdef:
        const Images* im = <const Images*> work
        Py_ssize_t per_image = im.chunks * im.strips, tasks = im.count * per_image, q
        Py_ssize_t statistics = im.call.B * im.groups
        seam joint
        seam* past = open_seam(&joint, im.call.streaming)
    _take_terms(im, share(statistics, member, members), share(statistics, member + 1, members),
                im.terms)
    team_barrier(members)
    for q in range(share(tasks, member, members), share(tasks, member + 1, members)):
        _transform(im, q // per_image * im.size, q % per_image,
                   im.terms + (q // per_image * im.terms_size if im.call.B > 1 else 0), past)
    end_seam(past)


cdef inline int apply_images(Images* im) noexcept nogil:
    """Transform with statistics, (B, G), given. -1 if out of memory."""
    if (im.strips > 1 and im.inner == 1 and im.call.streaming
            and im.rows >= MANY * im.call.threads
            and not rows_aligned(<element*> im.call.y, im.channels)):
        # Whole rows, however wide, are one stretch: where inner is 1 nothing is copied for them.
        im.strips, im.strip_channels = 1, im.channels
        im.chunk_rows = im.rows // (MANY * im.call.threads)
        im.chunks = (im.rows + im.chunk_rows - 1) // im.chunk_rows
    im.pitch = whole_lines(im.channels)
    im.terms_size = 3 * im.pitch
    im.terms = <real*> new_lines(im.call.B * im.terms_size * sizeof(real))
    if im.terms is NULL:
        return -1
    team(_apply, im, im.call.threads)
    free(im.terms)
    return 0


# ------------------------------------------------------------------------------------- backward


cdef inline void _sum_columns(
    const element* grad_y, const element* x, Py_ssize_t rows, const Task* task,
    Py_ssize_t abreast, const Images* im, const real* mean, double* sums,
) noexcept nogil:
    """Add the three backward sums per channel of some rows of a strip; sums is (3, C)."""
    cdef:
        double columns[3 * STRIP_COLUMNS]
        Py_ssize_t width = task.channels * im.inner * abreast
        Py_ssize_t stride = im.channels * im.inner * abreast, C = im.channels, v
    if abreast == 1 and im.inner == 1:
        column_backward_sums(grad_y, x, <const real*> NULL, rows, stride, width, im.call.far, mean,
                             sums, sums + C, NULL if im.frozen else sums + 2 * C)
        return
    memset(columns, 0, 3 * width * sizeof(double))
    column_backward_sums(grad_y, x, <const real*> NULL, rows // abreast, stride, width,
                         im.call.far, mean, columns, columns + width, columns + 2 * width)
    for v in range(3):
        fold_sums(columns + v * width, abreast, task.channels, im.inner, sums + v * C)


cdef inline void _sum(const Images* im, Py_ssize_t start, Py_ssize_t index, const real* mean,
                      double* sums) noexcept nogil:
    """The backward sums of one task; sums is (chunks, 3, C)."""
    cdef:
        column_reals column_mean
        Task task = task_of(im, index)
        Py_ssize_t left = task.rows % im.abreast, whole = task.rows - left, v
        const element* grad_y = <const element*> im.call.grad_y + start + task.offset
        const element* x = <const element*> im.call.x + start + task.offset
    sums += index // im.strips * 3 * im.channels + task.first_channel
    for v in range(3):
        memset(sums + v * im.channels, 0, task.channels * sizeof(double))
    mean = columns_of(im, mean, &task, im.abreast, column_mean)
    if whole:
        _sum_columns(grad_y, x, whole, &task, im.abreast, im, mean, sums)
    if left:
        whole *= im.channels * im.inner
        _sum_columns(grad_y + whole, x + whole, left, &task, 1, im, mean, sums)


cdef inline void _differentiate(const Images* im, Py_ssize_t start, Py_ssize_t index,
                                const real* terms, seam* past) noexcept nogil:
    """terms, (5, pitch): mean, rstd, b, c and weight of backward_block."""
    cdef:
        column_reals columns[5]
        const real* per_column[5]
        const Call* call = im.call
        Task task = task_of(im, index)
        Py_ssize_t stride = im.channels * im.inner * im.in_line
        Py_ssize_t width = task.channels * im.inner * im.in_line
        Py_ssize_t here = start + task.offset, rows = task.rows // im.in_line, v
        const element* x = NULL if im.frozen else <const element*> call.x
    for v in range(5):
        per_column[v] = columns_of(im, terms + v * im.pitch, &task, im.in_line, columns[v])
    backward_block(<const element*> call.grad_y + here, at(x, here), <element*> call.grad_x + here,
                   rows, stride, width, per_column[0], per_column[1], per_column[2], per_column[3],
                   per_column[4], past, im.cached)
    if task.rows % im.in_line:
        here += rows * stride
        backward_block(<const element*> call.grad_y + here, at(x, here),
                       <element*> call.grad_x + here, 1, stride,
                       task.rows % im.in_line * task.channels * im.inner, per_column[0],
                       per_column[1], per_column[2], per_column[3], per_column[4], past,
                       im.cached)


cdef inline void _set_backward(const Images* im, Py_ssize_t image, Py_ssize_t first,
                               Py_ssize_t last, real* terms) noexcept nogil:
    """mean, rstd and weight of the channels of some groups."""
    cdef:
        Py_ssize_t K = im.channels // im.groups, c
        const real* mean = <const real*> im.call.mean + image * im.groups
        const real* rstd = <const real*> im.call.rstd + image * im.groups
        const real* weight = <const real*> im.call.weight
    for c in range(first * K, last * K):
        terms[4 * im.pitch + c] = 1 if weight is NULL else weight[c]
    repeat_each(mean + first, last - first, K, terms + first * K)
    repeat_each(rstd + first, last - first, K, terms + im.pitch + first * K)


cdef inline void _combine(const Images* im, Py_ssize_t image, Py_ssize_t first, Py_ssize_t last,
                          double* wide, real* terms, double* grad_weight,
                          double* grad_bias) noexcept nogil:
    """b and c of the channels of some groups, from the sums of all chunks."""
    cdef:
        Py_ssize_t C = im.channels, K = C // im.groups, c = first * K, end = last * K, i, v, k
        Py_ssize_t count
        real slope[STRIP_COLUMNS]
        real offset[STRIP_COLUMNS]
    for i in range(1, im.chunks):
        for v in range(3):
            for k in range(v * C + c, v * C + end):
                wide[k] += wide[i * 3 * C + k]
    while first < last:
        c, count = first * K, min(last - first, <Py_ssize_t> STRIP_COLUMNS)
        combine_channels(K, count, wide + c, wide + C + c, wide + 2 * C + c,
                         at(<const real*> im.call.weight, c), im.rows * im.inner * K,
                         not im.frozen, <const real*> im.call.rstd + image * im.groups + first,
                         at(grad_weight, c), at(grad_bias, c), slope, offset)
        repeat_each(slope, count, K, terms + 2 * im.pitch + c)
        repeat_each(offset, count, K, terms + 3 * im.pitch + c)
        first += count


cdef inline void _differentiate_groups(const Images* im, Py_ssize_t image, const Task* task,
                                       double* grad_weight, double* grad_bias,
                                       seam* past) noexcept nogil:
    """All of a strip."""
    cdef:
        const Call* call = im.call
        Py_ssize_t K = im.channels // im.groups, c = task.first_channel
        Py_ssize_t here = image * im.size + c, g = image * im.groups + c // K
    backward_groups(<const element*> call.grad_y + here, <const element*> call.x + here,
                    at(<element*> call.grad_x, here), im.rows, im.channels, K, task.channels // K,
                    at(<const real*> call.weight, c), <const real*> call.mean + g,
                    <const real*> call.rstd + g, past, at(grad_weight, c), at(grad_bias, c))


cdef inline void _backward_image(
    const Images* im, Py_ssize_t image, double* wide, real* terms, double* grad_weight,
    double* grad_bias, int member, int members, seam* past,
) noexcept nogil:
    """wide is (chunks, 3, C), terms (5, pitch)."""
    cdef:
        Py_ssize_t K = im.channels // im.groups, tasks = im.chunks * im.strips
        Py_ssize_t first = share(tasks, member, members), last = share(tasks, member + 1, members)
        Py_ssize_t first_group, last_group, start = image * im.size, q
        bint summed = not im.frozen or grad_weight is not NULL
        bint differentiated = im.call.grad_x is not NULL
        Task task
    if im.chunks == 1:
        for q in range(first, last):
            task = task_of(im, q)
            if im.at_once:
                _differentiate_groups(im, image, &task, grad_weight, grad_bias, past)
                continue
            first_group = task.first_channel // K
            last_group = first_group + task.channels // K
            _set_backward(im, image, first_group, last_group, terms)
            if summed:
                _sum(im, start, q, terms, wide)
                _combine(im, image, first_group, last_group, wide, terms, grad_weight, grad_bias)
            if differentiated:
                _differentiate(im, start, q, terms, past)
        return
    first_group = share(im.groups, member, members)
    last_group = share(im.groups, member + 1, members)
    _set_backward(im, image, first_group, last_group, terms)
    team_barrier(members)
    for q in range(first, last):
        if summed:
            _sum(im, start, q, terms, wide)
        if im.frozen and differentiated:
            _differentiate(im, start, q, terms, past)
    team_barrier(members)
    if summed:
        _combine(im, image, first_group, last_group, wide, terms, grad_weight, grad_bias)
    team_barrier(members)
    if not im.frozen and differentiated:
        for q in range(last - 1, first - 1, -1):
            _differentiate(im, start, q, terms, past)


cdef inline void _backward(void* work, int member, int members) noexcept nogil:
    cdef:
        const Images* im = <const Images*> work
        Turn turn = turn_of(im, im.parts, member, members)
        Py_ssize_t C = im.channels, p, n, first = share(2 * C, turn.member, turn.members)
        Py_ssize_t last = share(2 * C, turn.member + 1, turn.members)
        seam joint
        seam* past = open_seam(&joint, im.call.streaming)
    for p in range(turn.first, turn.last):
        if im.sums is not NULL:
            memset(im.sums + 2 * p * C + first, 0, (last - first) * sizeof(double))
            team_barrier(turn.members)
        for n in range(im.count * p // im.parts, im.count * (p + 1) // im.parts):
            _backward_image(im, n, turn.wide, turn.terms, at(im.sums, 2 * p * C),
                            at(im.sums, (2 * p + 1) * C), turn.member, turn.members, past)
            # What comes next writes what others may still be reading.
            team_barrier(turn.members)
    end_seam(past)
    sum_parts(im.sums, im.parts, C, member, members, <real*> im.call.grad_weight,
              <real*> im.call.grad_bias)


cdef inline int backward_images(Images* im, bint frozen) noexcept nogil:
    """-1 if out of memory."""
    cdef:
        const Call* call = im.call
        bint parameters = call.grad_weight is not NULL or call.grad_bias is not NULL, worthwhile
        Py_ssize_t K = im.channels // im.groups, places, sums_size = 0
        double* scratch
    im.frozen = frozen
    # Where it is not near, of groups together whole lines are read, of others what stays in L1.
    if K <= LANES:
        worthwhile = im.rows <= ROWS and LANES * sizeof(element) == LINE_BYTES
    else:
        worthwhile = im.rows < FEW_ROWS
    im.at_once = (is_small(im) and not frozen and (worthwhile or is_near(im))
                  and (not call.streaming or in_vectors(<element*> call.grad_x, im.channels, K)))
    im.parts = image_parts(im.count, im.rows * im.inner)
    deal(im, im.parts, 2)
    places = call.threads if im.dealt else 1
    im.wide_size = own_lines(3 * im.chunks * im.channels)
    im.pitch = whole_lines(im.channels)
    im.terms_size = own_lines(5 * im.pitch)
    if parameters:
        sums_size = whole_lines(2 * im.parts * im.channels)
    scratch = <double*> new_lines(
        places * (im.wide_size * sizeof(double) + im.terms_size * sizeof(real))
        + sums_size * sizeof(double))
    if scratch is NULL:
        return -1
    im.sums = scratch if parameters else NULL
    im.wide = scratch + sums_size
    im.terms = <real*> (im.wide + places * im.wide_size)
    team(_backward, im, call.threads)
    free(scratch)
    return 0
