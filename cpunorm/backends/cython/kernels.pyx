"""The kernels for one instruction set and one element type, as a table of C functions."""

from cpython.pycapsule cimport PyCapsule_New

from . cimport channels_first, channels_last, columns, rows
from .call cimport Call, Table
from .sweeps cimport at, copy_stretch, element, share, stream_fence, team, triad_stretch


# The speed of memory, as the kernels see it: what bench/ compares them with.

cdef void copy_share(void* work, int member, int members) noexcept nogil:
    cdef:
        const Call* call = <const Call*> work
        Py_ssize_t first = share(call.M, member, members), last = share(call.M, member + 1, members)
    copy_stretch(<const element*> call.x + first, <element*> call.y + first, last - first,
                 call.streaming)
    if call.streaming:
        stream_fence()


cdef int copy(const Call* call) noexcept nogil:
    team(copy_share, <void*> call, call.threads)
    return 0


cdef void triad_share(void* work, int member, int members) noexcept nogil:
    cdef:
        const Call* call = <const Call*> work
        Py_ssize_t first = share(call.M, member, members), last = share(call.M, member + 1, members)
    triad_stretch(at(<const element*> call.grad_y, first), <const element*> call.x + first,
                  <element*> call.grad_x + first, last - first, call.streaming)
    if call.streaming:
        stream_fence()


cdef int triad(const Call* call) noexcept nogil:
    team(triad_share, <void*> call, call.threads)
    return 0


cdef Table table

table.rows_normalize = rows.normalize
table.rows_backward = rows.backward
table.columns_normalize = columns.normalize
table.columns_backward = columns.backward
table.first_normalize = channels_first.normalize
table.first_apply = channels_first.apply
table.first_moments = channels_first.moments
table.first_backward = channels_first.backward
table.first_backward_apply = channels_first.backward_apply
table.last_normalize = channels_last.normalize
table.last_apply = channels_last.apply
table.last_moments = channels_last.moments
table.last_backward = channels_last.backward
table.last_backward_apply = channels_last.backward_apply
table.copy = copy
table.triad = triad

TABLE = PyCapsule_New(&table, "cpunorm.Table", NULL)
