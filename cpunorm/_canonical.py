"""From a call to a canonical problem: every check, every error text, and where arrays lie.

An operation of the API arrives here with the caller's arguments. They are checked, all of them,
before anything is written; x is viewed as one of the four canonical problems described in
`backends/__init__.py`; a kernel of the chosen backend runs; and the result is handed back in the
caller's shape and strides.
"""

import math
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _dispatch, _masked
from ._frame import Array as Array
from ._frame import Frame, axis_frame, channel_frame, ordered_frame
from .backends import ACTIVATIONS

# The types of arguments, as the public signatures name them.
Layout = Literal["NCHW", "NHWC", "channels_first", "channels_last"]
Activation = Literal["relu", "silu", "gelu", "sigmoid", "tanh"]
ConventionName = Literal["torch", "keras", "onnx"]
Shape = int | Sequence[int]
Need = tuple[bool, bool, bool]

# x's dtype -> the dtype of statistics and, inside the kernels, of every sum's result.
STATS_DTYPE: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(np.float64): np.dtype(np.float64),
}
DTYPE_NAMES = "float16, bfloat16, float32 or float64"

# What momentum and eps are by default, in torch. Other conventions have others: these very objects
# tell that nothing was given.
MOMENTUM, EPS = 0.1, 1e-5


class Convention(NamedTuple):
    """How a library keeps running statistics."""

    momentum: float  # by default
    eps: float  # by default
    of_old: bool  # whether momentum is the weight of the old value, or of the new one
    unbiased: bool  # which variance is kept

    def weight_of_new(self, momentum: float) -> float:
        """Return the weight of the new value; the same turns that into a momentum."""
        return 1 - momentum if self.of_old else momentum


CONVENTIONS = {
    "torch": Convention(MOMENTUM, EPS, of_old=False, unbiased=True),
    "keras": Convention(0.99, 1e-3, of_old=True, unbiased=False),
    "onnx": Convention(0.9, 1e-5, of_old=True, unbiased=False),
}

# Beyond so many deviations from zero float32 rounds a mean too coarsely to merge variances by.
FAR = 8.0

CHANNELS_LAST = {"NCHW": False, "channels_first": False, "NHWC": True, "channels_last": True}


class Stats(NamedTuple):
    """What the backward pass needs of the forward pass.

    Parameters
    ----------
    mean : ndarray or None
        The mean of every normalised unit; None for RMS norm.
    rstd : ndarray
        One over the square root of its variance (mean square in RMS norm) plus eps.
    """

    mean: Array | None
    rstd: Array


class Gradients(NamedTuple):
    """What a backward pass returns.

    Parameters
    ----------
    x : ndarray or None
        The gradient with respect to x; None where it was not asked for.
    weight, bias : ndarray or None
        The same for the parameters.
    """

    x: Array | None
    weight: Array | None
    bias: Array | None


# --------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------


def _listed(options: Sequence[object]) -> str:
    return ", ".join(map(repr, options))


def _is_plain(a: Any) -> bool:
    # A subclass may redefine arithmetic (masked arrays) or shape (matrix): taking only its data
    # would silently drop what it means. A memmap is plain memory.
    return type(a) is np.ndarray or isinstance(a, np.memmap)


def array(name: str, a: Any) -> Array:
    """Check an array, of NumPy or of whoever lets its memory be read; return one of NumPy."""
    if _is_plain(a):
        return np.asarray(a)
    reason = ""
    if not isinstance(a, (np.ndarray, np.generic)):
        from . import _interchange  # takes a moment to import, and few need it

        if _interchange.is_foreign(a):
            try:
                return _interchange.read(a)
            # Whatever the other library raises: that it does not give its memory is our error.
            except Exception as error:
                reason = f": {error}"
    raise TypeError(
        f"{name} must be a numpy.ndarray, or an array whose memory can be read by DLPack or "
        f"__array_interface__, got {_kind(a)}{reason}"
    )


