"""The normalizations inside functions that Numba compiles.

What is called here, in nopython mode and without the GIL, are the library's compiled kernels: the
results are those of `cpunorm.layer_norm` and the others, bit by bit. Nothing is compiled but the
checks of the arguments, `cache=True` works in the caller, and on one thread, the default, so does
`prange`.

Arrays are C-contiguous, of float32 or float64, all of one type. `out` may be `x` itself, but not
overlap it otherwise. Statistics and gradients are written to the arrays that are given for them.
What cannot be told from types, a shape for instance, is a ValueError at run time, raised before
anything is written.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import binding
from numba import types
from numba.core.errors import TypingError
from numba.extending import get_cython_function_address, overload, register_jitable

_NAMES = {types.float32: "float32", types.float64: "float64"}
_POINTER, _SIZE, _REAL, _INT = types.uintp, types.intp, types.float64, types.int32


def _function(name: str, pointers: int, *others: Any) -> Any:
    """A function of the C API, to be called with x, which tells its type, and its arguments."""
    signature = _INT(*[_POINTER] * pointers, *others)
    external = {}
    for i, (kind, suffix) in enumerate(_NAMES.items()):
        # By a name, so that compiled code can be cached; addresses change with every process.
        symbol = f"cpunorm_{name}_{suffix}"
        address = get_cython_function_address("cpunorm._capi", f"__pyx_fuse_{i}{name}")
        binding.add_symbol(symbol, address)
        external[kind] = types.ExternalFunction(symbol, signature)

    def call(x, *arguments):
        raise NotImplementedError

    @overload(call)
    def call_in_nopython(x, *arguments):
        function = external[x.dtype]
        return lambda x, *arguments: function(*arguments)

    return call


_layer_norm = _function("layer_norm", 6, _SIZE, _SIZE, _REAL, _INT)
_rms_norm = _function("rms_norm", 4, _SIZE, _SIZE, _REAL, _INT)
_layer_norm_backward = _function("layer_norm_backward", 8, _SIZE, _SIZE, _INT)
_rms_norm_backward = _function("rms_norm_backward", 6, _SIZE, _SIZE, _INT)
_group_norm = _function("group_norm", 6, *[_SIZE] * 4, _REAL, _INT, _INT)
_group_norm_backward = _function("group_norm_backward", 8, *[_SIZE] * 4, _INT, _INT)
_batch_norm = _function("batch_norm", 8, *[_SIZE] * 3, _INT, _REAL, _REAL, _INT, _INT)
_batch_norm_backward = _function("batch_norm_backward", 8, *[_SIZE] * 3, _INT, _INT, _INT)


def _absent(a: Any) -> bool:
    return a is None or isinstance(a, (types.NoneType, types.Omitted))


def _argument(name: str, written: bool) -> Any:
    """What checks an argument, of x's type and of a shape, and gives its address; 0 of None."""

    def address(a, x, shape):
        raise NotImplementedError

    @overload(address)
    def address_in_nopython(a, x, shape):
        if _absent(a):
            return lambda a, x, shape: 0
        if not isinstance(a, types.Array) or x.dtype not in _NAMES or a.dtype != x.dtype:
            wanted = x.dtype if name != "x" and x.dtype in _NAMES else "float32 or float64"
            raise TypingError(f"{name} must be an array of {wanted}, got {a}")
        if a.layout != "C" or not a.aligned:
            raise TypingError(f"{name} must be C-contiguous (numpy.ascontiguousarray), got {a}")
        if written and not a.mutable:
            raise TypingError(f"{name} must be writeable, got {a}")
        message = f"{name} has the wrong shape"
        if a.ndim != len(shape):

            def of_no_shape(a, x, shape):
                if a.size >= 0:
                    raise ValueError(message)
                return a.ctypes.data

            return of_no_shape

        def of_this_shape(a, x, shape):
            if a.shape != shape:
                raise ValueError(message)
            return a.ctypes.data

        return of_this_shape

    return address


_from_x = _argument("x", written=False)
_from_weight = _argument("weight", written=False)
_from_bias = _argument("bias", written=False)
_from_grad_y = _argument("grad_y", written=False)
_from_mean = _argument("mean", written=False)
_from_rstd = _argument("rstd", written=False)
_into_out = _argument("out", written=True)
_into_mean = _argument("mean", written=True)
_into_rstd = _argument("rstd", written=True)
_into_grad_x = _argument("grad_x", written=True)
_into_grad_weight = _argument("grad_weight", written=True)
_into_grad_bias = _argument("grad_bias", written=True)
_from_running_mean = _argument("running_mean", written=False)
_from_running_var = _argument("running_var", written=False)


@register_jitable
def _overlap(a, b):
    distance = np.intp(a.ctypes.data) - np.intp(b.ctypes.data)
    return -a.nbytes < distance < b.nbytes


def _check_updatable(running_mean, running_var):
    """Raise unless both can be written, each where the other is not."""
    raise NotImplementedError


