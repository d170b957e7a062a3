# A call of a kernel: what the verbs of backends/__init__.py take, as pointers and sizes.
#
# Kernels are compiled once per instruction set and element type. Each such module hands out a
# Table, through which verbs.pyx and _front.pyx reach it.

cdef struct Call:
    Py_ssize_t M, D, N, C, S    # (M, D); (N, D, S); (N, C, S) or (N, S, C)
    Py_ssize_t B, G             # statistics: of so many images, or 1 of all; of each, groups
    const void* x               # arrays of elements; NULL stands for None
    const void* residual
    const void* grad_y
    const void* grad_total
    void* y
    void* total
    void* grad_x
    const void* weight          # arrays of reals
    const void* bias
    void* mean
    void* var
    void* rstd
    void* grad_weight
    void* grad_bias
    void* running_mean
    void* running_var
    double eps
    double momentum
    int activation
    int threads
    bint far                    # whether x is in good part not in the caches
    bint streaming              # whether y or grad_x is stored past them
    bint fetching               # whether planes are fetched before they are needed
    Py_ssize_t slab             # bytes that stay in a core's cache between two sweeps


# -1 if out of memory.
ctypedef int (*Verb)(const Call* call) noexcept nogil
# n elements become reals, or reals elements.
ctypedef void (*Conversion)(const void* x, void* y, Py_ssize_t n) noexcept nogil

cdef struct ChannelVerbs:
    Verb normalize, apply, backward, backward_apply

cdef struct Table:
    Verb rows_normalize, rows_backward
    Verb columns_normalize, columns_backward
    ChannelVerbs channels[2]    # first, last
    Verb move_running
    Conversion widen, narrow
    Verb copy, triad
