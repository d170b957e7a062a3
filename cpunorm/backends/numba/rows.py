"""rows: x (M, D), one statistic per row, weight and bias along the row.

A task is a range of rows. Its rows are taken as many at a time as fit L1 and swept there: statistics,
then transform; in backward the sums, grad_x, and what the rows add to the parameter gradients, which
every task gathers for itself. Few huge rows are cut along D instead: statistics of the parts, merge,
transform of the parts.

channels_first hands its groups over where S is short (see there): then a row is one group of one
image, row m belongs to group m % G, and the parameters are (G, D).
"""

from functools import lru_cache

import numpy as np
from numba import prange

from ._jit import flat, jit, kernel, twins
from .sweeps import (
    BLOCK,
    PIECE,
    TASKS,
    add,
    at,
    block_moments,
    ceil_div,
    finish,
    merge_moments,
    same_memory,
    store_statistics,
    store_totals,
)

# Every backward task has parameter gradients of its own: with more, adding them up would show.
GATHERING_TASKS = 64


@jit
def _affine(x, start, rows, left, width, stats, unit, parameters, group, sizes, out, first, step):
    """out = (x - mean)·rstd·weight + bias for columns left.. of rows of groups `group`, group + 1, .."""
    weight, weighted, bias, biased = parameters
    D, G = sizes
    number = x.dtype.type
    for r in range(rows):
        a = start + r * D
        o = first + r * step
        w = (group * D + left) * weighted
        b = (group * D + left) * biased
        mean = number(stats[0, unit + r])
        scale = number(stats[1, unit + r])
        shift = number((mean - stats[0, unit + r]) * stats[1, unit + r])
        for j in range(width):
            normal = (x[at(a + j)] - mean) * scale + shift
            out[at(o + j)] = normal * weight[at(w + j)] + bias[at(b + j)]
        group = group + 1 if group + 1 < G else 0


@jit
def _transform(x, residual, parameters, activation, stats, unit, y, z, block, sizes):
    """Write a block of y: columns of one row, or whole rows, so that it has no gaps."""
    top, left, rows, width = block
    D, G = sizes
    group = top % G
    direct = not (residual.size or activation or same_memory(x, y))
    for a in range(left, left + width, BLOCK):
        start = top * D + a
        n = min(BLOCK, left + width - a)
        if direct:
            _affine(x, start, rows, a, n, stats, unit, parameters, group, sizes, y, start, D)
        else:
            _affine(x, start, rows, a, n, stats, unit, parameters, group, sizes, z, 0, n)
            finish(z, residual, activation, start, rows * n, rows * n, rows * n, y)


