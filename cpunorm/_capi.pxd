# The kernels for compiled code: pointers and sizes, no GIL, no exceptions.
#
# Arrays are C-contiguous and aligned. NULL stands for an absent weight (1), bias (0), statistic or
# gradient that is not wanted. A y may be x itself; nothing else may overlap. `threads` is the most
# to use. Each function returns 0, NO_MEMORY or BAD_ARGUMENT, the latter before anything is written.

ctypedef fused real:
    float
    double

cdef enum:
    NO_MEMORY = -1
    BAD_ARGUMENT = -2           # sizes below 0, groups that do not divide C, eps < 0, ...

# x and y: (rows, length); weight and bias: (length,); mean and rstd: (rows,).

cdef int layer_norm(
    const real* x, const real* weight, const real* bias, real* y, real* mean, real* rstd,
    Py_ssize_t rows, Py_ssize_t length, double eps, int threads,
) noexcept nogil

cdef int rms_norm(
    const real* x, const real* weight, real* y, real* rstd,
    Py_ssize_t rows, Py_ssize_t length, double eps, int threads,
) noexcept nogil

cdef int layer_norm_backward(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight, real* grad_bias,
    Py_ssize_t rows, Py_ssize_t length, int threads,
) noexcept nogil

cdef int rms_norm_backward(
    const real* grad_y, const real* x, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight,
    Py_ssize_t rows, Py_ssize_t length, int threads,
) noexcept nogil

# x and y: (N, C, S), or (N, S, C) with channels_last; weight and bias: (C,).
# mean and rstd: (N, groups). Instance norm has C groups.

cdef int group_norm(
    const real* x, const real* weight, const real* bias, real* y, real* mean, real* rstd,
    Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, Py_ssize_t groups, double eps,
    bint channels_last, int threads,
) noexcept nogil

cdef int group_norm_backward(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight, real* grad_bias,
    Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, Py_ssize_t groups,
    bint channels_last, int threads,
) noexcept nogil

# mean, rstd and the running statistics: (C,). With `training` those of x are used and the running
# ones, if any, moved towards them; without it the running ones are used.

cdef int batch_norm(
    const real* x, real* running_mean, real* running_var, const real* weight, const real* bias,
    real* y, real* mean, real* rstd,
    Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, bint training, double momentum, double eps,
    bint channels_last, int threads,
) noexcept nogil

cdef int batch_norm_backward(
    const real* grad_y, const real* x, const real* mean, const real* rstd, const real* weight,
    real* grad_x, real* grad_weight, real* grad_bias,
    Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, bint training,
    bint channels_last, int threads,
) noexcept nogil