def _kind(a: Any) -> str:
    return f"{type(a).__module__}.{type(a).__qualname__}"


def is_supported(dtype: np.dtype[Any]) -> bool:
    """Whether x may have this dtype."""
    # bfloat16 is a dtype of ml_dtypes: it is known by its name, to import nothing, and enters the
    # table when it is first met.
    if dtype not in STATS_DTYPE and dtype.name == "bfloat16" and dtype.isnative:
        STATS_DTYPE[dtype] = np.dtype(np.float32)
    return dtype in STATS_DTYPE


def _input(a: Any) -> Array:
    x = array("x", a)
    if not is_supported(x.dtype):
        raise TypeError(f"x must have dtype {DTYPE_NAMES}, got {x.dtype}")
    return x


def _like(name: str, given: Any, x: Array) -> Array:
    """Check an array that must have the shape and dtype of x."""
    a = array(name, given)
    if a.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {a.dtype}")
    if a.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {x.shape}, got {a.shape}")
    return a


def _sized(
    name: str, given: Any, shape: tuple[int, ...], dtypes: Sequence[np.dtype[Any]], of: str
) -> Array:
    """Check a parameter or statistic; `of` says in the error where the shape comes from."""
    a = array(name, given)
    if a.dtype not in dtypes:
        allowed = " or ".join(map(str, dtypes))
        raise TypeError(f"{name} must have dtype {allowed}, got {a.dtype}")
    if a.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, {of}, got {a.shape}")
    return a


def _plain(a: Array | None, dtype: np.dtype[Any]) -> Array | None:
    """Return a parameter or statistic as kernels take it: contiguous, aligned, of `dtype`."""
    if a is None:
        return None
    if a.dtype != dtype:
        # NaN passes without a warning, and so does what overflows float16.
        with np.errstate(all="ignore"):
            return a.astype(dtype, order="C")
    a = np.ascontiguousarray(a)
    return a if a.flags.aligned else a.copy()


def _beside(x: Array) -> Sequence[np.dtype[Any]]:
    """The dtypes of parameters and running statistics: x's, or that of its statistics."""
    acc = STATS_DTYPE[x.dtype]
    return (acc,) if x.dtype == acc else (x.dtype, acc)


def _parameter(name: str, given: Any, shape: tuple[int, ...], x: Array, of: str) -> Array | None:
    return None if given is None else _sized(name, given, shape, _beside(x), of)


def number(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if isinstance(value, np.complexfloating):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float64, got an integer beyond it") from None


def _eps(value: Any, *, positive: bool = False) -> float:
    eps = number("eps", value)
    if not (0 < eps < math.inf if positive else 0 <= eps < math.inf):
        bound = "> 0 when the batch is normalised by its own statistics" if positive else ">= 0"
        raise ValueError(f"eps must be finite and {bound}, got {value!r}")
    return eps


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def integer(name: str, value: Any) -> int:
    """Check an int; arrays and bools are none, although Python would take them for one."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def integers(name: str, value: Any) -> tuple[int, ...]:
    """Check an int or a sequence of ints."""
    try:
        values = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
        return tuple(integer(name, v) for v in values)
    except TypeError:
        short = reprlib.repr(value)  # of an array, say, that took the wrong place
        raise TypeError(f"{name} must be an int or a sequence of ints, got {short}") from None


def resolve_convention(convention: Any, momentum: Any, eps: Any) -> tuple[Convention, Any, Any]:
    """Check a convention's name; return what it says, and momentum and eps, its own by default."""
    if not isinstance(convention, str):
        raise TypeError(f"convention must be a string, got {type(convention).__name__}")
    if convention not in CONVENTIONS:
        known = _listed(list(CONVENTIONS))
        raise ValueError(f"convention must be one of {known}, got {convention!r}")
    found = CONVENTIONS[convention]
    momentum = found.momentum if momentum is MOMENTUM else momentum
    return found, momentum, found.eps if eps is EPS else eps


def _mask(given: Any, x: Array, channel_axis: int) -> Array | None:
    """Check a mask; one that leaves nothing out is as good as none."""
    if given is None:
        return None
    mask = array("mask", given)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must have dtype bool, True where x counts, got {mask.dtype}")
    shape = x.shape[:channel_axis] + x.shape[channel_axis + 1 :]
    if mask.shape != shape:
        raise ValueError(
            f"mask must have shape {shape}, x's without its channel axis {channel_axis}, "
            f"got {mask.shape}"
        )
    return None if mask.all() else mask


def _need(need: Any) -> tuple[bool, bool, bool]:
    if not isinstance(need, (tuple, list)):
        raise TypeError(f"need must be a sequence of three bools, got {type(need).__name__}")
    if len(need) != 3:
        raise ValueError(f"need must hold three bools (x, weight, bias), got {len(need)} values")
    x, weight, bias = (flag(f"need[{i}]", v) for i, v in enumerate(need))
    return x, weight, bias


def _activation(activation: Any, return_stats: bool) -> int:
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"activation must be a string or None, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {_listed(ACTIVATIONS)}, got {activation!r}")
    if activation is not None and return_stats:
        raise ValueError(
            "return_stats must be False with an activation: backward differentiates the "
            f"normalization alone, and activation is {activation!r}"
        )
    return ACTIVATIONS.index(activation)