@overload(_check_updatable)
def _check_updatable_in_nopython(running_mean, running_var):
    statistics = {"running_mean": running_mean, "running_var": running_var}
    read_only = [n for n, a in statistics.items() if isinstance(a, types.Array) and not a.mutable]
    if read_only:
        message = f"{read_only[0]} must be writeable where it is updated"

        def of_read_only(running_mean, running_var):
            raise ValueError(message)

        return of_read_only
    if _absent(running_mean) or _absent(running_var):
        return lambda running_mean, running_var: None

    def of_writeable(running_mean, running_var):
        if _overlap(running_mean, running_var):
            raise ValueError("running_mean must not overlap running_var")

    return of_writeable


def _new(out, x):
    """`out`, or a new array like x."""
    raise NotImplementedError


@overload(_new)
def _new_in_nopython(out, x):
    if _absent(out):
        return lambda out, x: np.empty_like(x)
    if not isinstance(out, types.Array):
        return lambda out, x: out  # `_into_out` says what is wrong with it

    def given(out, x):
        if out.ctypes.data != x.ctypes.data and _overlap(out, x):
            raise ValueError("out must be x itself, or not overlap it")
        return out

    return given


def _check_axes(x: Any, least: int) -> None:
    if not isinstance(x, types.Array) or x.ndim < least:
        raise TypingError(f"x must be an array of {least} axes at least, got {x}")


def _width(x):
    """D"""
    raise NotImplementedError


@overload(_width)
def _width_in_nopython(x):
    _check_axes(x, 1)
    return lambda x: x.shape[-1]


def _sizes(x, channels_last):
    """N, C, S"""
    raise NotImplementedError


@overload(_sizes)
def _sizes_in_nopython(x, channels_last):
    _check_axes(x, 2)

    def sizes(x, channels_last):
        C = x.shape[-1] if channels_last else x.shape[1]
        return x.shape[0], C, x.size // max(1, x.shape[0] * C)

    return sizes


_compiled = numba.njit(nogil=True)


@_compiled
def _check(failed):
    if failed == -1:
        raise MemoryError
    if failed:
        raise ValueError("eps must be >= 0, threads >= 1, and the statistics must have values")


@_compiled
def layer_norm(x, weight=None, bias=None, eps=1e-5, out=None, mean=None, rstd=None, threads=1):
    """Layer norm over the last axis; mean and rstd have the shape of the others."""
    D = _width(x)
    y = _new(out, x)
    failed = _layer_norm(
        x,
        _from_x(x, x, x.shape),
        _from_weight(weight, x, (D,)),
        _from_bias(bias, x, (D,)),
        _into_out(y, x, x.shape),
        _into_mean(mean, x, x.shape[:-1]),
        _into_rstd(rstd, x, x.shape[:-1]),
        x.size // max(1, D),
        D,
        eps,
        threads,
    )
    _check(failed)
    return y


@_compiled
def rms_norm(x, weight=None, eps=1e-5, out=None, rstd=None, threads=1):
    """RMS norm over the last axis; rstd has the shape of the others."""
    D = _width(x)
    y = _new(out, x)
    failed = _rms_norm(
        x,
        _from_x(x, x, x.shape),
        _from_weight(weight, x, (D,)),
        _into_out(y, x, x.shape),
        _into_rstd(rstd, x, x.shape[:-1]),
        x.size // max(1, D),
        D,
        eps,
        threads,
    )
    _check(failed)
    return y


@_compiled
def layer_norm_backward(
    grad_y, x, mean, rstd, weight=None, grad_x=None, grad_weight=None, grad_bias=None, threads=1
):
    """Gradients of `layer_norm`, into the arrays that are given."""
    D = _width(x)
    failed = _layer_norm_backward(
        x,
        _from_grad_y(grad_y, x, x.shape),
        _from_x(x, x, x.shape),
        _from_mean(mean, x, x.shape[:-1]),
        _from_rstd(rstd, x, x.shape[:-1]),
        _from_weight(weight, x, (D,)),
        _into_grad_x(grad_x, x, x.shape),
        _into_grad_weight(grad_weight, x, (D,)),
        _into_grad_bias(grad_bias, x, (D,)),
        x.size // max(1, D),
        D,
        threads,
    )
    _check(failed)


@_compiled
def rms_norm_backward(grad_y, x, rstd, weight=None, grad_x=None, grad_weight=None, threads=1):
    """Gradients of `rms_norm`, into the arrays that are given."""
    D = _width(x)
    failed = _rms_norm_backward(
        x,
        _from_grad_y(grad_y, x, x.shape),
        _from_x(x, x, x.shape),
        _from_rstd(rstd, x, x.shape[:-1]),
        _from_weight(weight, x, (D,)),
        _into_grad_x(grad_x, x, x.shape),
        _into_grad_weight(grad_weight, x, (D,)),
        x.size // max(1, D),
        D,
        threads,
    )
    _check(failed)


