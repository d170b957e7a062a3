"""columns: x (N, D, S), one statistic per column (n, s), weight and bias along D.

A task is a strip of columns, of as many images as make a piece. Sums run down the columns, and the
output is written while the strip lies in L2. The parameter gradients are sums along its rows, which
every task gathers for itself.
"""

from functools import lru_cache

import numpy as np

from . import rows
from ._jit import Array, flat, jit, jit_sum, kernel, sweep
from .streams import room
from .sweeps import (
    PIECE,
    SLAB,
    TASKS,
    add,
    at,
    ceil_div,
    column_gradient_sums,
    column_moments,
    element_gradient,
    finish,
    is_large,
    pieces,
    row_terms,
    settle,
    store_totals,
    stream_block,
    way_of,
)

NARROW, BROAD = 128, 1024  # columns of a strip


@sweep
def _affine(x, start, height, stride, width, terms, parameters, row, out, first, step):
    """out = (x - mean)·rstd·weight + bias, rows from `row`, with terms for each column."""
    weight, bias = parameters
    number = x.dtype.type
    for r in range(height):
        a = start + r * stride
        o = first + r * step
        w = weight[at(row + r)] if weight.size else number(1)
        b = bias[at(row + r)] if bias.size else number(0)
        for j in range(width):
            normal = (x[at(a + j)] - terms[0, j]) * terms[1, j] + terms[2, j]
            out[at(o + j)] = normal * w + b


@jit
def _strip(task, sizes):
    """(first image, last image + 1, first column, columns) of a task."""
    N, _, S, images, strip, _ = sizes
    across = (S + strip - 1) // strip
    s0 = task % across * strip
    n0 = task // across * images
    return n0, min(N, n0 + images), s0, min(strip, S - s0)


def _normalize(task, arguments):
    x, addend, parameters, eps, center, y, total, outputs, sizes = arguments
    _, D, S, _, _, large = sizes
    n0, n1, s0, width = _strip(task, sizes)
    mean = np.empty(width)
    M2 = np.empty(width)
    terms = np.empty((3, width), x.dtype)
    source = total if total.size else x
    none = room(x, False)
    indirect, streaming = way_of(source, none, 0, y, large)
    z = room(x, indirect)
    added = room(x, total.size > 0)
    zero = np.intp(0)
    for n in range(n0, n1):
        start = n * D * S + s0
        if total.size:
            add(x, addend, start, D, S, width, added, total)
        column_moments(source, start, D, S, width, 1, center, terms, mean, M2)
        settle(mean, M2, width, D, eps, outputs, n * S + s0)
        for j in range(width):
            terms[0, j] = mean[j]
            terms[1, j] = M2[j]
            terms[2, j] = (terms[0, j] - mean[j]) * M2[j]
        if not z.size:
            _affine(source, start, D, S, width, terms, parameters, zero, y, start, S)
            continue
        for top, _, h, _ in pieces(D, width):
            a = start + top * S
            _affine(source, a, h, S, width, terms, parameters, top, z, zero, width)
            finish(z, streaming, none, 0, a, h * width, S, width, y)


@sweep
def _grad_x(grad_y, x, start, height, S, width, terms, weight, row, grad_total, out, first, step):
    """out = grad_x, rows from `row`, with terms for each column."""
    for r in range(height):
        a = start + r * S
        o = first + r * step
        w = weight[at(row + r)] if weight.size else x.dtype.type(1)
        if grad_total.size:
            for j in range(width):
                i = at(a + j)
                g = grad_y[i] * w
                d = x[i] - terms[0, j]
                own = element_gradient(g, d, terms[1, j], terms[2, j], terms[3, j], terms[4, j])
                out[at(o + j)] = own + grad_total[i]
        else:
            for j in range(width):
                i = at(a + j)
                g = grad_y[i] * w
                d = x[i] - terms[0, j]
                out[at(o + j)] = element_gradient(
                    g, d, terms[1, j], terms[2, j], terms[3, j], terms[4, j]
                )


@jit
def _write_grad_x(grad_y, x, start, D, S, width, terms, weight, grad_total, grad_x, z):
    zero = np.intp(0)
    if not z.size:
        _grad_x(grad_y, x, start, D, S, width, terms, weight, zero, grad_total, grad_x, start, S)
        return
    for top, _, h, _ in pieces(D, width):
        a = start + top * S
        _grad_x(grad_y, x, a, h, S, width, terms, weight, top, grad_total, z, zero, width)
        stream_block(z, a, h * width, S, width, grad_x)


