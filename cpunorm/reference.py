"""The oracle: every normalization of cpunorm, forward and backward, as its paper writes it.

Plain NumPy in float64, written to be read and not to be fast. It imports nothing of cpunorm and
shares no line with the kernels, so that a mistake in one cannot hide in the other; finite
differences and identities check it in turn (`tests/test_reference.py`).

One formula serves all of them. Over the set of positions that share a statistic, with m of them::

    mean = Σ x / m        var = Σ (x - mean)² / m        rstd = 1 / √(var + eps)
    x̂ = (x - mean)·rstd                                   y = weight·x̂ + bias

They differ in that set only (N batch, C channels, S spatial positions, K = C / G)::

    batch norm     one channel, all images            N·S    Ioffe & Szegedy 2015, arXiv:1502.03167
    instance norm  one channel of one image           S      Ulyanov et al. 2016, arXiv:1607.08022
    group norm     one group of channels of an image  K·S    Wu & He 2018, arXiv:1803.08494
    layer norm     the normalised axes                D      Ba et al. 2016, arXiv:1607.06450
    RMS norm       the same, with mean = 0            D      Zhang & Sennrich 2019, arXiv:1910.07467

and one formula serves their gradients, with ĝ = weight·grad_y::

    grad_x = rstd·(ĝ - mean(ĝ) - x̂·mean(ĝ·x̂))     (rstd·ĝ where the statistics are constants;
                                                    no mean(ĝ) in RMS norm, which has no mean)
    grad_weight = Σ grad_y·x̂        grad_bias = Σ grad_y        over all that share the parameter

Names, order and defaults of the arguments are those of the public functions. Arrays of any floating
dtype are read as float64, and only what `add_*` add is rounded, as the sum is stored. No argument
is ever written, results are float64, arrays must not be empty, and nothing is checked.

With a mask, of x's shape without its channels (the last of the normalised axes), sums and m are
over the positions where it is True, and everything is 0 at the others.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Gradient = tuple[Array, Array, Array | None]


class Forward(NamedTuple):
    """What a forward pass gives; None stands where an operation has no such thing.

    Attributes
    ----------
    y : ndarray
        The normalised array, in the layout of x.
    mean, rstd : ndarray
        The statistics used: (C,) for batch norm, (N, C) for instance norm ((C,) when it uses the
        running ones), (N, G) for group norm, x.shape without the normalised axes for layer and RMS
        norm, whose mean is None.
    running_mean, running_var : ndarray
        The running statistics after the call (batch and instance norm, where they were given).
    total : ndarray
        x + residual as an array of their dtype holds it (`add_layer_norm`, `add_rms_norm`).
    """

    y: Array
    mean: Array | None
    rstd: Array
    running_mean: Array | None = None
    running_var: Array | None = None
    total: Array | None = None


# --- The formulas ------------------------------------------------------------------------------


def _mean(x, axes, counted):
    """Mean over `axes`, which stay with length 1, of what is counted; 0 where nothing is."""
    counted = np.broadcast_to(counted, x.shape)
    return np.where(counted, x, 0.0).sum(axes, keepdims=True) / np.maximum(
        counted.sum(axes, keepdims=True), 1
    )


def _center(x, axes, counted):
    """Mean over `axes`, which stay with length 1, and x without it."""
    mean = _mean(x, axes, counted)
    centred = x - mean
    rest = _mean(centred, axes, counted)  # what rounding the mean has left in x
    return mean + rest, centred - rest


def _rstd(centred, axes, eps, counted):
    some = np.broadcast_to(counted, centred.shape).any(axes, keepdims=True)
    return np.where(some, 1.0 / np.sqrt(_mean(np.square(centred), axes, counted) + eps), 0.0)


def _backward(grad_y, x_hat, rstd, weight, axes, counted, center=True):
    """The gradient of x, through statistics over `axes` (None: the statistics are constants)."""
    grad_x_hat = weight * grad_y
    if axes is None:
        return np.where(counted, rstd * grad_x_hat, 0.0)
    through_var = x_hat * _mean(grad_x_hat * x_hat, axes, counted)
    through_mean = _mean(grad_x_hat, axes, counted) if center else 0.0
    return np.where(counted, rstd * (grad_x_hat - through_mean - through_var), 0.0)


def _parameter_gradients(grad_y, x_hat, axes, counted):
    """The gradients of weight and bias, summed over `axes`: those the parameters do not have."""
    counted = np.broadcast_to(counted, grad_y.shape)
    return tuple(np.where(counted, g, 0.0).sum(axes) for g in (grad_y * x_hat, grad_y))


def _sigmoid(z):
    return np.exp(-np.logaddexp(0.0, -z))


_erfc = np.vectorize(math.erfc, otypes=[np.float64])

ACTIVATIONS = {
    None: lambda z: z,
    "relu": lambda z: np.maximum(z, 0.0),
    "silu": lambda z: z * _sigmoid(z),
    "gelu": lambda z: 0.5 * z * _erfc(-z / math.sqrt(2.0)),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}


# --- Batch, instance and group norm: x seen as (N, G, K, S) ------------------------------------


def _as_groups(x, groups, layout):
    """(N, C, *spatial) or (N, *spatial, C) as (N, G, K, S)."""
    x = np.asarray(x, np.float64)
    x = x if layout in ("NCHW", "channels_first") else np.moveaxis(x, -1, 1)
    n, c = x.shape[:2]
    return x.reshape(n, groups, c // groups, -1)


def _from_groups(x, shape, layout):
    """The inverse: (N, G, K, S) as an array of `shape` in `layout`."""
    if layout in ("NCHW", "channels_first"):
        return x.reshape(shape)
    return np.moveaxis(x.reshape(shape[0], shape[-1], *shape[1:-1]), 1, -1)


def _per_channel(parameter, default, groups, size):
    """A parameter of C = groups·size values as (1, G, K, 1)."""
    parameter = np.full(groups * size, default) if parameter is None else parameter
    return np.asarray(parameter, np.float64).reshape(1, groups, size, 1)


def _counted_groups(mask, z):
    """A mask (N, *spatial) against z as (N, G, K, S); no mask counts everything."""
    return True if mask is None else np.asarray(mask, bool).reshape(len(z), 1, 1, -1)


def _count_channels(x, layout):
    return np.shape(x)[1 if layout in ("NCHW", "channels_first") else -1]


def _channel_statistics(z, axes, running, eps, counted):
    """Mean, x without it, and rstd: over `axes` of (N, G, K, S), or None for the running ones."""
    if axes is None:
        mean, var = (_per_channel(r, np.nan, *z.shape[1:3]) for r in running)
        return mean, z - mean, 1.0 / np.sqrt(var + eps)
    mean, centred = _center(z, axes, counted)
    return mean, centred, _rstd(centred, axes, eps, counted)


def _channel_forward(
    x, groups, axes, running, weight, bias, momentum, eps, layout, activation, residual, mask
):
    z = _as_groups(x, groups, layout)
    counted = _counted_groups(mask, z)
    mean, centred, rstd = _channel_statistics(z, axes, running, eps, counted)
    weight = _per_channel(weight, 1.0, *z.shape[1:3])
    bias = _per_channel(bias, 0.0, *z.shape[1:3])
    y = _from_groups(weight * (centred * rstd) + bias, np.shape(x), layout)
    y = ACTIVATIONS[activation](y if residual is None else y + np.asarray(residual, np.float64))
    everywhere = np.broadcast_to(counted, z.shape)
    y = np.where(_from_groups(everywhere, np.shape(x), layout), y, 0.0)

    running_mean, running_var = (None if r is None else np.array(r, np.float64) for r in running)
    if axes is not None and running_mean is not None:
        m = everywhere.sum(axes, keepdims=True)
        enough = m[:, 0, 0, 0] > 1  # the others have no variance
        squares = np.where(everywhere, np.square(centred), 0.0).sum(axes, keepdims=True)
        if enough.any():
            new_mean = mean[enough].mean(axis=0).ravel()
            new_var = (squares[enough] / (m[enough] - 1)).mean(axis=0).ravel()
            running_mean = (1 - momentum) * running_mean + momentum * new_mean
            running_var = (1 - momentum) * running_var + momentum * new_var
    shape = (groups,) if axes is None or 0 in axes else (len(z), groups)
    return Forward(y, mean.reshape(shape), rstd.reshape(shape), running_mean, running_var)


def _channel_backward(grad_y, x, groups, axes, running, weight, eps, layout, mask):
    z, g = _as_groups(x, groups, layout), _as_groups(grad_y, groups, layout)
    counted = _counted_groups(mask, z)
    _, centred, rstd = _channel_statistics(z, axes, running, eps, counted)
    x_hat = centred * rstd
    grad_x = _backward(g, x_hat, rstd, _per_channel(weight, 1.0, *z.shape[1:3]), axes, counted)
    grad_weight, grad_bias = _parameter_gradients(g, x_hat, (0, 3), counted)
    return _from_groups(grad_x, np.shape(x), layout), grad_weight.ravel(), grad_bias.ravel()


def batch_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str = "NCHW",
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Forward:
    """Batch normalization: one statistic per channel, over all images (Ioffe & Szegedy 2015).

    ::

        y = activation(weight·(x - mean) / √(var + eps) + bias + residual)

    In training mean and var (biased) are those of x over N and S, and with m = N·S::

        running_mean ← (1 - momentum)·running_mean + momentum·mean
        running_var  ← (1 - momentum)·running_var  + momentum·var·m / (m - 1)     (unbiased)

    Otherwise they are the running statistics themselves.

    Returns
    -------
    Forward
        y, mean, rstd and, where they were given, the new running statistics.
    """
    return _channel_forward(
        x, _count_channels(x, layout), (0, 2, 3) if training else None, (running_mean, running_var),
        weight, bias, momentum, eps, layout, activation, residual, mask,
    )  # fmt: skip


def instance_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str = "NCHW",
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Forward:
    """Instance normalization: one statistic per image and channel, over S (Ulyanov et al. 2016).

    ::

        y = activation(weight·(x - mean) / √(var + eps) + bias + residual)

    The running statistics take the mean over N of each mean and unbiased variance; with
    `use_input_stats` False they are the statistics, as in batch norm.

    Returns
    -------
    Forward
        y, mean, rstd and, where they were given, the new running statistics.
    """
    return _channel_forward(
        x, _count_channels(x, layout), (2, 3) if use_input_stats else None,
        (running_mean, running_var),
        weight, bias, momentum, eps, layout, activation, residual, mask,
    )  # fmt: skip


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    layout: str = "NCHW",
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Forward:
    """Group normalization: one statistic per image and group of K channels (Wu & He 2018).

    ::

        y = activation(weight·(x - mean) / √(var + eps) + bias + residual)

    with mean and var over the K·S values of a group; weight and bias are per channel.

    Returns
    -------
    Forward
        y, mean and rstd.
    """
    return _channel_forward(
        x, num_groups, (2, 3), (None, None),
        weight, bias, 0.0, eps, layout, activation, residual, mask,
    )  # fmt: skip


def batch_norm_backward(
    grad_y: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None = None,
    training: bool = True,
    eps: float = 1e-5,
    *,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    layout: str = "NCHW",
    mask: ArrayLike | None = None,
) -> Gradient:
    """The gradients of `batch_norm` (Ioffe & Szegedy 2015, section 3): x, weight, bias.

    With ĝ = weight·grad_y and means over N and S::

        grad_x = rstd·(ĝ - mean(ĝ) - x̂·mean(ĝ·x̂))

    and grad_x = rstd·ĝ with `training` False, where the statistics are the running ones.

    Returns
    -------
    grad_x : ndarray
    grad_weight : ndarray
    grad_bias : ndarray
    """
    axes = (0, 2, 3) if training else None
    running = (running_mean, running_var)
    c = _count_channels(x, layout)
    return _channel_backward(grad_y, x, c, axes, running, weight, eps, layout, mask)


def instance_norm_backward(
    grad_y: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None = None,
    use_input_stats: bool = True,
    eps: float = 1e-5,
    *,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    layout: str = "NCHW",
    mask: ArrayLike | None = None,
) -> Gradient:
    """The gradients of `instance_norm`: x, weight, bias (Ulyanov et al. 2016).

    As in `batch_norm_backward`, with means over S.

    Returns
    -------
    grad_x : ndarray
    grad_weight : ndarray
    grad_bias : ndarray
    """
    axes = (2, 3) if use_input_stats else None
    running = (running_mean, running_var)
    c = _count_channels(x, layout)
    return _channel_backward(grad_y, x, c, axes, running, weight, eps, layout, mask)


def group_norm_backward(
    grad_y: ArrayLike,
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    layout: str = "NCHW",
    mask: ArrayLike | None = None,
) -> Gradient:
    """The gradients of `group_norm`: x, weight, bias (Wu & He 2018).

    As in `batch_norm_backward`, with means over the K·S values of a group.

    Returns
    -------
    grad_x : ndarray
    grad_weight : ndarray
    grad_bias : ndarray
    """
    return _channel_backward(grad_y, x, num_groups, (2, 3), (None, None), weight, eps, layout, mask)


# --- Layer and RMS norm: x seen with its normalised axes last ----------------------------------


def _normalised_axes(x, normalized_shape, axis):
    """The axes normalised, in the order of the weight's axes."""
    d = np.size(normalized_shape)
    axes = range(-d, 0) if axis is None else np.atleast_1d(axis)
    return tuple(int(a) % np.ndim(x) for a in axes)


