"""Normalization layers: parameters, running statistics and modes, over `cpunorm.functional`.

Every layer works as its torch counterpart does: arguments, attributes and the keys of
`state_dict` have torch's names, and a new layer is in training mode. What it computes is one call
of `functional`, whose documentation holds the details of layouts, strides and errors.

A call in training mode remembers x (itself, not a copy: leave it as it is until then) and its
statistics, and `backward` turns the gradient of y into the gradient of x.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from . import functional
from ._canonical import (
    CONVENTIONS,
    DTYPE_NAMES,
    EPS,
    MOMENTUM,
    Array,
    Gradients,
    Stats,
    array,
    flag,
    integer,
    integers,
    is_supported,
    memory_of,
    resolve_convention,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

    from ._canonical import Activation, ConventionName, Layout, Shape
    from ._interchange import Readable

# The arrays of a layer that are saved, in torch's order. Not every layer has every one.
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` left alone: keys the state lacks, keys the layer does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Layer(ABC):
    """What the five layers share: parameters, mode, state, and the memory `backward` works from."""

    eps: float | None
    activation: Activation | None = None
    grad_weight: Array | None = None
    grad_bias: Array | None = None

    # x, mask and Stats of the latest call, or why there are none.
    _remembered: tuple[Array, Readable | None, Stats] | str = (
        "it has not been called in training mode"
    )

    def __init__(
        self,
        shape: tuple[int, ...],
        weight: bool,
        bias: bool,
        dtype: DTypeLike,
        backend: str | None,
    ) -> None:
        try:
            self.dtype = np.dtype(dtype)
        except TypeError:
            raise TypeError(f"dtype must be {DTYPE_NAMES}, got {dtype!r}") from None
        if dtype is None:  # NumPy's float64
            raise TypeError(f"dtype must be {DTYPE_NAMES}, got None")
        if not is_supported(self.dtype):
            raise TypeError(f"dtype must be {DTYPE_NAMES}, got {self.dtype}")
        if min(shape, default=0) < 0:
            raise ValueError(f"a layer's sizes must not be negative, got {shape}")
        self.backend = backend
        self.training = True
        self.weight: Array | None = np.ones(shape, self.dtype) if weight else None
        self.bias: Array | None = np.zeros(shape, self.dtype) if bias else None

    @abstractmethod
    def _forward(self, x: Array, **options: Any) -> Any:
        """Call the operation of `functional` with the layer's arguments and `options`."""

    @abstractmethod
    def _gradients(self, grad_y: Readable, x: Array, stats: Stats, **options: Any) -> Gradients:
        """Call its backward."""

    def _run(self, x: Readable, out: Array | None, mask: Readable | None, **options: Any) -> Array:
        """Normalise x, and remember it where `backward` may be asked for."""
        y: Array
        x = array("x", x)
        if self.training and self.activation is None:
            y, stats = self._forward(x, out=out, mask=mask, return_stats=True, **options)
            overwritten = out is not None and memory_of(out) == memory_of(x)
            self._remembered = "its latest call wrote y over x" if overwritten else (x, mask, stats)
        else:
            y = self._forward(x, out=out, mask=mask, **options)
            self._remembered = "its latest call kept nothing (evaluation mode, or an activation)"
        return y

    def backward(self, grad_y: Readable) -> Array:
        """Return the gradient of x, from the gradient of the latest call's y.

        The gradients of weight and bias are stored in `grad_weight` and `grad_bias`; they replace
        what was there and are None for a parameter the layer does not have. A residual's gradient
        is `grad_y` itself.

        Parameters
        ----------
        grad_y : ndarray
            The gradient with respect to y; x's shape and dtype.

        Returns
        -------
        ndarray
            The gradient with respect to x; x's shape and dtype.

        Raises
        ------
        ValueError
            If the layer has an activation, which `backward` does not differentiate.
        RuntimeError
            If there is no call to go back through: none yet, the latest one in evaluation mode,
            or with x as its `out`.
        """
        if self.activation is not None:
            raise ValueError(
                "activation must be None for backward, which differentiates the normalization "
                f"alone, got {self.activation!r}"
            )
        if isinstance(self._remembered, str):
            raise RuntimeError(
                f"{type(self).__name__}.backward needs the x of a call in training mode, "
                f"but {self._remembered}"
            )
        x, mask, stats = self._remembered
        need = (True, self.weight is not None, self.bias is not None)
        grad_x, self.grad_weight, self.grad_bias = self._gradients(
            grad_y, x, stats, mask=mask, need=need
        )
        assert grad_x is not None
        return grad_x

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or to evaluation mode.

        Parameters
        ----------
        mode : bool
            True for training.

        Returns
        -------
        Self
            The layer.
        """
        self.training = flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation mode.

        Returns
        -------
        Self
            The layer.
        """
        return self.train(False)

    def _state(self) -> dict[str, Array]:
        arrays = ((name, getattr(self, name, None)) for name in STATE)
        return {name: a for name, a in arrays if a is not None}

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the layer's arrays, under torch's names.

        Returns
        -------
        dict of str to ndarray
            Those of `weight`, `bias`, `running_mean`, `running_var` and `num_batches_tracked` that
            the layer has. ``numpy.savez(file, **layer.state_dict())`` saves them.
        """
        return {name: a.copy() for name, a in self._state().items()}

    def load_state_dict(
        self, state: Mapping[str, ArrayLike], strict: bool = True
    ) -> IncompatibleKeys:
        """Copy arrays into the layer's own, all of them or, if one does not fit, none.

        Parameters
        ----------
        state : mapping of str to array_like
            As `state_dict` gives it: of this library, of torch (tensors included), or as loaded by
            `numpy.load`. Values are converted to the layer's dtype. A state without
            `num_batches_tracked`, as early torch wrote it, leaves the count as it is.
        strict : bool
            Whether keys that are missing or unknown are an error, or skipped.

        Returns
        -------
        IncompatibleKeys
            The keys that are missing and those that are unknown; both empty if `strict`.

        Raises
        ------
        TypeError
            If `state` is not a mapping, or a value is no array of real numbers.
        ValueError
            If a shape does not fit, or, with `strict`, the keys do not.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"state must be a mapping of names to arrays, got {type(state).__name__}"
            )
        own = self._state()
        missing = [name for name in own if name not in state and name != "num_batches_tracked"]
        unexpected = [name for name in state if name not in own]
        if strict and (missing or unexpected):
            found = (("missing", missing), ("unexpected", unexpected))
            listed = "; ".join(
                f"{kind}: {', '.join(map(repr, keys))}" for kind, keys in found if keys
            )
            raise ValueError(f"state must have the keys {', '.join(map(repr, own))} ({listed})")
        loaded = {name: _loaded(name, state[name], a) for name, a in own.items() if name in state}
        for name, values in loaded.items():
            own[name][...] = values
        return IncompatibleKeys(missing, unexpected)

    def __getstate__(self) -> dict[str, Any]:
        # x belongs to a call, not to the layer, and may be a hundred times its size.
        return {name: v for name, v in self.__dict__.items() if name != "_remembered"}

    def __repr__(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value, default = getattr(self, name, parameter.default), parameter.default
            if name == "bias":
                value = self.bias is not None
            elif name == "dtype":
                value, default = self.dtype.name, np.dtype(default).name
            if default is parameter.empty:
                shown.append(repr(value))
            elif parameter.kind is not parameter.KEYWORD_ONLY or value != default:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _loaded(name: str, value: Any, target: Array) -> Array:
    """Return a value of a state as an array with the shape and dtype of `target`."""
    from . import _interchange  # takes a moment to import, and few need it

    # A torch parameter gives its values only when detached from its graph.
    value = value.detach() if hasattr(value, "detach") else value
    try:
        foreign = not isinstance(value, np.ndarray) and _interchange.is_foreign(value)
        values = _interchange.read(value) if foreign else np.asarray(value)
        if values.dtype == "V2":  # what `numpy.savez` makes of bfloat16
            values = _interchange.as_bfloat16(values)
        values = values.astype(target.dtype, casting="same_kind")
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise TypeError(f"state[{name!r}] must convert to {target.dtype}: {error}") from None
    if values.shape != target.shape:
        raise ValueError(f"state[{name!r}] must have shape {target.shape}, got {values.shape}")
    if not target.flags.writeable:
        raise ValueError(
            f"the layer's {name} must be writeable to be loaded, got a read-only array"
        )
    return values


class _ChannelNorm(_Layer):
    """Batch, instance and group norm: parameters along the channels of either layout."""

    def __init__(
        self,
        channels: tuple[str, int],
        eps: float,
        affine: bool,
        bias: bool,
        track_running_stats: bool,
        layout: Layout,
        activation: Activation | None,
        dtype: DTypeLike,
        backend: str | None,
    ) -> None:
        count = (integer(*channels),)
        self.affine = flag("affine", affine)
        super().__init__(count, affine, affine and flag("bias", bias), dtype, backend)
        self.eps: float = eps
        self.layout = layout
        self.activation = activation
        self.running_mean: Array | None = None
        self.running_var: Array | None = None
        self.num_batches_tracked: Array | None = None
        if flag("track_running_stats", track_running_stats):
            self.running_mean = np.zeros(count, self.dtype)
            self.running_var = np.ones(count, self.dtype)
            self.num_batches_tracked = np.array(0, np.int64)
        # An empty batch changes nothing and has every argument checked where all checks live;
        # with channels on both axes it is right for either layout.
        self._forward(np.empty((0, *count, *count), self.dtype))

    def __call__(
        self,
        x: Readable,
        residual: Readable | None = None,
        out: Array | None = None,
        *,
        mask: Readable | None = None,
    ) -> Array:
        """Normalise x.

        Parameters
        ----------
        x : ndarray
            (N, C, ...), or (N, ..., C) with ``layout="NHWC"``; the layer's dtype, or one of 16 bits
            beside float32.
        residual : ndarray, optional
            Added after the affine step and before the activation; x's shape and dtype.
        out : ndarray, optional
            Where to write the result; x's shape and dtype, and may be x (then `backward` is not
            possible) or residual.
        mask : ndarray of bool, optional
            Which positions count, of x's shape without the channels. The others take no part in
            anything, and come out zero.

        Returns
        -------
        ndarray
            `out`, or a new array of x's shape and dtype.
        """
        return self._run(x, out, mask, residual=residual)


class BatchNorm(_ChannelNorm):
    """Batch normalization: one mean and variance per channel, over the whole batch.

    ::

        y = activation(weight·(x - mean) / √(var + eps) + bias + residual)

    In training mode mean and var are those of x over N and all spatial positions, and the running
    statistics move towards them: ``running = (1 - momentum)·running + momentum·new``, where the
    new variance is the unbiased one while x is normalised by the biased one. In evaluation mode
    the running statistics are used instead, and left alone.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of the new value in the running statistics; None is the average over all batches.
    affine : bool
        Whether there are `weight` and `bias`.
    track_running_stats : bool
        Whether there are running statistics; without them, x's own are used in either mode.
    bias : bool
        Whether there is `bias` where `affine` holds.
    convention : {"torch", "keras", "onnx"}
        Which momentum and eps are the defaults, whether momentum is the weight of the old value
        instead, and which variance is kept; see `batch_norm`.
    layout : {"NCHW", "NHWC"}
        Where the channels are: axis 1, or the last one.
    activation : {None, "relu", "silu", "gelu", "sigmoid", "tanh"}
        Applied last, in the same pass over memory. There is no `backward` with one.
    dtype : dtype_like
        Of parameters and running statistics, and so of x, which beside float32 may have 16 bits.
    backend : {None, "auto", "cython", "numba", "numpy"}
        None is the current default.

    Attributes
    ----------
    weight, bias : ndarray or None
        (C,), ones and zeros at first.
    running_mean, running_var : ndarray or None
        (C,), zeros and ones at first.
    num_batches_tracked : ndarray or None
        The number of batches in the running statistics, a 0-d int64 array. Those that do not move
        them, empty or masked but for one position, do not count.
    grad_weight, grad_bias : ndarray or None
        (C,), written by `backward`.
    training : bool
        The mode; see `train` and `eval`.

    Notes
    -----
    Shapes: x and y (N, C, ...), or (N, ..., C) with ``layout="NHWC"``.

    Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import cpunorm, numpy as np
    >>> layer = cpunorm.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype(np.float32)
    >>> y = layer(x)
    >>> bool(np.allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-6))
    True
    >>> layer.backward(np.ones_like(y)).shape, layer.grad_bias.tolist()
    ((8, 3, 4, 4), [128.0, 128.0, 128.0])
    >>> layer.eval()
    BatchNorm(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = EPS,
        momentum: float | None = MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        convention: ConventionName = "torch",
        layout: Layout = "NCHW",
        activation: Activation | None = None,
        dtype: DTypeLike = np.float32,
        backend: str | None = None,
    ) -> None:
        _, self.momentum, eps = resolve_convention(convention, momentum, eps)
        self.num_features = num_features
        self.convention = convention
        self.track_running_stats = track_running_stats
        super().__init__(
            ("num_features", num_features), eps, affine, bias, track_running_stats,
            layout, activation, dtype, backend,
        )  # fmt: skip

    def _forward(self, x: Array, mask: Readable | None = None, **options: Any) -> Any:
        count = self.num_batches_tracked
        counted = None
        if self.training and x.size:
            # Where no position counts, or one, the statistics stay as they are.
            moved = mask is None or np.count_nonzero(array("mask", mask)) > 1
            counted = count if moved else None
        if counted is not None and not counted.flags.writeable:
            raise ValueError("num_batches_tracked must be writeable, got a read-only array")
        momentum = self.momentum
        if momentum is None:
            weight_of_new = 0.0 if count is None else 1.0 / (int(count) + 1)
            momentum = CONVENTIONS[self.convention].weight_of_new(weight_of_new)
        result = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or self.running_mean is None, momentum, self.eps,
            convention=self.convention, layout=self.layout, activation=self.activation,
            mask=mask, backend=self.backend, **options,
        )  # fmt: skip
        if counted is not None:
            counted += 1
        return result

    def _gradients(self, grad_y: Readable, x: Array, stats: Stats, **options: Any) -> Gradients:
        return functional.batch_norm_backward(
            grad_y, x, stats, self.weight, layout=self.layout, backend=self.backend, **options
        )


class InstanceNorm(_ChannelNorm):
    """Instance normalization: one mean and variance per image and channel.

    ::

        y = activation(weight·(x - mean) / √(var + eps) + bias + residual)

    Mean and var (biased) are those of x over its spatial positions. With running statistics,
    training mode moves them towards the averages over the batch of mean and unbiased variance,
    ``running = (1 - momentum)·running + momentum·new``, and evaluation mode uses them instead of
    x's own.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float
        The weight of the new value in the running statistics.
    affine : bool
        Whether there are `weight` and `bias`.
    track_running_stats : bool
        Whether there are running statistics.
    bias : bool
        Whether there is `bias` where `affine` holds.
    convention : {"torch", "keras", "onnx"}
        Which momentum and eps are the defaults, whether momentum is the weight of the old value
        instead, and which variance is kept; see `batch_norm`.
    layout : {"NCHW", "NHWC"}
        Where the channels are: axis 1, or the last one.
    activation : {None, "relu", "silu", "gelu", "sigmoid", "tanh"}
        Applied last, in the same pass over memory. There is no `backward` with one.
    dtype : dtype_like
        Of parameters and running statistics, and so of x, which beside float32 may have 16 bits.
    backend : {None, "auto", "cython", "numba", "numpy"}
        None is the current default.

    Attributes
    ----------
    weight, bias : ndarray or None
        (C,), ones and zeros at first.
    running_mean, running_var : ndarray or None
        (C,), zeros and ones at first.
    num_batches_tracked : ndarray or None
        A 0-d int64 array, there for torch's checkpoints; as in torch, instance norm does not count.
    grad_weight, grad_bias : ndarray or None
        (C,), written by `backward`.
    training : bool
        The mode; see `train` and `eval`.

    Notes
    -----
    Shapes: x and y (N, C, ...), or (N, ..., C) with ``layout="NHWC"``.

    Ulyanov, Vedaldi & Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import cpunorm, numpy as np
    >>> layer = cpunorm.InstanceNorm(3, layout="NHWC")
    >>> x = np.random.default_rng(0).normal(5, 2, (2, 8, 8, 3)).astype(np.float32)
    >>> bool(np.allclose(layer(x).std(axis=(1, 2)), 1, atol=1e-4))
    True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = EPS,
        momentum: float = MOMENTUM,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        convention: ConventionName = "torch",
        layout: Layout = "NCHW",
        activation: Activation | None = None,
        dtype: DTypeLike = np.float32,
        backend: str | None = None,
    ) -> None:
        _, self.momentum, eps = resolve_convention(convention, momentum, eps)
        self.num_features = num_features
        self.convention = convention
        self.track_running_stats = track_running_stats
        super().__init__(
            ("num_features", num_features), eps, affine, bias, track_running_stats,
            layout, activation, dtype, backend,
        )  # fmt: skip

    def _forward(self, x: Array, **options: Any) -> Any:
        return functional.instance_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or self.running_mean is None, self.momentum, self.eps,
            convention=self.convention, layout=self.layout, activation=self.activation,
            backend=self.backend, **options,
        )  # fmt: skip

    def _gradients(self, grad_y: Readable, x: Array, stats: Stats, **options: Any) -> Gradients:
        return functional.instance_norm_backward(
            grad_y, x, stats, self.weight, layout=self.layout, backend=self.backend, **options
        )


