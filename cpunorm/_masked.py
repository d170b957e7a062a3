"""Masks: the positions that count are gathered, solved like any others, and put back.

So a padded batch gives what its images without the padding give, whatever the operation, the
backend and the type, and no kernel knows of masks. What is gathered at a time is little enough to
stay in the caches, and what lies together is not even moved. Where no position needs another, all
are solved as if there were no mask, and zeros written over those that do not count.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from . import _dispatch, _threads
from ._frame import Array
from .backends import ARGUMENTS

try:
    from ._runs import Runs
except ImportError:
    from ._no_runs import Runs

# What the arguments of kernels are; the others are numbers.
READ = ("x", "residual", "grad_y", "grad_total")
WRITTEN = ("y", "grad_x")
STATISTICS = ("mean", "var", "rstd")
PARAMETERS = ("weight", "bias")
SUMS = ("grad_weight", "grad_bias")

MEASURING = ("normalize", "moments")  # to the others statistics are given

# About so much of an array is gathered at a time, where statistics of channels can be told apart.
PART_BYTES = 1 << 21


class Positions(NamedTuple):
    """Which positions of x count.

    x is seen as (images, planes, channels, places), or with its channels last as (images, places,
    channels). The images are solved one by one, since each has another number of positions that
    count; there is but one where a statistic covers the batch.
    """

    mask: Array  # (images, planes, places)
    channels_last: bool  # and the planes are one
    own_statistics: bool = False  # every position has statistics of its own
    own_parameters: bool = False  # every place has a weight and bias of its own

    def counts(self) -> Array:
        """Return how many positions of each image count."""
        counts: Array = self.mask.sum(axis=(1, 2))
        return counts

    def of(self, a: Array) -> Array:
        """View an array like x as (images, planes, channels, places, width)."""
        images, planes, places = self.mask.shape
        if self.channels_last:
            return a.reshape(images, 1, 1, places, -1)
        return a.reshape(images, planes, -1, places, 1)


def solve(
    positions: Positions, problem: str, verb: str, backend: str, nbytes: int, *arguments: Any
) -> None:
    """Do as `_dispatch.solve`, with nothing but the positions that count.

    Statistics of none are left as they are; everything else is zero where nothing counts.
    """
    given = dict(zip(ARGUMENTS[problem, verb], arguments, strict=True))
    images = (_Image(positions, index, given) for index in range(len(positions.mask)))
    if verb == "apply" or (verb == "normalize" and positions.own_statistics):
        _dispatch.solve(problem, verb, backend, nbytes, *arguments)
        for image in images:
            image.clear()
        for name in STATISTICS if positions.own_statistics else ():
            if given.get(name) is not None:
                given[name].reshape(positions.mask.shape)[~positions.mask] = 0
        return
    totals = {name: np.zeros(given[name].shape) for name in SUMS if given.get(name) is not None}
    for image in images:
        if image.places is not None or not image.count:
            image.clear()
        for part in image.parts(problem):
            taken = {name: image.take(name, a, part) for name, a in given.items()}
            if "y" in given and image.places is None:
                taken["y"] = taken["x"]  # which is gathered, and nobody else's
            _dispatch.solve(problem, verb, backend, image.nbytes(part), *taken.values())
            for name in image.arrays if image.places is None else ():
                if name in WRITTEN:
                    image.scatter(name, taken[name], part)
            for name, total in totals.items():
                image.add(total, taken[name], part)
    for name, total in totals.items():
        given[name][...] = total


class _Part(NamedTuple):
    """Some channels of an image, and the groups they make; all of them where it is not cut."""

    channels: slice = slice(None)
    groups: slice = slice(None)


class _Image:
    """What counts of one image; arrays like x are (planes, channels, places, width) here."""

    def __init__(self, positions: Positions, index: int, given: dict[str, Any]) -> None:
        self.positions = positions
        self.index = index
        self.given = given
        self.mask = mask = positions.mask[index]
        self.count = int(np.count_nonzero(mask))
        self.arrays = {
            name: positions.of(a)[index]
            for name, a in given.items()
            if a is not None and name in READ + WRITTEN
        }
        self.x = self.arrays["x"]
        self.runs = Runs(mask, self.x.shape[3] * self.x.itemsize)
        # The places that count, where a kernel can have them as they lie.
        self.places: slice | None = None
        if len(mask) == 1 and (positions.channels_last or self.count == mask.size):
            first = int(mask.argmax())
            if mask[0, first : first + self.count].all():
                self.places = slice(first, first + self.count)

    def parts(self, problem: str) -> Iterator[_Part]:
        """Yield what to solve at a time: some groups, where each has memory of its own."""
        if not self.count:
            return
        if problem != "channels_first":
            yield _Part()
            return
        groups = self.given["mean"].shape[1]
        channels = self.x.shape[1] // groups
        step = max(1, PART_BYTES // (self.count * self.x.itemsize * channels))
        for first in range(0, groups, step):
            last = min(first + step, groups)
            yield _Part(slice(first * channels, last * channels), slice(first, last))

    def nbytes(self, part: _Part) -> int:
        """Return how many bytes of x a kernel gets."""
        return int(self.x[:, part.channels].nbytes * self.count // self.mask.size)

    def take(self, name: str, a: Any, part: _Part) -> Any:
        """Return an argument of the kernel, made of that of the whole call."""
        if a is None:
            return None
        if name in self.arrays:
            return self._counted(name, part).reshape(self._shape_like(a))
        if name in STATISTICS:
            if self.positions.own_statistics:
                lain = a.reshape(self.positions.mask.shape)[self.index][self.mask]
                return lain.reshape((1,) * (a.ndim - 1) + (-1,))
            return a[self.index : self.index + 1][..., part.groups]
        if name in PARAMETERS + SUMS:
            if self.positions.own_parameters:
                a = a.reshape(self.mask.size, -1)[self.mask[0]].reshape(-1)
            a = a[part.channels]
            return np.empty_like(a) if name in SUMS else a
        return a

    def scatter(self, name: str, made: Array, part: _Part) -> None:
        """Put back what was made of an array like x, between zeros."""
        a = self.arrays[name][:, part.channels]
        _move(self.runs.scatter, made.reshape(a.shape[1], self.count, -1), a)

    def add(self, total: Array, made: Array, part: _Part) -> None:
        """Add the gradient of a parameter to that of the whole call."""
        if self.positions.own_parameters:
            total.reshape(self.mask.size, -1)[self.mask[0]] += made.reshape(self.count, -1)
        else:
            total[part.channels] += made

    def clear(self) -> None:
        """Write zeros where nothing counts."""
        for name in WRITTEN:
            if name in self.arrays:
                _move(self.runs.scatter, None, self.arrays[name])

    def _counted(self, name: str, part: _Part) -> Array:
        """Return what counts of an array like x, or room for it, as (channels, count, width)."""
        a = self.arrays[name][:, part.channels]
        if self.places is not None:
            where_it_lies: Array = a[0, :, self.places]
            return where_it_lies
        counted = np.empty((a.shape[1], self.count, a.shape[3]), a.dtype)
        if name in READ:
            _move(self.runs.gather, a, counted)
        return counted

    def _shape_like(self, a: Array) -> tuple[int, ...]:
        """Return the shape in which the problem has an array like x, reduced to what counts."""
        if self.positions.own_parameters:
            return 1, -1
        if a.ndim == 2:
            return self.count, -1
        return (1, self.count, -1) if self.positions.channels_last else (1, -1, self.count)


def _move(move: Callable[..., None], a: Array | None, b: Array) -> None:
    """Run a function of Runs on the threads that are free."""
    threads = _threads.take_threads(b.nbytes)
    try:
        move(a, b, threads)
    finally:
        _threads.give_back()
