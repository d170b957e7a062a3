"""Normalization of tensors as functions: those of ``torch.nn.functional``, with autograd."""

from collections.abc import Sequence
from typing import Any

import torch

from ._memory import in_torch_order
from ._operations import OPERATIONS, Running, eager, is_traced, is_transformed, traced

Shape = int | Sequence[int]


def batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalise every channel of x over the batch and its positions: `cpunorm.batch_norm`.

    Parameters
    ----------
    x : Tensor, shape (N, C, ...)
        On the CPU: float16, bfloat16, float32 or float64.
    running_mean, running_var : Tensor, shape (C,), or None
        Used when not training; in training they are updated in place.
    weight, bias : Tensor, shape (C,), optional
        In x's dtype, or float32 for an `x` of 16 bits.
    training : bool
        Whether the statistics are those of `x`.
    momentum : float
        The weight of the new value in the running statistics.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor
        Of x's shape and dtype, in channels-last order if x is.

    Raises
    ------
    TypeError, ValueError
        As `cpunorm.batch_norm`.

    Examples
    --------
    >>> import torch, cpunorm.torch
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> cpunorm.torch.batch_norm(x, None, None, training=True, eps=1e-12)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    options = {"training": training, "momentum": momentum, "eps": eps}
    running = running_mean, running_var
    return _normalize("batch_norm", options, x, weight, bias, running)


def instance_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalise every channel of every image over its positions: `cpunorm.instance_norm`.

    Parameters
    ----------
    x : Tensor, shape (N, C, ...)
        On the CPU: float16, bfloat16, float32 or float64.
    running_mean, running_var : Tensor, shape (C,), optional
        Used without `use_input_stats`; with it they are updated in place.
    weight, bias : Tensor, shape (C,), optional
        In x's dtype, or float32 for an `x` of 16 bits.
    use_input_stats : bool
        Whether the statistics are those of `x`.
    momentum : float
        The weight of the new value in the running statistics.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor
        Of x's shape and dtype, in channels-last order if x is (torch's own is in C order).

    Raises
    ------
    TypeError, ValueError
        As `cpunorm.instance_norm`.

    Examples
    --------
    >>> import torch, cpunorm.torch
    >>> cpunorm.torch.instance_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    tensor([[[-1.,  1.],
             [-1.,  1.]]])
    """
    options = {"use_input_stats": use_input_stats, "momentum": momentum, "eps": eps}
    running = running_mean, running_var
    return _normalize("instance_norm", options, x, weight, bias, running)


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalise every group of channels of every image: `cpunorm.group_norm`.

    Parameters
    ----------
    x : Tensor, shape (N, C, ...)
        On the CPU: float16, bfloat16, float32 or float64.
    num_groups : int
        Divides C.
    weight, bias : Tensor, shape (C,), optional
        In x's dtype, or float32 for an `x` of 16 bits.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor
        Of x's shape and dtype, in channels-last order if x is.

    Raises
    ------
    TypeError, ValueError
        As `cpunorm.group_norm`.

    Examples
    --------
    >>> import torch, cpunorm.torch
    >>> cpunorm.torch.group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    tensor([[-1.,  1., -1.,  1.]])
    """
    options = {"num_groups": num_groups, "eps": eps}
    return _normalize("group_norm", options, x, weight, bias)


def layer_norm(
    x: torch.Tensor,
    normalized_shape: Shape,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    axis: Shape | None = None,
) -> torch.Tensor:
    """Normalise x over its trailing axes, or any others: `cpunorm.layer_norm`.

    Parameters
    ----------
    x : Tensor
        On the CPU: float16, bfloat16, float32 or float64.
    normalized_shape : int or sequence of ints
        The sizes of the normalised axes.
    weight, bias : Tensor, shape `normalized_shape`, optional
        In x's dtype, or float32 for an `x` of 16 bits.
    eps : float
        Added to the variance.
    axis : int or sequence of ints, optional
        The normalised axes; None is the trailing ones. ``axis=1`` normalises an NCHW tensor over
        the channels of every position, in either memory format, without a transpose.

    Returns
    -------
    Tensor
        Of x's shape and dtype; in C order, as torch's, and with `axis` in x's order if x has no
        gaps.

    Raises
    ------
    TypeError, ValueError
        As `cpunorm.layer_norm`.

    Examples
    --------
    >>> import torch, cpunorm.torch
    >>> x = torch.randn(2, 8, 5, 5, requires_grad=True)
    >>> y = cpunorm.torch.layer_norm(x, 8, axis=1)
    >>> expected = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
    >>> torch.allclose(y, expected, atol=1e-5)
    True
    """
    options = _over_axes(normalized_shape, axis, eps)
    return _normalize("layer_norm", options, x, weight, bias)


def rms_norm(
    x: torch.Tensor,
    normalized_shape: Shape,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    axis: Shape | None = None,
) -> torch.Tensor:
    """Divide x by its root mean square over trailing axes, or any others: `cpunorm.rms_norm`.

    Parameters
    ----------
    x : Tensor
        On the CPU: float16, bfloat16, float32 or float64.
    normalized_shape : int or sequence of ints
        The sizes of the normalised axes.
    weight : Tensor, shape `normalized_shape`, optional
        In x's dtype, or float32 for an `x` of 16 bits.
    eps : float, optional
        Added to the mean square; None is the machine epsilon of float32 (float64 for float64).
    axis : int or sequence of ints, optional
        The normalised axes; None is the trailing ones.

    Returns
    -------
    Tensor
        Of x's shape and dtype; as torch's in channels-last order if x is, else in C order, and with
        `axis` in x's order if x has no gaps.

    Raises
    ------
    TypeError, ValueError
        As `cpunorm.rms_norm`.

    Examples
    --------
    >>> import torch, cpunorm.torch
    >>> cpunorm.torch.rms_norm(torch.tensor([[3.0, 4.0]]), 2)
    tensor([[0.8485, 1.1314]])
    """
    options = _over_axes(normalized_shape, axis, eps)
    return _normalize("rms_norm", options, x, weight, None)


def _over_axes(normalized_shape: Shape, axis: Shape | None, eps: float | None) -> dict[str, Any]:
    def sequence(a: Shape | None) -> Any:
        return (a,) if isinstance(a, int) else a if a is None else tuple(a)

    return {"normalized_shape": sequence(normalized_shape), "axis": sequence(axis), "eps": eps}


def _normalize(
    name: str,
    options: dict[str, Any],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running: Running = (),
) -> torch.Tensor:
    _check("x", x)
    if weight is not None:
        _check("weight", weight)
    if bias is not None:
        _check("bias", bias)
    if running:
        _check_running(*running)
    operation = OPERATIONS[name]
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu
    run = eager
    if not is_plain or is_traced():
        if is_transformed():
            return operation.in_torch(x, weight, bias, options, running)
        run = traced
    return run(operation, options, _in_order(name, options, x), weight, bias, running)


def _check(name: str, t: Any) -> None:
    """Raise if an argument is no tensor, or none whose values lie in memory one by one."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        found = "a nested one" if t.is_nested else f"one of layout {t.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {found}")


def _check_running(mean: Any, var: Any) -> None:
    if mean is not None:
        _check("running_mean", mean)
    if var is not None:
        _check("running_var", var)
    if (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must be given together")


def _in_order(name: str, options: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """Return x as torch lays the result; as it is over other axes, for which torch has nothing."""
    if options.get("axis") is None:
        return x.contiguous() if name == "layer_norm" else in_torch_order(x)
    # Where x has gaps, torch's `empty_like` need not lie as our results do.
    return x if torch.empty_like(x).stride() == x.stride() else x.contiguous()
