"""Batch normalization folded into the weights of the layer before it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._canonical import DTYPE_NAMES, Array, array, is_supported, number
from .layers import BatchNorm

STATISTICS = ("running_mean", "running_var")
AFFINE = {"weight": 1.0, "bias": 0.0}


def fold_batch_norm(
    weight: Array,
    bias: Array | None,
    bn: BatchNorm | Mapping[str, Any],
    layout: str = "OIHW",
) -> tuple[Array, Array]:
    r"""Return the weight and bias of a layer that does a batch norm's work too.

    For a convolution, transposed convolution or linear layer and the batch norm after it, in
    inference: with :math:`s = weight_{bn} / \sqrt{running\_var + \epsilon}`, per output channel,

    .. math:: weight' = weight \, s, \quad bias' = (bias - running\_mean) \, s + bias_{bn}

    computed in float64 and rounded once [1]_.

    Parameters
    ----------
    weight : ndarray
        The layer's weight; float16, bfloat16, float32 or float64.
    bias : ndarray, shape (C,), or None
        The layer's bias, C being the number of its output channels.
    bn : BatchNorm, or mapping of str to ndarray
        The batch norm, or its arrays as `BatchNorm.state_dict` names them: `running_mean` and
        `running_var`, `weight` and `bias` where it has them, and `eps` where it is not 1e-5. An
        activation of the layer stays to be applied.
    layout : str
        What the axes of `weight` are, a letter for each: ``O`` the output channels, ``I`` the input
        channels, any others the kernel's. A convolution is ``"OIHW"`` in torch and ONNX and
        ``"HWIO"`` in Keras, a transposed one ``"IOHW"`` (in Keras ``"HWOI"``), a linear layer
        ``"OI"`` (``"IO"``), and Keras' depthwise convolution ``"HWIO"``. Groups follow from C:
        where the axis ``O`` is shorter, it runs over the outputs of each group of input channels.

    Returns
    -------
    weight : ndarray
        A new array of the weight's dtype.
    bias : ndarray, shape (C,)
        The same.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or an array of the wrong dtype.
    ValueError
        If shapes do not fit each other, or `bn` has no running statistics or negative variances.

    References
    ----------
    .. [1] B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
       Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 3.2.

    Examples
    --------
    >>> import numpy as np, cpunorm
    >>> rng = np.random.default_rng(0)
    >>> x, weight, bias = rng.normal(size=(4, 3)), rng.normal(size=(5, 3)), rng.normal(size=5)
    >>> bn = cpunorm.BatchNorm(5, dtype=np.float64).eval()
    >>> bn.running_mean[:], bn.running_var[:] = rng.normal(size=5), rng.uniform(1, 2, size=5)
    >>> expected = bn(x @ weight.T + bias)
    >>> weight, bias = cpunorm.fold_batch_norm(weight, bias, bn, "OI")
    >>> bool(np.allclose(x @ weight.T + bias, expected))
    True
    """
    weight = _array("weight", weight)
    arrays, eps = _arrays_of(bn)
    channels = arrays["running_var"].shape[0]
    variance = arrays["running_var"] + eps
    if not np.all(variance > 0):
        raise ValueError(f"bn.running_var + eps must be positive, got {variance.min()}")
    scale = arrays["weight"] / np.sqrt(variance)
    along = _along(weight, layout, scale)
    old = np.zeros(channels) if bias is None else _parameter("bias", bias, (channels,))
    new = (old - arrays["running_mean"]) * scale + arrays["bias"]
    with np.errstate(over="ignore"):  # of 16 bits: infinite, as in the kernels
        return (weight.astype(np.float64) * along).astype(weight.dtype), new.astype(weight.dtype)


def _array(name: str, given: Any) -> Array:
    a = array(name, given)
    if not is_supported(a.dtype):
        raise TypeError(f"{name} must have dtype {DTYPE_NAMES}, got {a.dtype}")
    return a


def _parameter(name: str, given: Any, shape: tuple[int, ...]) -> Array:
    """Check an array along the channels, and return it in float64."""
    a = _array(name, given)
    if a.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, one per channel of bn, got {a.shape}")
    return np.asarray(a, np.float64)


def _arrays_of(bn: Any) -> tuple[dict[str, Array], float]:
    """Return a batch norm's arrays in float64, with those it lacks, and its eps."""
    if isinstance(bn, BatchNorm):
        given: Mapping[str, Any] = {name: getattr(bn, name) for name in (*STATISTICS, *AFFINE)}
        eps = bn.eps
    elif isinstance(bn, Mapping):
        given, eps = bn, number("bn.eps", bn.get("eps", 1e-5))
    else:
        raise TypeError(f"bn must be a BatchNorm or a mapping, got {type(bn).__name__}")
    for name in STATISTICS:
        if given.get(name) is None:
            raise ValueError(
                f"bn must have running statistics to be folded, but no {name} is there"
            )
    channels = np.shape(given["running_mean"])
    if len(channels) != 1:
        raise ValueError(f"bn.running_mean must have one axis, got shape {channels}")
    found = {name: _parameter(f"bn.{name}", given[name], channels) for name in STATISTICS}
    for name, absent in AFFINE.items():
        a = given.get(name)
        found[name] = (
            np.full(channels, absent) if a is None else _parameter(f"bn.{name}", a, channels)
        )
    return found, eps


def _along(weight: Array, layout: Any, scale: Array) -> Array:
    """Return the scale of every output channel so that it broadcasts to the weight."""
    if not isinstance(layout, str):
        raise TypeError(f"layout must be a string, got {type(layout).__name__}")
    if (
        len(set(layout)) != len(layout)
        or len(layout) != weight.ndim
        or not {"O", "I"} <= set(layout)
    ):
        raise ValueError(
            f"layout must have one letter for each of the {weight.ndim} axes of weight, O and I "
            f"among them, got {layout!r}"
        )
    outputs, inputs = layout.index("O"), layout.index("I")
    per_group = weight.shape[outputs]
    shape = [1] * weight.ndim
    if per_group == scale.size:
        shape[outputs] = scale.size
        return scale.reshape(shape)
    groups = scale.size // max(per_group, 1)
    if groups * per_group != scale.size or weight.shape[inputs] % groups:
        raise ValueError(
            f"weight of shape {weight.shape} and layout {layout!r} must have the {scale.size} "
            f"output channels of bn, or a part of them for each group of input channels"
        )
    # (groups, outputs of a group) -> (inputs, outputs of a group)
    table = scale.reshape(groups, per_group).repeat(weight.shape[inputs] // groups, axis=0)
    shape[inputs], shape[outputs] = table.shape
    return (table if inputs < outputs else table.T).reshape(shape)
