"""channels_last: x (N, S, C), weight and bias along C, statistics over S and the K channels of a group.

Batch norm is one image of N·S rows, with groups of one channel.

Sums run down columns. A task takes a strip of channels of some images: the columns measured, merged
to groups, and the output written while the strip lies in L2. Where that makes too few tasks, images
are cut along S instead: the parts measured, merged, and the output written in a second sweep, which is
all that `apply` does.
"""

import numpy as np
from . import rows
from ._jit import flat, jit, kernel
from .activations import address
from .sweeps import (
    BLOCK,
    PIECE,
    SLAB,
    TASKS,
    add_parameter_sums,
    at,
    ceil_div,
    column_gradient_sums,
    column_moments,
    finish,
    group_terms,
    in_full,
    lanes_of,
    merge_gradients,
    merge_moments,
    same_memory,
    set_terms,
    settle,
    store_totals,
    unfold,
)

NARROW = 64  # channels of the narrowest strip that still reads whole cache lines in a row


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
    """Write a block of y; `terms` has room for the lanes."""
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
def _group_columns(mean, M2, groups, K, rows):
    """From the moments of columns to those of groups of K, in place."""
    if K == 1:
        return
    for g in range(groups):
        first = mean[g * K]
        offset = 0.0
        for k in range(g * K, g * K + K):
            offset += mean[k] - first
        group_mean = first + offset / K
        group_M2 = 0.0
        for k in range(g * K, g * K + K):
            d = mean[k] - group_mean
            group_M2 += M2[k] + rows * d * d
        mean[g] = group_mean
        M2[g] = group_M2


