"""The named cases: operations in every mode, on shapes that tests and benchmarks share.

A `Case` says which public function is called, on which shape of x and with which arguments that
are not arrays; `Case.arrays` makes the arrays. Sizes stand around the vector lengths (1, 15, 16,
17, 31, 32, 33), at primes, at the edges (one image, one channel, one pixel), beyond one block of a
kernel (some thousand values) and beyond L2.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np

from bench.shapes import SHAPES

CHANNEL_OPS = ("batch_norm", "instance_norm", "group_norm")
ROW_OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
OPS = CHANNEL_OPS + ROW_OPS
LAYOUTS = ("NCHW", "NHWC")


@dataclass(frozen=True, eq=False)
class Case:
    """One call: `op(x of shape, **kwargs)`, plus the arrays the operation takes."""

    op: str
    shape: tuple[int, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """batch_norm-2x3x17x33-training=True-layout=NHWC, the name of the test."""
        options = (f"{k}={v}".replace(" ", "") for k, v in self.kwargs.items())
        return "-".join([self.op, "x".join(map(str, self.shape)), *options])

    @property
    def is_channel_op(self) -> bool:
        return self.op in CHANNEL_OPS

    @property
    def is_rms(self) -> bool:
        return "rms" in self.op

    @property
    def adds(self) -> bool:
        """Whether residual is added before the normalization (and is not optional)."""
        return self.op.startswith("add_")

    @property
    def takes_running_statistics(self) -> bool:
        return self.op in ("batch_norm", "instance_norm")

    @property
    def is_frozen(self) -> bool:
        """Whether the statistics are the running ones."""
        if self.op == "batch_norm":
            return not self.kwargs.get("training", False)
        return not self.kwargs.get("use_input_stats", True)

    @property
    def channel_axis(self) -> int | None:
        if not self.is_channel_op:
            return None
        return 1 if self.kwargs["layout"] == "NCHW" else -1

    @property
    def groups(self) -> int:
        """The number of groups of channels; batch and instance norm have one per channel."""
        return self.kwargs.get("num_groups", *self.parameter_shape)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of weight and bias."""
        if self.is_channel_op:
            return (self.shape[self.channel_axis],)
        normalized = self.kwargs["normalized_shape"]
        return (normalized,) if isinstance(normalized, int) else tuple(normalized)

    @property
    def stats_shape(self) -> tuple[int, ...]:
        """The shape of the statistics, whatever the layout."""
        if self.is_channel_op:
            per_image = self.op != "batch_norm" and not self.is_frozen
            return (self.shape[0], self.groups) if per_image else (self.groups,)
        axis = self.kwargs.get("axis")
        trailing = list(range(-len(self.parameter_shape), 0))
        return tuple(np.delete(self.shape, trailing if axis is None else axis).tolist())

    def arrays(
        self,
        dtype: str = "float32",
        parameters: str | None = None,
        *,
        weight: bool = True,
        bias: bool = True,
        residual: bool = False,
        running: bool = True,
    ) -> dict[str, np.ndarray]:
        """The arrays of the call by argument name: offset mean, random weight, always the same.

        `parameters` is the dtype of weight, bias and running statistics where it is not x's.
        """
        rng = np.random.default_rng(crc32(str(self).encode()))
        parameters = np.dtype(parameters or dtype)

        def draw(shape, scale=1.0, offset=0.0, dtype=parameters):
            return (scale * rng.standard_normal(shape) + offset).astype(dtype)

        made = {"x": draw(self.shape, 1.5, 2.0, dtype)}
        if weight:
            made["weight"] = draw(self.parameter_shape, 0.5, 1.0)
        if bias and not self.is_rms:
            made["bias"] = draw(self.parameter_shape)
        if residual or self.adds:
            made["residual"] = draw(self.shape, 1.0, -0.5, dtype)
        if self.takes_running_statistics and (running or self.is_frozen):
            made["running_mean"] = draw(self.parameter_shape, 0.5, 2.0)
            made["running_var"] = np.square(draw(self.parameter_shape)) + parameters.type(0.5)
        return made

    def grad_y(self, dtype: str = "float32") -> np.ndarray:
        """A random upstream gradient, with an offset."""
        rng = np.random.default_rng(crc32(str(self).encode()) + 1)
        return (rng.standard_normal(self.shape) + 0.25).astype(dtype)


