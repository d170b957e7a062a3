"""The inner loops that several problems share, and the sizes by which all of them cut their work.

A block is `rows` rows of `width` elements in a flat array, `stride` apart, the first at `start`; where
a block is given by its `count` of elements, its last row may be short. Loops take offsets, not slices:
numba counts references to a slice, which costs more than a short row.

Every sum is held in float64, and deviations are taken from an element of the statistic itself:
M2 = Σd² - (Σd)²/n with d = x - pivot then loses at most n·2⁻⁵³ of itself however large the mean, and
a constant comes out with its own value as the mean and a variance of exactly 0.
"""

import math

import numpy as np

from ._jit import jit, kernel
from .activations import activate

BLOCK = 4096  # elements that are swept several times from L1
PIECE = 32768  # elements of the least task worth a thread
SLAB = 512 * 1024  # bytes that stay in L2 between two sweeps
TASKS = 16  # enough to keep the threads busy; where there would be fewer, statistics are cut
WIDE = 512  # elements of a row long enough for a loop of its own

# An index of this type cannot be negative: numba's test for that would keep the loops scalar.
at = np.uintp


def ceil_div(a, b):
    return -(-a // b)


@jit
def same_memory(a, b):
    return a.ctypes.data == b.ctypes.data


@jit
def block_moments(x, start, rows, stride, width, center):
    """Mean and M2 of one block; 0 and Σx² where it is not to be centred."""
    pivot = np.float64(x[at(start)]) if center else 0.0
    s1 = 0.0
    s2 = 0.0
    for r in range(rows):
        a = start + r * stride
        for j in range(width):
            d = x[at(a + j)] - pivot
            s1 += d
            s2 += d * d
    if not center:
        return 0.0, s2
    n = rows * width
    return pivot + s1 / n, s2 - s1 * s1 / n


@jit
def column_moments(x, start, rows, stride, width, lanes, center, pivot, mean, M2):
    """Mean and M2 of every column of a block, into mean[:width] and M2[:width].

    A narrow block without gaps is swept as if `lanes` of its rows were one: the three arrays, all
    float64, are that many times as long as it is wide.
    """
    wide = lanes * width
    step = lanes * stride
    count = rows * width
    full = count // wide
    fours = full - full % 4
    for j in range(width):
        pivot[j] = x[at(start + j)] if center else 0.0
    unfold(pivot, width, lanes)
    for j in range(wide):
        mean[j] = 0.0
        M2[j] = 0.0
    # Four rows for each load and store of the sums.
    for r in range(0, fours, 4):
        a = start + r * step
        b = a + step
        c = b + step
        d = c + step
        for j in range(wide):
            p = pivot[j]
            da = x[at(a + j)] - p
            db = x[at(b + j)] - p
            dc = x[at(c + j)] - p
            dd = x[at(d + j)] - p
            mean[j] += (da + db) + (dc + dd)
            M2[j] += (da * da + db * db) + (dc * dc + dd * dd)
    for r in range(fours, full + 1):
        a = start + r * step
        for j in range(min(wide, count - r * wide)):
            da = x[at(a + j)] - pivot[j]
            mean[j] += da
            M2[j] += da * da
    fold(mean, width, lanes)
    fold(M2, width, lanes)
    for j in range(width):
        s1 = mean[j] if center else 0.0
        mean[j] = pivot[j] + s1 / rows
        M2[j] -= s1 * s1 / rows


@jit
def column_gradient_sums(
    grad_y, x, start, rows, stride, width, lanes, mean, weight, weighted, g, gx, lost
):
    """Σg, Σg·(x - mean) and Σ(x - mean) of every column of a block, with g = grad_y·weight of the row.

    As in `column_moments`, all arrays are `lanes` times as long as the block is wide, which goes with a
    weight that is the same for all rows (`weighted` is 0).
    """
    wide = lanes * width
    step = lanes * stride
    count = rows * width
    full = count // wide
    pairs = full - full % 2
    for j in range(wide):
        g[j] = 0.0
        gx[j] = 0.0
        lost[j] = 0.0
    for r in range(0, pairs, 2):
        a = start + r * step
        b = a + step
        wa = np.float64(weight[at(r * weighted)])
        wb = np.float64(weight[at((r + 1) * weighted)])
        for j in range(wide):
            m = np.float64(mean[j])
            da = x[at(a + j)] - m
            db = x[at(b + j)] - m
            ga = grad_y[at(a + j)] * wa
            gb = grad_y[at(b + j)] * wb
            g[j] += ga + gb
            gx[j] += ga * da + gb * db
            lost[j] += da + db
    for r in range(pairs, full + 1):
        a = start + r * step
        wa = np.float64(weight[at(min(r, rows - 1) * weighted)])
        for j in range(min(wide, count - r * wide)):
            da = x[at(a + j)] - np.float64(mean[j])
            ga = grad_y[at(a + j)] * wa
            g[j] += ga
            gx[j] += ga * da
            lost[j] += da
    fold(g, width, lanes)
    fold(gx, width, lanes)
    fold(lost, width, lanes)


@jit
def fold(sums, width, lanes):
    """Add up the lanes of a swept row into the first."""
    for lane in range(1, lanes):
        a = lane * width
        for j in range(width):
            sums[j] += sums[at(a + j)]


@jit
def unfold(values, width, lanes):
    """Copy the first lane to the others."""
    for j in range(width, lanes * width):
        values[at(j)] = values[at(j - width)]


@jit
def store_statistics(unit, mean_value, M2, count, eps, outputs):
    """Store what is wanted of the statistics of one unit; return its rstd."""
    mean, var, rstd = outputs
    variance = M2 / count
    rstd_value = 1.0 / math.sqrt(variance + eps)
    if mean.size:
        mean[unit] = mean_value
    if var.size:
        var[unit] = variance
    if rstd.size:
        rstd[unit] = rstd_value
    return rstd_value


@jit
def part_of(part, rows, width, height, length):
    """(top, left, rows, width) of one part of a block cut into parts of height by length."""
    across = (width + length - 1) // length
    top = part // across * height
    left = part % across * length
    return top, left, min(height, rows - top), min(length, width - left)


@kernel
def merge_moments(parts, rows, width, height, length, eps, stats, outputs):
    """Merge parts[:, part, unit], the (mean, M2) of each part of the block of a unit, by Chan's formula.

    stats[:, unit] becomes (mean, rstd).
    """
    units = stats.shape[1]
    seen = 0
    for part in range(parts.shape[1]):
        _, _, h, w = part_of(part, rows, width, height, length)
        share = h * w / (seen + h * w)
        for unit in range(units):
            if part == 0:
                stats[0, unit] = parts[0, 0, unit]
                stats[1, unit] = parts[1, 0, unit]
            else:
                d = parts[0, part, unit] - stats[0, unit]
                stats[0, unit] += d * share
                stats[1, unit] += parts[1, part, unit] + d * d * seen * share
        seen += h * w
    for unit in range(units):
        stats[1, unit] = store_statistics(unit, stats[0, unit], stats[1, unit], seen, eps, outputs)


@jit
def set_terms(terms, i, mean, rstd, weight, bias, channel):
    """terms[:, i] = (mean, scale, shift) with y = (x - mean)·scale + shift.

    `shift` carries what the mean loses by being rounded to the type of x.
    """
    number = terms.dtype.type
    rounded = number(mean)
    scale = number(rstd * weight[channel] if weight.size else rstd)
    shift = (rounded - mean) * scale
    terms[0, i] = rounded
    terms[1, i] = scale
    terms[2, i] = shift + bias[channel] if bias.size else shift


@jit
def add(x, residual, start, rows, stride, width, z, total):
    """total = x + residual over one block, by way of `z`, as total may be either of them."""
    for r in range(rows):
        for left in range(0, width, BLOCK):
            a = start + r * stride + left
            n = min(BLOCK, width - left)
            for j in range(n):
                z[j] = x[at(a + j)] + residual[at(a + j)]
            for j in range(n):
                total[at(a + j)] = z[j]


@jit
def finish(z, residual, activation, start, count, stride, width, y):
    """Write a block of the output from `z`, a copy of it without gaps in L1.

    What stands after the affine step is done there; and a y that is x itself is written this way,
    because loops that read and write the same memory are not vectorised.
    """
    rows = (count + width - 1) // width
    if residual.size:
        for r in range(rows):
            a = start + r * stride
            b = r * width
            for j in range(min(width, count - b)):
                z[at(b + j)] += residual[at(a + j)]
    if activation:
        activate(activation, z, count)
    for r in range(rows):
        a = start + r * stride
        b = r * width
        for j in range(min(width, count - b)):
            y[at(a + j)] = z[at(b + j)]


@jit
def group_terms(sums, first, channels, count, rstd, weight, channel):
    """(delta, slope, offset) of one group from Σdy, Σdy·(x - mean), Σ(x - mean) of each channel.

    grad_x = weight·rstd·dy + slope·(x - mean) + offset, where delta is what the mean lost by being
    rounded and `offset` makes up for it.
    """
    g = 0.0
    gx = 0.0
    delta = 0.0
    for k in range(channels):
        w = np.float64(weight[channel + k]) if weight.size else 1.0
        g += w * sums[0, first + k]
        gx += w * sums[1, first + k]
        delta += sums[2, first + k] / count
    gx -= delta * g
    slope = -rstd * rstd * rstd * gx / count
    return delta, slope, -rstd * g / count - slope * delta


@jit
def add_parameter_sums(sums, first, channels, rstd, delta, totals, slot, channel):
    """Add one group to totals[slot], (2, C): the sums over units of grad_weight and grad_bias."""
    for k in range(channels):
        product = sums[1, first + k] - delta * sums[0, first + k]
        totals[slot, 0, channel + k] += rstd * product
        totals[slot, 1, channel + k] += sums[0, first + k]


@kernel
def merge_gradients(sums, groups, channels, count, rstd, weight, frozen, terms, totals):
    """From sums (3, B·C) to terms[:, unit] = (slope, offset) of each unit and to totals[0]."""
    for unit in range(terms.shape[1]):
        first = unit * channels
        channel = unit % groups * channels
        s = np.float64(rstd[unit])
        delta = 0.0
        if not frozen:
            delta, terms[0, unit], terms[1, unit] = group_terms(
                sums, first, channels, count, s, weight, channel
            )
        add_parameter_sums(sums, first, channels, s, delta, totals, 0, channel)


def store_totals(totals, grad_weight, grad_bias):
    """Add up totals[slot, (weight, bias), channel] over the slots, in their order."""
    for gradient, total in zip((grad_weight, grad_bias), totals.sum(axis=0), strict=True):
        if gradient is not None:
            gradient[...] = total
