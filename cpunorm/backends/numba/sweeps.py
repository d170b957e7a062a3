"""The inner loops that several problems share, and the sizes by which all of them cut their work.

A block is `rows` rows of `width` elements in a flat array, `stride` apart, the first at `start`;
where a block is given by its `count` of elements, its last row may be short. Loops take offsets,
not slices: numba counts references to a slice, which costs more than a short row.

Moments are summed in float64, as deviations from an element of the statistic itself. With
d = x - pivot, M2 = Σd² - (Σd)²/n then loses at most n·2⁻⁵³ of itself however large the mean, and a
constant comes out with its own value as the mean and a variance of exactly 0.

Statistics in progress are two float64 arrays, `mean` and `M2`, which `settle` turns into mean and
rstd. Gradients in progress are the three sums Σg, Σg·(x - mean), Σ(x - mean); they turn into the
terms of

    grad_x = scale·(g - centre) + slope·(x - mean) + rest

where g = grad_y·weight and scale = rstd, or for one channel g = grad_y and scale = weight·rstd. The
last sum is what the mean lost by being rounded; slope and rest make up for it.
"""

import numpy as np

from ..caches import stream_bytes
from ._jit import Array, jit, jit_sum, sweep
from .activations import RELU, activate
from .streams import BLOCK, LINE, store_lines

PIECE = 16384  # elements of the least task worth a thread
SLAB = 512 * 1024  # bytes that stay in L2 between two sweeps
TASKS = 8  # enough to keep the threads busy; where there would be fewer, statistics are cut
SHORT_SUM = 32  # rows summed in the type of x before float64 takes over
RUN = 4096  # and elements of a row
FIRST = 8  # rows whose mean is the first pivot of a column

# An index of this type cannot be negative: numba's test for that would keep the loops scalar.
at = np.uintp


# Bytes of x from which on a result goes past the caches, forward and backward.
STREAM = stream_bytes()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def is_large(x: Array, backward: bool = False) -> bool:
    """Whether a result of the size of x is for memory; if it can be stored past the caches."""
    return x.itemsize > 2 and x.nbytes >= STREAM[backward]


@jit
def same_memory(a, b):
    return a.ctypes.data == b.ctypes.data


@jit
def way_of(x, residual, activation, y, large):
    """Whether y is put together in L1, for `finish`, and whether it goes past the caches then.

    What takes the place of an input stays in the cache with it.
    """
    in_place = same_memory(x, y)
    streaming = large and not (in_place or same_memory(residual, y))
    return bool(residual.size or activation or in_place or streaming), streaming