def _axes_last(x, axes):
    return np.moveaxis(np.asarray(x, np.float64), axes, range(-len(axes), 0))


def _axes_back(x, axes):
    return np.moveaxis(x, range(-len(axes), 0), axes)


def _counted_rows(mask, axes):
    """A mask without the last of `axes`, against x with its axes last; none counts everything."""
    if mask is None:
        return True
    return np.moveaxis(np.expand_dims(np.asarray(mask, bool), axes[-1]), axes, range(-len(axes), 0))


def _row_statistics(z, axes, eps, center, counted):
    """Mean (None in RMS norm), x without it, and rstd."""
    mean, centred = _center(z, axes, counted) if center else (None, z)
    return mean, centred, _rstd(centred, axes, eps, counted)


def _row_forward(x, axes, weight, bias, eps, center, mask):
    z, last = _axes_last(x, axes), tuple(range(-len(axes), 0))
    counted = _counted_rows(mask, axes)
    mean, centred, rstd = _row_statistics(z, last, eps, center, counted)
    weight = 1.0 if weight is None else np.asarray(weight, np.float64)
    bias = 0.0 if bias is None else np.asarray(bias, np.float64)
    y = _axes_back(np.where(counted, weight * (centred * rstd) + bias, 0.0), axes)
    return Forward(y, np.squeeze(mean, last) if center else None, np.squeeze(rstd, last))


