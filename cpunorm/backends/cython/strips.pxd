# Strips: an image is a matrix of R rows and C * inner columns, `inner` neighbouring columns to a
# channel; a statistic covers all rows of the C / G channels of a group.
#
# These are NHWC images (inner = 1); a whole NHWC batch under batch norm; and a whole NCHW batch
# whose planes are too short for loops of their own (a row is then an image, inner = S).
#
# The matrix is cut into chunks of rows and strips of channels, by shape alone. A task is one chunk
# of one strip: its columns are measured straight down, with vectors of columns in registers, and
# folded into channels. Chunks are merged, then channels into groups, in float64. The transform
# takes the same tasks backwards, to meet what the first sweep left in the cache.
#
# Rows of few columns are taken side by side: `abreast` of them fill a measured strip, and
# `in_line` a loop of the transform.

from cython.parallel cimport prange
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from .sweeps cimport (affine_columns, at, backward_columns, column_backward_sums, column_moments,
                      merge_moments, real, rstd_of, variance)

cdef enum:
    COLUMNS = 1024          # of a strip, at most
    NARROW = 64             # columns worth measuring side by side
    SHORT = 256             # columns worth transforming in one loop
    CHUNK_BYTES = 1 << 17
    CHUNKS = 64             # at most
    ROWS = 64               # a chunk's rows are a multiple of


cdef struct Cut:
    Py_ssize_t rows, channels, inner, groups
    Py_ssize_t chunk_rows, chunks
    Py_ssize_t strip_channels, strips
    Py_ssize_t abreast, in_line


