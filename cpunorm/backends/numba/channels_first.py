"""channels_first: x (N, C, S), weight and bias along C, statistics over units.

mean is (B, G). A unit is group g of R = N/B images: R runs of K·S elements without gaps, K = C/G,
each C·S after the one before. R is 1 in instance and group norm; in batch norm it is N, and K is 1.

A task of `normalize` or `backward` is whole units, of as many groups and images as make a piece:
statistics (or sums) of each, then its output while it lies in L2. Few large units are cut instead:
the parts measured, merged, and the output written in a second sweep over channels as they lie,
which is all that `apply` does.

Where S is short, so are the loops over it. Batch norm is then channels_last, one image of N rows of
C·S channels, S to a group; and group norm is `rows` of K·S elements.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from . import channels_last, rows
from ._jit import Array, flat, jit, kernel, sweep
from .activations import address
from .streams import room
from .sweeps import (
    PIECE,
    SLAB,
    TASKS,
    at,
    block_gradient_sums,
    ceil_div,
    channel_terms,
    element_gradient,
    finish,
    is_large,
    merge_gradients,
    merge_moments,
    part_of,
    per_channel,
    pieces,
    scale_of,
    set_terms,
    settle,
    spread,
    store_totals,
    stream,
    stream_block,
    unit_moments,
    way_of,
)

SHORT = 32
RUN = 16384  # bytes of a run that memory is quick with
LARGER = 8  # slabs that may be swept at once for it


@sweep
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
def _transform(x, residual, activation, start, rows, stride, width, terms, y, z, streaming):
    """Write a block of y, a row for each channel."""
    zero = np.intp(0)
    if not z.size:
        _affine(x, start, rows, stride, width, terms, zero, y, start, stride)
        return
    for top, left, h, n in pieces(rows, width):
        first = start + top * stride + left
        _affine(x, first, h, stride, n, terms, top, z, zero, n)
        if n == stride:
            finish(z, streaming, residual, activation, first, h * n, h * n, h * n, y)
        else:
            finish(z, streaming, residual, activation, first, h * n, stride, n, y)


@jit
def _units_of(task, sizes):
    """(first image, last image + 1, first group, last group + 1, slot) of a task."""
    B, _, G, _, _, images, groups = sizes
    across = (G + groups - 1) // groups
    slot = task // across
    b0 = slot * images
    g0 = task % across * groups
    return b0, min(B, b0 + images), g0, min(G, g0 + groups), slot


def _normalize(task, arguments):
    x, residual, weight, bias, eps, activation, y, large, outputs, sizes = arguments
    _, R, G, K, S, _, _ = sizes
    b0, b1, g0, g1, _ = _units_of(task, sizes)
    groups = g1 - g0
    stride = G * K * S
    pivot = np.empty(groups, x.dtype)
    mean = np.empty(groups * K)
    M2 = np.empty(groups * K)
    terms = np.empty((3, groups * K), x.dtype)
    indirect, streaming = way_of(x, residual, activation, y, large)
    z = room(x, indirect)
    for b in range(b0, b1):
        start = b * R * stride + g0 * K * S
        unit_moments(x, start, R, stride, K * S, groups, True, pivot, mean, M2)
        settle(mean, M2, groups, R * K * S, eps, outputs, b * G + g0)
        if y.size:
            spread(mean, groups, K)
            spread(M2, groups, K)
            set_terms(terms, groups * K, mean, M2, np.intp(0), weight, bias, g0 * K)
            # Backwards, to meet first what was read last.
            for r in range(R - 1, -1, -1):
                a = start + r * stride
                _transform(x, residual, activation, a, groups * K, S, S, terms, y, z, streaming)


def _measure_parts(task, arguments):
    x, _, _, _, _, _, _, _, _, parts, _, cut, _ = arguments
    R, G, K, S, height, length = cut
    run = K * S
    part = task % parts.shape[1]
    unit = task // parts.shape[1]
    top, left, h, w = part_of(part, R, run, height, length)
    start = ((unit // G * R + top) * G + unit % G) * run + left
    pivot = np.empty(1, x.dtype)
    mean = parts[0, part, unit : unit + 1]
    M2 = parts[1, part, unit : unit + 1]
    unit_moments(x, start, h, G * run, w, 1, True, pivot, mean, M2)


def _merge_parts(task, arguments):
    _, _, _, _, eps, _, _, _, outputs, parts, stats, cut, _ = arguments
    R, _, K, S, height, length = cut
    merge_moments(parts, R, K * S, height, length, eps, outputs, stats)
    for values in stats:
        spread(values, parts.shape[2], K)


def _apply_parts(task, arguments):
    x, residual, weight, bias, _, activation, y, large, _, _, stats, _, sizes = arguments
    _transform_part(~task, x, residual, weight, bias, activation, y, large, stats, sizes)


def _apply(task, arguments):
    _transform_part(~task, *arguments)


@jit
def _transform_part(task, x, residual, weight, bias, activation, y, large, stats, sizes):
    N, R, C, S, height, length = sizes
    mean, rstd = stats
    top, left, h, w = part_of(task, N * C, S, height, length)
    terms = np.empty((3, h), x.dtype)
    indirect, streaming = way_of(x, residual, activation, y, large)
    z = room(x, indirect)
    for n in range(top // C, (top + h - 1) // C + 1):
        first = max(top, n * C)
        channels = min(top + h, n * C + C) - first
        c = first - n * C
        set_terms(terms, channels, mean, rstd, n // R * C + c, weight, bias, c)
        _transform(
            x, residual, activation, first * S + left, channels, S, w, terms, y, z, streaming
        )


@sweep
def _grad_x(grad_y, x, start, rows, stride, width, given, first, terms, frozen, out, place, step):
    """out = grad_x, a row for each channel, or where `apart` is 0 all of one channel."""
    mean, rstd, weight = given
    unit, channel, term, apart = first
    number = x.dtype.type
    for r in range(rows):
        a = start + r * stride
        o = place + r * step
        i = r * apart
        m = mean[at(unit + i)]
        scale = scale_of(np.float64(rstd[at(unit + i)]), weight, channel + i)
        centre = number(terms[0, at(term + i)])
        slope = number(terms[1, at(term + i)])
        rest = number(terms[2, at(term + i)])
        if frozen:
            # x plays no part, so that its NaN and Inf do not.
            for j in range(width):
                out[at(o + j)] = scale * grad_y[at(a + j)]
        else:
            for j in range(width):
                d = x[at(a + j)] - m
                out[at(o + j)] = element_gradient(grad_y[at(a + j)], d, scale, centre, slope, rest)


@jit
def _write_grad_x(grad_y, x, start, rows, stride, width, given, first, terms, frozen, grad_x, z):
    if not z.size:
        _grad_x(
            grad_y, x, start, rows, stride, width, given, first, terms, frozen, grad_x, start,
            stride,
        )  # fmt: skip
        return
    unit, channel, term, apart = first
    zero = np.intp(0)
    for top, left, h, n in pieces(rows, width):
        i = top * apart
        here = unit + i, channel + i, term + i, apart
        a = start + top * stride + left
        _grad_x(grad_y, x, a, h, stride, n, given, here, terms, frozen, z, zero, n)
        if n == stride:
            stream(z, zero, h * n, grad_x, a)
        else:
            stream_block(z, a, h * n, stride, n, grad_x)


def _backward(task, arguments):
    grad_y, x, saved, weight, grad_x, large, sizes, totals, _ = arguments
    _, R, G, K, S, _, _ = sizes
    mean, rstd = saved
    b0, b1, g0, g1, slot = _units_of(task, sizes)
    stride = G * K * S
    channels = (g1 - g0) * K
    sums = np.empty((3, channels))
    z = room(x, large)
    for b in range(b0, b1):
        start = b * R * stride + g0 * K * S
        first = b * G * K + g0 * K
        sums[:] = 0.0
        for r in range(R):
            for c in range(channels):
                a = start + r * stride + c * S
                g, gx, lost = block_gradient_sums(grad_y, x, a, 1, 0, S, mean[first + c])
                sums[0, c] += g
                sums[1, c] += gx
                sums[2, c] += lost
        scales = rstd[first : first + channels]
        channel_terms(
            sums, np.intp(0), channels, K, R * K * S, scales, weight, g0 * K, False, totals, slot
        )
        if not grad_x.size:
            continue
        given = mean, rstd, weight
        here = first, g0 * K, np.intp(0), np.intp(1)
        for r in range(R - 1, -1, -1):
            a = start + r * stride
            _write_grad_x(grad_y, x, a, channels, S, S, given, here, sums, False, grad_x, z)


def _sweep_parts(task, arguments):
    """Over a part of some channels: their sums; on the way back grad_x, or at once without sums."""
    grad_y, x, saved, weight, frozen, grad_x, large, parts, sizes, _, _ = arguments
    R, C, _, S, channels, height, length = sizes
    summing = task >= 0
    task = task if summing else ~task
    mean, rstd = saved
    given = mean, rstd, weight
    merged = parts[0]
    z = room(x, large)
    count = parts.shape[0]
    top, left, h, w = part_of(task % count, R, S, height, length)
    first = task // count * channels
    for q in range(first, min(first + channels, mean.size)):
        c = q % C
        m = mean[q]
        a = ((q // C * R + top) * C + c) * S + left
        if summing:
            sums = block_gradient_sums(grad_y, x, a, h, C * S, w, m)
            for i in range(3):
                parts[task % count, i, q] = sums[i]
        if grad_x.size and (frozen or not summing):
            here = q, c, q, np.intp(0)
            _write_grad_x(grad_y, x, a, h, C * S, w, given, here, merged, frozen, grad_x, z)


def _merge_sums(task, arguments):
    _, _, saved, weight, frozen, _, _, parts, sizes, totals, _ = arguments
    R, C, K, S, _, _, _ = sizes
    merge_gradients(parts, C, K, R * K * S, saved[1], weight, frozen, totals)


_normalize_whole = kernel(_normalize)
_normalize_parts = kernel(_measure_parts, _merge_parts, _apply_parts)
_apply_whole = kernel(_apply)
_backward_whole = kernel(_backward, store_totals)
_backward_in_parts = kernel(_sweep_parts, _merge_sums, _sweep_parts, store_totals)


def _units(x: Array, mean: Array) -> tuple[int, ...]:
    """(B, R, G, K, S)"""
    N, C, S = x.shape
    B, G = mean.shape
    return B, N // B, G, C // G, S


@lru_cache
def _task_size(units: tuple[int, ...], itemsize: int) -> tuple[int, int] | None:
    """How many images and groups make a task; None where units are so few that they are cut."""
    B, R, G, K, S = units
    size = R * K * S
    if B * G < TASKS and size >= 2 * PIECE:
        return None
    wide = 1
    if R > 1:
        # Channels of a batch lie apart: the more side by side, the longer the runs in memory. Short
        # runs cost more than L2 brings.
        fitting = SLAB // (size * itemsize)
        long = min(RUN // (K * S * itemsize), LARGER * SLAB // (size * itemsize))
        wide = min(max(fitting, long), G // TASKS)
    groups = min(G, max(1, PIECE // size, wide))
    return (max(1, PIECE // (groups * size)) if groups == G else 1), groups


def _part_size(rows: int, width: int) -> tuple[int, int, int]:
    """The height and length of the parts of a block, and how many there are."""
    height = min(rows, max(1, PIECE // width))
    length = min(width, PIECE)
    return height, length, ceil_div(rows, height) * ceil_div(width, length)


def _as(shape: tuple[int, ...], *arrays: Array | None) -> list[Any]:
    return [None if array is None else array.reshape(shape) for array in arrays]


def _spread(S: int, *parameters: Array | None) -> list[Array | None]:
    """From one value per channel to one per (channel, s)."""
    return [None if array is None else np.repeat(array, S) for array in parameters]


def _gather(S: int, wide: Iterable[Array | None], gradients: Iterable[Array | None]) -> None:
    """The opposite, for gradients."""
    for total, gradient in zip(wide, gradients, strict=True):
        if gradient is not None:
            gradient[...] = total.reshape(-1, S).sum(axis=1)


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
    units = B, R, G, K, S = _units(x, mean)
    outputs = mean, var, rstd
    function = address(activation, mean.dtype)
    if S < SHORT:
        parameters = _spread(S, weight, bias)
        if R > 1:
            x, residual, y = _as((1, R, G * S), x, residual, y)
            channels_last.normalize(x, residual, *parameters, eps, activation, y, *outputs, threads)
        else:
            x, residual, y = _as((B * G, K * S), x, residual, y)
            rows.normalize_groups(
                x, None, residual, *parameters, eps, True, function, y, None, outputs, G, threads
            )
        return
    size = _task_size(units, x.itemsize)
    large = is_large(x)
    x, residual, y = flat(x, x, residual, y)
    weight, bias, *outputs = flat(mean, weight, bias, *outputs)
    arguments = x, residual, weight, bias, eps, function, y, large, tuple(outputs)
    if size:
        counts = (ceil_div(B, size[0]) * ceil_div(G, size[1]),)
        _normalize_whole(threads, counts, *arguments, (*units, *size))
        return
    height, length, parts = _part_size(R, K * S)
    sizes, tasks = _apply_size(units)
    counts = B * G * parts, 1, -tasks if y.size else 0
    stats = np.empty(B * G * K), np.empty(B * G * K)
    scratch = np.empty((2, parts, B * G)), stats
    cut = R, G, K, S, height, length
    _normalize_parts(threads, counts, *arguments, *scratch, cut, sizes)


@lru_cache
def _apply_size(units: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """What `_transform_part` has to know of sizes, and the number of tasks."""
    B, R, G, K, S = units
    height, length, tasks = _part_size(B * R * G * K, S)
    return (B * R, R, G * K, S, height, length), tasks


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
    units = _, R, G, K, S = _units(x, mean)
    if S < SHORT and R > 1:
        parameters = _spread(S, weight, bias)
        x, residual, y = _as((1, R, G * S), x, residual, y)
        channels_last.apply(x, residual, *parameters, activation, y, mean, rstd, threads)
        return
    function = address(activation, mean.dtype)
    sizes, tasks = _apply_size(units)
    large = is_large(x)
    x, residual, y = flat(x, x, residual, y)
    weight, bias = flat(mean, weight, bias)
    stats = per_channel(K, *flat(mean, mean, rstd))
    _apply_whole(threads, (-tasks,), x, residual, weight, bias, function, y, large, stats, sizes)


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
    units = B, R, G, K, S = _units(x, mean)
    C = G * K
    if S < SHORT and not (R == 1 and frozen):
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
    size = _task_size(units, 2 * x.itemsize)
    large = is_large(x, backward=True)
    grad_y, x, grad_x = flat(x, grad_y, x, grad_x)
    weight, mean, rstd, *gradients = flat(mean, weight, mean, rstd, *gradients)
    inputs = grad_y, x, per_channel(K, mean, rstd), weight
    if size and not frozen:
        slots = ceil_div(B, size[0])
        counts = slots * ceil_div(G, size[1]), 1
        rest = grad_x, large, (*units, *size), np.zeros((slots, 2, C)), tuple(gradients)
        _backward_whole(threads, counts, *inputs, *rest)
        return
    height, length, count = _part_size(R, S)
    channels = max(1, PIECE // (R * S))
    tasks = ceil_div(B * C, channels) * count
    counts = tasks, 1, 0 if frozen or not grad_x.size else -tasks, 1
    sizes = R, C, K, S, channels, height, length
    scratch = np.empty((count, 3, B * C)), sizes, np.zeros((1, 2, C))
    _backward_in_parts(threads, counts, *inputs, frozen, grad_x, large, *scratch, tuple(gradients))
