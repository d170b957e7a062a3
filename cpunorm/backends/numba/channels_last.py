"""channels_last: x (N, S, C), weight and bias along C, statistics over S and the K channels of a group.

Batch norm is one image of N·S rows, with groups of one channel.

Sums run down columns. A task takes a strip of channels of some images: the columns measured, merged
to groups, and the output written while the strip lies in L2. Where that makes too few tasks, images
are cut along S instead: the parts measured, merged, and the output written in a second sweep, which is
all that `apply` does.
"""

import numpy as np
from numba import prange

from . import rows
from ._jit import flat, jit, twins
from .activations import address
from .sweeps import (
    BLOCK,
    PIECE,
    SLAB,
    TASKS,
    WIDE,
    add_parameter_sums,
    at,
    ceil_div,
    column_gradient_sums,
    column_moments,
    finish,
    group_terms,
    merge_gradients,
    merge_moments,
    same_memory,
    set_terms,
    store_statistics,
    store_totals,
    unfold,
)

NARROW = 64  # channels of the narrowest strip that still reads whole cache lines in a row


@jit
def _lanes(rows, width, C):
    """How many rows are swept as one: they must lie side by side, and be short."""
    return min(max(1, WIDE // width), rows) if width == C else 1


@jit
def _affine(x, start, count, stride, width, terms, out, first, step):
    """out = (x - mean)·scale + shift, with terms for each column."""
    for r in range((count + width - 1) // width):
        a = start + r * stride
        o = first + r * step
        for j in range(min(width, count - r * width)):
            out[at(o + j)] = (x[at(a + j)] - terms[0, j]) * terms[1, j] + terms[2, j]


@jit
def _transform(x, residual, activation, start, rows, C, width, lanes, terms, y, z):
    """Write a block of y; `terms` has room for `lanes` times its width."""
    for i in range(3):
        unfold(terms[i], width, lanes)
    wide = lanes * width
    step = lanes * C
    count = rows * width
    if not (residual.size or activation or same_memory(x, y)):
        _affine(x, start, count, step, wide, terms, y, start, step)
        return
    tall = max(1, BLOCK // wide)
    for top in range(0, (count + wide - 1) // wide, tall):
        n = min(tall * wide, count - top * wide)
        a = start + top * step
        _affine(x, a, n, step, wide, terms, z, np.intp(0), wide)
        if wide == step:
            finish(z, residual, activation, a, n, n, n, y)
        else:
            finish(z, residual, activation, a, n, step, wide, y)


@jit
def _group_moments(mean, M2, first, K, rows):
    """Mean and M2 of K columns of equal length."""
    if K == 1:
        return mean[first], M2[first]
    offset = 0.0
    for k in range(first, first + K):
        offset += mean[k] - mean[first]
    group_mean = mean[first] + offset / K
    group_M2 = 0.0
    for k in range(first, first + K):
        d = mean[k] - group_mean
        group_M2 += M2[k] + rows * d * d
    return group_mean, group_M2


@jit
def _normalize_task(task, x, residual, weight, bias, eps, activation, y, outputs, sizes):
    N, S, C, K, images, strip = sizes
    across = (C + strip - 1) // strip
    c0 = task % across * strip
    n0 = task // across * images
    width = min(strip, C - c0)
    lanes = _lanes(S, width, C)
    wide = lanes * width
    pivot = np.empty(wide)
    mean = np.empty(wide)
    M2 = np.empty(wide)
    terms = np.empty((3, wide), x.dtype)
    z = np.empty(max(BLOCK, wide), x.dtype)
    for n in range(n0, min(N, n0 + images)):
        start = n * S * C + c0
        column_moments(x, start, S, C, width, lanes, True, pivot, mean, M2)
        for k in range(0, width, K):
            group_mean, group_M2 = _group_moments(mean, M2, k, K, S)
            unit = (n * C + c0 + k) // K
            rstd = store_statistics(unit, group_mean, group_M2, S * K, eps, outputs)
            for c in range(k, k + K):
                set_terms(terms, c, group_mean, rstd, weight, bias, c0 + c)
        if y.size:
            _transform(x, residual, activation, start, S, C, width, lanes, terms, y, z)


@twins
def _normalize(tasks, x, residual, weight, bias, eps, activation, y, outputs, sizes):
    for task in prange(tasks):
        _normalize_task(task, x, residual, weight, bias, eps, activation, y, outputs, sizes)


@jit
def _part(task, sizes):
    """(image, part, first row, rows, first channel, channels) of a task."""
    N, S, C, K, height, strip = sizes
    across = (C + strip - 1) // strip
    count = (S + height - 1) // height
    c0 = task % across * strip
    part = task // across % count
    top = part * height
    return task // across // count, part, top, min(height, S - top), c0, min(strip, C - c0)


@jit
def _measure_part(task, x, parts, sizes):
    N, S, C, K, height, strip = sizes
    n, part, top, h, c0, width = _part(task, sizes)
    lanes = _lanes(h, width, C)
    pivot = np.empty(lanes * width)
    mean = np.empty(lanes * width)
    M2 = np.empty(lanes * width)
    column_moments(x, (n * S + top) * C + c0, h, C, width, lanes, True, pivot, mean, M2)
    for k in range(0, width, K):
        unit = (n * C + c0 + k) // K
        parts[0, part, unit], parts[1, part, unit] = _group_moments(mean, M2, k, K, h)


@twins
def _measure_parts(tasks, x, parts, sizes):
    for task in prange(tasks):
        _measure_part(task, x, parts, sizes)


@jit
def _apply_task(task, x, residual, weight, bias, activation, y, stats, sizes):
    N, S, C, K, height, strip = sizes
    n, part, top, h, c0, width = _part(task, sizes)
    lanes = _lanes(h, width, C)
    terms = np.empty((3, lanes * width), x.dtype)
    z = np.empty(max(BLOCK, lanes * width), x.dtype)
    for c in range(width):
        unit = (n * C + c0 + c) // K
        set_terms(terms, c, stats[0, unit], stats[1, unit], weight, bias, c0 + c)
    start = (n * S + top) * C + c0
    _transform(x, residual, activation, start, h, C, width, lanes, terms, y, z)


@twins
def _apply(tasks, x, residual, weight, bias, activation, y, stats, sizes):
    for task in prange(tasks):
        _apply_task(task, x, residual, weight, bias, activation, y, stats, sizes)


@jit
def _set_means(terms, mean, n, c0, width, C, K):
    for c in range(width):
        terms[0, c] = mean[(n * C + c0 + c) // K]


@jit
def _set_group(terms, k, K, rstd, weight, channel, slope, offset):
    """terms[1:] of one group: grad_x = scale·dy + slope·(x - mean) + offset."""
    for c in range(k, k + K):
        terms[1, c] = rstd * weight[channel + c - k] if weight.size else rstd
        terms[2, c] = slope
        terms[3, c] = offset


@jit
def _sum_columns(grad_y, x, start, rows, C, width, lanes, terms, sums):
    """sums[:, c] = Σdy, Σdy·(x - mean), Σ(x - mean) of every column of a block."""
    g = np.empty(lanes * width)
    gx = np.empty(lanes * width)
    lost = np.empty(lanes * width)
    one = np.ones(1, x.dtype)
    unfold(terms[0], width, lanes)
    column_gradient_sums(grad_y, x, start, rows, C, width, lanes, terms[0], one, 0, g, gx, lost)
    for c in range(width):
        sums[0, c] = g[c]
        sums[1, c] = gx[c]
        sums[2, c] = lost[c]


@jit
def _write_grad_x(grad_y, x, start, rows, C, width, lanes, terms, frozen, grad_x):
    for i in range(4):
        unfold(terms[i], width, lanes)
    wide = lanes * width
    count = rows * width
    for r in range((count + wide - 1) // wide):
        a = start + r * lanes * C
        n = min(wide, count - r * wide)
        if frozen:
            # x plays no part, so that its NaN and Inf do not.
            for j in range(n):
                grad_x[at(a + j)] = terms[1, j] * grad_y[at(a + j)]
        else:
            for j in range(n):
                i = at(a + j)
                rest = terms[2, j] * (x[i] - terms[0, j]) + terms[3, j]
                grad_x[i] = terms[1, j] * grad_y[i] + rest


@jit
def _backward_task(task, grad_y, x, saved, weight, grad_x, totals, sizes):
    N, S, C, K, images, strip = sizes
    mean, rstd = saved
    across = (C + strip - 1) // strip
    c0 = task % across * strip
    n0 = task // across * images
    width = min(strip, C - c0)
    lanes = _lanes(S, width, C)
    terms = np.empty((4, lanes * width), x.dtype)
    sums = np.empty((3, width))
    for n in range(n0, min(N, n0 + images)):
        start = n * S * C + c0
        _set_means(terms, mean, n, c0, width, C, K)
        _sum_columns(grad_y, x, start, S, C, width, lanes, terms, sums)
        for k in range(0, width, K):
            s = np.float64(rstd[(n * C + c0 + k) // K])
            delta, slope, offset = group_terms(sums, k, K, S * K, s, weight, c0 + k)
            add_parameter_sums(sums, k, K, s, delta, totals, task // across, c0 + k)
            _set_group(terms, k, K, s, weight, c0 + k, slope, offset)
        if grad_x.size:
            _write_grad_x(grad_y, x, start, S, C, width, lanes, terms, False, grad_x)


@twins
def _backward(tasks, grad_y, x, saved, weight, grad_x, totals, sizes):
    for task in prange(tasks):
        _backward_task(task, grad_y, x, saved, weight, grad_x, totals, sizes)


@jit
def _backward_part(task, grad_y, x, saved, weight, frozen, parts, group_terms_, grad_x, sizes):
    """Over one part: the sums of its columns, and grad_x if there is one to write yet."""
    N, S, C, K, height, strip = sizes
    mean, rstd = saved
    n, part, top, h, c0, width = _part(task, sizes)
    lanes = _lanes(h, width, C)
    start = (n * S + top) * C + c0
    terms = np.empty((4, lanes * width), x.dtype)
    _set_means(terms, mean, n, c0, width, C, K)
    if parts.size:
        sums = np.empty((3, width))
        _sum_columns(grad_y, x, start, h, C, width, lanes, terms, sums)
        for i in range(3):
            for c in range(width):
                parts[i, part, n * C + c0 + c] = sums[i, c]
    if grad_x.size:
        for k in range(0, width, K):
            unit = (n * C + c0 + k) // K
            s = np.float64(rstd[unit])
            slope, offset = group_terms_[0, unit], group_terms_[1, unit]
            _set_group(terms, k, K, s, weight, c0 + k, slope, offset)
        _write_grad_x(grad_y, x, start, h, C, width, lanes, terms, frozen, grad_x)


@twins
def _backward_parts(tasks, grad_y, x, saved, weight, frozen, parts, group_terms_, grad_x, sizes):
    for task in prange(tasks):
        _backward_part(task, grad_y, x, saved, weight, frozen, parts, group_terms_, grad_x, sizes)


def _sizes(x, mean):
    """(N, S, C, K), the batch folded into the rows where it is reduced."""
    N, S, C = x.shape
    B, G = mean.shape
    return B, N // B * S, C, C // G


def _strip(width, C, K):
    """About `width` channels, in whole groups: all, or not too few."""
    width = max(width, NARROW)
    return C if width >= C else min(C, max(1, width // K) * K if K > 1 else width // 16 * 16)


def _task_size(sizes, itemsize):
    """How many images and channels make a task; None where the images are cut."""
    N, S, C, K = sizes
    strip = _strip(SLAB // (S * itemsize), C, K)
    if N * ceil_div(C, strip) < TASKS:
        strip = _strip(PIECE // S, C, K)
    images = max(1, PIECE // (S * strip))
    tasks = ceil_div(N, images) * ceil_div(C, strip)
    fits = S * strip * itemsize <= SLAB
    if tasks >= TASKS or (fits and tasks * PIECE >= N * S * C):
        return images, strip
    return None


def _part_size(sizes):
    """The rows and channels of a part, and how many parts an image has along S."""
    N, S, C, K = sizes
    strip = _strip(1024, C, K)
    height = min(S, max(1, PIECE // strip))
    return height, strip, ceil_div(S, height)


def normalize(x, residual, weight, bias, eps, activation, y, mean, var, rstd, threads):
    """y = activation((x - mean)·rstd·weight + bias + residual); where y is None, only the statistics."""
    sizes = N, S, C, K = _sizes(x, mean)
    function = address(activation, x.dtype)
    outputs = mean, var, rstd
    if S == 1:
        groups = N * C // K, K
        x, residual, y = (None if a is None else a.reshape(groups) for a in (x, residual, y))
        rows.normalize_groups(
            x, None, residual, weight, bias, eps, True, function, y, None, outputs, C // K, threads
        )
        return
    size = _task_size(sizes, x.itemsize)
    x, residual, weight, bias, y = (flat(array, x) for array in (x, residual, weight, bias, y))
    outputs = tuple(flat(array, x) for array in outputs)
    if size:
        tasks = ceil_div(N, size[0]) * ceil_div(C, size[1])
        _normalize(
            threads, tasks, x, residual, weight, bias, eps, function, y, outputs, (*sizes, *size)
        )
        return
    height, strip, count = _part_size(sizes)
    tasks = N * count * ceil_div(C, strip)
    cut = *sizes, height, strip
    parts = np.empty((2, count, N * C // K))
    stats = np.empty((2, N * C // K))
    _measure_parts(threads, tasks, x, parts, cut)
    merge_moments(parts, S, K, height, K, eps, stats, outputs)
    if y.size:
        _apply(threads, tasks, x, residual, weight, bias, function, y, stats, cut)


def apply(x, residual, weight, bias, activation, y, mean, rstd, threads):
    """As `normalize`, with the statistics given."""
    sizes = N, S, C, K = _sizes(x, mean)
    function = address(activation, x.dtype)
    height, strip, count = _part_size(sizes)
    stats = np.array((mean.reshape(-1), rstd.reshape(-1)), np.float64)
    _apply(
        threads, N * count * ceil_div(C, strip),
        flat(x, x), flat(residual, x), flat(weight, x), flat(bias, x), function, flat(y, x), stats,
        (*sizes, height, strip),
    )  # fmt: skip


def moments(x, mean, var, threads):
    """Mean and biased variance."""
    normalize(x, None, None, None, 1.0, 0, None, mean, var, None, threads)


def backward(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, threads):
    """Gradients through the statistics."""
    _gradients(grad_y, x, mean, rstd, weight, False, grad_x, grad_weight, grad_bias, threads)


def backward_apply(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, threads):
    """Gradients with the statistics held constant."""
    _gradients(grad_y, x, mean, rstd, weight, True, grad_x, grad_weight, grad_bias, threads)


def _gradients(grad_y, x, mean, rstd, weight, frozen, grad_x, grad_weight, grad_bias, threads):
    sizes = N, S, C, K = _sizes(x, mean)
    if S == 1 and not frozen:
        groups = N * C // K, K
        grad_y, x, grad_x = (None if a is None else a.reshape(groups) for a in (grad_y, x, grad_x))
        rows.backward_groups(
            grad_y, x, mean, rstd, weight, None, grad_x, grad_weight, grad_bias, C // K, threads
        )
        return
    size = _task_size(sizes, 2 * x.itemsize)
    grad_y, x, weight, grad_x = (flat(array, x) for array in (grad_y, x, weight, grad_x))
    saved = flat(mean, x), flat(rstd, x)
    if size and not frozen:
        slots = ceil_div(N, size[0])
        totals = np.zeros((slots, 2, C))
        tasks = slots * ceil_div(C, size[1])
        _backward(threads, tasks, grad_y, x, saved, weight, grad_x, totals, (*sizes, *size))
    else:
        height, strip, count = _part_size(sizes)
        tasks = N * count * ceil_div(C, strip)
        cut = *sizes, height, strip
        parts = np.empty((3, count, N * C))
        terms = np.empty((2, N * C // K))
        totals = np.zeros((1, 2, C))
        none = np.empty(0, x.dtype)
        _backward_parts(
            threads, tasks, grad_y, x, saved, weight, frozen, parts, terms,
            grad_x if frozen else none, cut,
        )  # fmt: skip
        sums = parts.sum(axis=1)
        merge_gradients(sums, C // K, K, S * K, saved[1], weight, frozen, terms, totals)
        if grad_x.size and not frozen:
            parts = np.empty((3, count, 0))
            _backward_parts(
                threads, tasks, grad_y, x, saved, weight, frozen, parts, terms, grad_x, cut
            )
    store_totals(totals, grad_weight, grad_bias)
