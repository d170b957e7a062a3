"""channels_first: x (N, C, S), weight and bias along C, statistics over units.

mean is (B, G). A unit is group g of R = N/B images: R runs of K·S elements without gaps, K = C/G,
each C·S after the one before. R is 1 in instance and group norm; in batch norm it is N, and K is 1.

A task of `normalize` or `backward` is whole units, of as many groups and images as make a piece:
statistics (or sums) of each, then its output while it lies in L2. Few large units are cut instead:
the parts measured, merged, and the output written in a second sweep over channels as they lie, which
is all that `apply` does.

Where S is short, so are the loops over it. Batch norm is then channels_last, one image of N rows of
C·S channels, S to a group; and group norm is `rows` of K·S elements.
"""

import numpy as np
from . import channels_last, rows
from ._jit import flat, jit, kernel
from .activations import address
from .sweeps import (
    BLOCK,
    PIECE,
    TASKS,
    add_parameter_sums,
    at,
    block_gradient_sums,
    block_moments,
    ceil_div,
    finish,
    group_terms,
    in_full,
    merge_gradients,
    merge_moments,
    part_of,
    same_memory,
    set_terms,
    settle,
    store_totals,
)

SHORT = 32


@jit
def _affine(x, start, rows, stride, width, terms, channel, out, first, step):
    """out = (x - mean)·scale + shift, a row for each channel from `channel`."""
    for r in range(rows):
        a = start + r * stride
        o = first + r * step
        mean = terms[0, at(channel + r)]
        scale = terms[1, at(channel + r)]
        shift = terms[2, at(channel + r)]
        for j in range(width):
            out[at(o + j)] = (x[at(a + j)] - mean) * scale + shift


