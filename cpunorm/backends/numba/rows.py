"""rows: x (M, D), one statistic per row, weight and bias along the row.

A task is a range of rows. Its rows are taken as many at a time as fit L1 and swept there:
statistics, then output; in backward the sums, grad_x, and what the rows add to the parameter
gradients, which every task gathers for itself. Few huge rows are cut along D instead: the parts
measured, merged, and the output written in a second sweep.

Other problems hand over what has this shape. Then row m belongs to group m % G, and the parameters
are (G, D).
"""

from functools import lru_cache
from typing import Any

import numpy as np

from ._jit import Array, flat, jit, jit_sum, kernel, sweep
from .streams import room
from .sweeps import (
    BLOCK,
    PIECE,
    SHORT_SUM,
    SLAB,
    TASKS,
    add,
    add_slots,
    at,
    ceil_div,
    element_gradient,
    finish,
    is_large,
    merge_moments,
    row_terms,
    settle,
    store_totals,
    stream_block,
    unit_moments,
    way_of,
)

# Every backward task has parameter gradients of its own: with more tasks, or of fewer rows, adding
# them up would show.
GATHERING_TASKS = 64
GATHERING_ROWS = 8


@sweep
def _affine(x, start, rows, left, width, stats, row, parameters, group, sizes, out, first, step):
    """out = (x - mean)·rstd·weight + bias, columns from `left` of rows that start with `group`."""
    mean, rstd = stats
    weight, weighted, bias, biased = parameters
    D, G = sizes
    number = x.dtype.type
    for r in range(rows):
        a = start + r * D
        o = first + r * step
        w = (group * D + left) * weighted
        b = (group * D + left) * biased
        exact = mean[at(row + r)]
        scale = number(rstd[at(row + r)])
        m = number(exact)
        shift = number((m - exact) * rstd[at(row + r)])
        for j in range(width):
            normal = (x[at(a + j)] - m) * scale + shift
            out[at(o + j)] = normal * weight[at(w + j)] + bias[at(b + j)]
        group = group + 1 if group + 1 < G else 0