def _row_backward(grad_y, x, axes, weight, eps, grad_sum, center, mask):
    z, g, last = _axes_last(x, axes), _axes_last(grad_y, axes), tuple(range(-len(axes), 0))
    counted = _counted_rows(mask, axes)
    _, centred, rstd = _row_statistics(z, last, eps, center, counted)
    x_hat = centred * rstd
    weight = 1.0 if weight is None else np.asarray(weight, np.float64)
    grad_x = _backward(g, x_hat, rstd, weight, last, counted, center)
    if grad_sum is not None:
        grad_x = grad_x + np.where(counted, _axes_last(grad_sum, axes), 0.0)
    grad_x, rest = _axes_back(grad_x, axes), tuple(range(z.ndim - len(axes)))
    grad_weight, grad_bias = _parameter_gradients(g, x_hat, rest, counted)
    return grad_x, grad_weight, grad_bias if center else None


def _rms_eps(x, eps):
    """None is the machine epsilon of the accumulation dtype: float64 for float64, else float32."""
    is_double = np.asarray(x).dtype == np.float64
    return float(np.finfo(np.float64 if is_double else np.float32).eps) if eps is None else eps


def layer_norm(
    x: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int | tuple[int, ...] | None = None,
    mask: ArrayLike | None = None,
) -> Forward:
    """Layer normalization: one statistic for everything but the normalised axes (Ba et al. 2016).

    ::

        y = weight·(x - mean) / √(var + eps) + bias

    `axis` None means the trailing axes. The axes of weight and bias follow the order of `axis`.

    Returns
    -------
    Forward
        y, mean and rstd.
    """
    axes = _normalised_axes(x, normalized_shape, axis)
    return _row_forward(x, axes, weight, bias, eps, center=True, mask=mask)