@_compiled
def group_norm(
    x,
    num_groups,
    weight=None,
    bias=None,
    eps=1e-5,
    out=None,
    channels_last=False,
    mean=None,
    rstd=None,
    threads=1,
):
    """Group norm of (N, C, ...), or (N, ..., C); mean and rstd are (N, num_groups)."""
    N, C, S = _sizes(x, channels_last)
    y = _new(out, x)
    if num_groups < 1 or C % num_groups:
        raise ValueError("num_groups must divide the channels of x")
    failed = _group_norm(
        x,
        _from_x(x, x, x.shape),
        _from_weight(weight, x, (C,)),
        _from_bias(bias, x, (C,)),
        _into_out(y, x, x.shape),
        _into_mean(mean, x, (N, num_groups)),
        _into_rstd(rstd, x, (N, num_groups)),
        N,
        C,
        S,
        num_groups,
        eps,
        channels_last,
        threads,
    )
    _check(failed)
    return y


@_compiled
def group_norm_backward(
    grad_y,
    x,
    num_groups,
    mean,
    rstd,
    weight=None,
    grad_x=None,
    grad_weight=None,
    grad_bias=None,
    channels_last=False,
    threads=1,
):
    """Gradients of `group_norm`, into the arrays that are given."""
    N, C, S = _sizes(x, channels_last)
    if num_groups < 1 or C % num_groups:
        raise ValueError("num_groups must divide the channels of x")
    failed = _group_norm_backward(
        x,
        _from_grad_y(grad_y, x, x.shape),
        _from_x(x, x, x.shape),
        _from_mean(mean, x, (N, num_groups)),
        _from_rstd(rstd, x, (N, num_groups)),
        _from_weight(weight, x, (C,)),
        _into_grad_x(grad_x, x, x.shape),
        _into_grad_weight(grad_weight, x, (C,)),
        _into_grad_bias(grad_bias, x, (C,)),
        N,
        C,
        S,
        num_groups,
        channels_last,
        threads,
    )
    _check(failed)


@_compiled
def instance_norm(
    x,
    weight=None,
    bias=None,
    eps=1e-5,
    out=None,
    channels_last=False,
    mean=None,
    rstd=None,
    threads=1,
):
    """Instance norm of (N, C, ...), or (N, ..., C); mean and rstd are (N, C)."""
    _, C, S = _sizes(x, channels_last)
    if S == 1:
        raise ValueError("x must hold more than one value per channel of an image")
    return group_norm(x, C, weight, bias, eps, out, channels_last, mean, rstd, threads)


@_compiled
def instance_norm_backward(
    grad_y,
    x,
    mean,
    rstd,
    weight=None,
    grad_x=None,
    grad_weight=None,
    grad_bias=None,
    channels_last=False,
    threads=1,
):
    """Gradients of `instance_norm`, into the arrays that are given."""
    C = _sizes(x, channels_last)[1]
    group_norm_backward(
        grad_y,
        x,
        C,
        mean,
        rstd,
        weight,
        grad_x,
        grad_weight,
        grad_bias,
        channels_last,
        threads,
    )


@_compiled
def batch_norm(
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    out=None,
    channels_last=False,
    mean=None,
    rstd=None,
    threads=1,
):
    """Batch norm of (N, C, ...), or (N, ..., C); mean and rstd are (C,).

    With `training` by x's own statistics, towards which running_mean and running_var, if they are
    not None, are moved.
    """
    N, C, S = _sizes(x, channels_last)
    y = _new(out, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var must be given where training is False")
    if training and not eps > 0:
        raise ValueError("eps must be > 0 when the batch is normalised by its own statistics")
    if training and N * S == 1:
        raise ValueError("x must hold more than one value per channel to have a variance")
    if training:
        _check_updatable(running_mean, running_var)
    failed = _batch_norm(
        x,
        _from_x(x, x, x.shape),
        _from_running_mean(running_mean, x, (C,)),
        _from_running_var(running_var, x, (C,)),
        _from_weight(weight, x, (C,)),
        _from_bias(bias, x, (C,)),
        _into_out(y, x, x.shape),
        _into_mean(mean, x, (C,)),
        _into_rstd(rstd, x, (C,)),
        N,
        C,
        S,
        training,
        momentum,
        eps,
        channels_last,
        threads,
    )
    _check(failed)
    return y


@_compiled
def batch_norm_backward(
    grad_y,
    x,
    mean,
    rstd,
    weight=None,
    grad_x=None,
    grad_weight=None,
    grad_bias=None,
    training=True,
    channels_last=False,
    threads=1,
):
    """Gradients of `batch_norm`, into the arrays that are given."""
    N, C, S = _sizes(x, channels_last)
    failed = _batch_norm_backward(
        x,
        _from_grad_y(grad_y, x, x.shape),
        _from_x(x, x, x.shape),
        _from_mean(mean, x, (C,)),
        _from_rstd(rstd, x, (C,)),
        _from_weight(weight, x, (C,)),
        _into_grad_x(grad_x, x, x.shape),
        _into_grad_weight(grad_weight, x, (C,)),
        _into_grad_bias(grad_bias, x, (C,)),
        N,
        C,
        S,
        training,
        channels_last,
        threads,
    )
    _check(failed)
