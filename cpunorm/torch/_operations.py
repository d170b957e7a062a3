"""The five operations on tensors: with autograd in eager mode, and as custom operators elsewhere.

In eager mode a call goes straight to `cpunorm.functional`, by way of an autograd function where
gradients are wanted. Where torch traces instead of computing it meets the custom operator of the
same name, ``torch.ops.cpunorm.layer_norm`` for instance, whose fake implementation tells shapes
and strides, and whose gradient is a custom operator too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import functional
from .._canonical import Stats
from ._memory import array, tensor

Options = dict[str, Any]
Tensors = tuple[torch.Tensor | None, ...]


class Operation(NamedTuple):
    """What sets an operation apart: its tensors besides x, its options, those of its backward."""

    name: str
    tensors: tuple[str, ...]
    options: dict[str, str]  # name -> type in a schema
    of_backward: tuple[str, ...]

    def forward(self, x: torch.Tensor, tensors: Tensors, options: Options, **more: Any) -> Any:
        """Call the function of `functional`; running statistics are updated in place."""
        arrays = {name: array(t) for name, t in zip(self.tensors, tensors, strict=True)}
        result = getattr(functional, self.name)(array(x), **arrays, **options, **more)
        for name, t in zip(self.tensors, tensors, strict=True):
            if name.startswith("running") and t is not None:
                # What autograd keeps for others must notice that it was written to.
                torch.autograd.graph.increment_version(t)
        return result

    def backward(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        stats: Stats,
        options: Options,
        need: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """Call the backward of `functional`: the gradients of x, weight and bias."""
        gradients = getattr(functional, f"{self.name}_backward")(
            array(grad_y),
            array(x),
            stats=stats,
            weight=array(weight),
            need=need,
            **{name: options[name] for name in self.of_backward},
        )
        return tuple(None if g is None else tensor(g) for g in gradients)

    def in_torch(
        self, x: torch.Tensor, tensors: Tensors, stats: Stats, options: Options
    ) -> torch.Tensor:
        """Compute the same with torch's differentiable operators."""
        given = dict(zip(self.tensors, tensors, strict=True))
        options = dict(options)
        if "running_mean" in given:
            if not options.get("training", options.get("use_input_stats")):
                return _affine(x, stats, given["weight"], given["bias"])
            given["running_mean"] = given["running_var"] = None
        axis = options.pop("axis", None)
        if axis is not None:
            last = tuple(range(-len(axis), 0))
            x = x.movedim(axis, last)
        y: torch.Tensor = getattr(torch.nn.functional, self.name)(x, **given, **options)
        return y if axis is None else y.movedim(last, axis)


def _affine(
    x: torch.Tensor, stats: Stats, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Normalise channels by constant statistics."""
    along = (-1, *(1,) * (x.ndim - 2))
    assert stats.mean is not None
    y = (x - tensor(stats.mean).view(along)) * tensor(stats.rstd).view(along)
    if weight is not None:
        y = y * weight.view(along)
    if bias is not None:
        y = y + bias.view(along)
    return y.to(x.dtype)


_RUNNING = ("running_mean", "running_var", "weight", "bias")
_OVER_AXES = {"normalized_shape": "SymInt[]", "axis": "int[]?"}
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "batch_norm",
            _RUNNING,
            {"training": "bool", "momentum": "float", "eps": "float"},
            ("training",),
        ),
        Operation(
            "instance_norm",
            _RUNNING,
            {"use_input_stats": "bool", "momentum": "float", "eps": "float"},
            ("use_input_stats",),
        ),
        Operation(
            "group_norm",
            ("weight", "bias"),
            {"num_groups": "int", "eps": "float"},
            ("num_groups",),
        ),
        Operation(
            "layer_norm",
            ("weight", "bias"),
            {**_OVER_AXES, "eps": "float"},
            ("normalized_shape", "axis"),
        ),
        Operation(
            "rms_norm", ("weight",), {**_OVER_AXES, "eps": "float?"}, ("normalized_shape", "axis")
        ),
    )
}


def is_traced() -> bool:
    """Whether torch looks for its own operators: it compiles, traces, transforms, or has a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.autograd.forward_ad._current_level >= 0
    )


# ----------------------------------------------------------------------------------- in eager mode


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, options: Options, x: Any, *tensors: Any) -> Any:
        y, ctx.stats = operation.forward(x, tensors, options, return_stats=True)
        ctx.operation, ctx.options = operation, options
        parameters = [
            t if name in ("weight", "bias") else None
            for name, t in zip(operation.tensors, tensors, strict=True)
        ]
        ctx.save_for_backward(x, *parameters)
        return tensor(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_y,) = grad_outputs
        operation: Operation = ctx.operation
        x, *tensors = ctx.saved_tensors
        need = dict(zip(("x", *operation.tensors), ctx.needs_input_grad[2:], strict=True))
        if torch.is_grad_enabled():
            # Gradients of gradients: of torch's formula.
            inputs = {"x": x, **dict(zip(operation.tensors, tensors, strict=True))}
            wanted = [name for name in inputs if need[name]]
            y = operation.in_torch(x, tuple(tensors), ctx.stats, ctx.options)
            found = torch.autograd.grad(
                y, [inputs[name] for name in wanted], grad_y, create_graph=True
            )
            gradients: dict[str, Any] = dict(zip(wanted, found, strict=True))
        else:
            weight = tensors[operation.tensors.index("weight")]
            order = ("x", "weight", "bias")
            found = operation.backward(
                grad_y, x, weight, ctx.stats, ctx.options,
                tuple(need.get(name, False) for name in order),
            )  # fmt: skip
            gradients = dict(zip(order, found, strict=True))
        return None, None, *(gradients.get(name) for name in need)


