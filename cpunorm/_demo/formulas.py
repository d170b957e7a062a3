"""The normalizations in plain NumPy, as people write them when they have no library for it."""

from typing import Any

import numpy as np

Array = Any  # an ndarray; NumPy's annotations of its arithmetic know no more than this either


def along(parameter: Array, x: Array, axis: int) -> Array:
    """Return a parameter of x's `axis` in a shape that broadcasts against x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def transform(
    x: Array, mean: Array, var: Array, weight: Array, bias: Array, axis: int, eps: float = 1e-5
) -> Array:
    """Normalise with given statistics: batch norm at inference."""
    mean, var, weight, bias = (along(a, x, axis) for a in (mean, var, weight, bias))
    return (x - mean) / np.sqrt(var + eps) * weight + bias


def standardise(
    x: Array, over: tuple[int, ...], weight: Array, bias: Array, axis: int, eps: float = 1e-5
) -> Array:
    """Normalise with x's statistics over some axes: batch, instance and layer norm."""
    mean = x.mean(axis=over, keepdims=True)
    var = x.var(axis=over, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * along(weight, x, axis) + along(bias, x, axis)


def batch_norm_training(
    x: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array,
    bias: Array,
    axis: int,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Array:
    """Normalise with the statistics of the batch, and update the running ones."""
    over = tuple(i for i in range(x.ndim) if i != axis)
    mean, var = x.mean(axis=over), x.var(axis=over)
    count = x.size // x.shape[axis]
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (var * count / (count - 1) - running_var)
    return transform(x, mean, var, weight, bias, axis, eps)


def group_norm(
    x: Array, groups: int, weight: Array, bias: Array, axis: int, eps: float = 1e-5
) -> Array:
    """Normalise groups of channels; axis 1 or the last one has the channels."""
    n, c = x.shape[0], x.shape[axis]
    over: tuple[int, ...]
    if axis == 1:
        split, over = x.reshape(n, groups, -1), (2,)
    else:
        split, over = x.reshape(n, -1, groups, c // groups), (1, 3)
    mean = split.mean(axis=over, keepdims=True)
    var = split.var(axis=over, keepdims=True)
    y = ((split - mean) / np.sqrt(var + eps)).reshape(x.shape)
    return y * along(weight, x, axis) + along(bias, x, axis)


def rms_norm(x: Array, weight: Array, axis: int, eps: float = 1e-6) -> Array:
    """Divide by the root of the mean square along one axis."""
    mean_square = np.mean(x**2, axis=axis, keepdims=True)
    return x / np.sqrt(mean_square + eps) * along(weight, x, axis)


def relu(z: Array) -> Array:
    """max(z, 0)."""
    return np.maximum(z, 0)


def silu(z: Array) -> Array:
    """z times its sigmoid."""
    return z / (1 + np.exp(-z))
