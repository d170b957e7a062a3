# What a call over channels comes down to, at the front door and in the C API.

cimport numpy as cnp

cdef struct Channels:
    bint last                   # the problem: channels_last, else channels_first
    cnp.npy_intp stats[2]       # (B, G)
    cnp.npy_intp N, C, S
    bint per_image


cdef inline void place_axes(Channels* c) noexcept nogil:
    """From where the channels are in x to the canonical problem."""
    # Where one of them is 1, it does not matter what lies inside what.
    if c.S == 1:
        c.last = not c.per_image
    elif c.C == 1:
        c.last = False
    if c.last and not c.per_image:
        c.N, c.S = 1, c.N * c.S
