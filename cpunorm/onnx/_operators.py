"""The normalization operators, as classes that ONNX's reference evaluator runs nodes with."""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx.defs import onnx_opset_version
from onnx.reference.op_run import OpRun

from .. import functional
from .._canonical import STATS_DTYPE, Array, Stats, is_supported

MICROSOFT = "com.microsoft"
FLOAT = 1  # of onnx.TensorProto.DataType: the type that `stash_type` names by default


class _Normalization(OpRun):
    """A node: opset and attributes are checked when a model is loaded, the rest when it runs."""

    op_domain = ""
    first_opset = 1
    attributes: tuple[str, ...] = ()

    def __init__(self, node: Any, run_params: Any, schema: Any = None) -> None:
        unknown = [a.name for a in node.attribute if a.name not in self.attributes]
        opset = run_params["opsets"].get(self.op_domain, 1)
        self.opset = opset
        self.shown = f"node {(node.name or node.output[0])!r} ({node.op_type})"
        if opset < self.first_opset:
            raise NotImplementedError(
                f"{self.shown}: opset must be {self.first_opset} or later, got {opset}"
            )
        if self.op_domain == "" and opset > onnx_opset_version():
            raise NotImplementedError(
                f"{self.shown}: opset must be {onnx_opset_version()}, the newest that onnx knows, "
                f"or earlier, got {opset}"
            )
        if unknown:
            raise NotImplementedError(f"{self.shown}: unknown attribute {unknown[0]!r}")
        super().__init__(node, run_params, schema)

    def _run(self, x: Array, *tensors: Array | None, **attributes: Any) -> tuple[Array, ...]:
        if attributes.get("stash_type", FLOAT) != FLOAT:
            raise NotImplementedError(
                f"{self.shown}: stash_type must be {FLOAT} (float), got {attributes['stash_type']}"
            )
        attributes.pop("stash_type", None)
        try:
            results = self.compute(x, *tensors, **attributes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.shown}: {error}") from error
        return results[: len(self.onnx_node.output)]

    def compute(self, x: Array, *tensors: Any, **attributes: Any) -> tuple[Array, ...]:
        """Return every output the node may have."""
        raise NotImplementedError


def _beside(x: Array, a: Array | None) -> Array | None:
    """Return a parameter as x takes it: in x's dtype or that of its statistics."""
    if a is None:
        return None
    if is_supported(x.dtype) and a.dtype != x.dtype:
        a = a.astype(STATS_DTYPE[x.dtype], copy=False)
    return a