def rms_norm(
    x: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    axis: int | tuple[int, ...] | None = None,
    mask: ArrayLike | None = None,
) -> Forward:
    """RMS normalization: layer norm without the mean (Zhang & Sennrich 2019).

    ::

        y = weight·x / √(mean(x²) + eps)

    `eps` None is the machine epsilon of the dtype sums are kept in.

    Returns
    -------
    Forward
        y and rstd.
    """
    axes = _normalised_axes(x, normalized_shape, axis)
    return _row_forward(x, axes, weight, None, _rms_eps(x, eps), center=False, mask=mask)


def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int | tuple[int, ...] | None = None,
) -> Forward:
    """`layer_norm` of total = x + residual, rounded to their dtype (Ba et al. 2016).

    Returns
    -------
    Forward
        y, mean, rstd and total.
    """
    total = np.add(x, residual)
    forward = layer_norm(total, normalized_shape, weight, bias, eps, axis=axis)
    return forward._replace(total=total.astype(np.float64))


def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    axis: int | tuple[int, ...] | None = None,
) -> Forward:
    """`rms_norm` of total = x + residual, rounded to their dtype (Zhang & Sennrich 2019).

    Returns
    -------
    Forward
        y, rstd and total.
    """
    total = np.add(x, residual)
    forward = rms_norm(total, normalized_shape, weight, eps, axis=axis)
    return forward._replace(total=total.astype(np.float64))


