"""The five operations on tensors: with autograd in eager mode, and as custom operators elsewhere.

In eager mode a call goes straight to `cpunorm.functional`, by way of an autograd function where
gradients are wanted. Where torch traces instead of computing it meets the custom operator of the
same name, ``torch.ops.cpunorm.layer_norm`` for instance, whose fake implementation tells shapes
and strides, and whose gradient is a custom operator too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from .. import functional
from .._canonical import Stats
from ._memory import array, tensor

Options = dict[str, Any]
Optional: TypeAlias = torch.Tensor | None
Running: TypeAlias = tuple[()] | tuple[Optional, Optional]


class Operation(NamedTuple):
    """What sets an operation apart: its options, and which of them its backward takes."""

    name: str
    options: dict[str, str]  # name -> type in a schema
    of_backward: tuple[str, ...]
    own: str | None = None  # with running statistics: the option that says they are not used

    def forward(
        self, x: torch.Tensor, weight: Optional, bias: Optional, running: Running, options: Options
    ) -> Any:
        """Call the function of `functional`; running statistics are updated in place."""
        call = {"weight": array(weight), **options}
        if bias is not None:
            call["bias"] = array(bias)
        if running and running[0] is not None:
            if self.own is not None and options[self.own]:
                if any(t.is_neg() for t in running if t is not None):
                    raise ValueError("running statistics to be updated must not be negated views")
                # What autograd keeps of them for others must notice that they are written to.
                torch.autograd.graph.increment_version(running)
            call["running_mean"], call["running_var"] = array(running[0]), array(running[1])
        elif self.own == "training":
            call["running_mean"] = call["running_var"] = None
        return getattr(functional, self.name)(array(x), **call)

    def backward(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        weight: Optional,
        stats: Stats,
        options: Options,
        need: tuple[bool, ...],
    ) -> tuple[Optional, ...]:
        """Call the backward of `functional`: the gradients of x, weight and bias."""
        gradients = getattr(functional, f"{self.name}_backward")(
            array(grad_y),
            array(x),
            stats=stats,
            weight=array(weight),
            need=need,
            **{name: options[name] for name in self.of_backward},
        )
        return tuple([None if g is None else tensor(g) for g in gradients])

    def in_torch(
        self,
        x: torch.Tensor,
        weight: Optional,
        bias: Optional,
        options: Options,
        running: Running = (None, None),
    ) -> torch.Tensor:
        """Compute the same with torch's differentiable operators."""
        call = {name: value for name, value in options.items() if name != "axis"}
        if self.own is not None:
            call.update(zip(("running_mean", "running_var"), running, strict=True))
        if bias is not None:
            call["bias"] = bias
        function = getattr(torch.nn.functional, self.name)
        axis = options.get("axis")
        if axis is None:
            y: torch.Tensor = function(x, weight=weight, **call)
            return y
        last = tuple(range(-len(axis), 0))
        y = function(x.movedim(axis, last), weight=weight, **call)
        return y.movedim(last, axis)

    def again(
        self, x: torch.Tensor, weight: Optional, bias: Optional, stats: Stats, options: Options
    ) -> torch.Tensor:
        """Compute in torch what has been computed; running statistics stay as they are."""
        if self.own is not None and not options[self.own]:
            return _affine(x, stats, weight, bias)
        return self.in_torch(x, weight, bias, options)


def _affine(x: torch.Tensor, stats: Stats, weight: Optional, bias: Optional) -> torch.Tensor:
    """Normalise channels by constant statistics."""
    along = (-1, *(1,) * (x.ndim - 2))
    assert stats.mean is not None
    y = (x - tensor(stats.mean).view(along)) * tensor(stats.rstd).view(along)
    if weight is not None:
        y = y * weight.view(along)
    if bias is not None:
        y = y + bias.view(along)
    return y.to(x.dtype)


_CHANNELS = {"momentum": "float", "eps": "float"}
_AXES = {"normalized_shape": "SymInt[]", "axis": "int[]?"}
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("batch_norm", {"training": "bool", **_CHANNELS}, ("training",), "training"),
        Operation(
            "instance_norm",
            {"use_input_stats": "bool", **_CHANNELS},
            ("use_input_stats",),
            "use_input_stats",
        ),
        Operation("group_norm", {"num_groups": "int", "eps": "float"}, ("num_groups",)),
        Operation("layer_norm", {**_AXES, "eps": "float"}, ("normalized_shape", "axis")),
        Operation("rms_norm", {**_AXES, "eps": "float?"}, ("normalized_shape", "axis")),
    )
}


