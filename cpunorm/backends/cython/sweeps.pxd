# The declarations of sweeps.h, and the few helpers every kernel shares.

from libc.string cimport memcpy

from .call cimport Call


cdef extern from "sweeps.h" nogil:
    # Which types these are is said when the C code is compiled.
    ctypedef float real
    ctypedef unsigned short element

    enum:
        LANES
        LINE_BYTES
        NARROW_ROWS
        BLOCK
        PAIR
        BACKWARD_ROWS
        BACKWARD_SHORT
        FEW_CHANNELS
        GAPPED_ROWS
        SHORT_VECTORS
        STRIP_COLUMNS
        TOGETHER
        UNITS

    ctypedef real column_reals[STRIP_COLUMNS]   # and a line more
    void* new_lines(size_t nbytes) noexcept

    ctypedef void (*team_body)(void* work, int member, int members) noexcept nogil
    void team(team_body body, void* work, int threads) noexcept
    void team_barrier(int members) noexcept

    bint rows_aligned(const element* p, Py_ssize_t stride) noexcept
    ctypedef struct seam:
        pass
    seam* open_seam(seam* s, bint wanted) noexcept
    void end_seam(seam* past) noexcept

    void merge_moments(double n_a, double* mean_a, double* m2_a,
                       double n_b, double mean_b, double m2_b) noexcept
    void merge_columns(double n_a, double* mean_a, double* m2_a, double n_b, const double* mean_b,
                       const double* m2_b, Py_ssize_t count) noexcept

    void fold_moments(double n, const double* mean, const double* m2, Py_ssize_t copies,
                      Py_ssize_t channels, Py_ssize_t inner, double* out_mean,
                      double* out_m2) noexcept
    void fold_sums(const double* columns, Py_ssize_t copies, Py_ssize_t channels, Py_ssize_t inner,
                   double* sums) noexcept

    void settle(const double* mu, const double* m2, Py_ssize_t n, double count, double eps,
                double* r, real* mean, real* var, real* rstd) noexcept

    void stretch_moments(const element* x, Py_ssize_t units, Py_ssize_t n, double* mean,
                         double* m2, const element* y) noexcept
    void plane_moments(const element* x, Py_ssize_t planes, Py_ssize_t stride, Py_ssize_t units,
                       Py_ssize_t n, double* mean, double* m2) noexcept
    void stretch_squares(const element* x, Py_ssize_t units, Py_ssize_t n, double* squares,
                         const element* y) noexcept
    void pair_backward_sums(const element* grad_y, const element* x, const real* weight,
                            Py_ssize_t rows, Py_ssize_t n, const real* mean, double* sums,
                            const element* grad_x) noexcept
    void stretches_backward_sums(const element* grad_y, const element* x, Py_ssize_t stretches,
                                 Py_ssize_t n, const real* mean, Py_ssize_t K, double* g_sum,
                                 double* gx_sum, double* x_sum) noexcept
    void plane_backward_sums(const element* grad_y, const element* x, Py_ssize_t planes,
                             Py_ssize_t stride, Py_ssize_t units, Py_ssize_t n, const real* mean,
                             bint fetching, double* g_sum, double* gx_sum, double* x_sum) noexcept

    void add(const element* x, const element* residual, element* total, Py_ssize_t n) noexcept
    void affine(const element* x, const element* residual, element* y, Py_ssize_t planes,
                Py_ssize_t n, Py_ssize_t K, const double* mean, const double* rstd,
                const real* weight, const real* bias, int activation, seam* past,
                Py_ssize_t ahead) noexcept
    void affine_along(const element* x, const real* weight, const real* bias,
                      const element* residual, element* y, Py_ssize_t rows, Py_ssize_t n,
                      Py_ssize_t begin, Py_ssize_t length, const real* pivot, const real* scale,
                      const real* shift, int activation, int far, seam* past,
                      Py_ssize_t ahead) noexcept
    void backward_affine(const element* grad_y, const element* x, element* grad_x,
                         Py_ssize_t planes, Py_ssize_t n, Py_ssize_t K, const real* mean,
                         const real* rstd, const real* b, const real* c, const real* weight,
                         seam* past, Py_ssize_t ahead) noexcept
    void backward_affine_along(const element* grad_y, const element* x, const real* weight,
                               const element* grad_total, element* grad_x, Py_ssize_t rows,
                               Py_ssize_t n, const real* mean, const real* rstd,
                               const double* sums, double inverse, real* grad_weight,
                               real* grad_bias, seam* past, int fetching) noexcept
    void flush_reals(double* wide, real* sums, Py_ssize_t n) noexcept

    bint several_a_vector(Py_ssize_t n) noexcept
    void normalize_short(const element* x, const real* weight, const real* bias, element* y,
                         Py_ssize_t M, Py_ssize_t n, Py_ssize_t begin, Py_ssize_t length,
                         double eps, real* mean, real* var, real* rstd, seam* past) noexcept
    void backward_short(const element* grad_y, const element* x, const real* weight,
                        const element* grad_total, element* grad_x, Py_ssize_t M, Py_ssize_t n,
                        Py_ssize_t period, const real* mean, const real* rstd,
                        double* grad_weight, double* grad_bias, seam* past) noexcept

    void column_moments(const element* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width,
                        int far, double* mean, double* m2) noexcept
    void column_squares(const element* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width,
                        double* squares) noexcept
    void column_backward_sums(const element* grad_y, const element* x, const real* weight,
                              Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width, int far,
                              const real* mean, double* g_sum, double* gx_sum,
                              double* x_sum) noexcept

    void set_columns(Py_ssize_t K, const double* mean, const double* rstd, const real* weight,
                     const real* bias, Py_ssize_t groups, real* pivot, real* scale,
                     real* shift) noexcept
    void set_given_columns(Py_ssize_t K, const real* mean, const real* rstd, const real* weight,
                           const real* bias, Py_ssize_t groups, real* pivot, real* scale,
                           real* shift) noexcept
    void invert_roots(const real* var, Py_ssize_t n, double eps, real* rstd) noexcept
    void finish_backward(const double* g_sum, const double* gx_sum, const double* x_sum,
                         Py_ssize_t n, Py_ssize_t rows, const real* rstd, int centred,
                         real* shift, real* b, real* c) noexcept
    void combine_channels(Py_ssize_t K, Py_ssize_t groups, const double* g, const double* gx,
                          const double* x, const real* weight, double n, int through,
                          const real* rstd, double* grad_weight, double* grad_bias, real* b,
                          real* c) noexcept

    bint survives(double eps) noexcept
    bint in_vectors(const element* y, Py_ssize_t stride, Py_ssize_t K) noexcept
    void normalize_groups(const element* x, element* y, Py_ssize_t rows, Py_ssize_t stride,
                          Py_ssize_t K, Py_ssize_t G, double eps, const real* weight,
                          const real* bias, seam* past, real* mean, real* var, real* rstd,
                          real* pivot, real* scale, real* shift) noexcept
    void backward_groups(const element* grad_y, const element* x, element* grad_x, Py_ssize_t rows,
                         Py_ssize_t stride, Py_ssize_t K, Py_ssize_t G, const real* weight,
                         const real* mean, const real* rstd, seam* past, double* grad_weight,
                         double* grad_bias) noexcept

    void affine_block(const element* x, const element* residual, element* y, Py_ssize_t rows,
                      Py_ssize_t stride, Py_ssize_t width, const real* pivot, const real* scale,
                      const real* shift, int activation, seam* past, int cached) noexcept
    void backward_block(const element* grad_y, const element* x, element* grad_x, Py_ssize_t rows,
                        Py_ssize_t stride, Py_ssize_t width, const real* mean, const real* rstd,
                        const real* b, const real* c, const real* weight, seam* past,
                        int cached) noexcept
    void affine_strip(const element* x, element* y, Py_ssize_t rows, Py_ssize_t stride,
                      Py_ssize_t width, const real* pivot, const real* scale, const real* shift,
                      const real* weight, const real* bias, seam* past,
                      Py_ssize_t ahead) noexcept
    void backward_strip(const element* grad_y, const element* x, const real* weight,
                        const element* grad_total, element* grad_x, Py_ssize_t rows,
                        Py_ssize_t stride, Py_ssize_t width, const real* mean, const real* rstd,
                        const real* shift, const real* b, const real* c, double* grad_weight,
                        double* grad_bias, seam* past, Py_ssize_t ahead) noexcept

    void move_running(real* running, const real* new_, Py_ssize_t B, Py_ssize_t stride,
                      Py_ssize_t n, double factor, double momentum) noexcept

    void add_up(const real* laid, Py_ssize_t copies, Py_ssize_t channels, Py_ssize_t inner,
                real* sums) noexcept
    void repeat_each(const real* values, Py_ssize_t count, Py_ssize_t times, real* out) noexcept
    void widen_stretch(const element* x, real* y, Py_ssize_t n) noexcept
    void narrow_stretch(const real* x, element* y, Py_ssize_t n) noexcept

    void copy_stretch(const element* x, element* y, Py_ssize_t n, int streaming) noexcept
    void triad_stretch(const element* grad_y, const element* x, element* grad_x, Py_ssize_t n,
                       int streaming) noexcept