def layer_norm_backward(
    grad_y: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int | tuple[int, ...] | None = None,
    grad_sum: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Gradient:
    """The gradients of `layer_norm`: x, weight, bias (Ba et al. 2016).

    With ĝ = weight·grad_y and means over the normalised axes::

        grad_x = rstd·(ĝ - mean(ĝ) - x̂·mean(ĝ·x̂)) + grad_sum

    Returns
    -------
    grad_x : ndarray
    grad_weight : ndarray
    grad_bias : ndarray
    """
    axes = _normalised_axes(x, normalized_shape, axis)
    return _row_backward(grad_y, x, axes, weight, eps, grad_sum, center=True, mask=mask)


def rms_norm_backward(
    grad_y: ArrayLike,
    x: ArrayLike,
    normalized_shape: int | tuple[int, ...],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    axis: int | tuple[int, ...] | None = None,
    grad_sum: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Gradient:
    """The gradients of `rms_norm`: x, weight, None (Zhang & Sennrich 2019).

    With ĝ = weight·grad_y and the mean over the normalised axes::

        grad_x = rstd·(ĝ - x̂·mean(ĝ·x̂)) + grad_sum

    Returns
    -------
    grad_x : ndarray
    grad_weight : ndarray
    grad_bias : None
    """
    axes = _normalised_axes(x, normalized_shape, axis)
    return _row_backward(
        grad_y, x, axes, weight, _rms_eps(x, eps), grad_sum, center=False, mask=mask
    )
