cimport numpy as cnp

cdef cnp.ndarray empty(cnp.dtype dtype, int ndim, const cnp.npy_intp* shape)
cdef cnp.ndarray empty_as(cnp.ndarray x)
