"""Masks: the positions that count are gathered, solved like any others, and put back.

So a padded batch gives what its images without the padding give, whatever the operation, the
backend and the type, and no kernel knows of masks. Adjoining positions of an image with its
channels last are a smaller image already, and not even moved.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from . import _dispatch
from ._frame import Array
from .backends import ARGUMENTS

# What the arguments of kernels are; the others are numbers.
READ = ("x", "residual", "grad_y", "grad_total")
WRITTEN = ("y", "total", "grad_x")
STATISTICS = ("mean", "var", "rstd")
PARAMETERS = ("weight", "bias")
SUMS = ("grad_weight", "grad_bias")

MEASURING = ("normalize", "moments")  # to the others statistics are given


class Positions(NamedTuple):
    """Which positions of x count.

    x is seen as (images, places, channels), or as (images, planes, channels, places). The images
    are solved one by one, since each has another number of positions that count; there is but one
    where a statistic covers the batch, or no more than the channels of a position.
    """

    mask: Array  # (images, planes, places)
    channels_last: bool  # and the planes are one
    own_statistics: bool = False  # every position has statistics of its own
    own_parameters: bool = False  # every place has a weight and bias of its own

    def counts(self) -> Array:
        """Return how many positions of each image count."""
        counts: Array = self.mask.sum(axis=(1, 2))
        return counts


def solve(
    positions: Positions, problem: str, verb: str, backend: str, nbytes: int, *arguments: Any
) -> None:
    """Do as `_dispatch.solve`, with nothing but the positions that count.

    Statistics of none are left as they are; everything else is zero where nothing counts.
    """
    given = dict(zip(ARGUMENTS[problem, verb], arguments, strict=True))
    totals = {name: np.zeros(given[name].shape) for name in SUMS if given.get(name) is not None}
    for index in range(len(positions.mask)):
        image = _Image(positions, index)
        if image.count:
            taken = {name: image.take(name, a) for name, a in given.items()}
            share = nbytes * image.count // positions.mask.size
            _dispatch.solve(problem, verb, backend, share, *taken.values())
            for name, a in taken.items():
                if a is not None and (name not in STATISTICS or verb in MEASURING):
                    image.put(name, a, totals.get(name, given[name]))
        for name in WRITTEN:
            if given.get(name) is not None:
                image.clear(given[name])
    for name, total in totals.items():
        given[name][...] = total


class _Image:
    """What counts of one image."""

    def __init__(self, positions: Positions, index: int) -> None:
        self.positions = positions
        self.index = index
        self.mask = positions.mask[index]
        self.spans = tuple(_spans(self.mask))
        self.count = int(np.count_nonzero(self.mask))

    def take(self, name: str, a: Any) -> Any:
        """Return an argument of the kernel, made of that of the whole call."""
        if a is None:
            return None
        if name in READ + WRITTEN:
            return self._gather(a, name in READ).reshape(self._shape_like(a))
        if name in STATISTICS:
            if not self.positions.own_statistics:
                return a[self.index : self.index + 1]
            return a.reshape(self.mask.shape)[self.mask].reshape((1,) * (a.ndim - 1) + (-1,))
        if name in PARAMETERS + SUMS and self.positions.own_parameters:
            return a.reshape(self.mask.size, -1)[self.mask[0]].reshape(-1)
        return np.empty_like(a) if name in SUMS else a

    def put(self, name: str, made: Any, a: Any) -> None:
        """Bring what the kernel has made of an argument to where it belongs."""
        if name in WRITTEN and not np.may_share_memory(made, a):
            image = self._of(a)
            if self.positions.channels_last:
                image[self.spans[0].where] = made.reshape(self.count, -1)
            else:
                for n, where, there in self.spans:
                    image[n][:, where] = made.reshape(-1, self.count)[:, there]
        elif name in STATISTICS and self.positions.own_statistics:
            a.reshape(self.mask.shape)[self.mask] = made.reshape(-1)
        elif name in SUMS:
            if self.positions.own_parameters:
                a.reshape(self.mask.size, -1)[self.mask[0]] += made.reshape(self.count, -1)
            else:
                a += made

    def clear(self, a: Array) -> None:
        """Write zeros where nothing counts."""
        image = self._of(a)
        for n, where, _ in _spans(~self.mask):
            if self.positions.channels_last:
                image[where] = 0
            else:
                image[n][:, where] = 0

    def _of(self, a: Array) -> Array:
        """View the image in an array like x: (places, channels) or (planes, channels, places)."""
        images, planes, places = self.positions.mask.shape
        shape = (places, -1) if self.positions.channels_last else (planes, -1, places)
        image: Array = a.reshape(images, *shape)[self.index]
        return image

    def _shape_like(self, a: Array) -> tuple[int, ...]:
        """Return the shape in which the problem has an array like x, reduced to what counts."""
        if self.positions.own_parameters:
            return 1, -1
        if a.ndim == 2:
            return self.count, -1
        return (1, self.count, -1) if self.positions.channels_last else (1, -1, self.count)

    def _gather(self, a: Array, filled: bool) -> Array:
        """Return (V, channels) or (channels, V) of an array like x, or room for as much."""
        image = self._of(a)
        if self.positions.channels_last:
            where = self.spans[0].where
            if filled or isinstance(where, slice):
                return image[where]
            return np.empty((self.count, image.shape[1]), a.dtype)
        gathered = np.empty((image.shape[1], self.count), a.dtype)
        if filled:
            for n, where, there in self.spans:
                gathered[:, there] = image[n][:, where]
        return gathered


class _Span(NamedTuple):
    """Some places of a plane, and which they are among all that are meant."""

    plane: int
    where: slice | Array
    there: slice


def _spans(mask: Array) -> Iterator[_Span]:
    """Yield the places of each plane of a mask (planes, places), as a slice where they adjoin."""
    first = 0
    for n, plane in enumerate(mask):
        indices = np.flatnonzero(plane)
        if indices.size:
            last = first + indices.size
            start, stop = int(indices[0]), int(indices[-1]) + 1
            adjoin = stop - start == indices.size
            yield _Span(n, slice(start, stop) if adjoin else indices, slice(first, last))
            first = last
