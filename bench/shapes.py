"""The cases that are measured: every normalization, direction, mode and layout, over many shapes.

The shapes stand in ``shapes.json``: those of oneDNN's benchdnn inputs, which are what networks use,
and odd ones (primes, one or three channels, one pixel, very long and very short rows).
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Shape = tuple[int, ...]

ROWS = ("layer_norm", "rms_norm")
WITH_STATISTICS = "forward with statistics"
BACKWARD = "backward"
INFERENCE = "inference"
CLASSES = (WITH_STATISTICS, BACKWARD, INFERENCE)

ITEM = 4
LINE = 64

_DATA = json.loads(Path(__file__).with_suffix(".json").read_text())
# What of benchdnn's lists the marks are measured on: every kind of shape, few of its repetitions.
_MARKS = {
    "batch_norm": ("1d", "2d", "3d", "topologies_small"),
    "group_norm": ("all", "sd"),
    "layer_norm": ("all",),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Parameters
    ----------
    operation : str
        The name of the function in cpunorm.
    direction : {"forward", "backward"}
    frozen : bool
        Whether batch norm uses given statistics: inference, and the backward pass of fine-tuning.
    layout : {"NCHW", "NHWC"}
        Where the channels lie. Two axes are NCHW.
    shape : tuple of int
        Channels first, whatever the layout; rows are normalized over the last axis.
    num_groups : int, optional
        For group norm.
    over_channels : bool
        Layer and RMS norm over axis 1, not the last; no suite has it, as no peer has.
    """

    operation: str
    direction: str
    frozen: bool
    layout: str
    shape: Shape
    num_groups: int | None = None
    over_channels: bool = False

    def __str__(self) -> str:
        parts = [self.operation, self.direction]
        if self.operation == "batch_norm":
            frozen = "inference" if self.direction == "forward" else "frozen"
            parts.append(frozen if self.frozen else "training")
        if len(self.shape) > 2 and self.operation not in ROWS:
            parts.append(self.layout)
        parts.append("x".join(map(str, self.shape)))
        if self.num_groups is not None:
            parts.append(f"G={self.num_groups}")
        if self.over_channels:
            parts.append("axis=1")
        return " ".join(parts)

    @property
    def kind(self) -> str:
        """The class of the case, one of `CLASSES`."""
        if self.direction == "backward":
            return BACKWARD
        return INFERENCE if self.frozen else WITH_STATISTICS

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * ITEM

    @property
    def channels_last(self) -> bool:
        """Whether the memory is laid out otherwise than `shape` says."""
        return self.layout == "NHWC"

    @property
    def axis(self) -> int:
        """The axis that weight and bias lie along, in memory."""
        last = self.channels_last or (self.operation in ROWS and not self.over_channels)
        return len(self.shape) - 1 if last else 1

    @property
    def memory_shape(self) -> Shape:
        """The shape as it lies in memory."""
        n, c, *spatial = self.shape
        return (n, *spatial, c) if self.channels_last else self.shape

    @property
    def features(self) -> int:
        """Length of weight and bias."""
        return self.memory_shape[self.axis]

    @property
    def spatial_size(self) -> int:
        """Pixels of one channel in one image, S."""
        return 1 if self.operation in ROWS else math.prod(self.shape[2:])

    @property
    def slab(self) -> int:
        """Bytes that one statistic is over: whole cache lines where channels lie side by side."""
        if self.operation in ROWS:
            return self.features * ITEM
        channels = 1 if self.num_groups is None else self.shape[1] // self.num_groups
        images = self.shape[0] if self.operation == "batch_norm" else 1
        last = self.channels_last or self.spatial_size == 1
        width = max(channels * ITEM, min(LINE, self.shape[1] * ITEM)) if last else channels * ITEM
        return images * self.spatial_size * width


def suite(name: str) -> list[Case]:
    """Return the cases of a suite: "quick", "marks" or "full"."""
    return list(dict.fromkeys({"quick": _quick, "marks": _marks, "full": _full}[name]()))


def _quick() -> Iterator[Case]:
    for shape in ((8, 512, 7, 7), (32, 64, 56, 56)):
        for layout in ("NCHW", "NHWC"):
            for case in _channels(shape, layout):
                forward = case.direction == "forward"
                if forward or not (case.frozen or case.operation == "instance_norm"):
                    yield case
    for shape in ((1, 768), (4096, 768)):
        yield from _rows(shape)
    yield Case("batch_norm", "forward", False, "NCHW", (7, 13, 17, 19))
    yield Case("instance_norm", "forward", False, "NHWC", (7, 13, 17, 19))
    yield Case("group_norm", "backward", False, "NCHW", (7, 13, 17, 19), 1)
    yield Case("batch_norm", "forward", False, "NHWC", (16, 3, 64, 64))
    yield Case("batch_norm", "forward", False, "NCHW", (20000, 8))
    yield Case("batch_norm", "backward", True, "NCHW", (128, 1000))
    yield Case("layer_norm", "forward", False, "NCHW", (4099, 33))
    yield Case("rms_norm", "forward", False, "NCHW", (65536, 64))


def _marks() -> Iterator[Case]:
    return _over({op: [s for n in names for s in _DATA[op][n]] for op, names in _MARKS.items()})


def _full() -> Iterator[Case]:
    return _over({op: [s for some in _DATA[op].values() for s in some] for op in _MARKS})


def _over(shapes: dict[str, list]) -> Iterator[Case]:
    """Yield every operation on the shapes it is given and on the odd ones."""
    odd = _DATA["odd"]
    for shape in _tuples(shapes["batch_norm"] + odd["channels"]):
        for layout in ("NCHW", "NHWC") if len(shape) > 2 else ("NCHW",):
            for case in _channels(shape, layout):
                if case.operation != "group_norm" or list(shape) in odd["channels"]:
                    yield case
    for shape, num_groups in shapes["group_norm"]:
        for layout in ("NCHW", "NHWC"):
            for direction in ("forward", "backward"):
                yield Case("group_norm", direction, False, layout, tuple(shape), num_groups)
    for shape in _tuples(shapes["layer_norm"] + odd["rows"]):
        yield from _rows(shape)


def _tuples(shapes: Iterable[list[int]]) -> Iterator[Shape]:
    return map(tuple, shapes)


def _channels(shape: Shape, layout: str) -> Iterator[Case]:
    """Yield the operations on channels that are defined for a shape."""
    pixels = math.prod(shape[2:])
    for direction in ("forward", "backward"):
        if shape[0] * pixels > 1:
            yield Case("batch_norm", direction, False, layout, shape)
        yield Case("batch_norm", direction, True, layout, shape)
        if pixels > 1:
            yield Case("instance_norm", direction, False, layout, shape)
        if len(shape) > 2 and pixels > 1:
            groups = math.gcd(shape[1], 32)
            yield Case("group_norm", direction, False, layout, shape, groups)


def _rows(shape: Shape) -> Iterator[Case]:
    for operation in ROWS:
        for direction in ("forward", "backward"):
            yield Case(operation, direction, False, "NCHW", shape)