def is_transformed() -> bool:
    """Whether torch differentiates or vectorizes by its functional transforms, or forward."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether torch looks for its own operators: it compiles, traces, transforms, or has a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or is_transformed()
    )


# ----------------------------------------------------------------------------------- in eager mode


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        operation, options, running, x, weight, bias = arguments
        kept = {**options, "return_stats": True}
        y, ctx.stats = operation.forward(x, weight, bias, running, kept)
        ctx.operation, ctx.options = operation, options
        ctx.save_for_backward(x, weight, bias)
        return tensor(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        need = ctx.needs_input_grad[3:]
        (grad_y,) = grad_outputs
        if grad_y.layout is not torch.strided:
            grad_y = grad_y.to_dense()
        differentiable = torch.is_grad_enabled()
        if not (differentiable or is_traced() or is_legacy_batchedtensor(grad_y)):
            found = ctx.operation.backward(grad_y, x, weight, ctx.stats, ctx.options, need)
            return None, None, None, *found
        # Gradients of gradients, and batches of them, are those of torch's formula.
        with torch.enable_grad():
            y = ctx.operation.again(x, weight, bias, ctx.stats, ctx.options)
        wanted = [t for t, n in zip((x, weight, bias), need, strict=True) if n]
        found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=differentiable))
        return None, None, None, *(next(found) if n else None for n in need)


def eager(
    operation: Operation,
    options: Options,
    x: torch.Tensor,
    weight: Optional,
    bias: Optional,
    running: Running = (),
) -> torch.Tensor:
    """Normalise x, with gradients where they are wanted."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        y: torch.Tensor = _Normalize.apply(operation, options, running, x, weight, bias)
        return y
    return tensor(operation.forward(x, weight, bias, running, options))


# ---------------------------------------------------------------------------- as custom operators


def traced(
    operation: Operation,
    options: Options,
    x: torch.Tensor,
    weight: Optional,
    bias: Optional,
    running: Running = (),
) -> torch.Tensor:
    """Normalise x by the custom operator."""
    in_order = (options[name] for name in operation.options)
    operator = getattr(torch.ops.cpunorm, operation.name)
    y, _, _, *new = operator(x, weight, bias, *running, *in_order)
    # A custom operator with a gradient writes to none of its arguments.
    for old, updated in zip(running, new, strict=True):
        if old is not None:
            old.copy_(updated)
    return y


def _register(operation: Operation) -> None:
    """Define torch.ops.cpunorm.NAME and torch.ops.cpunorm.NAME_backward.

    An operator returns tensors: where there is nothing to return, one of size zero.
    """
    name = operation.name
    statistics = 2 if operation.own is not None else 0

    def split(arguments: Sequence[Any]) -> tuple[Sequence[Any], Options]:
        options = zip(operation.options, arguments[statistics:], strict=True)
        return arguments[:statistics], dict(options)

    def forward(
        x: torch.Tensor, weight: Optional, bias: Optional, *arguments: Any
    ) -> tuple[torch.Tensor, ...]:
        given, options = split(arguments)
        running: Any = tuple(None if t is None else t.clone() for t in given)
        options["return_stats"] = True
        y, stats = operation.forward(x, weight, bias, running, options)
        mean = x.new_empty(0) if stats.mean is None else tensor(stats.mean)
        updated = (x.new_empty(0) if t is None else t for t in running)
        return tensor(y), mean, tensor(stats.rstd), *updated

    def fake_forward(
        x: torch.Tensor, weight: Optional, bias: Optional, *arguments: Any
    ) -> tuple[torch.Tensor, ...]:
        running, options = split(arguments)
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        rstd = x.new_empty(_statistic_shape(x, options), dtype=dtype)
        mean = x.new_empty(0) if name == "rms_norm" else torch.empty_like(rstd)
        updated = (x.new_empty(0) if t is None else torch.empty_like(t) for t in running)
        return torch.empty_like(x), mean, rstd, *updated

    def backward(
        grad_y: torch.Tensor,
        x: torch.Tensor,
        weight: Optional,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        need: Sequence[bool],
        *arguments: Any,
    ) -> tuple[torch.Tensor, ...]:
        options = dict(zip(operation.options, arguments, strict=True))
        stats = Stats(None if name == "rms_norm" else array(mean), array(rstd))
        found = operation.backward(grad_y, x, weight, stats, options, tuple(need))
        return tuple(x.new_empty(0) if g is None else g for g in found)

    def fake_backward(
        grad_y: torch.Tensor,
        x: torch.Tensor,
        weight: Optional,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        need: Sequence[bool],
        *arguments: Any,
    ) -> tuple[torch.Tensor, ...]:
        options = dict(zip(operation.options, arguments, strict=True))
        shape = options.get("normalized_shape", x.shape[1:2])
        dtype = rstd.dtype if weight is None else weight.dtype
        grad_x = torch.empty_like(x) if need[0] else x.new_empty(0)
        affine = (x.new_empty(shape, dtype=dtype) if n else x.new_empty(0) for n in need[1:])
        return grad_x, *affine

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, weight, _, *arguments = inputs
        ctx.save_for_backward(x, weight, *output[1:3])
        ctx.options = arguments[statistics:]

    def gradient(ctx: Any, grad_y: torch.Tensor, *_: Any) -> Any:
        need = list(ctx.needs_input_grad[:3])
        operator = getattr(torch.ops.cpunorm, f"{name}_backward")
        found = operator(grad_y, *ctx.saved_tensors, need, *ctx.options)
        others = (None,) * (statistics + len(ctx.options))
        return *(g if n else None for g, n in zip(found, need, strict=True)), *others

    running = "Tensor? running_mean, Tensor? running_var, " if statistics else ""
    options = ", ".join(f"{kind} {o}" for o, kind in operation.options.items())
    results = ", ".join(["Tensor"] * (3 + statistics))
    op = torch.library.custom_op(
        f"cpunorm::{name}",
        forward,
        mutates_args=(),
        device_types="cpu",
        schema=f"(Tensor x, Tensor? weight, Tensor? bias, {running}{options}) -> ({results})",
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