def _out(
    name: str, out: Any, x: Array, same_as: dict[str, Array], others: dict[str, Array | None]
) -> Array:
    """Check an output: it may be one of `same_as` itself, and shares no memory otherwise."""
    if not _is_plain(out):
        raise TypeError(f"{name} must be a numpy.ndarray, got {_kind(out)}")
    checked = _like(name, out, x)
    if not checked.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")
    if checked.size and _overlaps_itself(checked):
        raise ValueError(f"{name} must not overlap itself, got strides {checked.strides}")
    for other, a in (same_as | others).items():
        if a is None or (other in same_as and memory_of(a) == memory_of(checked)):
            continue
        if np.shares_memory(checked, a):
            allowed = " or ".join(f"{s} itself" for s in same_as)
            raise ValueError(
                f"{name} must not overlap {other} (it may be {allowed}), got a view of its memory"
            )
    return checked


def _overlaps_itself(a: Array) -> bool:
    """Whether some element may lie inside another axis's step, as in broadcast arrays."""
    reach = a.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(a.strides, a.shape, strict=True)):
        if n > 1:
            if stride < reach:
                return True
            reach += stride * (n - 1)
    return False


def memory_of(a: Array) -> tuple[int, tuple[int, ...]]:
    # The strides of axes of length 1 mean nothing.
    strides = tuple(s for s, n in zip(a.strides, a.shape, strict=True) if n != 1)
    return a.__array_interface__["data"][0], strides


def _stats(
    stats: Any, centred: bool, shape: tuple[int, ...], dtype: np.dtype[Any], of: str
) -> Stats:
    if not isinstance(stats, tuple) or len(stats) != 2:
        raise TypeError(
            f"stats must be the Stats(mean, rstd) of the forward pass, got {type(stats).__name__}"
        )
    mean, rstd = stats
    if centred:
        mean = _sized("stats.mean", mean, shape, (dtype,), of)
    elif mean is not None:
        raise ValueError(f"stats.mean must be None in RMS norm, got {type(mean).__name__}")
    return Stats(mean, _sized("stats.rstd", rstd, shape, (dtype,), of))


def _solver(positions: _masked.Positions | None) -> Callable[..., None]:
    """Return what runs a kernel on all of x, or on the positions that count."""
    return _dispatch.solve if positions is None else partial(_masked.solve, positions)


# --------------------------------------------------------------------------------------------
# Normalization over axes: layer norm and RMS norm
# --------------------------------------------------------------------------------------------