@jit
def _transform(x, residual, parameters, activation, stats, row, y, z, streaming, block, sizes):
    """Write a block of y, columns of one row or whole rows: in pieces without gaps."""
    top, left, rows, width = block
    D, G = sizes
    tall = max(1, BLOCK // width) if z.size else rows
    for r in range(0, rows, tall):
        h = min(tall, rows - r)
        group = (top + r) % G
        for a in range(left, left + width, BLOCK):
            start = (top + r) * D + a
            n = min(BLOCK, left + width - a)
            if not z.size:
                _affine(x, start, h, a, n, stats, row + r, parameters, group, sizes, y, start, D)
            else:
                zero = np.intp(0)
                _affine(x, start, h, a, n, stats, row + r, parameters, group, sizes, z, zero, n)
                finish(z, streaming, residual, activation, start, h * n, h * n, h * n, y)


def _normalize(task, arguments):
    x, addend, residual, parameters, eps, center, activation, y, total, outputs, sizes = arguments
    M, D, G, height, large = sizes
    top = task * height
    rows = min(height, M - top)
    pivot = np.empty(rows, x.dtype)
    mean = np.empty(rows)
    M2 = np.empty(rows)
    source = total if total.size else x
    if total.size:
        add(x, addend, top * D, 1, 0, rows * D, room(x, True), total)
    unit_moments(source, top * D, 1, 0, D, rows, center, pivot, mean, M2)
    settle(mean, M2, rows, D, eps, outputs, top)
    if y.size:
        indirect, streaming = way_of(source, residual, activation, y, large)
        z = room(x, indirect)
        block = top, 0, rows, D
        _transform(
            source, residual, parameters, activation, (mean, M2), np.intp(0), y, z, streaming,
            block, (D, G),
        )  # fmt: skip


def _measure_parts(task, arguments):
    x, addend, _, _, center, _, total, _, parts, _, (D, _) = arguments
    part = task % parts.shape[1]
    row = task // parts.shape[1]
    start = row * D + part * PIECE
    width = min(PIECE, D - part * PIECE)
    if total.size:
        add(x, addend, start, 1, 0, width, room(x, True), total)
    source = total if total.size else x
    pivot = np.empty(1, x.dtype)
    mean = parts[0, part, row : row + 1]
    M2 = parts[1, part, row : row + 1]
    unit_moments(source, start, 1, 0, width, 1, center, pivot, mean, M2)


def _merge_parts(task, arguments):
    _, _, _, eps, _, _, _, outputs, parts, stats, (D, _) = arguments
    merge_moments(parts, 1, D, 1, PIECE, eps, outputs, stats)


def _transform_parts(task, arguments):
    x, _, parameters, _, _, y, total, _, parts, stats, (D, large) = arguments
    row = ~task // parts.shape[1]
    left = ~task % parts.shape[1] * PIECE
    source = total if total.size else x
    none = room(x, False)
    indirect, streaming = way_of(source, none, 0, y, large)
    z = room(x, indirect)
    block = row, left, 1, min(PIECE, D - left)
    _transform(source, none, parameters, 0, stats, row, y, z, streaming, block, (D, 1))


_normalize_whole = kernel(_normalize)
_normalize_parts = kernel(_measure_parts, _merge_parts, _transform_parts)


@jit_sum
def _sum_rows(grad_y, x, mean, parameters, block, sizes, sums):
    """The three gradient sums of every row of a block."""
    weight, weighted, _, _ = parameters
    top, left, rows, width = block
    D, G = sizes
    zero = x.dtype.type(0)
    group = top % G
    for r in range(rows):
        m = mean[at(top + r)] if mean.size else zero
        for i in range(3):
            sums[i, r] = 0.0
        for a in range(left, left + width, BLOCK):
            start = (top + r) * D + a
            w = (group * D + a) * weighted
            g = zero
            gx = zero
            lost = zero
            for j in range(min(BLOCK, left + width - a)):
                d = x[at(start + j)] - m
                v = grad_y[at(start + j)] * weight[at(w + j)]
                g += v
                gx += v * d
                lost += d
            sums[0, r] += g
            sums[1, r] += gx
            sums[2, r] += lost
        group = group + 1 if group + 1 < G else 0


@jit
def _terms_of(row, saved, terms, r):
    """(mean, rstd, shift, centre, slope, rest) of a row, the r-th of its block."""
    mean, rstd = saved
    number = rstd.dtype.type
    m = mean[at(row)] if mean.size else number(0)
    centre, slope, rest, shift = terms[0, r], terms[1, r], terms[2, r], terms[3, r]
    return m, rstd[at(row)], number(shift), number(centre), number(slope), number(rest)


@jit
def _plus(value, grad_total, i):
    return value if grad_total is None else value + grad_total[i]


@sweep
def _sweep_gradients(
    inputs, grad_total, block, sizes, terms, term, sums, place, out, other, first, step
):
    """out = grad_x of a block, with terms[:, term] for its first row; add its rows to `sums`.

    They are (2, G·D), of grad_weight and grad_bias, from `place` on. Two rows of a group are taken
    for each load and store of them. The second is written to `other`, which is `out` once more: in
    one array, it would be asked whether the two overlap.
    """
    grad_y, x, saved, parameters = inputs
    weight, weighted, _, _ = parameters
    top, left, rows, width = block
    D, G = sizes
    for g in range(min(G, rows)):
        group = (top + g) % G
        i = place + group * D
        w = (group * D + left) * weighted
        for r in range(g, rows, 2 * G):
            a = (top + r) * D + left
            o = first + r * step
            ma, sa, ta, ca, la, ra = _terms_of(top + r, saved, terms, term + r)
            if r + G < rows:
                b = a + G * D
                p = o + G * step
                mb, sb, tb, cb, lb, rb = _terms_of(top + r + G, saved, terms, term + r + G)
                for j in range(width):
                    ga = grad_y[at(a + j)]
                    gb = grad_y[at(b + j)]
                    da = x[at(a + j)] - ma
                    db = x[at(b + j)] - mb
                    v = weight[at(w + j)]
                    own = element_gradient(ga * v, da, sa, ca, la, ra)
                    out[at(o + j)] = _plus(own, grad_total, at(a + j))
                    own = element_gradient(gb * v, db, sb, cb, lb, rb)
                    other[at(p + j)] = _plus(own, grad_total, at(b + j))
                    sums[0, at(i + j)] += ga * (da * sa + ta) + gb * (db * sb + tb)
                    sums[1, at(i + j)] += ga + gb
            else:
                for j in range(width):
                    ga = grad_y[at(a + j)]
                    da = x[at(a + j)] - ma
                    own = element_gradient(ga * weight[at(w + j)], da, sa, ca, la, ra)
                    out[at(o + j)] = _plus(own, grad_total, at(a + j))
                    sums[0, at(i + j)] += ga * (da * sa + ta)
                    sums[1, at(i + j)] += ga


@jit
def _gradients(inputs, grad_total, block, sizes, terms, term, sums, place, out, first, step):
    if grad_total.size:
        _sweep_gradients(
            inputs, grad_total, block, sizes, terms, term, sums, place, out, out, first, step
        )
    else:
        _sweep_gradients(
            inputs, None, block, sizes, terms, term, sums, place, out, out, first, step
        )


@jit
def _write_gradients(inputs, grad_total, block, sizes, terms, sums, grad_x, z):
    """grad_x of a block, directly or by way of z, and what its rows add to `sums`."""
    top, left, rows, width = block
    D, _ = sizes
    wide = BLOCK // 2 if z.size else BLOCK
    tall = BLOCK // min(wide, width) // 2 * 2 if z.size else rows
    for r in range(0, rows, tall):
        h = min(tall, rows - r)
        for i in range(0, width, wide):
            n = min(wide, width - i)
            start = (top + r) * D + left + i
            part = top + r, left + i, h, n
            given = inputs, grad_total, part, sizes, terms, r, sums, i
            if not z.size:
                _gradients(*given, grad_x, start, D)
                continue
            _gradients(*given, z, np.intp(0), n)
            if grad_x.size:
                stream_block(z, start, h * n, D, n, grad_x)


@jit
def _flush(sums, totals, slot, left):
    """Move short sums on to the totals, which are float64."""
    for i in range(2):
        for j in range(sums.shape[1]):
            totals[slot, i, at(left + j)] += sums[i, j]
            sums[i, j] = 0


def _backward(task, arguments):
    grad_y, x, saved, parameters, grad_total, grad_x, sizes, totals, _ = arguments
    M, D, G, height, large = sizes
    inputs = grad_y, x, saved, parameters
    mean, rstd = saved
    z = room(x, large or not grad_x.size)
    tall = max(1, min(4, SLAB // (16 * D)), min(BLOCK // D // 4 * 4, SHORT_SUM * G))
    terms = np.empty((4, tall))
    sums = np.zeros((2, G * D), x.dtype)
    pending = 0
    stop = min(M, (task + 1) * height)
    for top in range(task * height, stop, tall):
        rows = min(tall, stop - top)
        block = top, 0, rows, D
        _sum_rows(grad_y, x, mean, parameters, block, (D, G), terms)
        row_terms(terms, mean, rstd, top, rows, D)
        _write_gradients(inputs, grad_total, block, (D, G), terms, sums, grad_x, z)
        pending += rows
        if pending >= SHORT_SUM * G or top + rows == stop:
            _flush(sums, totals, task, np.intp(0))
            pending = 0


def _sum_parts(task, arguments):
    grad_y, x, saved, parameters, _, _, _, parts, _, totals, _ = arguments
    D = totals.shape[2]
    part = task % parts.shape[0]
    row = task // parts.shape[0]
    sums = np.empty((3, 1))
    block = row, part * PIECE, 1, min(PIECE, D - part * PIECE)
    _sum_rows(grad_y, x, saved[0], parameters, block, (D, 1), sums)
    for i in range(3):
        parts[part, i, row] = sums[i, 0]


def _merge_sums(task, arguments):
    _, _, saved, _, _, _, _, parts, terms, totals, _ = arguments
    mean, rstd = saved
    add_slots(parts)
    for i in range(3):
        for row in range(rstd.size):
            terms[i, row] = parts[0, i, row]
    row_terms(terms, mean, rstd, np.intp(0), rstd.size, totals.shape[2])


def _backward_parts(task, arguments):
    grad_y, x, saved, parameters, grad_total, grad_x, large, _, terms, totals, _ = arguments
    D = totals.shape[2]
    left = task * PIECE
    width = min(PIECE, D - left)
    inputs = grad_y, x, saved, parameters
    block = 0, left, saved[1].size, width
    z = room(x, large or not grad_x.size)
    sums = np.zeros((2, width), x.dtype)
    _write_gradients(inputs, grad_total, block, (D, 1), terms, sums, grad_x, z)
    _flush(sums, totals, np.intp(0), left)


_backward_whole = kernel(_backward, store_totals)
_backward_in_parts = kernel(_sum_parts, _merge_sums, _backward_parts, store_totals)


@lru_cache
def _constants(value: int, dtype: np.dtype[Any]) -> Array:
    return np.full(BLOCK, value, dtype)


def _parameters(weight: Array | None, bias: Array | None, like: Array) -> tuple[Any, ...]:
    """(weight, weighted, bias, biased) for the kernels.

    An absent one is BLOCK constants, read again and again: the loops have no case for it.
    """
    weighted, biased = weight is not None, bias is not None
    weight, bias = flat(
        like,
        weight if weighted else _constants(1, like.dtype),
        bias if biased else _constants(0, like.dtype),
    )
    return weight, int(weighted), bias, int(biased)


def _are_huge(M: int, D: int) -> bool:
    return M < TASKS and D >= 2 * PIECE


def normalize_groups(
    x: Array,
    addend: Array | None,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    center: bool,
    activation: int,
    y: Array | None,
    total: Array | None,
    outputs: tuple[Array | None, ...],
    G: int,
    threads: int,
) -> None:
    """Normalize the rows of x; row m has the parameters of group m % G.

    `addend` joins before the normalization, `residual` between the affine step and the activation,
    which is given by its address. `outputs` are mean, var and rstd.
    """
    M, D = x.shape
    statistic = outputs[2] if outputs[0] is None else outputs[0]
    parameters = _parameters(weight, bias, statistic)
    large = is_large(x)
    huge = G == 1 and not activation and residual is None and _are_huge(M, D)
    x, addend, residual, y, total = flat(x, x, addend, residual, y, total)
    outputs = flat(statistic, *outputs)
    if huge:
        across = ceil_div(D, PIECE)
        tasks = M * across
        counts = tasks, 1, -tasks if y.size else 0
        scratch = np.empty((2, across, M)), (np.empty(M), np.empty(M))
        arguments = x, addend, parameters, eps, center, y, total, outputs, *scratch, (D, large)
        _normalize_parts(threads, counts, *arguments)
        return
    height = max(1, PIECE // D)
    counts = (ceil_div(M, height),)
    source = x, addend, residual
    rest = eps, center, activation, y, total, outputs, (M, D, G, height, large)
    _normalize_whole(threads, counts, *source, parameters, *rest)


def backward_groups(
    grad_y: Array,
    x: Array,
    mean: Array | None,
    rstd: Array,
    weight: Array | None,
    grad_total: Array | None,
    grad_x: Array | None,
    grad_weight: Array | None,
    grad_bias: Array | None,
    G: int,
    threads: int,
) -> None:
    """Gradients of `normalize_groups`; grad_weight and grad_bias are (G·D,)."""
    M, D = x.shape
    parameters = _parameters(weight, None, rstd)
    saved = flat(rstd, mean, rstd)
    gradients = flat(rstd, grad_weight, grad_bias)
    grad_y, x, grad_total, grad_x = flat(x, grad_y, x, grad_total, grad_x)
    large = is_large(x, backward=True)
    arguments = grad_y, x, saved, parameters, grad_total, grad_x
    if G == 1 and _are_huge(M, D):
        across = ceil_div(D, PIECE)
        counts = M * across, 1, across, 1
        scratch = np.empty((across, 3, M)), np.empty((4, M)), np.zeros((1, 2, D))
        _backward_in_parts(threads, counts, *arguments, large, *scratch, gradients)
    else:
        rows = min(GATHERING_ROWS, ceil_div(M, TASKS))
        height = max(rows, PIECE // D, ceil_div(M, GATHERING_TASKS))
        tasks = ceil_div(M, height)
        totals = np.zeros((tasks, 2, G * D))
        sizes = M, D, G, height, large
        _backward_whole(threads, (tasks, 1), *arguments, sizes, totals, gradients)


def normalize(
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    y: Array,
    total: Array | None,
    mean: Array | None,
    rstd: Array,
    threads: int,
) -> None:
    """y = (x - mean)·rstd·weight + bias along D, of total = x + residual where there is one."""
    center = mean is not None
    outputs = mean, None, rstd
    normalize_groups(x, residual, None, weight, bias, eps, center, 0, y, total, outputs, 1, threads)


def backward(
    grad_y: Array,
    x: Array,
    mean: Array | None,
    rstd: Array,
    weight: Array | None,
    grad_total: Array | None,
    grad_x: Array | None,
    grad_weight: Array | None,
    grad_bias: Array | None,
    threads: int,
) -> None:
    """Gradients through the statistics; grad_total is added to grad_x."""
    backward_groups(
        grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias, 1, threads
    )
