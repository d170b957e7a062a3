"""The backend that is always there: plain vectorised NumPy.

One set of verbs serves all four problems. A problem is only a way to fold x so that the axes a
statistic covers, and those a parameter covers, can be named.
"""

import inspect
import math
from functools import wraps
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

_erf = np.frompyfunc(math.erf, 1, 1)


class _Fold(NamedTuple):
    x: tuple[int, ...]  # the shape x is folded to
    stat: tuple[int, ...]  # the shape a statistic is folded to, to broadcast against x
    param: tuple[int, ...]  # the same for weight and bias

    def over_stat(self):
        return tuple(i for i, n in enumerate(self.stat) if n == 1)

    def over_param(self):
        return tuple(i for i, n in enumerate(self.param) if n == 1)


def _rows(x, rstd):
    M, D = x.shape
    return _Fold((M, D), (M, 1), (1, D))


def _columns(x, rstd):
    N, D, S = x.shape
    return _Fold((N, D, S), (N, 1, S), (1, D, 1))


def _channels_first(x, rstd):
    (N, C, S), (B, G) = x.shape, rstd.shape
    return _Fold((B, N // B, G, C // G, S), (B, 1, G, 1, 1), (1, 1, G, C // G, 1))


def _channels_last(x, rstd):
    (N, S, C), (B, G) = x.shape, rstd.shape
    return _Fold((B, N // B * S, G, C // G), (B, 1, G, 1), (1, 1, G, C // G))


def _moments(x, fold):
    """Return a rounded mean, what the rounding took away, and the biased variance."""
    axes = fold.over_stat()
    first = x[tuple(slice(1) if i in axes else slice(None) for i in range(x.ndim))]
    mean = first + (x - first).mean(axes, np.float64, keepdims=True)
    rounded = mean.astype(x.dtype)
    centred = x - rounded
    rest = centred.mean(axes, np.float64, keepdims=True)
    np.square(centred, out=centred)
    return rounded, rest, np.maximum(centred.mean(axes, np.float64, keepdims=True) - rest**2, 0)


def _activate(y, activation):
    if activation == 1:
        np.maximum(y, 0, out=y)
    elif activation == 2:
        y *= _sigmoid(y)
    elif activation == 3:
        y *= 0.5 + 0.5 * _erf(y * math.sqrt(0.5)).astype(y.dtype)
    elif activation == 4:
        y[...] = _sigmoid(y)
    elif activation == 5:
        np.tanh(y, out=y)


def _sigmoid(y):
    # Through tanh, which does not overflow.
    return 0.5 + 0.5 * np.tanh(0.5 * y)


def _transform(fold, y, rstd, weight, bias):
    """Scale and shift y, which is centred already, in place."""
    y *= rstd.reshape(fold.stat).astype(y.dtype, copy=False)
    if weight is not None:
        y *= weight.reshape(fold.param)
    if bias is not None:
        y += bias.reshape(fold.param)


def _axis_verbs(fold_of):
    def normalize(x, residual, weight, bias, eps, y, total, mean, rstd, threads):
        # Not in float32 where x is half: what is normalised is the sum as it is stored.
        if residual is not None:
            x = np.add(x, residual, out=total)
        normalize_rows(x, weight, bias, eps, y, mean, rstd)

    @_in_single
    def normalize_rows(x, weight, bias, eps, y, mean, rstd):
        fold = fold_of(x, rstd)
        x, y = x.reshape(fold.x), y.reshape(fold.x)
        if mean is None:
            var = np.square(x).mean(fold.over_stat(), np.float64, keepdims=True)
            y[...] = x
        else:
            rounded, rest, var = _moments(x, fold)
            mean[...] = (rounded + rest).reshape(mean.shape)
            np.subtract(x, rounded, out=y)
            y -= rest.astype(y.dtype)
        exact = 1 / np.sqrt(var + eps)
        rstd[...] = exact.reshape(rstd.shape)
        _transform(fold, y, exact, weight, bias)

    @_in_single
    def backward(
        grad_y, x, mean, rstd, weight, grad_total, grad_x, grad_weight, grad_bias, threads
    ):
        fold = fold_of(x, rstd)
        _backward(fold, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, False)
        if grad_total is not None and grad_x is not None:
            grad_x += grad_total

    return _verbs(normalize, backward)


def _channel_verbs(fold_of):
    def finish(fold, y, rstd, weight, bias, residual, activation):
        _transform(fold, y, rstd, weight, bias)
        if residual is not None:
            y += residual.reshape(fold.x)
        _activate(y, activation)

    def normalize(x, residual, weight, bias, eps, activation, y, mean, var, rstd, threads):
        if residual is not None and np.may_share_memory(residual, y):
            residual = residual.copy()
        fold = fold_of(x, rstd)
        x, y = x.reshape(fold.x), y.reshape(fold.x)
        rounded, rest, exact = _moments(x, fold)
        mean[...] = (rounded + rest).reshape(mean.shape)
        var[...] = exact.reshape(var.shape)
        exact = 1 / np.sqrt(exact + eps)
        rstd[...] = exact.reshape(rstd.shape)
        np.subtract(x, rounded, out=y)
        y -= rest.astype(y.dtype)
        finish(fold, y, exact, weight, bias, residual, activation)

    def apply(x, residual, weight, bias, activation, y, mean, rstd, threads):
        if residual is not None and np.may_share_memory(residual, y):
            residual = residual.copy()
        fold = fold_of(x, rstd)
        x, y = x.reshape(fold.x), y.reshape(fold.x)
        np.subtract(x, mean.reshape(fold.stat), out=y)
        finish(fold, y, rstd, weight, bias, residual, activation)

    def moments(x, mean, var, threads):
        fold = fold_of(x, mean)
        rounded, rest, exact = _moments(x.reshape(fold.x), fold)
        mean[...] = (rounded + rest).reshape(mean.shape)
        var[...] = exact.reshape(var.shape)

    def backward(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, threads):
        fold = fold_of(x, rstd)
        _backward(fold, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, False)

    def backward_apply(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, threads):
        fold = fold_of(x, rstd)
        _backward(fold, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, True)

    return _verbs(*map(_in_single, (normalize, apply, moments, backward, backward_apply)))


def _in_single(verb):
    """Have a verb work on float32 copies of half arrays; what it writes is rounded once."""
    names = tuple(inspect.signature(verb).parameters)

    def single(name, a):
        if not isinstance(a, np.ndarray) or a.itemsize != 2:
            return a
        return np.empty(a.shape, np.float32) if name in ("y", "grad_x") else a.astype(np.float32)

    @wraps(verb)
    def run(*arguments):
        singles = [single(name, a) for name, a in zip(names, arguments, strict=True)]
        verb(*singles)
        for name, a, result in zip(names, arguments, singles, strict=True):
            if name in ("y", "grad_x") and a is not result:
                a[...] = result

    return run


def _verbs(*functions):
    # NaN and Inf pass through normalization without a warning, as in the other backends.
    quiet = np.errstate(all="ignore")
    return SimpleNamespace(**{function.__name__: quiet(function) for function in functions})


def _backward(fold, grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, frozen):
    x, grad_y = x.reshape(fold.x), grad_y.reshape(fold.x)
    rstd = rstd.reshape(fold.stat)
    if mean is None:
        x_hat = x * rstd
    else:
        x_hat = x - mean.reshape(fold.stat)
        if not frozen:
            # The mean arrives rounded: what was rounded away is the mean of what is left.
            x_hat -= x_hat.mean(fold.over_stat(), np.float64, keepdims=True).astype(x.dtype)
        x_hat *= rstd
    if grad_weight is not None:
        total = (grad_y * x_hat).sum(fold.over_param(), np.float64)
        grad_weight[...] = total.reshape(grad_weight.shape)
    if grad_bias is not None:
        total = grad_y.sum(fold.over_param(), np.float64)
        grad_bias[...] = total.reshape(grad_bias.shape)
    if grad_x is None:
        return
    grad_x = grad_x.reshape(fold.x)
    if weight is None:
        grad_x[...] = grad_y
    else:
        np.multiply(grad_y, weight.reshape(fold.param), out=grad_x)
    if not frozen:
        along = (grad_x * x_hat).mean(fold.over_stat(), np.float64, keepdims=True)
        if mean is not None:
            grad_x -= grad_x.mean(fold.over_stat(), np.float64, keepdims=True).astype(x.dtype)
        x_hat *= along.astype(x.dtype)
        grad_x -= x_hat
    grad_x *= rstd


rows = _axis_verbs(_rows)
columns = _axis_verbs(_columns)
channels_first = _channel_verbs(_channels_first)
channels_last = _channel_verbs(_channels_last)
