"""PyTorch, eager: functions of the C extension, and the backward kernels without autograd."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..shapes import Case
from . import EPS, MOMENTUM, Array, Call, Data

Tensor = torch.Tensor
ALL = [True, True, True]
aten = torch.ops.aten


class Library:
    """Torch in inference mode; NHWC is its channels_last memory format."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.mode = torch.inference_mode()
        self.mode.__enter__()

    def forms(self, case: Case, data: Data) -> Iterator[Call]:
        """Yield the calls torch has for a case."""
        make: Callable[..., Iterator[Call]] = getattr(self, f"_{case.operation}")
        x = self._tensor(data.x, case)
        grad = None if case.forward else self._tensor(data.grad, case)
        return make(case, data, x, grad, _shared(data.weight), _shared(data.bias))

    def answer(self, returned: Any, data: Data) -> Array:
        """Return the first result, channels where they lie in memory."""
        tensor = returned if isinstance(returned, Tensor) else returned[0]
        if not data.case.over_rows:
            tensor = tensor.reshape(data.case.shape)
            tensor = tensor.movedim(1, -1) if data.case.channels_last else tensor
        if data.case.dtype == "bfloat16":
            return tensor.view(torch.int16).numpy().view(data.case.type)
        return tensor.numpy()

    @staticmethod
    def _tensor(array: Array, case: Case) -> Tensor:
        tensor = _shared(array)
        if not case.channels_last or case.over_rows:
            return tensor
        # It knows no channels_last of three axes: an image of one line is the same memory.
        return (tensor.unsqueeze(1) if tensor.ndim == 3 else tensor).movedim(-1, 1)

    def _batch_norm(self, case: Case, data: Data, x, grad, w, b) -> Iterator[Call]:
        running = (_shared(data.mean.copy()), _shared(data.var.copy()))
        training = not case.frozen
        if grad is None:
            yield partial(torch.batch_norm, x, w, b, *running, training, MOMENTUM, EPS, False)
            out = (self._tensor(data.out, case), *(w.new_empty(case.features) for _ in range(2)))
            native = torch.native_batch_norm
            yield partial(native, x, w, b, *running, training, MOMENTUM, EPS, out=out)
        else:
            _, *saved = torch.native_batch_norm(x, w, b, *running, training, MOMENTUM, EPS)
            backward = aten.native_batch_norm_backward.default
            yield partial(backward, grad, x, w, *running, *saved, training, EPS, ALL)

    def _instance_norm(self, case: Case, data: Data, x, grad, w, b) -> Iterator[Call]:
        yield from self._groups(case, x, grad, w, b, case.shape[1])
        n, c = case.shape[:2]
        if grad is None:
            yield partial(torch.instance_norm, x, w, b, None, None, True, MOMENTUM, EPS, False)
        elif not case.channels_last:
            # What its instance norm does: batch norm of one image with N·C channels.
            x, grad = (t.reshape(1, n * c, *case.shape[2:]) for t in (x, grad))
            w, b = w.repeat(n), b.repeat(n)
            _, *saved = torch.native_batch_norm(x, w, b, None, None, True, MOMENTUM, EPS)
            backward = aten.native_batch_norm_backward.default

            def through_batch_norm() -> tuple[Tensor, ...]:
                dx, dw, db = backward(grad, x, w, None, None, *saved, True, EPS, ALL)
                return dx, dw.view(n, c).sum(0), db.view(n, c).sum(0)

            yield through_batch_norm

    def _group_norm(self, case: Case, data: Data, x, grad, w, b) -> Iterator[Call]:
        assert case.num_groups is not None
        return self._groups(case, x, grad, w, b, case.num_groups)

    def _groups(self, case: Case, x, grad, w, b, num_groups: int) -> Iterator[Call]:
        if grad is None:
            yield partial(torch.group_norm, x, num_groups, w, b, EPS, False)
            return
        sizes = (*case.shape[:2], case.spatial_size, num_groups)
        _, *saved = torch.native_group_norm(x, w, b, *sizes, EPS)
        backward = aten.native_group_norm_backward.default
        yield partial(backward, grad, x, *saved, w, *sizes, ALL)

    def _layer_norm(self, case: Case, data: Data, x, grad, w, b) -> Iterator[Call]:
        over = (case.features,)
        if grad is None:
            yield _on_rows(case, torch.layer_norm, (x,), (over, w, b, EPS, False))
            if case.axis == 1 and x.ndim > 2:
                # As ConvNeXt has it for channels first.
                yield partial(_written_out, x, *(p.view(-1, *[1] * (x.ndim - 2)) for p in (w, b)))
            return
        rows = x if case.axis == x.ndim - 1 else x.movedim(1, -1)
        _, *saved = torch.native_layer_norm(rows, over, w, b, EPS)
        backward = aten.native_layer_norm_backward.default
        yield _on_rows(case, backward, (grad, x), (over, *saved, w, b, ALL))

    def _rms_norm(self, case: Case, data: Data, x, grad, w, b) -> Iterator[Call]:
        over = (case.features,)
        if grad is None:
            yield _on_rows(case, torch.rms_norm, (x,), (over, w, EPS))
            return
        # It has no kernel for this on a CPU: its autograd walks the graph of the forward pass.
        with torch.inference_mode(False):
            inputs = (x.clone().requires_grad_(), w.clone().requires_grad_())
            y = _on_rows(case, torch.rms_norm, inputs[:1], (over, inputs[1], EPS))()
            grad = grad.clone()

        def through_graph() -> tuple[Tensor, ...]:
            with torch.inference_mode(False):
                dx, dw = torch.autograd.grad(y, inputs, grad, retain_graph=True)
                return dx.contiguous(), dw

        yield through_graph


def _shared(array: Array) -> Tensor:
    """Return a tensor on an array's memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _on_rows(
    case: Case, function: Call, arrays: tuple[Tensor, ...], others: tuple[Any, ...]
) -> Call:
    """Return a call that needs the channels last, and moves them there and back if they are not."""
    if case.axis == len(case.shape) - 1:
        return partial(function, *arrays, *others)

    def moved() -> Tensor | tuple[Tensor, ...]:
        returned = function(*(array.movedim(1, -1) for array in arrays), *others)
        if isinstance(returned, Tensor):
            return returned.movedim(-1, 1).contiguous()
        return returned[0].movedim(-1, 1).contiguous(), *returned[1:]

    return moved


def _written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    var = centred.pow(2).mean(1, keepdim=True)
    return weight * (centred / torch.sqrt(var + EPS)) + bias
