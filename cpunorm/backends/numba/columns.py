"""columns: x (N, D, S), one statistic per column (n, s), weight and bias along D.

A task is a strip of columns, of as many images as make a piece. Sums run down the columns and the
output is written while the strip lies in L2. The parameter gradients are sums along its rows, which
every task gathers for itself.
"""

import numpy as np
from numba import prange

from . import rows
from ._jit import flat, jit, twins
from .sweeps import (
    BLOCK,
    PIECE,
    add,
    at,
    ceil_div,
    column_gradient_sums,
    column_moments,
    finish,
    same_memory,
    store_statistics,
    store_totals,
)

NARROW, BROAD = 64, 1024  # columns of a strip


@jit
def _affine(x, start, height, stride, width, terms, parameters, row, out, first, step):
    """out = (x - mean)·rstd·weight + bias, with terms for each column and parameters for each row."""
    weight, bias = parameters
    number = x.dtype.type
    for r in range(height):
        a = start + r * stride
        o = first + r * step
        w = weight[row + r] if weight.size else number(1)
        b = bias[row + r] if bias.size else number(0)
        for j in range(width):
            normal = (x[at(a + j)] - terms[0, j]) * terms[1, j] + terms[2, j]
            out[at(o + j)] = normal * w + b


@jit
def _normalize_task(task, x, addend, parameters, eps, center, y, total, outputs, sizes):
    N, D, S, images, strip = sizes
    across = (S + strip - 1) // strip
    s0 = task % across * strip
    n0 = task // across * images
    width = min(strip, S - s0)
    pivot = np.empty(width)
    mean = np.empty(width)
    M2 = np.empty(width)
    terms = np.empty((3, width), x.dtype)
    z = np.empty(BLOCK, x.dtype)
    source = total if total.size else x
    direct = not same_memory(source, y)
    tall = max(1, BLOCK // width)
    for n in range(n0, min(N, n0 + images)):
        start = n * D * S + s0
        if total.size:
            add(x, addend, start, D, S, width, z, total)
        column_moments(source, start, D, S, width, 1, center, pivot, mean, M2)
        for j in range(width):
            rstd = store_statistics(n * S + s0 + j, mean[j], M2[j], D, eps, outputs)
            terms[0, j] = mean[j]
            terms[1, j] = rstd
            terms[2, j] = (terms[0, j] - mean[j]) * rstd
        if direct:
            _affine(source, start, D, S, width, terms, parameters, np.intp(0), y, start, S)
            continue
        for top in range(0, D, tall):
            h = min(tall, D - top)
            a = start + top * S
            _affine(source, a, h, S, width, terms, parameters, top, z, np.intp(0), width)
            finish(z, x[:0], 0, a, h * width, S, width, y)


@twins
def _normalize(tasks, x, addend, parameters, eps, center, y, total, outputs, sizes):
    for task in prange(tasks):
        _normalize_task(task, x, addend, parameters, eps, center, y, total, outputs, sizes)


@jit
def _write_grad_x(grad_y, x, start, D, S, width, terms, weight, grad_total, grad_x):
    """grad_x = rstd·g + slope·(x - mean) + offset, with terms for each column."""
    for r in range(D):
        a = start + r * S
        w = weight[r] if weight.size else x.dtype.type(1)
        for j in range(width):
            i = at(a + j)
            rest = terms[2, j] * (x[i] - terms[0, j]) + terms[3, j]
            grad_x[i] = terms[1, j] * (grad_y[i] * w) + rest
        if grad_total.size:
            for j in range(width):
                grad_x[at(a + j)] += grad_total[at(a + j)]


@jit
def _sum_parameters(grad_y, x, start, D, S, width, mean, rstd, totals, slot, wanted):
    """Add a strip to totals[slot], (2, D): the sums over columns of grad_weight and grad_bias."""
    for r in range(D):
        a = start + r * S
        if wanted[0]:
            product = 0.0
            for j in range(width):
                i = at(a + j)
                product += grad_y[i] * ((x[i] - mean[j]) * rstd[j])
            totals[slot, 0, r] += product
        if wanted[1]:
            plain = 0.0
            for j in range(width):
                plain += grad_y[at(a + j)]
            totals[slot, 1, r] += plain


@jit
def _backward_task(task, grad_y, x, saved, parameters, grad_total, grad_x, totals, wanted, sizes):
    N, D, S, images, strip = sizes
    mean, rstd = saved
    weight, row_weight, weighted = parameters
    across = (S + strip - 1) // strip
    s0 = task % across * strip
    n0 = task // across * images
    width = min(strip, S - s0)
    g = np.empty(width)
    gx = np.empty(width)
    lost = np.empty(width)
    terms = np.empty((4, width), x.dtype)
    for n in range(n0, min(N, n0 + images)):
        start = n * D * S + s0
        for j in range(width):
            terms[0, j] = mean[n * S + s0 + j] if mean.size else 0.0
        column_gradient_sums(
            grad_y, x, start, D, S, width, 1, terms[0], row_weight, weighted, g, gx, lost
        )
        for j in range(width):
            s = np.float64(rstd[n * S + s0 + j])
            delta = lost[j] / D if mean.size else 0.0
            slope = -s * s * s * (gx[j] - delta * g[j]) / D
            offset = -s * g[j] / D if mean.size else 0.0
            terms[1, j] = s
            terms[2, j] = slope
            terms[3, j] = offset - slope * delta
            # From here on, the mean and rstd in full.
            g[j] = np.float64(terms[0, j]) + delta
            gx[j] = s
        if grad_x.size:
            _write_grad_x(grad_y, x, start, D, S, width, terms, weight, grad_total, grad_x)
        _sum_parameters(grad_y, x, start, D, S, width, g, gx, totals, task, wanted)


@twins
def _backward(tasks, grad_y, x, saved, parameters, grad_total, grad_x, totals, wanted, sizes):
    for task in prange(tasks):
        _backward_task(
            task, grad_y, x, saved, parameters, grad_total, grad_x, totals, wanted, sizes
        )


def _cut(N, D, S):
    """(images, strip) of a task."""
    strip = min(S, BROAD, max(NARROW, PIECE // D // 16 * 16))
    return max(1, PIECE // (D * strip)), strip


def normalize(x, residual, weight, bias, eps, y, total, mean, rstd, threads):
    """y = (x - mean)·rstd·weight + bias along D, of total = x + residual where there is one."""
    N, D, S = x.shape
    if S == 1:
        x, residual, y, total = (
            None if array is None else array.reshape(N, D) for array in (x, residual, y, total)
        )
        rows.normalize(x, residual, weight, bias, eps, y, total, mean, rstd, threads)
        return
    images, strip = _cut(N, D, S)
    parameters = flat(weight, x), flat(bias, x)
    outputs = tuple(flat(array, x) for array in (mean, None, rstd))
    _normalize(
        threads, ceil_div(N, images) * ceil_div(S, strip),
        flat(x, x), flat(residual, x), parameters, eps, mean is not None, flat(y, x),
        flat(total, x), outputs, (N, D, S, images, strip),
    )  # fmt: skip


def backward(grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias, threads):
    """Gradients through the statistics; grad_total is added to grad_x."""
    N, D, S = x.shape
    if S == 1:
        grad_y, x, grad_total, grad_x = (
            None if array is None else array.reshape(N, D)
            for array in (grad_y, x, grad_total, grad_x)
        )
        rows.backward(
            grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias, threads
        )
        return
    images, strip = _cut(N, D, S)
    tasks = ceil_div(N, images) * ceil_div(S, strip)
    totals = np.zeros((tasks, 2, D))
    weights = flat(weight, x)
    row_weight = np.ones(1, x.dtype) if weight is None else weights
    parameters = weights, row_weight, int(weight is not None)
    wanted = grad_weight is not None, grad_bias is not None
    _backward(
        threads, tasks,
        flat(grad_y, x), flat(x, x), (flat(mean, x), flat(rstd, x)), parameters,
        flat(grad_total, x), flat(grad_x, x), totals, wanted, (N, D, S, images, strip),
    )  # fmt: skip
    store_totals(totals, grad_weight, grad_bias)