@jit
def _transform(x, residual, activation, start, rows, stride, width, terms, y, z):
    """Write a block of y, a row for each channel."""
    zero = np.intp(0)
    if not (residual.size or activation or same_memory(x, y)):
        _affine(x, start, rows, stride, width, terms, zero, y, start, stride)
        return
    tall = max(1, BLOCK // width)
    for top in range(0, rows, tall):
        h = min(tall, rows - top)
        for left in range(0, width, BLOCK):
            n = min(BLOCK, width - left)
            first = start + top * stride + left
            _affine(x, first, h, stride, n, terms, top, z, zero, n)
            if n == stride:
                finish(z, residual, activation, first, h * n, h * n, h * n, y)
            else:
                finish(z, residual, activation, first, h * n, stride, n, y)


@kernel
def _normalize(task, x, residual, weight, bias, eps, activation, y, outputs, sizes):
    B, R, G, K, S, images, groups = sizes
    across = (G + groups - 1) // groups
    g0 = task % across * groups
    b0 = task // across * images
    width = min(groups, G - g0)
    stride = G * K * S
    mean = np.empty(width)
    M2 = np.empty(width)
    terms = np.empty((3, width * K), x.dtype)
    z = np.empty(BLOCK, x.dtype)
    for b in range(b0, min(B, b0 + images)):
        start = b * R * stride + g0 * K * S
        for g in range(width):
            mean[g], M2[g] = block_moments(x, start + g * K * S, R, stride, K * S, True)
        settle(mean, M2, width, R * K * S, eps, outputs, b * G + g0)
        if y.size:
            set_terms(terms, width * K, mean, M2, np.intp(0), K, weight, bias, g0 * K)
            # Backwards, to meet first what was read last.
            for r in range(R - 1, -1, -1):
                a = start + r * stride
                _transform(x, residual, activation, a, width * K, S, S, terms, y, z)


@kernel
def _measure_parts(task, x, parts, sizes):
    R, G, run, height, length = sizes
    part = task % parts.shape[1]
    unit = task // parts.shape[1]
    top, left, h, w = part_of(part, R, run, height, length)
    start = ((unit // G * R + top) * G + unit % G) * run + left
    parts[0, part, unit], parts[1, part, unit] = block_moments(x, start, h, G * run, w, True)


@kernel
def _apply(task, x, residual, weight, bias, activation, y, mean, rstd, sizes):
    N, R, G, K, S, height, length = sizes
    C = G * K
    top, left, h, w = part_of(task, N * C, S, height, length)
    terms = np.empty((3, h), x.dtype)
    z = np.empty(BLOCK, x.dtype)
    for n in range(top // C, (top + h - 1) // C + 1):
        first = max(top, n * C)
        channels = min(top + h, n * C + C) - first
        c = first - n * C
        unit = n // R * G + c // K
        set_terms(terms, channels, mean, rstd, unit, K, weight, bias, c)
        a = first * S + left
        _transform(x, residual, activation, a, channels, S, w, terms, y, z)


@jit
def _write_grad_x(
    grad_y, x, start, rows, stride, width, mean, rstd, weight, channel, terms, frozen, grad_x
):
    """grad_x of one channel over one block; `terms` are the slope and offset of its group."""
    number = x.dtype.type
    scale = number(np.float64(rstd) * weight[channel]) if weight.size else rstd
    slope = number(terms[0])
    offset = number(terms[1])
    for r in range(rows):
        a = start + r * stride
        if frozen:
            # x plays no part, so that its NaN and Inf do not.
            for j in range(width):
                grad_x[at(a + j)] = scale * grad_y[at(a + j)]
        else:
            for j in range(width):
                i = at(a + j)
                grad_x[i] = scale * grad_y[i] + (slope * (x[i] - mean) + offset)


@kernel
def _backward(task, grad_y, x, saved, weight, grad_x, totals, sizes):
    B, R, G, K, S, images, groups = sizes
    mean, rstd = saved
    across = (G + groups - 1) // groups
    g0 = task % across * groups
    b0 = task // across * images
    stride = G * K * S
    sums = np.empty((3, K))
    for b in range(b0, min(B, b0 + images)):
        for g in range(g0, min(G, g0 + groups)):
            unit = b * G + g
            start = b * R * stride + g * K * S
            s = np.float64(rstd[unit])
            for k in range(K):
                sums[0, k], sums[1, k], sums[2, k] = block_gradient_sums(
                    grad_y, x, start + k * S, R, stride, S, mean[unit]
                )
            delta, slope, offset = group_terms(sums, 0, K, R * K * S, s, weight, g * K)
            add_parameter_sums(sums, 0, K, s, delta, totals, task // across, g * K)
            if grad_x.size:
                for k in range(K):
                    _write_grad_x(
                        grad_y, x, start + k * S, R, stride, S,
                        mean[unit], rstd[unit], weight, g * K + k, (slope, offset), False, grad_x,
                    )  # fmt: skip


@kernel
def _backward_parts(task, grad_y, x, saved, weight, frozen, parts, terms, grad_x, sizes):
    """Over one part of some channels: their sums, or grad_x, or both where it does not need them."""
    R, G, K, S, channels, height, length = sizes
    C = G * K
    mean, rstd = saved
    count = parts.shape[1]
    top, left, h, w = part_of(task % count, R, S, height, length)
    first = task // count * channels
    for q in range(first, min(first + channels, mean.size * K)):
        unit = q // K
        c = q % C
        a = ((unit // G * R + top) * C + c) * S + left
        if parts.size:
            sums = block_gradient_sums(grad_y, x, a, h, C * S, w, mean[unit])
            for i in range(3):
                parts[i, task % count, q] = sums[i]
        if grad_x.size:
            _write_grad_x(
                grad_y, x, a, h, C * S, w, mean[unit], rstd[unit], weight, c,
                (terms[0, unit], terms[1, unit]), frozen, grad_x,
            )  # fmt: skip


def _units(x, mean):
    """(B, R, G, K, S)"""
    N, C, S = x.shape
    B, G = mean.shape
    return B, N // B, G, C // G, S


def _task_size(units):
    """How many (images, groups) make a task; None where there are so few units that they are cut."""
    B, R, G, K, S = units
    size = R * K * S
    if B * G < TASKS and size >= 2 * PIECE:
        return None
    groups = min(G, max(1, PIECE // size))
    return (max(1, PIECE // (groups * size)) if groups == G else 1), groups


def _part_size(rows, width):
    """The height and length of the parts of a block, and how many there are."""
    height = min(rows, max(1, PIECE // width))
    length = min(width, PIECE)
    return height, length, ceil_div(rows, height) * ceil_div(width, length)


def _is_short(x):
    return x.shape[2] < SHORT


def _as(shape, *arrays):
    return [None if array is None else array.reshape(shape) for array in arrays]


def _spread(S, *parameters):
    """From one value per channel to one per (channel, s)."""
    return [None if array is None else np.repeat(array, S) for array in parameters]


def _gather(S, wide, gradients):
    """The opposite, for gradients."""
    for total, gradient in zip(wide, gradients, strict=True):
        if gradient is not None:
            gradient[...] = total.reshape(-1, S).sum(axis=1)


def normalize(x, residual, weight, bias, eps, activation, y, mean, var, rstd, threads):
    """y = activation((x - mean)·rstd·weight + bias + residual); where y is None, only the statistics."""
    units = B, R, G, K, S = _units(x, mean)
    outputs = mean, var, rstd
    if _is_short(x):
        parameters = _spread(S, weight, bias)
        if R > 1:
            x, residual, y = _as((1, R, G * S), x, residual, y)
            channels_last.normalize(x, residual, *parameters, eps, activation, y, *outputs, threads)
        else:
            function = address(activation, x.dtype)
            x, residual, y = _as((B * G, K * S), x, residual, y)
            rows.normalize_groups(
                x, None, residual, *parameters, eps, True, function, y, None, outputs, G, threads
            )
        return
    function = address(activation, x.dtype)
    x, residual, weight, bias, y = (flat(array, x) for array in (x, residual, weight, bias, y))
    outputs = tuple(flat(array, x) for array in outputs)
    if size := _task_size(units):
        tasks = ceil_div(B, size[0]) * ceil_div(G, size[1])
        sizes = *units, *size
        _normalize(threads, tasks, x, residual, weight, bias, eps, function, y, outputs, sizes)
        return
    height, length, count = _part_size(R, K * S)
    parts = np.empty((2, count, B * G))
    _measure_parts(threads, B * G * count, x, parts, (R, G, K * S, height, length))
    stats = merge_moments(parts, R, K * S, height, length, eps, outputs)
    if y.size:
        _sweep(x, residual, weight, bias, function, y, stats, units, threads)


def _sweep(x, residual, weight, bias, function, y, stats, units, threads):
    B, R, G, K, S = units
    height, length, tasks = _part_size(B * R * G * K, S)
    sizes = B * R, R, G, K, S, height, length
    _apply(threads, tasks, x, residual, weight, bias, function, y, *stats, sizes)


def apply(x, residual, weight, bias, activation, y, mean, rstd, threads):
    """As `normalize`, with the statistics given."""
    units = B, R, G, K, S = _units(x, mean)
    if _is_short(x) and R > 1:
        parameters = _spread(S, weight, bias)
        x, residual, y = _as((1, R, G * S), x, residual, y)
        channels_last.apply(x, residual, *parameters, activation, y, mean, rstd, threads)
        return
    function = address(activation, x.dtype)
    stats = in_full(mean, rstd)
    arrays = (flat(array, x) for array in (x, residual, weight, bias))
    _sweep(*arrays, function, flat(y, x), stats, units, threads)


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
    units = B, R, G, K, S = _units(x, mean)
    C = G * K
    gradients = grad_weight, grad_bias
    if _is_short(x) and not (R == 1 and frozen):
        (weight,) = _spread(S, weight)
        wide = [None if array is None else np.empty(C * S) for array in gradients]
        if R > 1:
            grad_y, x, grad_x = _as((1, R, C * S), grad_y, x, grad_x)
            verb = channels_last.backward_apply if frozen else channels_last.backward
            verb(grad_y, x, mean, rstd, weight, grad_x, *wide, threads)
        else:
            grad_y, x, grad_x = _as((B * G, K * S), grad_y, x, grad_x)
            rows.backward_groups(grad_y, x, mean, rstd, weight, None, grad_x, *wide, G, threads)
        _gather(S, wide, gradients)
        return
    grad_y, x, weight, grad_x = (flat(array, x) for array in (grad_y, x, weight, grad_x))
    saved = flat(mean, x), flat(rstd, x)
    size = _task_size(units)
    if size and not frozen:
        slots = ceil_div(B, size[0])
        totals = np.zeros((slots, 2, C))
        tasks = slots * ceil_div(G, size[1])
        _backward(threads, tasks, grad_y, x, saved, weight, grad_x, totals, (*units, *size))
    else:
        height, length, count = _part_size(R, S)
        channels = max(1, PIECE // (R * S))
        tasks = ceil_div(B * C, channels) * count
        sizes = R, G, K, S, channels, height, length
        none = grad_x[:0]
        parts = np.empty((3, count, B * C))
        terms = np.empty((2, B * G))
        totals = np.zeros((1, 2, C))
        _backward_parts(
            threads, tasks, grad_y, x, saved, weight, frozen, parts, terms,
            grad_x if frozen else none, sizes,
        )  # fmt: skip
        sums = parts.sum(axis=1)
        merge_gradients(sums, G, K, R * K * S, saved[1], weight, frozen, terms, totals)
        if grad_x.size and not frozen:
            _backward_parts(
                threads, tasks, grad_y, x, saved, weight, frozen, np.empty((3, count, 0)), terms, grad_x,
                sizes,
            )  # fmt: skip
    store_totals(totals, *gradients)