cdef inline Cut cut_image(Py_ssize_t rows, Py_ssize_t channels, Py_ssize_t inner,
                          Py_ssize_t groups, Py_ssize_t itemsize) noexcept nogil:
    """`inner` is at most COLUMNS."""
    cdef Cut cut
    cdef Py_ssize_t width = channels * inner
    cut.rows, cut.channels, cut.inner, cut.groups = rows, channels, inner, groups
    cut.abreast = cut.in_line = 1
    if rows >= 2 * NARROW:
        while cut.abreast * width < NARROW:
            cut.abreast *= 2
    while cut.in_line * width < SHORT and 2 * cut.in_line <= rows:
        cut.in_line *= 2
    cut.strip_channels = min(channels, COLUMNS // inner)
    cut.strips = (channels + cut.strip_channels - 1) // cut.strip_channels
    cut.chunk_rows = max(CHUNK_BYTES // (cut.strip_channels * inner * itemsize),
                         (rows + CHUNKS - 1) // CHUNKS)
    cut.chunk_rows = (cut.chunk_rows + ROWS - 1) // ROWS * ROWS
    cut.chunks = (rows + cut.chunk_rows - 1) // cut.chunk_rows
    return cut


cdef struct Task:
    Py_ssize_t first_row, rows, first_channel, channels, offset


cdef inline Task task_of(const Cut* cut, Py_ssize_t index) noexcept nogil:
    cdef Task task
    task.first_row = index // cut.strips * cut.chunk_rows
    task.rows = min(cut.chunk_rows, cut.rows - task.first_row)
    task.first_channel = index % cut.strips * cut.strip_channels
    task.channels = min(cut.strip_channels, cut.channels - task.first_channel)
    task.offset = (task.first_row * cut.channels + task.first_channel) * cut.inner
    return task


cdef inline void expand(const double* per_channel, Py_ssize_t channels, Py_ssize_t inner,
                        Py_ssize_t copies, real* columns) noexcept nogil:
    """Write a value per channel to the columns of `copies` rows side by side."""
    cdef Py_ssize_t width = channels * inner, c, i
    if inner == 1:
        for c in range(channels):
            columns[c] = <real> per_channel[c]
    else:
        for c in range(channels):
            for i in range(c * inner, (c + 1) * inner):
                columns[i] = <real> per_channel[c]
    for i in range(width, copies * width):
        columns[i] = columns[i - width]


cdef inline void fold_equal(Py_ssize_t n, const double* mean, const double* m2, Py_ssize_t outer,
                            Py_ssize_t outer_stride, Py_ssize_t inner, double* out_mean,
                            double* out_m2) noexcept nogil:
    """Merge outer * inner moments of n values each. Equal means give exactly their value."""
    cdef Py_ssize_t k, s, count = outer * inner
    cdef double first = mean[0], shift = 0, total = 0, delta, mu
    for k in range(outer):
        for s in range(inner):
            shift += mean[k * outer_stride + s] - first
    mu = first + shift / count
    for k in range(outer):
        for s in range(inner):
            delta = mean[k * outer_stride + s] - mu
            total += m2[k * outer_stride + s] + n * delta * delta
    out_mean[0] = mu
    out_m2[0] = total


cdef inline void _measure_columns(const real* x, Py_ssize_t rows, Py_ssize_t channels,
                                  Py_ssize_t abreast, const Cut* cut, double* mean,
                                  double* m2) noexcept nogil:
    """Moments per channel of some rows of a strip, `abreast` rows taken as one."""
    cdef:
        double column_mean[COLUMNS]
        double column_m2[COLUMNS]
        Py_ssize_t width = channels * cut.inner, c
    column_moments(x, rows // abreast, cut.channels * cut.inner * abreast,
                   width * abreast, column_mean, column_m2)
    for c in range(channels):
        fold_equal(rows // abreast, column_mean + c * cut.inner, column_m2 + c * cut.inner,
                   abreast, width, cut.inner, mean + c, m2 + c)


cdef inline void _measure(const real* x, const Cut* cut, Py_ssize_t index,
                          double* mean, double* m2) noexcept nogil:
    """Moments per channel of one task, written to the chunk's part of mean and m2."""
    cdef:
        Task task = task_of(cut, index)
        Py_ssize_t here = index // cut.strips * cut.channels + task.first_channel
        Py_ssize_t left = task.rows % cut.abreast, whole = task.rows - left, c
        double left_mean[COLUMNS]
        double left_m2[COLUMNS]
    x += task.offset
    if whole:
        _measure_columns(x, whole, task.channels, cut.abreast, cut, mean + here, m2 + here)
    if left:
        _measure_columns(x + whole * cut.channels * cut.inner, left, task.channels, 1, cut,
                         left_mean, left_m2)
        for c in range(task.channels):
            if whole:
                merge_moments(whole * cut.inner, mean + here + c, m2 + here + c,
                              left * cut.inner, left_mean[c], left_m2[c])
            else:
                mean[here + c], m2[here + c] = left_mean[c], left_m2[c]


cdef inline int strip_moments(const real* x, const Cut* cut, double* group_mean, double* group_var,
                              int threads) noexcept nogil:
    """Mean and variance of every group, (G,) each. -1 if out of memory."""
    cdef:
        Py_ssize_t C = cut.channels, K = cut.channels // cut.groups, q, i, c, g
        Py_ssize_t count = cut.rows * cut.inner
        double* mean = <double*> malloc(2 * cut.chunks * C * sizeof(double))
        double* m2 = mean + cut.chunks * C
    if mean is NULL:
        return -1
    for q in prange(cut.chunks * cut.strips, num_threads=threads, schedule="static"):
        _measure(x, cut, q, mean, m2)
    for i in range(1, cut.chunks):
        for c in range(C):
            merge_moments(i * cut.chunk_rows * cut.inner, mean + c, m2 + c,
                          min(cut.chunk_rows, cut.rows - i * cut.chunk_rows) * cut.inner,
                          mean[i * C + c], m2[i * C + c])
    for g in range(cut.groups):
        fold_equal(count, mean + g * K, m2 + g * K, 1, 0, K, group_mean + g, group_var + g)
        group_var[g] = variance(group_var[g], count * K)
    free(mean)
    return 0


cdef inline void _transform(
    const real* x, const real* residual, real* y, const Cut* cut, Py_ssize_t index,
    const double* pivot, const double* scale, const double* shift, int activation,
) noexcept nogil:
    cdef:
        real column_pivot[COLUMNS]
        real column_scale[COLUMNS]
        real column_shift[COLUMNS]
        Task task = task_of(cut, index)
        Py_ssize_t stride = cut.channels * cut.inner * cut.in_line
        Py_ssize_t width = task.channels * cut.inner * cut.in_line
        Py_ssize_t length = task.rows * cut.channels * cut.inner, i = task.offset, done = 0
    expand(pivot + task.first_channel, task.channels, cut.inner, cut.in_line, column_pivot)
    expand(scale + task.first_channel, task.channels, cut.inner, cut.in_line, column_scale)
    expand(shift + task.first_channel, task.channels, cut.inner, cut.in_line, column_shift)
    while done < length:
        # Only where rows lie side by side can the last one be shorter than the others.
        affine_columns(x + i, at(residual, i), y + i,
                       min(width, length - done) if cut.in_line > 1 else width, column_pivot,
                       column_scale, column_shift, 1, 0, activation)
        done += stride
        i += stride


cdef inline int strip_transform(
    const real* x, const real* residual, const real* weight, const real* bias, int activation,
    real* y, const Cut* cut, const double* group_mean, const double* group_rstd, int threads,
) noexcept nogil:
    """y = activation((x - mean) * rstd * weight + bias + residual). -1 if out of memory."""
    cdef:
        Py_ssize_t C = cut.channels, K = cut.channels // cut.groups, tasks, q, c
        double* pivot = <double*> malloc(3 * C * sizeof(double))
        double* scale = pivot + C
        double* shift = scale + C
    if pivot is NULL:
        return -1
    for c in range(C):
        pivot[c] = <real> group_mean[c // K]
        scale[c] = group_rstd[c // K] * (1 if weight is NULL else weight[c])
        shift[c] = (0 if bias is NULL else bias[c]) + (pivot[c] - group_mean[c // K]) * scale[c]
    tasks = cut.chunks * cut.strips
    for q in prange(tasks, num_threads=threads, schedule="static"):
        _transform(x, residual, y, cut, tasks - 1 - q, pivot, scale, shift, activation)
    free(pivot)
    return 0


cdef inline int normalize_image(
    const real* x, const real* residual, const real* weight, const real* bias, double eps,
    int activation, real* y, const Cut* cut, real* mean, real* var, real* rstd, int threads,
) noexcept nogil:
    """Moments and transform; mean, var, rstd are (G,). -1 if out of memory."""
    cdef:
        Py_ssize_t G = cut.groups, g
        double* mu = <double*> malloc(3 * G * sizeof(double))
        double* v = mu + G
        double* r = v + G
        int failed
    if mu is NULL:
        return -1
    failed = strip_moments(x, cut, mu, v, threads)
    if not failed:
        for g in range(G):
            r[g] = rstd_of(v[g], eps)
            mean[g], var[g], rstd[g] = <real> mu[g], <real> v[g], <real> r[g]
        failed = strip_transform(x, residual, weight, bias, activation, y, cut, mu, r, threads)
    free(mu)
    return failed


cdef inline int apply_image(
    const real* x, const real* residual, const real* weight, const real* bias, int activation,
    real* y, const Cut* cut, const real* mean, const real* rstd, int threads,
) noexcept nogil:
    """Transform with mean and rstd, (G,), given. -1 if out of memory."""
    cdef:
        Py_ssize_t G = cut.groups, g
        double* mu = <double*> malloc(2 * G * sizeof(double))
        double* r = mu + G
        int failed
    if mu is NULL:
        return -1
    for g in range(G):
        mu[g], r[g] = mean[g], rstd[g]
    failed = strip_transform(x, residual, weight, bias, activation, y, cut, mu, r, threads)
    free(mu)
    return failed


cdef inline void _sum_columns(
    const real* grad_y, const real* x, Py_ssize_t rows, Py_ssize_t channels,
    Py_ssize_t abreast, const Cut* cut, const real* column_mean, double* sums,
    Py_ssize_t stride,
) noexcept nogil:
    """Add the three backward sums per channel of some rows of a strip."""
    cdef:
        double columns[3 * COLUMNS]
        Py_ssize_t width = channels * cut.inner, c, k, s, v
    memset(columns, 0, sizeof(columns))
    column_backward_sums(grad_y, x, <const real*> NULL, rows // abreast,
                         cut.channels * cut.inner * abreast, width * abreast,
                         column_mean, columns, columns + COLUMNS, columns + 2 * COLUMNS)
    for v in range(3):
        for k in range(abreast):
            for c in range(channels):
                for s in range(cut.inner):
                    sums[v * stride + c] += columns[v * COLUMNS + k * width + c * cut.inner + s]


cdef inline void _sum(const real* grad_y, const real* x, const Cut* cut, Py_ssize_t index,
                      const double* mean, double* sums) noexcept nogil:
    """The backward sums of one task, added to sums, (chunks, 3, C)."""
    cdef:
        real column_mean[COLUMNS]
        Task task = task_of(cut, index)
        Py_ssize_t left = task.rows % cut.abreast, whole = task.rows - left
    sums += index // cut.strips * 3 * cut.channels + task.first_channel
    expand(mean + task.first_channel, task.channels, cut.inner, cut.abreast, column_mean)
    x += task.offset
    grad_y += task.offset
    if whole:
        _sum_columns(grad_y, x, whole, task.channels, cut.abreast, cut, column_mean, sums,
                     cut.channels)
    if left:
        whole *= cut.channels * cut.inner
        _sum_columns(grad_y + whole, x + whole, left, task.channels, 1, cut, column_mean, sums,
                     cut.channels)


cdef inline void _differentiate(
    const real* grad_y, const real* x, real* grad_x, const Cut* cut, Py_ssize_t index,
    const double* terms,
) noexcept nogil:
    """terms, (5, C): mean, weight, rstd, b and c of backward_columns."""
    cdef:
        real columns[5 * COLUMNS]
        Task task = task_of(cut, index)
        Py_ssize_t stride = cut.channels * cut.inner * cut.in_line
        Py_ssize_t width = task.channels * cut.inner * cut.in_line
        Py_ssize_t length = task.rows * cut.channels * cut.inner, i = task.offset, done = 0, v
    for v in range(5):
        expand(terms + v * cut.channels + task.first_channel, task.channels, cut.inner,
               cut.in_line, columns + v * COLUMNS)
    while done < length:
        backward_columns(grad_y + i, at(x, i), columns + COLUMNS, 1, <const real*> NULL,
                         grad_x + i, min(width, length - done) if cut.in_line > 1 else width,
                         columns, columns + 2 * COLUMNS, columns + 3 * COLUMNS,
                         columns + 4 * COLUMNS)
        done += stride
        i += stride


cdef inline void _sum_and_differentiate(
    const real* grad_y, const real* x, real* grad_x, const Cut* cut, Py_ssize_t index,
    const double* terms, double* sums,
) noexcept nogil:
    """One task of the backward pass past constant statistics: everything in one sweep."""
    if sums is not NULL:
        _sum(grad_y, x, cut, index, terms, sums)
    if grad_x is not NULL:
        _differentiate(grad_y, <const real*> NULL, grad_x, cut, index, terms)


cdef inline int backward_image(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, double* grad_weight, double* grad_bias, bint frozen, const Cut* cut, int threads,
) noexcept nogil:
    """Adds to grad_weight and grad_bias, (C,), unless NULL. -1 if out of memory."""
    cdef:
        Py_ssize_t C = cut.channels, K = cut.channels // cut.groups
        Py_ssize_t tasks = cut.chunks * cut.strips, q, i, c, g
        double n = cut.rows * cut.inner * K, g_sum, gx_sum, rest, r
        double* mu = <double*> calloc((5 + 3 * cut.chunks) * C, sizeof(double))
        double* w_ = mu + C
        double* r_ = w_ + C
        double* b_ = r_ + C
        double* c_ = b_ + C
        double* sums = c_ + C
    if mu is NULL:
        return -1
    for c in range(C):
        mu[c] = mean[c // K]
        w_[c] = 1 if weight is NULL else weight[c]
        r_[c] = rstd[c // K]
    if frozen:
        for q in prange(tasks, num_threads=threads, schedule="static"):
            _sum_and_differentiate(grad_y, x, grad_x, cut, q, mu,
                                   NULL if grad_weight is NULL else sums)
    else:
        for q in prange(tasks, num_threads=threads, schedule="static"):
            _sum(grad_y, x, cut, q, mu, sums)
    for i in range(1, cut.chunks):
        for c in range(3 * C):
            sums[c] += sums[i * 3 * C + c]
    for g in range(cut.groups):
        r = rstd[g]
        rest = g_sum = gx_sum = 0
        if not frozen:
            # The mean arrives rounded: what was rounded away is the mean of what is left.
            for c in range(g * K, (g + 1) * K):
                rest += sums[2 * C + c] / n
        for c in range(g * K, (g + 1) * K):
            sums[C + c] -= rest * sums[c]
            g_sum += w_[c] * sums[c]
            gx_sum += w_[c] * sums[C + c]
            if grad_weight is not NULL:
                grad_weight[c] += r * sums[C + c]
                grad_bias[c] += sums[c]
        for c in range(g * K, (g + 1) * K):
            b_[c] = -r * r * gx_sum / n
            c_[c] = -g_sum / n - b_[c] * rest
    if grad_x is not NULL and not frozen:
        for q in prange(tasks, num_threads=threads, schedule="static"):
            _differentiate(grad_y, x, grad_x, cut, tasks - 1 - q, mu)
    free(mu)
    return 0