class GroupNorm(_ChannelNorm):
    """Group normalization: one mean and variance per image and group of channels.

    ::

        y = activation(weight·(x - mean) / √(var + eps) + bias + residual)

    Mean and var (biased) are those of x over the C / G channels of a group and all spatial
    positions; weight and bias are per channel. The mode makes no difference to y.

    Parameters
    ----------
    num_groups : int
        G; it must divide C.
    num_channels : int
        C, the number of channels.
    eps : float
        Added to the variance.
    affine : bool
        Whether there are `weight` and `bias`.
    bias : bool
        Whether there is `bias` where `affine` holds.
    layout : {"NCHW", "NHWC"}
        Where the channels are: axis 1, or the last one.
    activation : {None, "relu", "silu", "gelu", "sigmoid", "tanh"}
        Applied last, in the same pass over memory. There is no `backward` with one.
    dtype : dtype_like
        Of the parameters, and so of x, which beside float32 may have 16 bits.
    backend : {None, "auto", "cython", "numba", "numpy"}
        None is the current default.

    Attributes
    ----------
    weight, bias : ndarray or None
        (C,), ones and zeros at first.
    grad_weight, grad_bias : ndarray or None
        (C,), written by `backward`.
    training : bool
        The mode; see `train` and `eval`.

    Notes
    -----
    Shapes: x and y (N, C, ...), or (N, ..., C) with ``layout="NHWC"``.

    Wu & He, "Group Normalization", 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import cpunorm, numpy as np
    >>> x = np.random.default_rng(0).normal(5, 2, (2, 6, 4, 4)).astype(np.float32)
    >>> y = cpunorm.GroupNorm(6, 6)(x)
    >>> bool(np.allclose(y, cpunorm.InstanceNorm(6)(x), atol=1e-6))
    True
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        layout: Layout = "NCHW",
        activation: Activation | None = None,
        dtype: DTypeLike = np.float32,
        backend: str | None = None,
    ) -> None:
        self.num_groups = num_groups
        self.num_channels = num_channels
        super().__init__(
            ("num_channels", num_channels), eps, affine, bias, False,
            layout, activation, dtype, backend,
        )  # fmt: skip

    def _forward(self, x: Array, **options: Any) -> Any:
        return functional.group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps,
            layout=self.layout, activation=self.activation, backend=self.backend, **options,
        )  # fmt: skip

    def _gradients(self, grad_y: Readable, x: Array, stats: Stats, **options: Any) -> Gradients:
        return functional.group_norm_backward(
            grad_y, x, self.num_groups, stats, self.weight,
            layout=self.layout, backend=self.backend, **options,
        )  # fmt: skip


class _AxisNorm(_Layer):
    """Layer and RMS norm: parameters along the normalised axes."""

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float | None,
        elementwise_affine: bool,
        bias: bool,
        axis: Shape | None,
        dtype: DTypeLike,
        backend: str | None,
    ) -> None:
        self.normalized_shape = integers("normalized_shape", normalized_shape)
        self.elementwise_affine = affine = flag("elementwise_affine", elementwise_affine)
        bias = affine and flag("bias", bias)
        super().__init__(self.normalized_shape, affine, bias, dtype, backend)
        self.eps = eps
        # An empty batch changes nothing and has the arguments checked where all checks live;
        # `axis` waits for the rank of the first x.
        self.axis: Shape | None = None
        self._forward(np.empty((0, *self.normalized_shape), self.dtype))
        self.axis = axis

    def __call__(
        self, x: Readable, out: Array | None = None, *, mask: Readable | None = None
    ) -> Array:
        """Normalise x.

        Parameters
        ----------
        x : ndarray
            ``(..., *normalized_shape)``, or with `axis` any array with these sizes on these axes;
            the layer's dtype, or one of 16 bits beside float32.
        out : ndarray, optional
            Where to write the result; x's shape and dtype, and may be x (then `backward` is not
            possible).
        mask : ndarray of bool, optional
            Which positions count, of x's shape without the last of the normalised axes. The others
            take no part in anything, and come out zero.

        Returns
        -------
        ndarray
            `out`, or a new array of x's shape and dtype.
        """
        return self._run(x, out, mask)


class LayerNorm(_AxisNorm):
    """Layer normalization: one mean and variance for everything but the normalised axes.

    ::

        y = weight·(x - mean) / √(var + eps) + bias

    Mean and var (biased) are those of x over the normalised axes: the trailing ones, or with
    `axis` any others, in place. The mode makes no difference to y.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the normalised axes.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether there are `weight` and `bias`.
    bias : bool
        Whether there is `bias` where `elementwise_affine` holds.
    axis : int or sequence of int, optional
        The normalised axes, one per entry of `normalized_shape`; None is the trailing ones.
        ``LayerNorm(C, axis=1)`` normalises the channels of every pixel of an NCHW array.
    dtype : dtype_like
        Of the parameters, and so of x, which beside float32 may have 16 bits.
    backend : {None, "auto", "cython", "numba", "numpy"}
        None is the current default.

    Attributes
    ----------
    weight, bias : ndarray or None
        Of shape `normalized_shape`, ones and zeros at first.
    grad_weight, grad_bias : ndarray or None
        Of shape `normalized_shape`, written by `backward`.
    training : bool
        The mode; see `train` and `eval`.

    Notes
    -----
    Shapes: x and y ``(..., *normalized_shape)``, or with `axis` any.

    Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import cpunorm, numpy as np
    >>> layer = cpunorm.LayerNorm(4, axis=1)
    >>> y = layer(np.arange(24, dtype=np.float32).reshape(2, 4, 3))
    >>> y[0, :, 0].round(2)
    array([-1.34, -0.45,  0.45,  1.34], dtype=float32)
    """

    eps: float

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        axis: Shape | None = None,
        dtype: DTypeLike = np.float32,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, axis, dtype, backend)

    def _forward(self, x: Array, **options: Any) -> Any:
        return functional.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps,
            axis=self.axis, backend=self.backend, **options,
        )  # fmt: skip

    def _gradients(self, grad_y: Readable, x: Array, stats: Stats, **options: Any) -> Gradients:
        return functional.layer_norm_backward(
            grad_y, x, self.normalized_shape, stats, self.weight,
            axis=self.axis, backend=self.backend, **options,
        )  # fmt: skip


class RMSNorm(_AxisNorm):
    """RMS normalization: layer norm without a mean and without a bias.

    ::

        y = weight·x / √(mean(x²) + eps)

    with the mean over the normalised axes: the trailing ones, or with `axis` any others, in place.
    The mode makes no difference to y.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the normalised axes.
    eps : float, optional
        Added to the mean square; None is the machine epsilon of the dtype sums are kept in.
    elementwise_affine : bool
        Whether there is `weight`.
    axis : int or sequence of int, optional
        The normalised axes, one per entry of `normalized_shape`; None is the trailing ones.
    dtype : dtype_like
        Of the weight, and so of x, which beside float32 may have 16 bits.
    backend : {None, "auto", "cython", "numba", "numpy"}
        None is the current default.

    Attributes
    ----------
    weight : ndarray or None
        Of shape `normalized_shape`, ones at first.
    bias : None
        RMS norm has none.
    grad_weight : ndarray or None
        Of shape `normalized_shape`, written by `backward`.
    training : bool
        The mode; see `train` and `eval`.

    Notes
    -----
    Shapes: x and y ``(..., *normalized_shape)``, or with `axis` any.

    Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import cpunorm, numpy as np
    >>> cpunorm.RMSNorm(2)(np.array([[3.0, 4.0]], np.float32)).round(4)
    array([[0.8485, 1.1314]], dtype=float32)
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        axis: Shape | None = None,
        dtype: DTypeLike = np.float32,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, False, axis, dtype, backend)

    def _forward(self, x: Array, **options: Any) -> Any:
        return functional.rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            axis=self.axis, backend=self.backend, **options,
        )  # fmt: skip

    def _gradients(self, grad_y: Readable, x: Array, stats: Stats, **options: Any) -> Gradients:
        return functional.rms_norm_backward(
            grad_y, x, self.normalized_shape, stats, self.weight,
            axis=self.axis, backend=self.backend, **options,
        )  # fmt: skip
