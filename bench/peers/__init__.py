"""The libraries that are compared, each by the fastest calls it has for a case.

A peer is a class with the attributes of `Peer`. Its `forms` yields calls without arguments, every
reasonable way the library has to compute the case into the layout asked for; whoever measures
keeps the fastest. It is made in a process of its own, so that thread pools do not meet.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..results import PEERS, PLAIN
from ..shapes import LINE, Case, Shape

Array = NDArray[Any]
Call = Callable[[], Any]

__all__ = ["EPS", "MEMORY", "MOMENTUM", "OURS", "PEERS", "PLAIN", "Data", "Peer", "load", "missing"]

EPS = 1e-5
MOMENTUM = 0.1

# Of a result, whole units of what a statistic is over, and about so many values, are looked at.
SAMPLED_VALUES = 2**17
FEWEST_SAMPLED = 2

MEMORY = "memory"
OURS = "cpunorm"
# The module here, and the packages it needs.
_MODULES = {
    "torch": ("torch_", "torch"),
    "onnxruntime": ("onnxruntime_", "onnxruntime", "onnx"),
    "openvino": ("openvino_", "openvino", "onnx"),
    "jax": ("jax_", "jax"),
    MEMORY: ("memory", "numba"),
    OURS: ("cpunorm_", "cpunorm"),
    PLAIN: ("plain", "numpy"),
}


class Peer(Protocol):
    """What a library has to answer."""

    def forms(self, case: Case, data: "Data") -> Iterator[Call]:
        """Yield the ways to compute a case, none where the library cannot."""

    def answer(self, returned: Any, data: "Data") -> Array | None:
        """Return y, or the gradient of x, as it lies in memory, from what a call returned."""


def missing(name: str) -> str | None:
    """Return a package that a peer needs and that is not installed."""
    _, *packages = _MODULES[name]
    return next((p for p in packages if importlib.util.find_spec(p) is None), None)


def load(name: str, threads: int, **options: Any) -> Peer:
    """Return a peer that computes on so many threads."""
    module = importlib.import_module(f".{_MODULES[name][0]}", __package__)
    peer: Peer = module.Library(threads, **options)
    return peer


@dataclass
class Data:
    """The arrays of a case, made when they are asked for, the same in every process."""

    case: Case

    @cached_property
    def x(self) -> Array:
        """The input."""
        return _random(self.case, self.case.memory_shape, 0, self.case.offset)

    @cached_property
    def grad(self) -> Array:
        """The gradient of the output."""
        return _random(self.case, self.case.memory_shape, 1)

    @cached_property
    def out(self) -> Array:
        """Memory for y or the gradient of x, already touched."""
        out = _aligned(self.case.memory_shape, self.case.type)
        out.fill(0)
        return out

    @cached_property
    def weight(self) -> Array:
        """The scale."""
        return self._parameter(2)

    @cached_property
    def bias(self) -> Array:
        """The shift."""
        return self._parameter(3)

    @cached_property
    def mean(self) -> Array:
        """The running mean."""
        return self._parameter(4)

    @cached_property
    def var(self) -> Array:
        """The running variance."""
        return (np.square(self.mean) + 1).astype(self.case.type)

    def _parameter(self, seed: int) -> Array:
        return _random(self.case, (self.case.features,), seed)

    @cached_property
    def sampled(self) -> tuple[int, Array]:
        """An axis in memory, and the places on it whose results are looked at.

        Between two places there is no statistic: they are channels in batch norm, else images.
        """
        axis = self.case.axis if self.case.operation == "batch_norm" else 0
        length = self.case.memory_shape[axis]
        count = max(FEWEST_SAMPLED, SAMPLED_VALUES * length // self.x.size)
        return axis, np.unique(np.linspace(0, length - 1, min(count, length)).astype(int))

    def sample(self, array: Array) -> Array:
        """Return the part of an array of x's shape that is looked at."""
        axis, places = self.sampled
        return np.take(array, places, axis)


def _aligned(shape: Shape, dtype: np.dtype) -> Array:
    """Return memory that starts on a cache line."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _random(case: Case, shape: Shape, seed: int, offset: float = 0.0) -> Array:
    """Return normal numbers; they repeat after a million or so, which no kernel can tell."""
    array = _aligned(shape, case.type)
    flat = array.reshape(-1)
    some = np.random.default_rng(seed).standard_normal(min(flat.size, 1_000_003), np.float32)
    if offset:
        some = some + np.float64(offset)
    for start in range(0, flat.size, some.size):
        part = flat[start : start + some.size]
        part[:] = some[: part.size]
    return array