def in_layout(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """An (N, C, *spatial) shape as the layout has it."""
    return shape if layout == "NCHW" else (shape[0], *shape[2:], shape[1])


def channel_cases(shape: tuple[int, ...], groups: tuple[int, ...]) -> Iterator[Case]:
    """Every mode of batch, instance and group norm that an (N, C, *spatial) shape allows."""
    spatial = math.prod(shape[2:])
    modes: list[tuple[str, dict[str, Any]]] = [
        *([("batch_norm", {"training": True})] if shape[0] * spatial > 1 else []),
        ("batch_norm", {"training": False}),
        *([("instance_norm", {})] if spatial > 1 else []),
        ("instance_norm", {"use_input_stats": False}),
        *(("group_norm", {"num_groups": g}) for g in groups),
    ]
    for layout in LAYOUTS:
        for op, kwargs in modes:
            yield Case(op, in_layout(shape, layout), {**kwargs, "layout": layout})


def row_cases(shape: tuple[int, ...], normalized: Any, axis: Any = None) -> Iterator[Case]:
    """Layer and RMS norm, alone and after an addition, over `axis` (None: the trailing axes)."""
    for op in ROW_OPS:
        yield Case(op, shape, {"normalized_shape": normalized, "axis": axis})


# From the one list of shapes: (N, C, *spatial) and the numbers of groups.
CHANNEL_SHAPES: dict[tuple[int, ...], tuple[int, ...]] = {
    tuple(shape): tuple(groups) for shape, groups in SHAPES["edges"]["channels"]
}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# (shape, normalized_shape, axis)
ROW_SHAPES: tuple[tuple[tuple[int, ...], Any, Any], ...] = tuple(
    (tuple(shape), normalized, _as_tuple(axis))
    for shape, normalized, axis in SHAPES["edges"]["rows"]
)

CASES: tuple[Case, ...] = (
    *(case for shape, groups in CHANNEL_SHAPES.items() for case in channel_cases(shape, groups)),
    *(case for shape in ROW_SHAPES for case in row_cases(*shape)),
)

# Every operation in every mode and on every canonical problem, once and small: for the tests that
# vary something else.
SMALL_CASES: tuple[Case, ...] = (
    *channel_cases((3, 6, 5, 7), (2,)),
    *channel_cases((9, 6), (3,)),
    *row_cases((6, 35), 35),
    *row_cases((2, 6, 5, 7), 6, 1),
)

# Images so small, or so few of short planes, that groups of theirs are taken another way.
SMALL_IMAGES: tuple[Case, ...] = tuple(
    case
    for shape, groups in (
        ((20, 3, 5, 5), (1, 3)),
        ((5, 8, 7, 7), (1, 2)),
        ((4, 40, 6, 6), (1,)),
        ((400, 2, 7, 7), (1,)),
        ((66, 3, 15, 20), (1,)),
        ((1, 40, 3, 3), (4,)),
        ((2, 40, 2, 4), (4,)),
        ((8, 480, 3, 3), (32,)),
        ((3, 1400, 3, 3), (28,)),
        ((2, 2048, 2, 3), (32,)),
    )
    for case in channel_cases(shape, groups)
    if case.op in ("group_norm", "instance_norm")
)

# Small enough for one finite difference per element.
TINY_CASES: tuple[Case, ...] = (
    *channel_cases((3, 4, 2, 3), (1, 2, 4)),
    *channel_cases((5, 4), (2,)),
    *row_cases((4, 6), 6),
    *row_cases((2, 4, 3), 4, 1),
    *row_cases((2, 3, 4), (4, 2), (2, 0)),
)
