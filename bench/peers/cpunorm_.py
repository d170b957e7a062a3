"""cpunorm itself: one backend of one checkout."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import cpunorm

from ..shapes import Case
from . import EPS, MOMENTUM, Array, Call, Data


class Library:
    """One backend, writing into existing memory unless it is asked for fresh outputs.

    The backward functions always return fresh gradients.
    """

    def __init__(self, threads: int, backend: str = "auto", fresh: bool = False) -> None:
        cpunorm.set_num_threads(threads)
        self.options: dict[str, Any] = {} if backend == "auto" else {"backend": backend}
        self.fresh = fresh

    def forms(self, case: Case, data: Data) -> Iterator[Call]:
        """Yield the one call a user would write."""
        options = dict(self.options)
        if case.over_rows:
            if case.axis != len(case.shape) - 1:
                options["axis"] = case.axis
        elif case.channels_last:
            options["layout"] = case.layout
        if case.forward:
            if not self.fresh:
                options["out"] = data.out
            yield self._forward(case, data, options)
        else:
            _, stats = self._forward(case, data, {**options, "return_stats": True})()
            backward = getattr(cpunorm, f"{case.operation}_backward")
            middle: tuple[Any, ...] = ()
            after: tuple[Any, ...] = ()
            match case.operation:
                case "batch_norm":
                    after = (not case.frozen,)
                case "group_norm":
                    middle = (case.num_groups,)
                case "layer_norm" | "rms_norm":
                    middle = (case.features,)
            arguments = (data.grad, data.x, *middle, stats, data.weight, *after)
            yield partial(backward, *arguments, **options)

    def _forward(self, case: Case, data: Data, options: dict[str, Any]) -> Call:
        d, affine = data, (data.weight, data.bias)
        match case.operation:
            case "batch_norm":
                running = (d.mean.copy(), d.var.copy())
                arguments = (d.x, *running, *affine, not case.frozen, MOMENTUM, EPS)
            case "instance_norm":
                arguments = (d.x, None, None, *affine, True, MOMENTUM, EPS)
            case "group_norm":
                arguments = (d.x, case.num_groups, *affine, EPS)
            case "layer_norm":
                arguments = (d.x, case.features, *affine, EPS)
            case "rms_norm":
                arguments = (d.x, case.features, d.weight, EPS)
        return partial(getattr(cpunorm, case.operation), *arguments, **options)

    def answer(self, returned: Any, data: Data) -> Array:
        """Return y or the gradient of x."""
        return returned if data.case.forward else returned.x
