"""The inner loops that several problems share, and the sizes by which all of them cut their work.

A block is `rows` rows of `width` elements in a flat array, `stride` apart, the first at `start`.
Offsets instead of slices: numba counts references to a slice, which costs more than a short row.

Every sum is held in float64, and deviations are taken from an element of the statistic itself:
M2 = Σd² - (Σd)²/n with d = x - pivot then loses no more than n·2⁻⁵³ of itself however large the mean,
and a constant comes out with its own value as the mean and a variance of exactly 0.
"""

import math

import numpy as np

from ._jit import jit
from .activations import activate

BLOCK = 4096  # elements swept several times in a row, from L1
PIECE = 32768  # elements of the least task worth a thread
SLAB = 512 * 1024  # bytes that stay in L2 between two sweeps
TASKS = 16  # enough to keep the threads busy: below, large statistics are cut into pieces

# An index of this type cannot be negative; numba's test for that would keep loops from vectorising.
at = np.uintp


@jit
def moments(x, start, rows, stride, width, center):
    """Mean and M2 of one block; 0 and Σx² where it is not centred."""
    pivot = np.float64(x[at(start)]) if center else 0.0
    s1 = 0.0
    s2 = 0.0
    for r in range(rows):
        first = start + r * stride
        for j in range(width):
            d = x[at(first + j)] - pivot
            s1 += d
            s2 += d * d
    if not center:
        return 0.0, s2
    n = rows * width
    return pivot + s1 / n, s2 - s1 * s1 / n


@jit
def column_sums(x, start, count, stride, width, pivot, s1, s2):
    """Add Σd and Σd² of each column of a block of `count` elements, its last row perhaps short."""
    rows = count // width
    fours = rows - rows % 4
    for r in range(0, fours, 4):
        a = start + r * stride
        b = a + stride
        c = b + stride
        e = c + stride
        for j in range(width):
            p = pivot[j]
            da = x[at(a + j)] - p
            db = x[at(b + j)] - p
            dc = x[at(c + j)] - p
            de = x[at(e + j)] - p
            s1[j] += (da + db) + (dc + de)
            s2[j] += (da * da + db * db) + (dc * dc + de * de)
    for r in range(fours, rows + 1):
        a = start + r * stride
        for j in range(min(width, count - r * width)):
            d = x[at(a + j)] - pivot[j]
            s1[j] += d
            s2[j] += d * d