@jit
def lanes_of(rows, width, stride):
    """How many rows of a block to sweep as one: it must be narrow, without gaps, and tall.

    Sweeps down columns read four rows at a time. The prefetchers keep up where all four lie within
    a kilobyte, or each on a page of its own; in between, memory takes twice the time.
    """
    if width != stride:
        return 1
    wide = 64 if width <= 64 else 1024
    most = min(wide // width, rows // 8)
    lanes = 1
    while 2 * lanes <= most:
        lanes *= 2
    return lanes


@sweep
def fold(sums, width, lanes):
    """Add up the lanes of a swept row, a power of two, into the first."""
    wide = lanes * width // 2
    while wide >= width:
        for j in range(wide):
            sums[j] += sums[at(wide + j)]
        wide //= 2


@jit
def unfold(values, width, lanes):
    """Copy the first lane to the others."""
    for j in range(width, lanes * width):
        values[at(j)] = values[at(j - width)]


@jit_sum
def deviations(x, start, rows, stride, width, units, pivot, s1, s2):
    """Add Σd and Σd² of blocks side by side, with d = x - pivot: along a run in the type of x."""
    zero = x.dtype.type(0)
    for r in range(rows):
        for i in range(units):
            p = pivot[i]
            for left in range(0, width, RUN):
                a = start + r * stride + i * width + left
                run1 = zero
                run2 = zero
                for j in range(min(RUN, width - left)):
                    d = x[at(a + j)] - p
                    run1 += d
                    run2 += d * d
                s1[i] += run1
                s2[i] += run2


@jit
def sample_mean(x, start, width):
    """The mean of a few values; exactly the value where all are the same."""
    quarter = width // 4
    first = x[at(start)]
    b = x[at(start + quarter)] - first
    c = x[at(start + 2 * quarter)] - first
    d = x[at(start + 3 * quarter)] - first
    return first + ((b + c) + d) * x.dtype.type(0.25)


@jit
def unit_moments(x, start, rows, stride, width, units, center, pivot, mean, M2):
    """Mean and M2 of blocks side by side, read in the order of memory.

    0 and Σx² where they are not to be centred. `pivot` is scratch in the type of x.
    """
    n = rows * width
    number = x.dtype.type
    for i in range(units):
        a = start + i * width
        pivot[i] = sample_mean(x, a, width) if center else number(0)
        mean[i] = 0.0
        M2[i] = 0.0
    deviations(x, start, rows, stride, width, units, pivot, mean, M2)
    if not center:
        mean[:units] = 0.0
        return
    for i in range(units):
        # A pivot more than two deviations from the mean: what is lost by the difference shows.
        if 1.25 * mean[i] * mean[i] > n * M2[i]:
            pivot[i] = pivot[i] + mean[i] / n
            mean[i] = 0.0
            M2[i] = 0.0
            a = start + i * width
            deviations(x, a, rows, stride, width, 1, pivot[i:], mean[i:], M2[i:])
    for i in range(units):
        offset = mean[i] / n
        M2[i] -= mean[i] * offset
        mean[i] = pivot[i] + offset


@sweep
def column_moments(x, start, rows, stride, width, lanes, center, scratch, mean, M2):
    """Mean and M2 of every column of a block; 0 and Σx² where it is not to be centred.

    `scratch`, (3, lanes·width), has the type of x.
    """
    pivot, s1, s2 = scratch[0], scratch[1], scratch[2]
    wide = lanes * width
    step = lanes * stride
    count = rows * width
    full = count // wide
    first = min(rows, FIRST)
    for j in range(width):
        pivot[j] = 0
        mean[j] = 0.0
        M2[j] = 0.0
    if center:
        for r in range(1, first):
            for j in range(width):
                pivot[j] += x[at(start + r * stride + j)] - x[at(start + j)]
        for j in range(width):
            pivot[j] = x[at(start + j)] + pivot[j] / x.dtype.type(first)
    unfold(pivot, width, lanes)
    for top in range(0, full + 1, SHORT_SUM):
        stop = min(top + SHORT_SUM, full + 1)
        fours = top + (min(stop, full) - top) // 4 * 4
        for j in range(wide):
            s1[j] = 0
            s2[j] = 0
        # Four rows for each load and store of the sums.
        for r in range(top, fours, 4):
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
                s1[j] += (da + db) + (dc + dd)
                s2[j] = s2[j] + da * da + db * db + dc * dc + dd * dd
        for r in range(fours, stop):
            a = start + r * step
            for j in range(min(wide, count - r * wide)):
                da = x[at(a + j)] - pivot[j]
                s1[j] += da
                s2[j] += da * da
        fold(s1, width, lanes)
        fold(s2, width, lanes)
        seen = top * lanes
        n = min(rows, stop * lanes) - seen
        if not center:
            for j in range(width):
                M2[j] += s2[j]
        elif n:
            share = 1.0 / (seen + n)
            for j in range(width):
                offset = s1[j] / np.float64(n)
                d = (pivot[j] - mean[j]) + offset
                M2[j] += (s2[j] - s1[j] * offset) + d * d * (seen * n * share)
                mean[j] += d * (n * share)
                pivot[j] = mean[j]
            unfold(pivot, width, lanes)


@sweep
def settle(mean, M2, units, count, eps, outputs, unit):
    """From M2 over `count` elements to rstd, in place; store what is wanted, from `unit` on."""
    mean_out, var_out, rstd_out = outputs
    for i in range(units):
        M2[i] /= count
    if var_out.size:
        for i in range(units):
            var_out[at(unit + i)] = M2[i]
    for i in range(units):
        M2[i] = 1.0 / np.sqrt(M2[i] + eps)
    if mean_out.size:
        for i in range(units):
            mean_out[at(unit + i)] = mean[i]
    if rstd_out.size:
        for i in range(units):
            rstd_out[at(unit + i)] = M2[i]


@jit
def pieces(rows, width):
    """(top, left, rows, width) of each piece of a block that there is room for in L1."""
    tall = max(1, BLOCK // width)
    for top in range(0, rows, tall):
        for left in range(0, width, BLOCK):
            yield top, left, min(tall, rows - top), min(BLOCK, width - left)


@jit
def part_of(part, rows, width, height, length):
    """(top, left, rows, width) of one part of a block cut into parts of height by length."""
    across = (width + length - 1) // length
    top = part // across * height
    left = part % across * length
    return top, left, min(height, rows - top), min(length, width - left)


@jit
def merge_moments(parts, rows, width, height, length, eps, outputs, stats):
    """Merge parts[:, part, unit], (mean, M2) of each part of a block, by Chan's formula.

    `stats` take mean and rstd.
    """
    mean, M2 = stats
    units = parts.shape[2]
    mean[:units] = 0.0
    M2[:units] = 0.0
    seen = np.intp(0)
    for part in range(parts.shape[1]):
        _, _, h, w = part_of(part, rows, width, height, length)
        share = h * w / (seen + h * w)
        for i in range(units):
            d = parts[0, part, i] - mean[i] if part else 0.0
            mean[i] = mean[i] + d * share if part else parts[0, part, i]
            M2[i] += parts[1, part, i] + d * d * seen * share
        seen += h * w
    settle(mean, M2, units, seen, eps, outputs, np.intp(0))


@jit
def scale_of(rstd, weight, channel):
    """weight·rstd of one channel, rounded once."""
    number = weight.dtype.type
    return number(rstd * weight[at(channel)]) if weight.size else number(rstd)


@jit
def spread(values, units, K):
    """From one value per unit to one for each of its K channels, in place."""
    if K == 1:
        return
    for i in range(units - 1, -1, -1):
        value = values[i]
        for k in range(i * K, i * K + K):
            values[k] = value


@sweep
def set_terms(terms, channels, mean, rstd, first, weight, bias, channel):
    """terms[:, i] = (mean, scale, shift), y = (x - mean)·scale + shift, channels from `channel`.

    The statistics are those of each channel, from `first` on. The shift carries what the mean loses
    by being rounded.
    """
    number = terms.dtype.type
    for i in range(channels):
        m = mean[at(first + i)]
        scale = scale_of(rstd[at(first + i)], weight, channel + i)
        shift = (number(m) - m) * scale
        terms[0, i] = m
        terms[1, i] = scale
        terms[2, i] = shift + bias[at(channel + i)] if bias.size else shift


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
def stream(z, first, count, y, start):
    """Store a stretch of z, which is in L1, past the caches: its whole lines at least."""
    size = z.itemsize
    head = min(count, -(np.intp(y.ctypes.data) + start * size) % LINE // size)
    for j in range(head):
        y[at(start + j)] = z[at(first + j)]
    for j in range(head + store_lines(z, first + head, y, start + head, count - head), count):
        y[at(start + j)] = z[at(first + j)]


@jit
def stream_block(z, start, count, stride, width, y):
    """The same of a block of y, without gaps in z."""
    for r in range((count + width - 1) // width):
        stream(z, r * width, min(width, count - r * width), y, start + r * stride)


@jit
def finish(z, streaming, residual, activation, start, count, stride, width, y):
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
    if activation > RELU:
        activate(activation, z, count)
    floor = z.dtype.type(0.0 if activation == RELU else -np.inf)
    if streaming:
        if activation == RELU:
            for j in range(count):
                z[at(j)] = floor if z[at(j)] < floor else z[at(j)]
        stream_block(z, start, count, stride, width, y)
        return
    for r in range(rows):
        a = start + r * stride
        b = r * width
        for j in range(min(width, count - b)):
            value = z[at(b + j)]
            # Written so that NaN stays NaN.
            y[at(a + j)] = floor if value < floor else value


@jit
def element_gradient(g, d, scale, centre, slope, rest):
    """One element of grad_x, with d = x - mean."""
    return scale * (g - centre) + (slope * d + rest)


@jit_sum
def block_gradient_sums(grad_y, x, start, rows, stride, width, mean):
    """Σg, Σg·(x - mean), Σ(x - mean) over one block, with g = grad_y."""
    zero = x.dtype.type(0)
    g = 0.0
    gx = 0.0
    lost = 0.0
    for r in range(rows):
        for left in range(0, width, RUN):
            a = start + r * stride + left
            run_g = zero
            run_gx = zero
            run_lost = zero
            for j in range(min(RUN, width - left)):
                d = x[at(a + j)] - mean
                v = grad_y[at(a + j)]
                run_g += v
                run_gx += v * d
                run_lost += d
            g += run_g
            gx += run_gx
            lost += run_lost
    return g, gx, lost


@sweep
def column_gradient_sums(
    grad_y, x, start, rows, stride, width, lanes, mean, weight, weighted, g, gx, lost, sums
):
    """sums[:, j] = Σg, Σg·(x - mean), Σ(x - mean) down column j, with g = grad_y·weight of the row.

    All arrays but `sums` are in the type of x, and `lanes` times as long as the block is wide. More
    lanes than one go with one weight for all rows (`weighted` is 0).
    """
    wide = lanes * width
    step = lanes * stride
    count = rows * width
    full = count // wide
    for i in range(3):
        for j in range(width):
            sums[i, j] = 0.0
    for top in range(0, full + 1, SHORT_SUM):
        stop = min(top + SHORT_SUM, full + 1)
        fours = top + (min(stop, full) - top) // 4 * 4
        for j in range(wide):
            g[j] = 0.0
            gx[j] = 0.0
            lost[j] = 0.0
        for r in range(top, fours, 4):
            a = start + r * step
            b = a + step
            c = b + step
            d = c + step
            w = r * weighted
            wa = weight[at(w)]
            wb = weight[at(w + weighted)]
            wc = weight[at(w + 2 * weighted)]
            wd = weight[at(w + 3 * weighted)]
            for j in range(wide):
                m = mean[j]
                da = x[at(a + j)] - m
                db = x[at(b + j)] - m
                dc = x[at(c + j)] - m
                dd = x[at(d + j)] - m
                ga = grad_y[at(a + j)] * wa
                gb = grad_y[at(b + j)] * wb
                gc = grad_y[at(c + j)] * wc
                gd = grad_y[at(d + j)] * wd
                g[j] += (ga + gb) + (gc + gd)
                gx[j] = gx[j] + ga * da + gb * db + gc * dc + gd * dd
                lost[j] += (da + db) + (dc + dd)
        for r in range(fours, stop):
            a = start + r * step
            wa = weight[at(min(r, rows - 1) * weighted)]
            for j in range(min(wide, count - r * wide)):
                da = x[at(a + j)] - mean[j]
                ga = grad_y[at(a + j)] * wa
                g[j] += ga
                gx[j] += ga * da
                lost[j] += da
        fold(g, width, lanes)
        fold(gx, width, lanes)
        fold(lost, width, lanes)
        for j in range(width):
            sums[0, j] += g[j]
            sums[1, j] += gx[j]
            sums[2, j] += lost[j]


@jit
def row_terms(terms, mean, rstd, unit, units, count):
    """From terms[:3] = the sums of each unit to (centre, slope, rest, shift), in place.

    The normalized x is (x - mean)·rstd + shift.
    """
    number = rstd.dtype.type
    for i in range(units):
        s = np.float64(rstd[at(unit + i)])
        g = terms[0, i] / count if mean.size else 0.0
        delta = terms[2, i] / count if mean.size else 0.0
        centre = number(g)
        slope = -s * s * s * (terms[1, i] - delta * terms[0, i]) / count
        terms[0, i] = centre
        terms[1, i] = slope
        terms[2, i] = s * (centre - g) - slope * delta
        terms[3, i] = -delta * s


@sweep
def channel_terms(sums, first, channels, K, count, rstd, weight, channel, frozen, totals, slot):
    """From the sums of channels, whole groups of K, to their (centre, slope, rest), in place.

    sums[:, i] and rstd[i] begin at `first`; totals[slot], (2, C), takes up what the channels add to
    grad_weight and grad_bias.
    """
    number = weight.dtype.type
    groups = np.empty((3, channels))  # the sums of its group for each channel
    for c in range(channels):
        scale = np.float64(scale_of(np.float64(rstd[at(first + c)]), weight, channel + c))
        groups[0, c] = 0.0 if frozen else scale * sums[0, at(first + c)]
        groups[1, c] = 0.0 if frozen else scale * sums[1, at(first + c)]
        groups[2, c] = 0.0 if frozen else sums[2, at(first + c)]
    if K > 1:
        for i in range(3):
            for c in range(0, channels, K):
                total = 0.0
                for k in range(c, c + K):
                    total += groups[i, k]
                for k in range(c, c + K):
                    groups[i, k] = total
    for c in range(channels):
        i = at(first + c)
        s = np.float64(rstd[i])
        g = groups[0, c]
        delta = groups[2, c] / count
        slope = -s * s * (groups[1, c] - delta * g) / count
        centre = number(sums[0, i] * K / count)
        totals[slot, 0, at(channel + c)] += s * (sums[1, i] - delta * sums[0, i])
        totals[slot, 1, at(channel + c)] += sums[0, i]
        scale = np.float64(scale_of(s, weight, channel + c))
        sums[0, i] = centre
        sums[1, i] = slope
        sums[2, i] = scale * centre - g / count - slope * delta


@jit
def add_slots(slots):
    """Add up the last two axes of (slots, ·, ·) into the first slot, in their order."""
    for slot in range(1, slots.shape[0]):
        for i in range(slots.shape[1]):
            for j in range(slots.shape[2]):
                slots[0, i, j] += slots[slot, i, j]


@jit
def merge_gradients(parts, C, K, count, rstd, weight, frozen, totals):
    """`channel_terms` for every image, of sums that are given in parts, (parts, 3, B·C)."""
    add_slots(parts)
    zero = np.intp(0)
    for first in range(0, rstd.size, C):
        channel_terms(parts[0], first, C, K, count, rstd, weight, zero, frozen, totals, zero)


def store_totals(task, arguments):
    """A stage: add up totals[slot, (weight, bias), channel] over the slots, in their order.

    The arguments end with the totals and (grad_weight, grad_bias).
    """
    totals = arguments[-2]
    grad_weight, grad_bias = arguments[-1]
    if grad_weight.size or grad_bias.size:
        add_slots(totals)
    for j in range(grad_weight.size):
        grad_weight[j] = totals[0, 0, j]
    for j in range(grad_bias.size):
        grad_bias[j] = totals[0, 1, j]


def per_channel(K: int, *statistics: Array) -> tuple[Array, ...]:
    """From one value per group to one for each of its K channels."""
    return statistics if K == 1 else tuple(array.repeat(K) for array in statistics)