def _broadcast(name: str, a: Array | None, shape: tuple[int, ...]) -> Any:
    if a is None:
        return None
    try:
        return np.broadcast_to(a, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to shape {shape}, got {a.shape}") from None


class BatchNormalization(_Normalization):
    first_opset = 7
    attributes = ("epsilon", "momentum", "training_mode", "spatial")

    def compute(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        var: Array,
        epsilon: float,
        momentum: float,
        training_mode: int,
        spatial: int = 1,
    ) -> tuple[Array, ...]:
        if spatial != 1:
            raise NotImplementedError(f"{self.shown}: spatial must be 1, got {spatial}")
        if self.opset < 14 and len(self.onnx_node.output) > 1:
            raise NotImplementedError(
                f"{self.shown}: training needs opset 14 or later, got {self.opset}"
            )
        affine = _beside(x, scale), _beside(x, bias)
        if not training_mode:
            running = _beside(x, mean), _beside(x, var)
            return (functional.batch_norm(x, *running, *affine, eps=epsilon),)
        # With a momentum of 1 the running statistics become those of the batch.
        new = [np.zeros(a.shape, STATS_DTYPE.get(x.dtype)) for a in (mean, var)]
        y = functional.batch_norm(
            x, new[0], new[1], *affine, training=True, momentum=1.0, eps=epsilon
        )
        if not x.size:
            return y, mean, var
        count = x.size // x.shape[1]
        new[1] *= (count - 1) / count
        updated = (
            (old * momentum + batch * (1 - momentum)).astype(old.dtype)
            for old, batch in zip((mean, var), new, strict=True)
        )
        return y, *updated


class InstanceNormalization(_Normalization):
    first_opset = 6
    attributes = ("epsilon",)

    def compute(self, x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, ...]:
        affine = _beside(x, scale), _beside(x, bias)
        return (functional.instance_norm(x, None, None, *affine, eps=epsilon),)


def _per_channel(name: str, a: Array, num_groups: int, size: int) -> Array:
    """Return a parameter of groups, as there were before opset 21, as one of channels."""
    if a.shape != (num_groups,):
        raise ValueError(f"{name} must have shape {(num_groups,)} before opset 21, got {a.shape}")
    return np.repeat(a, size)


class GroupNormalization(_Normalization):
    first_opset = 18
    attributes = ("epsilon", "num_groups", "stash_type")

    def compute(
        self, x: Array, scale: Array, bias: Array, epsilon: float, num_groups: int
    ) -> tuple[Array, ...]:
        if self.opset < 21 and num_groups > 0 and x.ndim > 1:
            size = x.shape[1] // num_groups
            scale = _per_channel("scale", scale, num_groups, size)
            bias = _per_channel("bias", bias, num_groups, size)
        affine = _beside(x, scale), _beside(x, bias)
        return (functional.group_norm(x, num_groups, *affine, eps=epsilon),)


def _trailing(x: Array, axis: int) -> tuple[int, ...]:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must lie in [{-x.ndim}, {x.ndim}), got {axis}")
    return x.shape[axis % x.ndim :]


def _statistics(x: Array, shape: tuple[int, ...], stats: Stats) -> Any:
    """Return mean and rstd with an axis of length 1 for each that was normalised."""
    kept = x.shape[: x.ndim - len(shape)] + (1,) * len(shape)
    return tuple(
        np.empty(0, np.float32) if a is None else a.reshape(kept).astype(np.float32) for a in stats
    )


class LayerNormalization(_Normalization):
    first_opset = 17
    attributes = ("axis", "epsilon", "stash_type")

    def compute(
        self, x: Array, scale: Array, bias: Array | None = None, *, axis: int, epsilon: float
    ) -> tuple[Array, ...]:
        shape = _trailing(x, axis)
        weight = _broadcast("scale", _beside(x, scale), shape)
        bias = _broadcast("bias", _beside(x, bias), shape)
        y, stats = functional.layer_norm(x, shape, weight, bias, epsilon, return_stats=True)
        return y, *_statistics(x, shape, stats)


class RMSNormalization(_Normalization):
    first_opset = 23
    attributes = ("axis", "epsilon", "stash_type")

    def compute(
        self, x: Array, scale: Array, axis: int = -1, epsilon: float = 1e-5
    ) -> tuple[Array, ...]:
        shape = _trailing(x, axis)
        weight = _broadcast("scale", _beside(x, scale), shape)
        y, stats = functional.rms_norm(x, shape, weight, epsilon, return_stats=True)
        return y, _statistics(x, shape, stats)[1]


class SimplifiedLayerNormalization(RMSNormalization):
    """ONNX Runtime's RMS norm, before ONNX had one; it returns 1/rms too."""

    first_opset = 1


class _SkipNormalization(_Normalization):
    """ONNX Runtime's normalization of a sum: outputs y, mean, 1/deviation, sum."""

    op_domain = MICROSOFT
    attributes = ("epsilon",)

    def normalize_sum(
        self, function: Callable[..., Any], x: Array, skip: Array, added: Array | None, *more: Any
    ) -> tuple[Array, ...]:
        shape = x.shape[-1:]
        skip = _broadcast("skip", skip, x.shape)
        if added is not None:
            skip = skip + _broadcast("bias", added, shape)
        y, total, stats = function(x, skip, shape, *more, return_stats=True)
        return y, *_statistics(x, shape, stats), total


class SkipLayerNormalization(_SkipNormalization):
    def compute(
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        beta: Array | None = None,
        bias: Array | None = None,
        *,
        epsilon: float = 1e-12,
    ) -> tuple[Array, ...]:
        affine = _beside(x, gamma), _beside(x, beta)
        return self.normalize_sum(functional.add_layer_norm, x, skip, bias, *affine, epsilon)


class SkipSimplifiedLayerNormalization(_SkipNormalization):
    def compute(
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        bias: Array | None = None,
        *,
        epsilon: float = 1e-12,
    ) -> tuple[Array, ...]:
        weight = _beside(x, gamma)
        return self.normalize_sum(functional.add_rms_norm, x, skip, bias, weight, epsilon)


NEW_OPS: list[type[OpRun]] = [
    BatchNormalization,
    InstanceNormalization,
    GroupNormalization,
    LayerNormalization,
    RMSNormalization,
    SimplifiedLayerNormalization,
    # Some exporters put it where it belongs.
    type("SimplifiedLayerNormalization", (SimplifiedLayerNormalization,), {"op_domain": MICROSOFT}),
    SkipLayerNormalization,
    SkipSimplifiedLayerNormalization,
]
