"""channels_last: x (N, S, C), weight and bias along C, statistics over S and a group of channels.

Batch norm is one image of N·S rows, with groups of K = 1 channel.

Sums run down columns. A task takes a strip of channels of some images: the columns measured, merged
to groups, and the output written while the strip lies in L2. Where that makes too few tasks, images
are cut along S instead: the parts measured, merged, and the output written in a second sweep, which
is all that `apply` does.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from . import rows
from ._jit import Array, flat, jit, kernel, sweep
from .activations import address
from .streams import room
from .sweeps import (
    PIECE,
    SLAB,
    TASKS,
    at,
    ceil_div,
    channel_terms,
    column_gradient_sums,
    column_moments,
    element_gradient,
    finish,
    is_large,
    lanes_of,
    merge_gradients,
    merge_moments,
    per_channel,
    pieces,
    scale_of,
    set_terms,
    settle,
    spread,
    store_totals,
    stream_block,
    unfold,
    way_of,
)

NARROW, BROAD = 64, 1024  # channels of a strip
PARTS = 64  # of an image, at most: one thread merges them


@sweep
def _affine(x, start, count, stride, width, terms, left, out, first, step):
    """out = (x - mean)·scale + shift, with terms for each column from `left`."""
    for r in range((count + width - 1) // width):
        a = start + r * stride
        o = first + r * step
        for j in range(min(width, count - r * width)):
            c = at(left + j)
            out[at(o + j)] = (x[at(a + j)] - terms[0, c]) * terms[1, c] + terms[2, c]


@jit
def _transform(x, residual, activation, start, rows, C, width, lanes, terms, y, z, streaming):
    """Write a block of y; `terms` has room for the lanes."""
    for i in range(3):
        unfold(terms[i], width, lanes)
    wide = lanes * width
    step = lanes * C
    count = rows * width
    zero = np.intp(0)
    if not z.size:
        _affine(x, start, count, step, wide, terms, zero, y, start, step)
        return
    for top, left, h, w in pieces((count + wide - 1) // wide, wide):
        n = min(h * w, count - top * wide - left)
        a = start + top * step + left
        _affine(x, a, n, step, w, terms, left, z, zero, w)
        if w == step:
            finish(z, streaming, residual, activation, a, n, n, n, y)
        else:
            finish(z, streaming, residual, activation, a, n, step, w, y)


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


@jit
def _strip_of(task, sizes):
    """(first image, last image + 1, first channel, channels, slot) of a task."""
    N, _, C, _, images, strip = sizes
    across = (C + strip - 1) // strip
    slot = task // across
    n0 = slot * images
    c0 = task % across * strip
    return n0, min(N, n0 + images), c0, min(strip, C - c0), slot


def _normalize(task, arguments):
    x, residual, weight, bias, eps, activation, y, large, outputs, sizes = arguments
    _, S, C, K, _, _ = sizes
    n0, n1, c0, width, _ = _strip_of(task, sizes)
    lanes = lanes_of(S, width, C)
    wide = lanes * width
    mean = np.empty(width)
    M2 = np.empty(width)
    terms = np.empty((3, wide), x.dtype)
    indirect, streaming = way_of(x, residual, activation, y, large)
    z = room(x, indirect)
    for n in range(n0, n1):
        start = n * S * C + c0
        column_moments(x, start, S, C, width, lanes, True, terms, mean, M2)
        _group_columns(mean, M2, width // K, K, S)
        settle(mean, M2, width // K, S * K, eps, outputs, (n * C + c0) // K)
        if y.size:
            spread(mean, width // K, K)
            spread(M2, width // K, K)
            set_terms(terms, width, mean, M2, np.intp(0), weight, bias, c0)
            _transform(x, residual, activation, start, S, C, width, lanes, terms, y, z, streaming)


@jit
def _part_of(task, sizes):
    """(image, part, first element, rows, first channel, channels) of a task."""
    _, S, C, _, height, strip = sizes
    across = (C + strip - 1) // strip
    count = (S + height - 1) // height
    c0 = task % across * strip
    part = task // across % count
    n = task // across // count
    start = (n * S + part * height) * C + c0
    return n, part, start, min(height, S - part * height), c0, min(strip, C - c0)


def _measure_parts(task, arguments):
    x, _, _, _, _, _, _, _, _, parts, _, sizes = arguments
    _, _, C, K, _, _ = sizes
    n, part, start, h, c0, width = _part_of(task, sizes)
    lanes = lanes_of(h, width, C)
    mean = np.empty(width)
    M2 = np.empty(width)
    scratch = np.empty((3, lanes * width), x.dtype)
    column_moments(x, start, h, C, width, lanes, True, scratch, mean, M2)
    _group_columns(mean, M2, width // K, K, h)
    unit = (n * C + c0) // K
    for g in range(width // K):
        parts[0, part, unit + g] = mean[g]
        parts[1, part, unit + g] = M2[g]


def _merge_parts(task, arguments):
    _, _, _, _, eps, _, _, _, outputs, parts, stats, sizes = arguments
    _, S, _, K, height, _ = sizes
    merge_moments(parts, S, K, height, K, eps, outputs, stats)
    for values in stats:
        spread(values, parts.shape[2], K)


def _apply_parts(task, arguments):
    x, residual, weight, bias, _, activation, y, large, _, _, stats, sizes = arguments
    _transform_part(~task, x, residual, weight, bias, activation, y, large, stats, sizes)


def _apply(task, arguments):
    _transform_part(task, *arguments)


@jit
def _transform_part(task, x, residual, weight, bias, activation, y, large, stats, sizes):
    _, _, C, _, _, _ = sizes
    mean, rstd = stats
    n, _, start, h, c0, width = _part_of(task, sizes)
    lanes = lanes_of(h, width, C)
    terms = np.empty((3, lanes * width), x.dtype)
    indirect, streaming = way_of(x, residual, activation, y, large)
    z = room(x, indirect)
    set_terms(terms, width, mean, rstd, n * C + c0, weight, bias, c0)
    _transform(x, residual, activation, start, h, C, width, lanes, terms, y, z, streaming)


@jit
def _sum_columns(grad_y, x, start, rows, C, width, lanes, means, sums):
    wide = lanes * width
    g = np.empty(wide, x.dtype)
    gx = np.empty(wide, x.dtype)
    lost = np.empty(wide, x.dtype)
    one = np.ones(1, x.dtype)
    column_gradient_sums(grad_y, x, start, rows, C, width, lanes, means, one, 0, g, gx, lost, sums)


@sweep
def _set_means(terms, mean, first, width, lanes):
    """terms[0] = the mean of every column of a strip, whose first channel is `first` of all."""
    for c in range(width):
        terms[0, c] = mean[at(first + c)]
    unfold(terms[0], width, lanes)


@sweep
def _set_gradient_terms(terms, rstd, first, weight, channel, merged, place, width, lanes):
    """terms[1:] = (scale, centre, slope, rest) of every column of a strip."""
    for c in range(width):
        terms[1, c] = scale_of(np.float64(rstd[at(first + c)]), weight, channel + c)
        terms[2, c] = merged[0, at(place + c)]
        terms[3, c] = merged[1, at(place + c)]
        terms[4, c] = merged[2, at(place + c)]
    for i in range(1, 5):
        unfold(terms[i], width, lanes)


@sweep
def _grad_x(grad_y, x, start, count, stride, width, terms, left, frozen, out, first, step):
    """out = grad_x, with terms for each column from `left`."""
    for r in range((count + width - 1) // width):
        a = start + r * stride
        o = first + r * step
        n = min(width, count - r * width)
        if frozen:
            # x plays no part, so that its NaN and Inf do not.
            for j in range(n):
                out[at(o + j)] = terms[1, at(left + j)] * grad_y[at(a + j)]
        else:
            for j in range(n):
                i = at(a + j)
                c = at(left + j)
                d = x[i] - terms[0, c]
                out[at(o + j)] = element_gradient(
                    grad_y[i], d, terms[1, c], terms[2, c], terms[3, c], terms[4, c]
                )


@jit
def _write_grad_x(grad_y, x, start, rows, C, width, lanes, terms, frozen, grad_x, z):
    wide = lanes * width
    step = lanes * C
    count = rows * width
    zero = np.intp(0)
    if not z.size:
        _grad_x(grad_y, x, start, count, step, wide, terms, zero, frozen, grad_x, start, step)
        return
    for top, left, h, w in pieces((count + wide - 1) // wide, wide):
        n = min(h * w, count - top * wide - left)
        a = start + top * step + left
        _grad_x(grad_y, x, a, n, step, w, terms, left, frozen, z, zero, w)
        stream_block(z, a, n, step, w, grad_x)


def _backward(task, arguments):
    grad_y, x, saved, weight, grad_x, large, sizes, totals, _ = arguments
    _, S, C, K, _, _ = sizes
    mean, rstd = saved
    n0, n1, c0, width, slot = _strip_of(task, sizes)
    lanes = lanes_of(S, width, C)
    terms = np.empty((5, lanes * width), x.dtype)
    sums = np.empty((3, width))
    z = room(x, large)
    zero = np.intp(0)
    for n in range(n0, n1):
        start = n * S * C + c0
        first = n * C + c0
        _set_means(terms, mean, first, width, lanes)
        _sum_columns(grad_y, x, start, S, C, width, lanes, terms[0], sums)
        scales = rstd[first : first + width]
        channel_terms(sums, zero, width, K, S * K, scales, weight, c0, False, totals, slot)
        if grad_x.size:
            _set_gradient_terms(terms, rstd, first, weight, c0, sums, zero, width, lanes)
            _write_grad_x(grad_y, x, start, S, C, width, lanes, terms, False, grad_x, z)


def _sweep_part(task, arguments):
    """Over a part: the sums of its columns; on the way back grad_x, or at once without sums."""
    grad_y, x, saved, weight, frozen, grad_x, large, parts, sizes, _, _ = arguments
    summing = task >= 0
    task = task if summing else ~task
    _, _, C, _, _, _ = sizes
    mean, rstd = saved
    n, part, start, h, c0, width = _part_of(task, sizes)
    lanes = lanes_of(h, width, C)
    first = n * C + c0
    terms = np.empty((5, lanes * width), x.dtype)
    _set_means(terms, mean, first, width, lanes)
    if summing:
        sums = np.empty((3, width))
        _sum_columns(grad_y, x, start, h, C, width, lanes, terms[0], sums)
        for i in range(3):
            for c in range(width):
                parts[part, i, first + c] = sums[i, c]
    if grad_x.size and (frozen or not summing):
        _set_gradient_terms(terms, rstd, first, weight, c0, parts[0], first, width, lanes)
        z = room(x, large)
        _write_grad_x(grad_y, x, start, h, C, width, lanes, terms, frozen, grad_x, z)


def _merge_sums(task, arguments):
    _, _, saved, weight, frozen, _, _, parts, sizes, totals, _ = arguments
    _, S, C, K, _, _ = sizes
    merge_gradients(parts, C, K, S * K, saved[1], weight, frozen, totals)


_normalize_whole = kernel(_normalize)
_normalize_parts = kernel(_measure_parts, _merge_parts, _apply_parts)
_apply_whole = kernel(_apply)
_backward_whole = kernel(_backward, store_totals)
_backward_in_parts = kernel(_sweep_part, _merge_sums, _sweep_part, store_totals)


def _sizes(x: Array, mean: Array) -> tuple[int, ...]:
    """(N, S, C, K), the batch folded into the rows where it is reduced."""
    N, S, C = x.shape
    B, G = mean.shape
    return B, N // B * S, C, C // G


def _strip(width: int, C: int, K: int) -> int:
    """About `width` channels, in whole groups: all, or not too few."""
    width = max(width, NARROW)
    return C if width >= C else max(K, width // K * K if K > 1 else width // 16 * 16)


@lru_cache
def _task_size(sizes: tuple[int, ...], itemsize: int) -> tuple[int, int] | None:
    """How many images and channels make a task; None where the images are cut."""
    N, S, C, K = sizes
    strip = _strip(SLAB // (S * itemsize), C, K)
    if N * ceil_div(C, strip) < TASKS:
        strip = _strip(PIECE // S, C, K)
    images = max(1, PIECE // (S * strip))
    tasks = ceil_div(N, images) * ceil_div(C, strip)
    nbytes = S * strip * itemsize
    if tasks >= TASKS:
        # A second sweep over narrow strips should not have to come from memory.
        worthwhile = strip == C or nbytes <= 2 * SLAB
    else:
        worthwhile = nbytes <= SLAB and tasks * PIECE >= N * S * C
    return (images, strip) if worthwhile else None


@lru_cache
def _part_size(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """The rows and channels of a part, and how many parts there are."""
    N, S, C, K = sizes
    strip = _strip(BROAD, C, K)
    height = min(S, max(1, PIECE // strip, ceil_div(S, PARTS)))
    return height, strip, N * ceil_div(S, height) * ceil_div(C, strip)


def _as_rows(K: int, *arrays: Array | None) -> list[Any]:
    return [None if array is None else array.reshape(-1, K) for array in arrays]


def normalize(
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    activation: int,
    y: Array | None,
    mean: Array,
    var: Array,
    rstd: Array | None,
    threads: int,
) -> None:
    """y = activation((x - mean)·rstd·weight + bias + residual); without y, the statistics alone."""
    sizes = N, S, C, K = _sizes(x, mean)
    function = address(activation, mean.dtype)
    outputs = mean, var, rstd
    if S == 1:
        x, residual, y = _as_rows(K, x, residual, y)
        rows.normalize_groups(
            x, None, residual, weight, bias, eps, True, function, y, None, outputs, C // K, threads
        )
        return
    size = _task_size(sizes, x.itemsize)
    large = is_large(x)
    x, residual, y = flat(x, x, residual, y)
    weight, bias, *outputs = flat(mean, weight, bias, *outputs)
    arguments = x, residual, weight, bias, eps, function, y, large, tuple(outputs)
    if size:
        counts = (ceil_div(N, size[0]) * ceil_div(C, size[1]),)
        _normalize_whole(threads, counts, *arguments, (*sizes, *size))
        return
    height, strip, tasks = _part_size(sizes)
    counts = tasks, 1, -tasks if y.size else 0
    parts = np.empty((2, ceil_div(S, height), N * C // K))
    stats = np.empty(N * C), np.empty(N * C)
    _normalize_parts(threads, counts, *arguments, parts, stats, (*sizes, height, strip))


def apply(
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    activation: int,
    y: Array,
    mean: Array,
    rstd: Array,
    threads: int,
) -> None:
    """As `normalize`, with the statistics given."""
    sizes = _, _, _, K = _sizes(x, mean)
    height, strip, tasks = _part_size(sizes)
    cut = *sizes, height, strip
    function = address(activation, mean.dtype)
    large = is_large(x)
    x, residual, y = flat(x, x, residual, y)
    weight, bias = flat(mean, weight, bias)
    stats = per_channel(K, *flat(mean, mean, rstd))
    _apply_whole(threads, (tasks,), x, residual, weight, bias, function, y, large, stats, cut)


def moments(x: Array, mean: Array, var: Array, threads: int) -> None:
    """Mean and biased variance."""
    normalize(x, None, None, None, 1.0, 0, None, mean, var, None, threads)


def backward(
    grad_y: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    grad_x: Array | None,
    grad_weight: Array | None,
    grad_bias: Array | None,
    threads: int,
) -> None:
    """Gradients through the statistics."""
    gradients = grad_weight, grad_bias
    _differentiate(grad_y, x, mean, rstd, weight, False, grad_x, gradients, threads)


def backward_apply(
    grad_y: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    grad_x: Array | None,
    grad_weight: Array | None,
    grad_bias: Array | None,
    threads: int,
) -> None:
    """Gradients with the statistics held constant."""
    gradients = grad_weight, grad_bias
    _differentiate(grad_y, x, mean, rstd, weight, True, grad_x, gradients, threads)


def _differentiate(
    grad_y: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None,
    frozen: bool,
    grad_x: Array | None,
    gradients: tuple[Array | None, ...],
    threads: int,
) -> None:
    sizes = N, S, C, K = _sizes(x, mean)
    if S == 1 and not frozen:
        grad_y, x, grad_x = _as_rows(K, grad_y, x, grad_x)
        rows.backward_groups(
            grad_y, x, mean, rstd, weight, None, grad_x, *gradients, C // K, threads
        )
        return
    size = _task_size(sizes, 2 * x.itemsize)
    large = is_large(x, backward=True)
    grad_y, x, grad_x = flat(x, grad_y, x, grad_x)
    weight, mean, rstd, *gradients = flat(mean, weight, mean, rstd, *gradients)
    inputs = grad_y, x, per_channel(K, mean, rstd), weight
    if size and not frozen:
        slots = ceil_div(N, size[0])
        counts = slots * ceil_div(C, size[1]), 1
        rest = grad_x, large, (*sizes, *size), np.zeros((slots, 2, C)), tuple(gradients)
        _backward_whole(threads, counts, *inputs, *rest)
        return
    height, strip, tasks = _part_size(sizes)
    counts = tasks, 1, 0 if frozen or not grad_x.size else -tasks, 1
    parts = np.empty((ceil_div(S, height), 3, N * C))
    rest = parts, (*sizes, height, strip), np.zeros((1, 2, C)), tuple(gradients)
    _backward_in_parts(threads, counts, *inputs, frozen, grad_x, large, *rest)