@jit_sum
def _sum_parameters(grad_y, x, start, D, S, width, terms, totals, slot, wanted):
    """Add a strip to totals[slot], (2, D), of grad_weight and grad_bias."""
    zero = x.dtype.type(0)
    for r in range(D):
        a = start + r * S
        if wanted[0]:
            product = zero
            for j in range(width):
                i = at(a + j)
                product += grad_y[i] * ((x[i] - terms[0, j]) * terms[1, j] + terms[5, j])
            totals[slot, 0, r] += product
        if wanted[1]:
            plain = zero
            for j in range(width):
                plain += grad_y[at(a + j)]
            totals[slot, 1, r] += plain


def _backward(task, arguments):
    grad_y, x, saved, parameters, grad_total, grad_x, wanted, sizes, totals, _ = arguments
    _, D, S, _, _, large = sizes
    mean, rstd = saved
    z = room(x, large)
    weight, row_weight, weighted = parameters
    n0, n1, s0, width = _strip(task, sizes)
    g = np.empty(width, x.dtype)
    gx = np.empty(width, x.dtype)
    lost = np.empty(width, x.dtype)
    sums = np.empty((4, width))
    terms = np.empty((6, width), x.dtype)  # mean, rstd, centre, slope, rest, shift
    for n in range(n0, n1):
        start = n * D * S + s0
        unit = n * S + s0
        for j in range(width):
            terms[0, j] = mean[at(unit + j)] if mean.size else 0.0
            terms[1, j] = rstd[at(unit + j)]
        column_gradient_sums(
            grad_y, x, start, D, S, width, 1, terms[0], row_weight, weighted, g, gx, lost, sums
        )
        row_terms(sums, mean, rstd, unit, width, D)
        for i in range(4):
            for j in range(width):
                terms[2 + i, j] = sums[i, j]
        if grad_x.size:
            _write_grad_x(grad_y, x, start, D, S, width, terms, weight, grad_total, grad_x, z)
        _sum_parameters(grad_y, x, start, D, S, width, terms, totals, task, wanted)


_normalize_whole = kernel(_normalize)
_backward_whole = kernel(_backward, store_totals)


@lru_cache
def _task_size(N: int, D: int, S: int, itemsize: int) -> tuple[int, int]:
    """How many images and columns make a task."""
    strip = SLAB // (D * itemsize)
    if TASKS * strip > N * S:
        strip = max(N * S // TASKS, PIECE // D)
    strip = min(S, BROAD, max(NARROW, strip // 16 * 16))
    return max(1, PIECE // (D * strip)), strip


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
    N, D, S = x.shape
    if S == 1:
        x, residual, y, total = (
            None if array is None else array.reshape(N, D) for array in (x, residual, y, total)
        )
        rows.normalize(x, residual, weight, bias, eps, y, total, mean, rstd, threads)
        return
    images, strip = _task_size(N, D, S, x.itemsize)
    tasks = ceil_div(N, images) * ceil_div(S, strip)
    center = mean is not None
    parameters = flat(rstd, weight, bias)
    outputs = flat(rstd, mean, None, rstd)
    large = is_large(x)
    x, addend, y, total = flat(x, x, residual, y, total)
    rest = eps, center, y, total, outputs, (N, D, S, images, strip, large)
    _normalize_whole(threads, (tasks,), x, addend, parameters, *rest)


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
    N, D, S = x.shape
    arrays = grad_y, x, grad_total, grad_x
    if S == 1:
        grad_y, x, grad_total, grad_x = (
            None if array is None else array.reshape(N, D) for array in arrays
        )
        rows.backward(
            grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias, threads
        )
        return
    images, strip = _task_size(N, D, S, 2 * x.itemsize)
    tasks = ceil_div(N, images) * ceil_div(S, strip)
    totals = np.zeros((tasks, 2, D))
    saved = flat(rstd, mean, rstd)
    (weights,) = flat(rstd, weight)
    gradients = flat(rstd, grad_weight, grad_bias)
    row_weight = np.ones(1, rstd.dtype) if weight is None else weights
    parameters = weights, row_weight, int(weight is not None)
    wanted = grad_weight is not None, grad_bias is not None
    large = is_large(x, backward=True)
    grad_y, x, grad_total, grad_x = flat(x, *arrays)
    sizes = N, D, S, images, strip, large
    rest = grad_total, grad_x, wanted, sizes, totals, gradients
    _backward_whole(threads, (tasks, 1), grad_y, x, saved, parameters, *rest)