@kernel
def _normalize(task, x, residual, weight, bias, eps, activation, y, outputs, sizes):
    N, S, C, K, images, strip = sizes
    across = (C + strip - 1) // strip
    c0 = task % across * strip
    n0 = task // across * images
    width = min(strip, C - c0)
    lanes = lanes_of(S, width, C)
    wide = lanes * width
    pivot = np.empty(wide)
    mean = np.empty(wide)
    M2 = np.empty(wide)
    terms = np.empty((3, wide), x.dtype)
    z = np.empty(max(BLOCK, wide), x.dtype)
    for n in range(n0, min(N, n0 + images)):
        start = n * S * C + c0
        column_moments(x, start, S, C, width, lanes, True, pivot, mean, M2)
        _group_columns(mean, M2, width // K, K, S)
        settle(mean, M2, width // K, S * K, eps, outputs, (n * C + c0) // K)
        if y.size:
            set_terms(terms, width, mean, M2, np.intp(0), K, weight, bias, c0)
            _transform(x, residual, activation, start, S, C, width, lanes, terms, y, z)


@jit
def _part(task, sizes):
    """(image, part, first element, rows, first channel, channels) of a task."""
    _, S, C, _, height, strip = sizes
    across = (C + strip - 1) // strip
    count = (S + height - 1) // height
    c0 = task % across * strip
    part = task // across % count
    n = task // across // count
    start = (n * S + part * height) * C + c0
    return n, part, start, min(height, S - part * height), c0, min(strip, C - c0)


@kernel
def _measure_parts(task, x, parts, sizes):
    _, _, C, K, _, _ = sizes
    n, part, start, h, c0, width = _part(task, sizes)
    lanes = lanes_of(h, width, C)
    pivot = np.empty(lanes * width)
    mean = np.empty(lanes * width)
    M2 = np.empty(lanes * width)
    column_moments(x, start, h, C, width, lanes, True, pivot, mean, M2)
    _group_columns(mean, M2, width // K, K, h)
    for g in range(width // K):
        parts[0, part, (n * C + c0) // K + g] = mean[g]
        parts[1, part, (n * C + c0) // K + g] = M2[g]


@kernel
def _apply(task, x, residual, weight, bias, activation, y, mean, rstd, sizes):
    _, _, C, K, _, _ = sizes
    n, _, start, h, c0, width = _part(task, sizes)
    lanes = lanes_of(h, width, C)
    terms = np.empty((3, lanes * width), x.dtype)
    z = np.empty(max(BLOCK, lanes * width), x.dtype)
    set_terms(terms, width, mean, rstd, (n * C + c0) // K, K, weight, bias, c0)
    _transform(x, residual, activation, start, h, C, width, lanes, terms, y, z)


@jit
def _sum_columns(grad_y, x, start, rows, C, width, lanes, means, sums):
    """sums[:, c] = Σdy, Σdy·(x - mean), Σ(x - mean) of every column of a block."""
    wide = lanes * width
    g = np.empty(wide, x.dtype)
    gx = np.empty(wide, x.dtype)
    lost = np.empty(wide, x.dtype)
    one = np.ones(1, x.dtype)
    unfold(means, width, lanes)
    column_gradient_sums(
        grad_y, x, start, rows, C, width, lanes, means, one, 0, g, gx, lost, sums
    )


@jit
def _set_means(means, mean, unit, K, width):
    """The mean of every column of a strip that begins with `unit`."""
    for c in range(width):
        means[c] = mean[unit + c // K]


@jit
def _set_group(terms, k, K, rstd, weight, channel, slope, offset):
    """terms[1:] for the columns of a group: grad_x = scale·dy + slope·(x - mean) + offset."""
    for i in range(K):
        terms[1, k + i] = rstd * weight[channel + i] if weight.size else rstd
        terms[2, k + i] = slope
        terms[3, k + i] = offset


@jit
def _write_grad_x(grad_y, x, start, rows, C, width, lanes, terms, frozen, grad_x):
    for i in range(1, 4):
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


@kernel
def _backward(task, grad_y, x, saved, weight, grad_x, totals, sizes):
    N, S, C, K, images, strip = sizes
    mean, rstd = saved
    across = (C + strip - 1) // strip
    c0 = task % across * strip
    n0 = task // across * images
    width = min(strip, C - c0)
    lanes = lanes_of(S, width, C)
    terms = np.empty((4, lanes * width), x.dtype)
    sums = np.empty((3, width))
    for n in range(n0, min(N, n0 + images)):
        start = n * S * C + c0
        unit = (n * C + c0) // K
        _set_means(terms[0], mean, unit, K, width)
        _sum_columns(grad_y, x, start, S, C, width, lanes, terms[0], sums)
        for k in range(0, width, K):
            s = np.float64(rstd[unit + k // K])
            delta, slope, offset = group_terms(sums, k, K, S * K, s, weight, c0 + k)
            add_parameter_sums(sums, k, K, s, delta, totals, task // across, c0 + k)
            _set_group(terms, k, K, s, weight, c0 + k, slope, offset)
        if grad_x.size:
            _write_grad_x(grad_y, x, start, S, C, width, lanes, terms, False, grad_x)


@kernel
def _backward_parts(task, grad_y, x, saved, weight, frozen, parts, merged, grad_x, sizes):
    """Over one part: the sums of its columns, or grad_x, or both where it does not need them."""
    _, _, C, K, _, _ = sizes
    mean, rstd = saved
    n, part, start, h, c0, width = _part(task, sizes)
    lanes = lanes_of(h, width, C)
    terms = np.empty((4, lanes * width), x.dtype)
    unit = (n * C + c0) // K
    _set_means(terms[0], mean, unit, K, width)
    if parts.size:
        sums = np.empty((3, width))
        _sum_columns(grad_y, x, start, h, C, width, lanes, terms[0], sums)
        for i in range(3):
            for c in range(width):
                parts[i, part, n * C + c0 + c] = sums[i, c]
    else:
        unfold(terms[0], width, lanes)
    if grad_x.size:
        for k in range(0, width, K):
            u = unit + k // K
            s = np.float64(rstd[u])
            _set_group(terms, k, K, s, weight, c0 + k, merged[0, u], merged[1, u])
        _write_grad_x(grad_y, x, start, h, C, width, lanes, terms, frozen, grad_x)


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
    _measure_parts(threads, tasks, x, parts, cut)
    stats = merge_moments(parts, S, K, height, K, eps, outputs)
    if y.size:
        _apply(threads, tasks, x, residual, weight, bias, function, y, *stats, cut)


def apply(x, residual, weight, bias, activation, y, mean, rstd, threads):
    """As `normalize`, with the statistics given."""
    sizes = N, S, C, K = _sizes(x, mean)
    function = address(activation, x.dtype)
    height, strip, count = _part_size(sizes)
    tasks = N * count * ceil_div(C, strip)
    x, residual, weight, bias, y = (flat(array, x) for array in (x, residual, weight, bias, y))
    _apply(
        threads, tasks, x, residual, weight, bias, function, y, *in_full(mean, rstd),
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
