# rows: (M, D), statistics over D, affine along D.

from libc.string cimport memset

from .call cimport Call
from .stretches cimport Stretches, backward_stretches, normalize_stretches
from .sweeps cimport element, real


cdef inline Stretches _rows(const Call* call) noexcept nogil:
    cdef Stretches s
    memset(&s, 0, sizeof(s))
    s.M, s.D, s.period = call.M, call.D, 1
    s.x = <const element*> call.x
    s.weight = <const real*> call.weight
    s.mean, s.rstd = <real*> call.mean, <real*> call.rstd
    s.far, s.streaming = call.far, call.streaming
    return s


cdef inline int normalize(const Call* call) noexcept nogil:
    cdef Stretches s = _rows(call)
    s.addend, s.total = <const element*> call.residual, <element*> call.total
    s.bias, s.eps = <const real*> call.bias, call.eps
    s.y = <element*> call.y
    normalize_stretches(&s, call.threads)
    return 0


cdef inline int backward(const Call* call) noexcept nogil:
    cdef Stretches s = _rows(call)
    s.grad_y, s.grad_total = <const element*> call.grad_y, <const element*> call.grad_total
    s.grad_x = <element*> call.grad_x
    s.grad_weight, s.grad_bias = <real*> call.grad_weight, <real*> call.grad_bias
    return backward_stretches(&s, call.slab, call.threads)