ctypedef fused array:
    element
    real
    double


cdef inline array* at(const array* start, Py_ssize_t offset) noexcept nogil:
    """start + offset, where NULL stays NULL (and const is dropped: C has no templates)."""
    return NULL if start is NULL else <array*> start + offset


cdef inline Py_ssize_t share(Py_ssize_t tasks, int member, int members) noexcept nogil:
    """The first of a member's tasks; those of the next member follow."""
    return tasks * member // members if members > 1 else tasks * member


cdef inline bint worth_dealing(Py_ssize_t tasks, Py_ssize_t nbytes, int threads) noexcept nogil:
    """Whether tasks of so many bytes go whole to a member each: none should have much less to do
    than the others, unless cutting them costs more than that."""
    return (threads == 1 or tasks % threads == 0 or tasks >= 4 * threads
            or (tasks >= threads and nbytes <= 1 << 16))


cdef inline double evenness(Py_ssize_t tasks, int threads) noexcept nogil:
    """What part of a team is at work when tasks of a size are dealt to it."""
    return tasks / <double> ((tasks + threads - 1) // threads * threads)


cdef inline Py_ssize_t own_lines(Py_ssize_t count) noexcept nogil:
    """At least as many, so that no cache line (or pair of them) is written by two members, wherever
    memory begins."""
    return (count + 31) // 32 * 32 + 32


cdef inline Py_ssize_t whole_lines(Py_ssize_t count) noexcept nogil:
    """At least as many, so that what comes after them begins a line as they do: an odd number of
    lines, or columns of the one and the other would lie in the same set of L1."""
    return ((count + 15) // 16 | 1) * 16


cdef enum:
    IMAGE_PARTS = 32    # of images, at most, that keep sums of their own in backward;
    PART_VALUES = 64    # values of a channel for each where there are more than
    EVER_PARTS = 8


cdef inline Py_ssize_t image_parts(Py_ssize_t images, Py_ssize_t values) noexcept nogil:
    """In how many parts images of so many values a channel are dealt: where sums are kept of few
    values, they are as much memory as these."""
    return min(images, max(<Py_ssize_t> EVER_PARTS,
                           min(<Py_ssize_t> IMAGE_PARTS, images * values // PART_VALUES)))


cdef inline void take_rstd(const Call* call, Py_ssize_t first, Py_ssize_t count,
                           real* rstd) noexcept nogil:
    """Some of the statistics that are given: rstd, or var, whose rstd goes to where there is a
    place for it."""
    cdef real* given = at(<real*> call.rstd, first)
    if call.var is NULL:
        memcpy(rstd, given, count * sizeof(real))
        return
    invert_roots(<const real*> call.var + first, count, call.eps, rstd)
    if given is not NULL:
        memcpy(given, rstd, count * sizeof(real))


cdef inline void sum_parts(double* sums, Py_ssize_t parts, Py_ssize_t length, int member,
                           int members, real* grad_weight, real* grad_bias) noexcept nogil:
    """The end of a backward pass: add what its parts found, (parts, 2, length) or NULL, up in the
    first, and write it to the outputs wanted. Each member does its share, once all are here."""
    cdef:
        Py_ssize_t first = share(length, member, members)
        Py_ssize_t last = share(length, member + 1, members), i, p
        double* weight_sums = sums
        double* bias_sums = sums + length
    if sums is NULL:
        return
    team_barrier(members)
    for p in range(1, parts):
        for i in range(first, last):
            weight_sums[i] += weight_sums[2 * p * length + i]
        for i in range(first, last):
            bias_sums[i] += bias_sums[2 * p * length + i]
    for i in range(first, last):
        if grad_weight is not NULL:
            grad_weight[i] = <real> weight_sums[i]
        if grad_bias is not NULL:
            grad_bias[i] = <real> bias_sums[i]