def _normalized_axes(
    x: Array, normalized_shape: Any, axis: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check normalized_shape and axis against x; return both as tuples, axes not negative."""
    shape = integers("normalized_shape", normalized_shape)
    if not shape:
        raise ValueError("normalized_shape must name at least one axis, got an empty sequence")
    if axis is None:
        if len(shape) > x.ndim:
            raise ValueError(f"normalized_shape must have at most x's {x.ndim} axes, got {shape}")
        axes = tuple(range(x.ndim - len(shape), x.ndim))
    else:
        given = integers("axis", axis)
        if len(given) != len(shape):
            raise ValueError(
                f"axis must name one axis per entry of normalized_shape {shape}, got {axis!r}"
            )
        if any(not -x.ndim <= a < x.ndim for a in given):
            raise ValueError(
                f"axis must lie in [{-x.ndim}, {x.ndim}) for x of shape {x.shape}, got {axis!r}"
            )
        axes = tuple(a % x.ndim for a in given)
        if len(set(axes)) != len(axes):
            raise ValueError(f"axis must name different axes, got {axis!r}")
    if shape != tuple(x.shape[a] for a in axes):
        where = "trailing axes" if axis is None else f"axes {axes}"
        raise ValueError(
            f"normalized_shape must match the {where} of x of shape {x.shape}, got {shape}"
        )
    return shape, axes


def _axis_problem(
    x: Array, axes: tuple[int, ...], mask: Array | None
) -> tuple[Frame, _masked.Positions | None]:
    """Return how x is read, and which of its positions count if not all of them do."""
    if mask is None:
        return axis_frame(x, axes), None
    if len(axes) > 1:
        frame = ordered_frame(x, axes)
        lain = frame.lay_mask(mask, axes[-1]).reshape(frame.shape[0], 1, -1)
        return frame, _masked.Positions(lain, channels_last=True, own_parameters=True)
    frame = axis_frame(x, axes)
    rows = frame.problem == "rows"
    lain = frame.lay_mask(mask, axes[-1])
    lain = lain.reshape((1, 1, -1) if rows else (1, *frame.shape[::2]))
    return frame, _masked.Positions(lain, channels_last=rows, own_statistics=True)


def _axis_parameter(
    frame: Frame, axes: tuple[int, ...], a: Array | None, dtype: np.dtype[Any]
) -> Array | None:
    """Flatten a parameter, whose axes follow `axes`, to (D,) in memory order."""
    if a is not None and frame.axes != axes:
        a = a.transpose([axes.index(i) for i in frame.axes])
    a = _plain(a, dtype)
    return None if a is None else a.reshape(-1)


def _axis_gradient(
    frame: Frame, axes: tuple[int, ...], shape: tuple[int, ...], a: Array | None, dtype: Any
) -> Array | None:
    """Undo `_axis_parameter` on the gradient of a parameter."""
    if a is None:
        return None
    lain = a.reshape([shape[axes.index(i)] for i in frame.axes])
    return _plain(lain.transpose([frame.axes.index(i) for i in axes]), dtype)


def axis_norm(
    x: Any,
    residual: Any,
    normalized_shape: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    *,
    axis: Any,
    center: bool,
    add: bool,
    mask: Any = None,
    out: Any,
    sum_out: Any = None,
    return_stats: Any,
    backend: str | None,
) -> Any:
    """Layer norm (`center`) or RMS norm, of x or with `add` of x + residual."""
    x = _input(x)
    acc = STATS_DTYPE[x.dtype]
    shape, axes = _normalized_axes(x, normalized_shape, axis)
    weight = _parameter("weight", weight, shape, x, "as normalized_shape")
    bias = _parameter("bias", bias, shape, x, "as normalized_shape")
    eps = float(np.finfo(acc).eps) if eps is None and not center else _eps(eps)
    return_stats = flag("return_stats", return_stats)
    summands = {"x": x}
    if add:
        summands["residual"] = residual = _like("residual", residual, x)
    mask = _mask(mask, x, axes[-1])
    parameters = {"weight": weight, "bias": bias, "mask": mask}
    total: Array | None = None
    if out is not None:
        y = _out("out", out, x, summands, parameters)
    if sum_out is not None:
        total = _out("sum_out", sum_out, x, summands, parameters)
        if out is not None and np.shares_memory(y, total):
            raise ValueError("sum_out must not overlap out, got a view of its memory")
    backend = _dispatch.resolve(backend)

    frame, positions = _axis_problem(x, axes, mask)
    solve = _solver(positions)
    if out is None:
        out = y = frame.new(x)
    if sum_out is None and add:
        sum_out = total = frame.new(x)
    new_statistic = np.empty if x.size and mask is None else np.zeros
    rstd = new_statistic(frame.kept_shape, acc)
    mean = new_statistic(frame.kept_shape, acc) if center else None
    if x.size:
        flat = frame.shape[:1] if frame.problem == "rows" else frame.shape[::2]
        y_placed, total_placed = frame.place(y), frame.place(total)
        solve(
            frame.problem,
            "normalize",
            backend,
            x.nbytes,
            frame.lay(x),
            frame.lay(residual) if add else None,
            _axis_parameter(frame, axes, weight, acc),
            _axis_parameter(frame, axes, bias, acc),
            eps,
            y_placed,
            total_placed,
            None if mean is None else mean.reshape(flat),
            rstd.reshape(flat),
        )
        frame.deliver(y_placed, y)
        frame.deliver(total_placed, total)
    result = (out, sum_out) if add else (out,)
    if return_stats:
        mean = None if mean is None else frame.unlay_statistic(mean)
        return (*result, Stats(mean, frame.unlay_statistic(rstd)))
    return result if add else out


def axis_norm_backward(
    grad_y: Any,
    x: Any,
    normalized_shape: Any,
    stats: Any,
    weight: Any,
    *,
    axis: Any,
    center: bool,
    grad_sum: Any,
    mask: Any = None,
    need: Any,
    backend: str | None,
) -> Gradients:
    """The gradients of `axis_norm`; with add, x is the sum and `grad_sum` its other gradient."""
    x = _input(x)
    acc = STATS_DTYPE[x.dtype]
    grad_y = _like("grad_y", grad_y, x)
    shape, axes = _normalized_axes(x, normalized_shape, axis)
    kept_shape = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    stats = _stats(stats, center, kept_shape, acc, "x's without the normalised axes")
    weight = _parameter("weight", weight, shape, x, "as normalized_shape")
    grad_sum = None if grad_sum is None else _like("grad_sum", grad_sum, x)
    mask = _mask(mask, x, axes[-1])
    need_x, need_weight, need_bias = _need(need)
    backend = _dispatch.resolve(backend)

    frame, positions = _axis_problem(x, axes, mask)
    solve = _solver(positions)
    grad_x = frame.new(x) if need_x else None
    size = math.prod(shape)
    grad_weight = np.zeros(size, acc) if need_weight else None
    grad_bias = np.zeros(size, acc) if need_bias and center else None
    if x.size:
        placed = frame.place(grad_x)
        solve(
            frame.problem,
            "backward",
            backend,
            x.nbytes,
            frame.lay(grad_y),
            frame.lay(x),
            frame.lay_statistic(stats.mean),
            frame.lay_statistic(stats.rstd),
            _axis_parameter(frame, axes, weight, acc),
            frame.lay(grad_sum),
            placed,
            grad_weight,
            grad_bias,
        )
        frame.deliver(placed, grad_x)
    grad_dtype = acc if weight is None else weight.dtype
    return Gradients(
        grad_x,
        _axis_gradient(frame, axes, shape, grad_weight, grad_dtype),
        _axis_gradient(frame, axes, shape, grad_bias, grad_dtype),
    )


# --------------------------------------------------------------------------------------------
# Normalization over channels: batch, instance and group norm
# --------------------------------------------------------------------------------------------


class _Channels(NamedTuple):
    """x's channel axis, and the shape of its statistics in the kernels: (B, G)."""

    axis: int
    size: int
    stats: tuple[int, int]
    per_image: bool

    @property
    def public_stats(self) -> tuple[int, ...]:
        """The shape of the statistics as the caller has them."""
        return self.stats if self.per_image else self.stats[1:]


def _channels(op: str, x: Array, layout: Any, num_groups: Any, frozen: bool) -> _Channels:
    if not isinstance(layout, str):
        raise TypeError(f"layout must be a string, got {type(layout).__name__}")
    if layout not in CHANNELS_LAST:
        raise ValueError(f"layout must be one of {_listed(list(CHANNELS_LAST))}, got {layout!r}")
    # torch lets an empty 1-d array pass as a batch without channels; so do we.
    if (x.ndim < 2 and x.size > 0) or x.ndim == 0:
        raise ValueError(f"x must have at least 2 axes, (N, C, ...), got shape {x.shape}")
    axis = x.ndim - 1 if CHANNELS_LAST[layout] else min(1, x.ndim - 1)
    images, count = x.shape[0], x.shape[axis]
    if op == "group_norm":
        groups = integer("num_groups", num_groups)
        if groups < 1 or count % groups:
            raise ValueError(
                f"num_groups must be at least 1 and divide x's {count} channels, got {groups}"
            )
        return _Channels(axis, count, (images, groups), True)
    per_image = op == "instance_norm" and not frozen
    return _Channels(axis, count, (images if per_image else 1, count), per_image)


def _channel_problem(
    x: Array, channels: _Channels, mask: Array | None
) -> tuple[Frame, _masked.Positions | None]:
    """Return how x is read, and which of its positions count if not all of them do."""
    frame = channel_frame(x, channels.axis, channels.per_image)
    if mask is None:
        return frame, None
    last = frame.problem == "channels_last"
    images = frame.shape[0] if channels.per_image or last else 1
    shape = (images, 1, -1) if last else (images, frame.shape[0] // images, -1)
    lain = frame.lay_mask(mask, channels.axis).reshape(shape)
    return frame, _masked.Positions(lain, channels_last=last)


def _running_statistics(
    running: tuple[Any, Any], channels: _Channels, x: Array, frozen: bool
) -> dict[str, Any]:
    names = ("running_mean", "running_var")
    given = [name for name, a in zip(names, running, strict=True) if a is not None]
    if len(given) == 1:
        missing = names[1 - names.index(given[0])]
        raise ValueError(f"{missing} must be given with {given[0]}, got None")
    if given:
        return {
            name: _sized(name, a, (channels.size,), _beside(x), "one per channel")
            for name, a in zip(names, running, strict=True)
        }
    if frozen:
        raise ValueError(
            "running_mean and running_var must be given where x's own statistics are not "
            "used, got None"
        )
    return {}


def _updatable(statistics: dict[str, Any], inputs: dict[str, Array | None]) -> None:
    """Check that running statistics can be written without touching anything else."""
    for name, a in statistics.items():
        if not a.flags.writeable:
            raise ValueError(f"{name} must be writeable where it is updated, got a read-only array")
        if a.size and _overlaps_itself(a):
            raise ValueError(f"{name} must not overlap itself, got strides {a.strides}")
        for other, b in (inputs | statistics).items():
            if other != name and b is not None and np.shares_memory(a, b):
                raise ValueError(f"{name} must not overlap {other}, got a view of its memory")


def channel_norm(
    op: str,
    x: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    *,
    num_groups: Any = None,
    running: tuple[Any, Any] = (None, None),
    frozen: bool = False,
    momentum: Any = 0.0,
    convention: Any = "torch",
    layout: Any,
    activation: Any,
    residual: Any,
    mask: Any,
    out: Any,
    return_stats: Any,
    backend: str | None,
) -> Any:
    """Batch, instance or group norm; `frozen` takes the running statistics and leaves them be."""
    x = _input(x)
    acc = STATS_DTYPE[x.dtype]
    channels = _channels(op, x, layout, num_groups, frozen)
    weight = _parameter("weight", weight, (channels.size,), x, "one per channel")
    bias = _parameter("bias", bias, (channels.size,), x, "one per channel")
    statistics = _running_statistics(running, channels, x, frozen)
    kept, momentum, eps = resolve_convention(convention, momentum, eps)
    eps = _eps(eps, positive=op == "batch_norm" and not frozen)
    momentum = number("momentum", momentum)
    return_stats = flag("return_stats", return_stats)
    activation = _activation(activation, return_stats)
    summands = {"x": x}
    if residual is not None:
        summands["residual"] = residual = _like("residual", residual, x)
    mask = _mask(mask, x, channels.axis)
    parameters = {"weight": weight, "bias": bias, "mask": mask}
    if not frozen:
        _updatable(statistics, {**summands, **parameters})
    if out is not None:
        y = _out("out", out, x, summands, parameters | statistics)
    per_statistic = x.size // max(1, math.prod(channels.stats))
    if op != "group_norm" and not frozen and per_statistic == 1:
        unit = "channel" if op == "batch_norm" else "channel of an image"
        raise ValueError(
            f"x must hold more than one value per {unit} to have a variance, got shape {x.shape}"
        )
    backend = _dispatch.resolve(backend)

    frame, positions = _channel_problem(x, channels, mask)
    solve = _solver(positions)
    if out is None:
        out = y = frame.new(x)
    if frozen:
        with np.errstate(all="ignore"):
            mean = statistics["running_mean"].astype(acc).reshape(channels.stats)
            # In the dtype that is wanted, as compiled kernels do, where it holds eps.
            kind = acc if eps == 0 or eps >= np.finfo(np.float32).tiny else np.dtype(np.float64)
            rstd = 1 / np.sqrt(statistics["running_var"].astype(kind) + kind.type(eps))
            rstd = rstd.astype(acc).reshape(channels.stats)
    else:
        new_statistics = np.empty if x.size and mask is None else np.zeros
        mean, var, rstd = new_statistics((3, *channels.stats), acc)
    if x.size:
        placed = frame.place(y)
        inputs = (
            frame.lay(x),
            frame.lay(residual),
            _plain(weight, acc),
            _plain(bias, acc),
        )
        if frozen:
            call = frame.problem, "apply", backend, x.nbytes
            solve(*call, *inputs, activation, placed, mean, rstd)
        else:
            call = frame.problem, "normalize", backend, x.nbytes
            solve(*call, *inputs, eps, activation, placed, mean, var, rstd)
            if statistics:
                counts = [per_statistic] if positions is None else positions.counts()
                weight_of_new = kept.weight_of_new(momentum)
                _update_running_statistics(
                    statistics, mean, var, counts, weight_of_new, kept.unbiased
                )
        frame.deliver(placed, y)
    if return_stats:
        shape = channels.public_stats
        return out, Stats(mean.reshape(shape), rstd.reshape(shape))
    return out


def channel_moments(
    x: Any, num_features: int, *, layout: Any, mask: Any, backend: str | None
) -> tuple[Array, Array, int, np.dtype[Any]]:
    """Mean and biased variance of every channel of x in float64, of how many values each, and the
    dtype that statistics of x have."""
    x = _input(x)
    acc = STATS_DTYPE[x.dtype]
    channels = _channels("batch_norm", x, layout, None, False)
    if channels.size != num_features:
        raise ValueError(
            f"x must have {num_features} channels on axis {channels.axis}, got shape {x.shape}"
        )
    mask = _mask(mask, x, channels.axis)
    backend = _dispatch.resolve(backend)
    frame, positions = _channel_problem(x, channels, mask)
    solve = _solver(positions)
    mean, rest, var, rstd = np.zeros((4, *channels.stats), acc)
    if x.size:
        lain = frame.lay(x)
        solve(frame.problem, "moments", backend, x.nbytes, lain, mean, var)
        with np.errstate(all="ignore"):
            far = bool(np.any(np.square(mean) > FAR**2 * var))
        if far and x.dtype == np.float32:
            centred = np.empty_like(lain)
            inputs = lain, None, None, None, 0
            rstd.fill(1)
            solve(frame.problem, "apply", backend, x.nbytes, *inputs, centred, mean, rstd)
            solve(frame.problem, "moments", backend, x.nbytes, centred, rest, var)
    counts = [x.size // max(1, channels.size)] if positions is None else positions.counts()
    with np.errstate(all="ignore"):
        exact = np.add(mean[0], rest[0], dtype=np.float64)
    return exact, var[0].astype(np.float64), int(counts[0]), acc


def _update_running_statistics(
    statistics: dict[str, Array],
    mean: Array,
    var: Array,
    counts: Sequence[int] | Array,
    weight_of_new: float,
    unbiased: bool,
) -> None:
    """Move the running statistics towards the means, over the images, of mean and variance.

    What covers fewer than two values says nothing about a variance, and is left out.
    """
    count = np.asarray(counts, np.float64)  # one for all images, or one for each
    enough = count > 1
    if not enough.any():
        return
    factor = count[enough] / (count[enough] - 1) if unbiased else np.ones(1)
    if len(count) > 1:
        mean, var, factor = mean[enough], var[enough] * factor[:, None], np.ones(1)
    with np.errstate(all="ignore"):
        new = {
            "running_mean": mean.mean(axis=0, dtype=np.float64),
            "running_var": var.mean(axis=0, dtype=np.float64) * factor,
        }
        for name, old in statistics.items():
            moved = (1 - weight_of_new) * old.astype(np.float64) + weight_of_new * new[name]
            # Halves are rounded from what float32 would have kept, as everything that is written.
            old[...] = moved.astype(mean.dtype)


def channel_norm_backward(
    op: str,
    grad_y: Any,
    x: Any,
    stats: Any,
    weight: Any,
    *,
    num_groups: Any = None,
    frozen: bool = False,
    layout: Any,
    mask: Any,
    need: Any,
    backend: str | None,
) -> Gradients:
    """The gradients of `channel_norm`, through the statistics or, `frozen`, past them."""
    x = _input(x)
    acc = STATS_DTYPE[x.dtype]
    grad_y = _like("grad_y", grad_y, x)
    channels = _channels(op, x, layout, num_groups, frozen)
    stats = _stats(stats, True, channels.public_stats, acc, "as the forward pass returns them")
    weight = _parameter("weight", weight, (channels.size,), x, "one per channel")
    mask = _mask(mask, x, channels.axis)
    need_x, need_weight, need_bias = _need(need)
    backend = _dispatch.resolve(backend)

    frame, positions = _channel_problem(x, channels, mask)
    solve = _solver(positions)
    grad_x = frame.new(x) if need_x else None
    grad_weight = np.zeros(channels.size, acc) if need_weight else None
    grad_bias = np.zeros(channels.size, acc) if need_bias else None
    if x.size:
        placed = frame.place(grad_x)
        solve(
            frame.problem,
            "backward_apply" if frozen else "backward",
            backend,
            x.nbytes,
            frame.lay(grad_y),
            frame.lay(x),
            _plain(stats.mean.reshape(channels.stats), acc),
            _plain(stats.rstd.reshape(channels.stats), acc),
            _plain(weight, acc),
            placed,
            grad_weight,
            grad_bias,
        )
        frame.deliver(placed, grad_x)
    grad_dtype = acc if weight is None else weight.dtype
    return Gradients(grad_x, _plain(grad_weight, grad_dtype), _plain(grad_bias, grad_dtype))