def eager(operation: Operation, options: Options, x: torch.Tensor, *tensors: Any) -> torch.Tensor:
    """Normalise x, with gradients where they are wanted."""
    if torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    ):
        y: torch.Tensor = _Normalize.apply(operation, options, x, *tensors)
        return y
    return tensor(operation.forward(x, tensors, options))


# ---------------------------------------------------------------------------- as custom operators


def traced(operation: Operation, options: Options, x: torch.Tensor, *tensors: Any) -> torch.Tensor:
    """Normalise x by the custom operator."""
    in_order = (options[name] for name in operation.options)
    y, _, _, *running = getattr(torch.ops.cpunorm, operation.name)(x, *tensors, *in_order)
    # A custom operator with a gradient writes to none of its arguments.
    for target, new in zip(tensors, running, strict=False):
        if target is not None:
            target.copy_(new)
    return y


def _register(operation: Operation) -> None:
    """Define torch.ops.cpunorm.NAME and torch.ops.cpunorm.NAME_backward."""
    name, count = operation.name, len(operation.tensors)
    has_running = "running_mean" in operation.tensors
    tensors = ", ".join(f"Tensor? {t}" for t in operation.tensors)
    options = ", ".join(f"{kind} {o}" for o, kind in operation.options.items())
    axis_norm = "normalized_shape" in operation.options

    def named(values: Sequence[Any]) -> Options:
        return dict(zip(operation.options, values, strict=True))

    def forward(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        given = list(arguments[:count])
        if has_running:
            given[:2] = (None if t is None else t.clone() for t in given[:2])
        y, stats = operation.forward(x, tuple(given), named(arguments[count:]), return_stats=True)
        running = tuple(_or_nothing(x, t) for t in given[:2]) if has_running else ()
        mean = x.new_empty(0) if stats.mean is None else tensor(stats.mean)
        return tensor(y), mean, tensor(stats.rstd), *running

    def fake_forward(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        given, chosen = arguments[:count], named(arguments[count:])
        rstd = x.new_empty(_statistic_shape(x, chosen), dtype=_statistic_dtype(x))
        mean = x.new_empty(0) if name == "rms_norm" else torch.empty_like(rstd)
        running = (
            tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in given[:2])
            if has_running
            else ()
        )
        return torch.empty_like(x), mean, rstd, *running

    def backward(
        grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
        mean: torch.Tensor, rstd: torch.Tensor, need: Sequence[bool], *arguments: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        stats = Stats(None if name == "rms_norm" else array(mean), array(rstd))
        gradients = operation.backward(grad_y, x, weight, stats, named(arguments), tuple(need))
        return tuple(_or_nothing(x, g) for g in gradients)

    def fake_backward(
        grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None,
        mean: torch.Tensor, rstd: torch.Tensor, need: Sequence[bool], *arguments: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        shape = named(arguments)["normalized_shape"] if axis_norm else (x.shape[1],)
        dtype = rstd.dtype if weight is None else weight.dtype
        of_parameters = (x.new_empty(shape if n else 0, dtype=dtype if n else None)
                         for n in need[1:])  # fmt: skip
        return torch.empty_like(x) if need[0] else x.new_empty(0), *of_parameters

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, mean, rstd, *_ = output
        weight = inputs[1 + operation.tensors.index("weight")]
        ctx.save_for_backward(inputs[0], weight, mean, rstd)
        ctx.options = inputs[1 + count :]

    def gradient(ctx: Any, grad_y: torch.Tensor, *_: Any) -> Any:
        needed = dict(zip(("x", *operation.tensors), ctx.needs_input_grad, strict=False))
        need = [needed.get(n, False) for n in ("x", "weight", "bias")]
        found = getattr(torch.ops.cpunorm, f"{name}_backward")(
            grad_y, *ctx.saved_tensors, need, *ctx.options
        )
        gradients = dict(zip(("x", "weight", "bias"), found, strict=True))
        return *(gradients[n] if needed[n] else None for n in needed), *(None for _ in ctx.options)

    results = ", ".join(["Tensor"] * (5 if has_running else 3))
    op = torch.library.custom_op(
        f"cpunorm::{name}",
        forward,
        mutates_args=(),
        device_types="cpu",
        schema=f"(Tensor x, {tensors}, {options}) -> ({results})",
    )
    op.register_fake(fake_forward)
    op.register_autograd(gradient, setup_context=keep)
    torch.library.custom_op(
        f"cpunorm::{name}_backward",
        backward,
        mutates_args=(),
        device_types="cpu",
        schema="(Tensor grad_y, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool[] need, "
        f"{options}) -> (Tensor, Tensor, Tensor)",
    ).register_fake(fake_backward)


def _or_nothing(x: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
    """An operator returns tensors: where there is none, one of size zero."""
    return x.new_empty(0) if t is None else t


def _statistic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _statistic_shape(x: torch.Tensor, options: Options) -> tuple[Any, ...]:
    if "normalized_shape" in options:
        axes = options["axis"]
        if axes is None:
            return tuple(x.shape[: x.ndim - len(options["normalized_shape"])])
        return tuple(n for i, n in enumerate(x.shape) if i not in {a % x.ndim for a in axes})
    if "num_groups" in options:
        return x.shape[0], options["num_groups"]
    if options.get("use_input_stats"):
        return x.shape[0], x.shape[1]
    return (x.shape[1],)


for _operation in OPERATIONS.values():
    _register(_operation)
