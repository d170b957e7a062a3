"""What can be measured: one normalization, in one pass, on one shape, layout and type."""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from .results import PASSES, pass_text, same_forward

Shape = tuple[int, ...]

ROWS = ("layer_norm", "rms_norm")
WITH_STATISTICS = "forward with statistics"
BACKWARD = "backward"
INFERENCE = "inference"
CLASSES = (WITH_STATISTICS, BACKWARD, INFERENCE)

LINE = 64

# Those of oneDNN's benchdnn inputs, which are what networks use; odd ones (primes, one or three
# channels, one pixel, very long and very short rows); and the edges that every test runs on.
SHAPES = json.loads(Path(__file__).with_suffix(".json").read_text())


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Parameters
    ----------
    operation : str
        The name of the function in cpunorm.
    pass_ : {"training", "inference", "backward", "backward_frozen"}
        All but batch norm compute the same in training and in inference; theirs is "inference".
        "backward_frozen" is batch norm with given statistics, as in fine-tuning.
    layout : {"NCHW", "NHWC"}
        Where the channels lie. Two axes are NCHW.
    shape : tuple of int
        Channels first, whatever the layout. Layer and RMS norm are over the channels: of every row
        of (M, D), of every pixel of (N, C, *spatial).
    num_groups : int, optional
        For group norm.
    dtype : {"float32", "float16", "bfloat16", "float64"}
        Of all arrays.
    offset : float
        What x lies around.
    source : {"grid", "models", "odd"}
        Which list the shape is from; `model`, the name of the list of a network.
    """

    operation: str
    pass_: str
    layout: str
    shape: Shape
    num_groups: int | None = None
    dtype: str = "float32"
    offset: float = 0.0
    source: str = field(default="odd", compare=False)
    model: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        assert self.pass_ in PASSES
        assert self.operation == "batch_norm" or self.pass_ in ("inference", "backward")

    def __str__(self) -> str:
        parts = [self.operation, pass_text(self.operation, self.pass_)]
        if len(self.shape) > 2:
            parts.append(self.layout)
        parts.append("x".join(map(str, self.shape)))
        if self.num_groups is not None:
            parts.append(f"G={self.num_groups}")
        if self.dtype != "float32":
            parts.append(self.dtype)
        if self.offset:
            parts.append(f"offset={self.offset:g}")
        return " ".join(parts)

    @property
    def forward(self) -> bool:
        """Whether y is computed, not gradients."""
        return self.pass_ in ("training", "inference")

    @property
    def same_forward(self) -> bool:
        """Whether it is a forward pass that is the same in training and in inference."""
        return same_forward(self.operation, self.pass_)

    @property
    def frozen(self) -> bool:
        """Whether batch norm uses given statistics."""
        inference = self.pass_ == "inference" and self.operation == "batch_norm"
        return inference or self.pass_ == "backward_frozen"

    @property
    def over_rows(self) -> bool:
        """Whether it is layer or RMS norm."""
        return self.operation in ROWS

    @property
    def kind(self) -> str:
        """The class of the case, one of `CLASSES`."""
        if not self.forward:
            return BACKWARD
        return INFERENCE if self.frozen else WITH_STATISTICS

    @cached_property
    def type(self) -> np.dtype:
        """The dtype, of NumPy or of ml_dtypes."""
        if self.dtype == "bfloat16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        itemsize = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return math.prod(self.shape) * itemsize

    @property
    def traffic(self) -> int:
        """The bytes that have to be moved at least: x to y, or x and its gradients."""
        return self.nbytes * (2 if self.forward else 3)

    @property
    def channels_last(self) -> bool:
        """Whether the memory is laid out otherwise than `shape` says."""
        return self.layout == "NHWC"

    @property
    def axis(self) -> int:
        """The axis that weight and bias lie along, in memory."""
        return len(self.shape) - 1 if self.channels_last else 1

    @property
    def memory_shape(self) -> Shape:
        """The shape as it lies in memory."""
        n, c, *spatial = self.shape
        return (n, *spatial, c) if self.channels_last else self.shape

    @property
    def features(self) -> int:
        """Length of weight and bias."""
        return self.shape[1]

    @property
    def spatial_size(self) -> int:
        """Pixels of one channel in one image, S."""
        return math.prod(self.shape[2:])

    @property
    def slab(self) -> int:
        """Bytes that one statistic is over: whole cache lines where channels lie side by side."""
        itemsize = self.nbytes // math.prod(self.shape)
        if self.over_rows:
            return self.features * itemsize
        channels = 1 if self.num_groups is None else self.features // self.num_groups
        images = self.shape[0] if self.operation == "batch_norm" else 1
        width = channels * itemsize
        if self.channels_last or self.spatial_size == 1:
            width = max(width, min(LINE, self.features * itemsize))
        return images * self.spatial_size * width
