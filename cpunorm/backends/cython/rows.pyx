"""rows: (M, D), statistics over D, affine along D."""

cimport numpy as cnp

from .stretches cimport backward_stretches, normalize_stretches
from .sweeps cimport data, is_float32, real

cnp.import_array()


cdef void _normalize(
    real _, cnp.ndarray x, residual, weight, bias, double eps, y, total, mean, rstd, int threads,
) except *:
    cdef:
        Py_ssize_t M = x.shape[0], D = x.shape[1]
        const real* x_ = <const real*> data(x)
        const real* residual_ = <const real*> data(residual)
        const real* weight_ = <const real*> data(weight)
        const real* bias_ = <const real*> data(bias)
        real* y_ = <real*> data(y)
        real* total_ = <real*> data(total)
        real* mean_ = <real*> data(mean)
        real* rstd_ = <real*> data(rstd)
    with nogil:
        normalize_stretches[real](x_, residual_, total_, weight_, bias_, NULL, y_, M, D, eps, 0, 1,
                                  mean_, NULL, rstd_, threads)


def normalize(
    cnp.ndarray x, residual, weight, bias, double eps, y, total, mean, rstd, int threads
):
    if is_float32(x):
        _normalize(<float> 0, x, residual, weight, bias, eps, y, total, mean, rstd, threads)
    else:
        _normalize(<double> 0, x, residual, weight, bias, eps, y, total, mean, rstd, threads)


cdef void _backward(
    real _, grad_y, cnp.ndarray x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias,
    int threads,
) except *:
    cdef:
        Py_ssize_t M = x.shape[0], D = x.shape[1]
        const real* grad_y_ = <const real*> data(grad_y)
        const real* x_ = <const real*> data(x)
        const real* mean_ = <const real*> data(mean)
        const real* rstd_ = <const real*> data(rstd)
        const real* weight_ = <const real*> data(weight)
        const real* grad_total_ = <const real*> data(grad_total)
        real* grad_x_ = <real*> data(grad_x)
        real* grad_weight_ = <real*> data(grad_weight)
        real* grad_bias_ = <real*> data(grad_bias)
        int failed
    with nogil:
        failed = backward_stretches[real](grad_y_, x_, mean_, rstd_, weight_, grad_total_, grad_x_,
                                          grad_weight_, grad_bias_, M, D, 1, threads)
    if failed:
        raise MemoryError


def backward(
    grad_y, cnp.ndarray x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias,
    int threads,
):
    if is_float32(x):
        _backward(<float> 0, grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight,
                  grad_bias, threads)
    else:
        _backward(<double> 0, grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight,
                  grad_bias, threads)
