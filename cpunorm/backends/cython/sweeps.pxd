# The declarations of sweeps.h, and the few helpers every kernel module shares.

cimport numpy as cnp
from libc.math cimport sqrt

# The order of the types is known to sweeps.h.
ctypedef fused real:
    float
    double


cdef extern from "sweeps.h" nogil:
    void merge_moments(double n_a, double* mean_a, double* m2_a,
                       double n_b, double mean_b, double m2_b) noexcept

    void moments(const real* x, Py_ssize_t n, double* mean, double* m2) noexcept
    double sum_of_squares(const real* x, Py_ssize_t n) noexcept
    void backward_sums(const real* grad_y, const real* x, const real* weight, Py_ssize_t n,
                       real mean, double* sums) noexcept

    void add(const real* x, const real* residual, real* total, Py_ssize_t n) noexcept
    void affine(const real* x, const real* residual, real* y, Py_ssize_t n,
                double mean, double scale, double bias, int activation) noexcept
    void affine_along(const real* x, const real* weight, const real* bias, const real* residual,
                      real* y, Py_ssize_t n, double mean, double rstd, int activation) noexcept
    void backward_affine(const real* grad_y, const real* x, const real* weights,
                         const real* grad_total, real* grad_x, Py_ssize_t n, real mean,
                         double weight, double rstd, double b, double c) noexcept
    void parameter_sums(const real* grad_y, const real* x, Py_ssize_t rows, Py_ssize_t stride,
                        Py_ssize_t n, const double* mean, const double* rstd,
                        real* grad_weight, real* grad_bias) noexcept

    void column_moments(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width,
                        double* mean, double* m2) noexcept
    void column_squares(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width,
                        double* squares) noexcept
    void column_backward_sums(const real* grad_y, const real* x, const real* weight,
                              Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width,
                              const real* mean, double* g_sum, double* gx_sum,
                              double* x_sum) noexcept

    void affine_columns(const real* x, const real* residual, real* y, Py_ssize_t n,
                        const real* pivot, const real* scale, const real* shift,
                        double weight, double bias, int activation) noexcept
    void backward_columns(const real* grad_y, const real* x, const real* weights, double weight,
                          const real* grad_total, real* grad_x, Py_ssize_t n, const real* mean,
                          const real* rstd, const real* b, const real* c) noexcept
    void row_parameter_sums(const real* grad_y, const real* x, Py_ssize_t n, const real* mean,
                            const real* rstd, const real* shift, double* grad_weight,
                            double* grad_bias) noexcept


cdef inline void* data(object array):
    """The memory of an array, NULL for None."""
    return NULL if array is None else cnp.PyArray_DATA(<cnp.ndarray> array)


cdef inline bint is_float32(object array):
    return cnp.PyArray_TYPE(<cnp.ndarray> array) == cnp.NPY_FLOAT32


cdef inline real* at(const real* array, Py_ssize_t offset) noexcept nogil:
    """array + offset, where NULL stays NULL (and const is dropped: C has no templates)."""
    return NULL if array is NULL else <real*> array + offset


cdef inline double rstd_of(double var, double eps) noexcept nogil:
    return 1 / sqrt(var + eps)


cdef inline double variance(double m2, Py_ssize_t count) noexcept nogil:
    # Rounding can leave m2 a hair below zero; a NaN must pass.
    return 0 if m2 < 0 else m2 / count


cdef inline void sum_parts(const double* sums, Py_ssize_t parts, Py_ssize_t length,
                           real* grad_weight, real* grad_bias) noexcept nogil:
    """Write what the parts of a backward pass found, (parts, 2, length), to the outputs wanted."""
    cdef:
        Py_ssize_t i, p
        double weight_sum, bias_sum
    for i in range(length):
        weight_sum = bias_sum = 0
        for p in range(parts):
            weight_sum += sums[2 * p * length + i]
            bias_sum += sums[(2 * p + 1) * length + i]
        if grad_weight is not NULL:
            grad_weight[i] = <real> weight_sum
        if grad_bias is not NULL:
            grad_bias[i] = <real> bias_sum
