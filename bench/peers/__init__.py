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

from ..shapes import ITEM, LINE, Case, Shape

Array = NDArray[np.float32]
Call = Callable[[], Any]

EPS = 1e-5
MOMENTUM = 0.1

PEERS = ("torch", "onnxruntime", "openvino", "jax")
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
        return _random(self.case.memory_shape, 0)

    @cached_property
    def grad(self) -> Array:
        """The gradient of the output."""
        return _random(self.case.memory_shape, 1)

    @cached_property
    def out(self) -> Array:
        """Memory for y or the gradient of x, already touched."""
        out = _aligned(self.case.memory_shape)
        out.fill(0)
        return out

    @cached_property
    def weight(self) -> Array:
        """The scale."""
        return _random((self.case.features,), 2)

    @cached_property
    def bias(self) -> Array:
        """The shift."""
        return _random((self.case.features,), 3)

    @cached_property
    def mean(self) -> Array:
        """The running mean."""
        return _random((self.case.features,), 4)

    @cached_property
    def var(self) -> Array:
        """The running variance."""
        return np.square(self.mean) + np.float32(1)


def _aligned(shape: Shape) -> Array:
    """Return memory that starts on a cache line."""
    nbytes = int(np.prod(shape)) * ITEM
    raw = np.empty(nbytes + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + nbytes].view(np.float32).reshape(shape)


def _random(shape: Shape, seed: int) -> Array:
    """Return normal numbers; they repeat after a million or so, which no kernel can tell."""
    array = _aligned(shape)
    flat = array.reshape(-1)
    some = np.random.default_rng(seed).standard_normal(min(flat.size, 1_000_003), np.float32)
    for start in range(0, flat.size, some.size):
        part = flat[start : start + some.size]
        part[:] = some[: part.size]
    return array
