"""NumPy as people write it: the formulas over the right axes, in the type of x, on one thread."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ..shapes import Case
from . import EPS, MOMENTUM, Array, Call, Data


class Library:
    """The formulas, and for gradients those that are taught with them."""

    def __init__(self, threads: int) -> None:
        # NumPy's elementwise loops and sums have one thread, whatever is asked for.
        self.threads = 1

    def forms(self, case: Case, data: Data) -> Iterator[Call]:
        """Yield the one call, none in bfloat16, which NumPy does not have."""
        if case.dtype == "bfloat16":
            return
        problem = _Problem(case, data)
        yield partial(problem.forward if case.forward else problem.backward)

    def answer(self, returned: Any, data: Data) -> Array:
        """Return y or the gradient of x."""
        return (returned if data.case.forward else returned[0]).reshape(data.case.memory_shape)


class _Problem:
    """A case with its arrays, in groups and broadcastable."""

    def __init__(self, case: Case, data: Data) -> None:
        shape, axis = list(case.memory_shape), case.axis
        channels = [1] * len(shape)
        channels[axis] = case.features
        if case.operation == "group_norm":
            split = [case.num_groups, case.features // case.num_groups]
            shape[axis : axis + 1] = channels[axis : axis + 1] = split
        match case.operation:
            case "batch_norm":
                axes = [a for a in range(len(shape)) if a != axis]
            case "layer_norm" | "rms_norm":
                axes = [axis]
            case _:
                axes = [a for a in range(1, len(shape)) if a != axis]
        self.case = case
        self.axes = tuple(axes)
        self.shared = tuple(a for a, n in enumerate(channels) if n == 1)
        self.x = data.x.reshape(shape)
        parameters = (data.weight, data.bias, data.mean.copy(), data.var.copy())
        self.weight, self.bias, self.mean, self.var = (p.reshape(channels) for p in parameters)
        if not case.forward:
            self.grad = data.grad.reshape(shape)
            # What a forward pass keeps.
            mean, var = self._statistics()
            self.x_hat, self.std = (self.x - mean) / np.sqrt(var + EPS), np.sqrt(var + EPS)

    def _statistics(self) -> tuple[Any, Array]:
        if self.case.frozen:
            return self.mean, self.var
        if self.case.operation == "rms_norm":
            return 0, np.mean(self.x**2, self.axes, keepdims=True)
        return self.x.mean(self.axes, keepdims=True), self.x.var(self.axes, keepdims=True)

    def forward(self) -> Array:
        """Return y; in training, move the running statistics."""
        mean, var = self._statistics()
        if self.case.operation == "rms_norm":
            return self.x / np.sqrt(var + EPS) * self.weight
        if self.case.pass_ == "training":
            count = self.x.size // self.case.features
            self.mean = (1 - MOMENTUM) * self.mean + MOMENTUM * mean
            self.var = (1 - MOMENTUM) * self.var + MOMENTUM * var * (count / (count - 1))
        return (self.x - mean) / np.sqrt(var + EPS) * self.weight + self.bias

    def backward(self) -> tuple[Array, Array, Array]:
        """Return the gradients of x, weight and bias."""
        grad, x_hat = self.grad, self.x_hat
        grad_weight = (grad * x_hat).sum(self.shared)
        grad_bias = grad.sum(self.shared)
        grad_hat = grad * self.weight
        if self.case.frozen:
            return grad_hat / self.std, grad_weight, grad_bias
        grad_x = grad_hat - x_hat * (grad_hat * x_hat).mean(self.axes, keepdims=True)
        if self.case.operation != "rms_norm":
            grad_x -= grad_hat.mean(self.axes, keepdims=True)
        return grad_x / self.std, grad_weight, grad_bias
