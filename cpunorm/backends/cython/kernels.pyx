"""The kernels for one instruction set and one element type, as a table of C functions."""

from cpython.pycapsule cimport PyCapsule_New

from . cimport channels_first, channels_last, columns, rows
from .call cimport Call, Table
from .sweeps cimport (
    copy_stretch, element, move_running, narrow_stretch, real, share, team, triad_stretch,
    widen_stretch,
)

cdef enum:
    MANY = 1 << 14      # channels whose running statistics are worth a team


cdef void move_share(void* work, int member, int members) noexcept nogil:
    cdef:
        const Call* call = <const Call*> work
        Py_ssize_t first = share(call.G, member, members)
        Py_ssize_t count = share(call.G, member + 1, members) - first
        double n = call.N // call.B * call.S * (call.C // call.G)
    move_running(<real*> call.running_mean + first, <const real*> call.mean + first, call.B, call.G,
                 count, 1, call.momentum)
    move_running(<real*> call.running_var + first, <const real*> call.var + first, call.B, call.G,
                 count, n / (n - 1), call.momentum)


cdef int moved(const Call* call) noexcept nogil:
    """The running statistics, after a call has found mean and var: means over B, unbiased."""
    team(move_share, <void*> call, call.threads if call.G >= MANY else 1)
    return 0


cdef void widen(const void* x, void* y, Py_ssize_t n) noexcept nogil:
    widen_stretch(<const element*> x, <real*> y, n)


cdef void narrow(const void* x, void* y, Py_ssize_t n) noexcept nogil:
    narrow_stretch(<const real*> x, <element*> y, n)


# The speed of memory, as the kernels see it: what bench/ compares them with.

cdef void copy_share(void* work, int member, int members) noexcept nogil:
    cdef:
        const Call* call = <const Call*> work
        Py_ssize_t first = share(call.M, member, members), last = share(call.M, member + 1, members)
    copy_stretch(<const element*> call.x + first, <element*> call.y + first, last - first,
                 call.streaming)


cdef int copy(const Call* call) noexcept nogil:
    team(copy_share, <void*> call, call.threads)
    return 0


cdef void triad_share(void* work, int member, int members) noexcept nogil:
    cdef:
        const Call* call = <const Call*> work
        Py_ssize_t first = share(call.M, member, members), last = share(call.M, member + 1, members)
    triad_stretch(<const element*> call.grad_y + first, <const element*> call.x + first,
                  <element*> call.grad_x + first, last - first, call.streaming)


cdef int triad(const Call* call) noexcept nogil:
    team(triad_share, <void*> call, call.threads)
    return 0


cdef Table table

table.rows_normalize = rows.normalize
table.rows_backward = rows.backward
table.columns_normalize = columns.normalize
table.columns_backward = columns.backward
table.channels[False].normalize = channels_first.normalize
table.channels[False].apply = channels_first.apply
table.channels[False].backward = channels_first.backward
table.channels[False].backward_apply = channels_first.backward_apply
table.channels[True].normalize = channels_last.normalize
table.channels[True].apply = channels_last.apply
table.channels[True].backward = channels_last.backward
table.channels[True].backward_apply = channels_last.backward_apply
table.move_running = moved
table.widen, table.narrow = widen, narrow
table.copy = copy
table.triad = triad

TABLE = PyCapsule_New(&table, "cpunorm.Table", NULL)
