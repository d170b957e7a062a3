"""The normalization modules of a model on our kernels.

A module is moved over by giving it another class, a subclass of its own that differs in `forward`
alone. So parameters, buffers, hooks, mode and state_dict are not touched, nobody's reference to the
module goes stale, and `isinstance` says what it said before.
"""

import warnings
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._memory import DTYPES, in_torch_order, memory_format
from ._operations import OPERATIONS, eager, is_traced

_Model = TypeVar("_Model", bound=nn.Module)

PLAIN = (torch.Tensor, nn.Parameter)


def accelerate(model: _Model) -> _Model:
    """Have a model's normalization modules run on cpunorm, forward and backward.

    BatchNorm1d, 2d and 3d, InstanceNorm1d, 2d and 3d, GroupNorm, LayerNorm and RMSNorm are moved
    over; subclasses of them, SyncBatchNorm, lazy and parametrized modules are left alone.
    Parameters, buffers, hooks and the state_dict stay as they are, and memory formats are kept.

    A call that is not ours falls back to torch's own kernel, and a warning says so, once for each
    reason: tensors that are not on the CPU, of another dtype or of another class, and calls that
    torch compiles, exports, traces or transforms. Small inputs are left to torch as well, without a
    warning: its calls are shorter than any that begins in Python (`least_bytes` of our classes).

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. It may be a normalization module itself.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If the parameters or buffers of a module do not fit it; it is named, and no module has been
        changed.

    See Also
    --------
    undo

    Examples
    --------
    >>> import torch, cpunorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> x = torch.randn(2, 3, 9, 9)
    >>> expected = model.eval()(x)
    >>> torch.allclose(cpunorm.torch.accelerate(model)(x), expected, atol=1e-5)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in OURS and "forward" not in vars(module)
    ]
    for name, module in chosen:
        _check(name or "the model", module)
    for _, module in chosen:
        module.__class__ = OURS[type(module)]
    return model


def undo(model: _Model) -> _Model:
    """Have the modules that `accelerate` moved over run on torch again.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If a module has been parametrized since; it is named, and no module has been changed.

    Examples
    --------
    >>> import torch, cpunorm.torch
    >>> model = cpunorm.torch.accelerate(torch.nn.LayerNorm(8))
    >>> type(cpunorm.torch.undo(model)) is torch.nn.LayerNorm
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, _Ours) and parametrize.is_parametrized(module):
            raise ValueError(
                f"{name or 'the model'}: it has been parametrized since accelerate; "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
    for module in model.modules():
        if type(module) in TORCHS:
            module.__class__ = TORCHS[type(module)]
    return model


def _check(name: str, module: Any) -> None:
    """Raise if a module's tensors do not fit it."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        shape = tuple(module.normalized_shape)
    elif isinstance(module, nn.GroupNorm):
        shape = (module.num_channels,)
        if module.num_groups < 1 or module.num_channels % module.num_groups:
            raise ValueError(
                f"{name}: num_groups must divide the {module.num_channels} channels, "
                f"got {module.num_groups}"
            )
    else:
        shape = (module.num_features,)
    for kind in ("weight", "bias", "running_mean", "running_var"):
        found = getattr(module, kind, None)
        if found is not None and tuple(found.shape) != shape:
            raise ValueError(
                f"{name}: {kind} must have shape {shape} in this {type(module).__name__}, "
                f"got {tuple(found.shape)}"
            )
    mean, var = (getattr(module, kind, None) for kind in ("running_mean", "running_var"))
    if (mean is None) != (var is None):
        raise ValueError(f"{name}: running_mean and running_var must both be None, or neither")


def _reason_against(x: Any, *tensors: Any) -> str | None:
    """Why a call is not for our kernels."""
    if is_traced():
        return "torch compiles, traces or transforms the call"
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}"
    if not x.is_cpu:
        return f"the input is on {x.device}"
    if x.layout is not torch.strided or x.is_nested:
        return "the input is not a dense tensor"
    allowed = DTYPES.get(x.dtype)
    if allowed is None:
        return f"the input has dtype {x.dtype}"
    for t in tensors:
        if t is not None and (t.dtype not in allowed or not t.is_cpu or type(t) not in PLAIN):
            return f"beside an input of {x.dtype} there is a {type(t).__name__} of {t.dtype}"
    return None


_said: set[tuple[str, str]] = set()


# While torch compiles, this runs once, and leaves nothing in what is compiled.
@torch.compiler.assume_constant_result
def _say_once(module: str, reason: str) -> None:
    if (module, reason) not in _said:
        _said.add((module, reason))
        warnings.warn(f"{module} falls back to torch's own kernel: {reason}", stacklevel=2)


class _Ours(nn.Module):
    """What our classes share: a call is ours, or falls back to the class after us."""

    # Below these sizes of x, without and with autograd, the way from Python to our kernel costs
    # more than the kernel wins.
    least_bytes = 64 << 10, 64 << 10

    def _is_for_us(self, x: Any, *tensors: Any) -> bool:
        reason = _reason_against(x, *tensors)
        if reason is not None:
            _say_once(type(self).__name__, reason)
            return False
        return bool(x.nbytes >= self.least_bytes[torch.is_grad_enabled()])


class _BatchNorm(_Ours):
    least_bytes = 2 << 20, 1 << 20

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        running = self.running_mean, self.running_var
        if not self._is_for_us(x, self.weight, self.bias, *running):
            return super().forward(x)  # type: ignore[no-any-return, misc]
        self._check_input_dim(x)
        momentum = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        if self.training and not self.track_running_stats:
            running = None, None
        options = {
            "training": self.training or running[0] is None,
            "momentum": momentum or 0.0,
            "eps": self.eps,
        }
        x = in_torch_order(x)
        return eager(OPERATIONS["batch_norm"], options, x, self.weight, self.bias, running)


class _InstanceNorm(_Ours):
    # `forward` of torch checks the input, adds a batch to one without, and calls this.
    def _apply_instance_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        running = self.running_mean, self.running_var
        if not self._is_for_us(x, self.weight, self.bias, *running):
            y: torch.Tensor = super()._apply_instance_norm(x)  # type: ignore[misc]
            # torch's own is in C order; where y lies must not depend on the size of x.
            return y if is_traced() else y.contiguous(memory_format=memory_format(x))
        options = {
            "use_input_stats": self.training or not self.track_running_stats,
            "momentum": 0.0 if self.momentum is None else self.momentum,
            "eps": self.eps,
        }
        x = in_torch_order(x)
        return eager(OPERATIONS["instance_norm"], options, x, self.weight, self.bias, running)


class GroupNorm(_Ours, nn.GroupNorm):
    least_bytes = 1 << 20, 4 << 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_for_us(x, self.weight, self.bias):
            return super().forward(x)
        options = {"num_groups": self.num_groups, "eps": self.eps}
        return eager(OPERATIONS["group_norm"], options, in_torch_order(x), self.weight, self.bias)


class LayerNorm(_Ours, nn.LayerNorm):
    least_bytes = 1 << 20, 2 << 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_for_us(x, self.weight, self.bias):
            return super().forward(x)
        options = {"normalized_shape": self.normalized_shape, "eps": self.eps, "axis": None}
        return eager(OPERATIONS["layer_norm"], options, x.contiguous(), self.weight, self.bias)


class RMSNorm(_Ours, nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_for_us(x, self.weight):
            return super().forward(x)
        options = {"normalized_shape": self.normalized_shape, "eps": self.eps, "axis": None}
        return eager(OPERATIONS["rms_norm"], options, in_torch_order(x), self.weight, None)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d): ...


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d): ...


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d): ...


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d): ...


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d): ...


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d): ...


# torch's classes and ours.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}
TORCHS = {ours: torchs for torchs, ours in OURS.items()}