@jit
def _normalize_task(
    task, x, addend, residual, parameters, eps, center, activation, y, total, outputs, sizes
):
    M, D, G, height = sizes
    tall = max(1, BLOCK // D)
    stats = np.empty((2, tall))
    z = np.empty(BLOCK, x.dtype)
    source = total if total.size else x
    stop = min(M, (task + 1) * height)
    for top in range(task * height, stop, tall):
        rows = min(tall, stop - top)
        if total.size:
            add(x, addend, top * D, 1, 0, rows * D, z, total)
        for r in range(rows):
            stats[0, r], M2 = block_moments(source, (top + r) * D, 1, 0, D, center)
            stats[1, r] = store_statistics(top + r, stats[0, r], M2, D, eps, outputs)
        if y.size:
            block = (top, 0, rows, D)
            _transform(source, residual, parameters, activation, stats, 0, y, z, block, (D, G))


@twins
def _normalize(
    tasks, x, addend, residual, parameters, eps, center, activation, y, total, outputs, sizes
):
    for task in prange(tasks):
        _normalize_task(
            task, x, addend, residual, parameters, eps, center, activation, y, total, outputs, sizes
        )


@jit
def _measure_part(task, x, addend, center, total, parts, D):
    part = task % parts.shape[1]
    row = task // parts.shape[1]
    start = row * D + part * PIECE
    width = min(PIECE, D - part * PIECE)
    if total.size:
        add(x, addend, start, 1, 0, width, np.empty(BLOCK, x.dtype), total)
    source = total if total.size else x
    parts[0, part, row], parts[1, part, row] = block_moments(source, start, 1, 0, width, center)


@twins
def _measure_parts(tasks, x, addend, center, total, parts, D):
    for task in prange(tasks):
        _measure_part(task, x, addend, center, total, parts, D)


@jit
def _transform_part(task, x, parameters, stats, y, D):
    across = (D + PIECE - 1) // PIECE
    row = task // across
    left = task % across * PIECE
    z = np.empty(BLOCK, x.dtype)
    block = (row, left, 1, min(PIECE, D - left))
    _transform(x, x[:0], parameters, 0, stats, row, y, z, block, (D, 1))


@twins
def _transform_parts(tasks, x, parameters, stats, y, D):
    for task in prange(tasks):
        _transform_part(task, x, parameters, stats, y, D)


@jit
def _sum_rows(grad_y, x, mean, parameters, block, sizes, sums):
    """sums[:, r] = Σg, Σg·(x - mean), Σ(x - mean) over the columns of a block, with g = dy·weight."""
    weight, weighted, _, _ = parameters
    top, left, rows, width = block
    D, G = sizes
    for r in range(rows):
        group = (top + r) % G
        m = np.float64(mean[top + r]) if mean.size else 0.0
        g = 0.0
        gx = 0.0
        lost = 0.0
        for a in range(left, left + width, BLOCK):
            start = (top + r) * D + a
            w = (group * D + a) * weighted
            for j in range(min(BLOCK, left + width - a)):
                d = x[at(start + j)] - m
                v = np.float64(grad_y[at(start + j)]) * weight[at(w + j)]
                g += v
                gx += v * d
                lost += d
        sums[0, r] = g
        sums[1, r] = gx
        sums[2, r] = lost


@kernel
def _row_terms(sums, mean, rstd, top, rows, D):
    """Turn the sums of each row into (delta, slope, offset).

    grad_x = rstd·g + slope·(x - mean) + offset, where delta is what the mean lost by being rounded and
    `offset` makes up for it.
    """
    for r in range(rows):
        s = np.float64(rstd[top + r])
        g = sums[0, r] / D if mean.size else 0.0
        delta = sums[2, r] / D if mean.size else 0.0
        slope = -s * s * s * (sums[1, r] - delta * sums[0, r]) / D
        sums[0, r] = delta
        sums[1, r] = slope
        sums[2, r] = -s * g - slope * delta


@jit
def _write_grad_x(grad_y, x, saved, parameters, grad_total, block, sizes, terms, grad_x):
    mean, rstd = saved
    weight, weighted, _, _ = parameters
    top, left, rows, width = block
    D, G = sizes
    number = x.dtype.type
    for r in range(rows):
        group = (top + r) % G
        m = mean[top + r] if mean.size else number(0)
        s = rstd[top + r]
        slope = number(terms[1, r])
        offset = number(terms[2, r])
        for a in range(left, left + width, BLOCK):
            start = (top + r) * D + a
            w = (group * D + a) * weighted
            for j in range(min(BLOCK, left + width - a)):
                i = at(start + j)
                grad_x[i] = s * (grad_y[i] * weight[at(w + j)]) + (slope * (x[i] - m) + offset)
            if grad_total.size:
                for j in range(min(BLOCK, left + width - a)):
                    grad_x[at(start + j)] += grad_total[at(start + j)]


@jit
def _sum_parameters(grad_y, x, saved, block, sizes, terms, totals, slot, wanted):
    """Add a block to totals[slot], (2, G·D): the sums over rows of grad_weight and grad_bias."""
    mean, rstd = saved
    top, left, rows, width = block
    D, G = sizes
    for r in range(rows):
        start = (top + r) * D + left
        first = (top + r) % G * D + left
        if wanted[0]:
            s = np.float64(rstd[top + r])
            m = np.float64(mean[top + r]) + terms[0, r] if mean.size else 0.0
            for j in range(width):
                i = at(start + j)
                totals[slot, 0, at(first + j)] += grad_y[i] * ((x[i] - m) * s)
        if wanted[1]:
            for j in range(width):
                totals[slot, 1, at(first + j)] += grad_y[at(start + j)]


@jit
def _backward_task(task, grad_y, x, saved, parameters, grad_total, grad_x, totals, wanted, sizes):
    M, D, G, height = sizes
    tall = max(1, BLOCK // D)
    sums = np.empty((3, tall))
    stop = min(M, (task + 1) * height)
    for top in range(task * height, stop, tall):
        block = (top, 0, min(tall, stop - top), D)
        _sum_rows(grad_y, x, saved[0], parameters, block, (D, G), sums)
        _row_terms(sums, saved[0], saved[1], top, block[2], D)
        if grad_x.size:
            _write_grad_x(grad_y, x, saved, parameters, grad_total, block, (D, G), sums, grad_x)
        _sum_parameters(grad_y, x, saved, block, (D, G), sums, totals, task, wanted)


@twins
def _backward(tasks, grad_y, x, saved, parameters, grad_total, grad_x, totals, wanted, sizes):
    for task in prange(tasks):
        _backward_task(
            task, grad_y, x, saved, parameters, grad_total, grad_x, totals, wanted, sizes
        )


@jit
def _sum_part(task, grad_y, x, mean, parameters, parts, D):
    part = task % parts.shape[1]
    row = task // parts.shape[1]
    sums = np.empty((3, 1))
    block = (row, part * PIECE, 1, min(PIECE, D - part * PIECE))
    _sum_rows(grad_y, x, mean, parameters, block, (D, 1), sums)
    for i in range(3):
        parts[i, part, row] = sums[i, 0]


@twins
def _sum_parts(tasks, grad_y, x, mean, parameters, parts, D):
    for task in prange(tasks):
        _sum_part(task, grad_y, x, mean, parameters, parts, D)


@jit
def _backward_part(task, grad_y, x, saved, parameters, grad_total, terms, grad_x, totals, wanted):
    M = terms.shape[1]
    D = totals.shape[2]
    block = (0, task * PIECE, M, min(PIECE, D - task * PIECE))
    if grad_x.size:
        _write_grad_x(grad_y, x, saved, parameters, grad_total, block, (D, 1), terms, grad_x)
    _sum_parameters(grad_y, x, saved, block, (D, 1), terms, totals, 0, wanted)


@twins
def _backward_parts(tasks, grad_y, x, saved, parameters, grad_total, terms, grad_x, totals, wanted):
    for task in prange(tasks):
        _backward_part(
            task, grad_y, x, saved, parameters, grad_total, terms, grad_x, totals, wanted
        )


@lru_cache
def _constants(value, dtype):
    return np.full(BLOCK, value, dtype)


def _parameters(weight, bias, x):
    """(weight, weighted, bias, biased) for the kernels.

    An absent one is BLOCK constants, read again and again: the loops have no case for it.
    """
    return (
        _constants(1, x.dtype) if weight is None else flat(weight, x),
        int(weight is not None),
        _constants(0, x.dtype) if bias is None else flat(bias, x),
        int(bias is not None),
    )


def _huge(M, D):
    return M < TASKS and D >= 2 * PIECE


def normalize_groups(
    x, addend, residual, weight, bias, eps, center, activation, y, total, outputs, G, threads
):
    """Normalize the rows of x; row m has the parameters of group m % G.

    `addend` joins before the normalization, `residual` between the affine step and the activation.
    """
    M, D = x.shape
    parameters = _parameters(weight, bias, x)
    x, addend, residual, y, total = (flat(array, x) for array in (x, addend, residual, y, total))
    outputs = tuple(flat(array, x) for array in outputs)
    if G == 1 and not activation and not residual.size and _huge(M, D):
        parts = np.empty((2, ceil_div(D, PIECE), M))
        stats = np.empty((2, M))
        tasks = M * parts.shape[1]
        _measure_parts(threads, tasks, x, addend, center, total, parts, D)
        merge_moments(parts, 1, D, 1, PIECE, eps, stats, outputs)
        source = total if total.size else x
        _transform_parts(threads, tasks, source, parameters, stats, y, D)
    else:
        height = max(1, PIECE // D)
        _normalize(
            threads, ceil_div(M, height),
            x, addend, residual, parameters, eps, center, activation, y, total, outputs,
            (M, D, G, height),
        )  # fmt: skip


def backward_groups(
    grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias, G, threads
):
    """Gradients of `normalize_groups`; grad_weight and grad_bias are (G·D,)."""
    M, D = x.shape
    parameters = _parameters(weight, None, x)
    wanted = (grad_weight is not None, grad_bias is not None)
    grad_y, grad_total, grad_x = (flat(array, x) for array in (grad_y, grad_total, grad_x))
    saved = flat(mean, x), flat(rstd, x)
    x = flat(x, x)
    if G == 1 and _huge(M, D):
        parts = np.empty((3, ceil_div(D, PIECE), M))
        totals = np.zeros((1, 2, D))
        _sum_parts(threads, M * parts.shape[1], grad_y, x, saved[0], parameters, parts, D)
        terms = parts.sum(axis=1)
        _row_terms(terms, saved[0], saved[1], 0, M, D)
        _backward_parts(
            threads, parts.shape[1],
            grad_y, x, saved, parameters, grad_total, terms, grad_x, totals, wanted,
        )  # fmt: skip
    else:
        height = max(1, PIECE // D, ceil_div(M, GATHERING_TASKS))
        tasks = ceil_div(M, height)
        totals = np.zeros((tasks, 2, G * D))
        _backward(
            threads, tasks,
            grad_y, x, saved, parameters, grad_total, grad_x, totals, wanted, (M, D, G, height),
        )  # fmt: skip
    store_totals(totals, grad_weight, grad_bias)


def normalize(x, residual, weight, bias, eps, y, total, mean, rstd, threads):
    """y = (x - mean)·rstd·weight + bias along D, of total = x + residual where there is one."""
    center = mean is not None
    outputs = (mean, None, rstd)
    normalize_groups(x, residual, None, weight, bias, eps, center, 0, y, total, outputs, 1, threads)


def backward(grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias, threads):
    """Gradients through the statistics; grad_total is added to grad_x."""
    backward_groups(
        grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias, 1, threads
    )
