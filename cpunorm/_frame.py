"""From shape and strides to a canonical view: how an array is read where it lies."""

import math
from functools import lru_cache
from typing import Any, NamedTuple, overload

import numpy as np

try:
    from ._memory import empty_like as _empty_like
except ImportError:
    _empty_like = np.empty_like

Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]


class Frame(NamedTuple):
    """How arrays of x's shape are read: transposed by `perm`, then reshaped to `shape`.

    The permutation is chosen so that for x, and for whatever lies as x does, the transposed array
    is C-contiguous and the reshape is a view. Anything that lies otherwise is copied.
    """

    problem: str
    perm: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]  # the normalised axes, in the order in which the kernel runs over them
    kept: tuple[int, ...]  # the others, outermost first
    kept_shape: tuple[int, ...]
    dense: bool  # whether x has no gaps

    def new(self, x: Array) -> Array:
        """Return an uninitialised array with x's strides if x is dense, in C order otherwise."""
        return _empty_like(x) if self.dense else np.empty(x.shape, x.dtype)

    @overload
    def lay(self, a: Array) -> Array: ...
    @overload
    def lay(self, a: None) -> None: ...
    def lay(self, a: Array | None) -> Array | None:
        """Return `a` in its canonical shape."""
        if a is None:
            return None
        a = a.transpose(self.perm)
        if not (a.flags.c_contiguous and a.flags.aligned):
            a = np.array(a, order="C")
        return a.reshape(self.shape)

    def place(self, out: Array | None) -> Array | None:
        """Return where a kernel is to write `out`: its own memory if that lies as x does."""
        if out is None:
            return None
        lain = out.transpose(self.perm)
        if lain.flags.c_contiguous and lain.flags.aligned:
            return lain.reshape(self.shape)
        return np.empty(self.shape, out.dtype)

    def deliver(self, placed: Array | None, out: Array | None) -> None:
        """Bring what a kernel wrote to where the caller wants it."""
        if placed is not None and out is not None and not np.may_share_memory(placed, out):
            lain = out.transpose(self.perm)
            lain[...] = placed.reshape(lain.shape)

    def lay_mask(self, mask: Array, channel_axis: int) -> Array:
        """Return a mask, which has x's axes but for that of the channels, as x is read."""
        order = [i - (i > channel_axis) for i in self.perm if i != channel_axis]
        return np.ascontiguousarray(mask.transpose(order))

    def lay_statistic(self, a: Array | None) -> Array | None:
        """Return a statistic, one axis per kept axis of x, as rows or columns has it."""
        if a is None:
            return None
        rank = sorted(self.kept)
        lain = np.ascontiguousarray(a.transpose([rank.index(i) for i in self.kept]))
        lain = lain if lain.flags.aligned else lain.copy()
        return lain.reshape(self.shape[:1] if self.problem == "rows" else self.shape[::2])

    def unlay_statistic(self, a: Array) -> Array:
        """Return a statistic of rows or columns with one axis per kept axis of x."""
        order = sorted(range(len(self.kept)), key=self.kept.__getitem__)
        return a.reshape(self.kept_shape).transpose(order)


def axis_frame(x: Array, axes: tuple[int, ...]) -> Frame:
    """View x as rows (M, D) or columns (N, D, S) with `axes` as D."""
    return _axis_frame(x.shape, x.strides, x.itemsize, axes)


@lru_cache(maxsize=256)
def _axis_frame(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axes: tuple[int, ...]
) -> Frame:
    order, dense = _memory_order(shape, strides, itemsize)
    before, inside, after = _split(order, axes)
    frame = _frame(shape, axes, before, inside, after, dense)
    outer, size, inner = frame.shape
    if size == 1:
        # Statistics of one value each: side by side they fill vectors.
        return frame._replace(problem="columns", shape=(1, 1, outer * inner))
    if inner == 1:
        return frame._replace(problem="rows", shape=(outer, size))
    return frame._replace(problem="columns")


def ordered_frame(x: Array, axes: tuple[int, ...]) -> Frame:
    """View x as rows (M, D) with `axes` as D, in the very order in which they are named."""
    order, dense = _memory_order(x.shape, x.strides, x.itemsize)
    before = [i for i in range(x.ndim) if i in order and i not in axes]
    inside = [i for i in axes if i in order]
    frame = _frame(x.shape, axes, before, inside, [], dense)
    return frame._replace(problem="rows", shape=frame.shape[:2])


def channel_frame(x: Array, channel_axis: int, per_image: bool) -> Frame:
    """View x as channels_first (N, C, S) or channels_last (N, S, C).

    With `per_image` N is the first axis; otherwise whatever lies outside the channels.
    """
    return _channel_frame(x.shape, x.strides, x.itemsize, channel_axis, per_image)


@lru_cache(maxsize=256)
def _channel_frame(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    channel_axis: int,
    per_image: bool,
) -> Frame:
    order, dense = _memory_order(shape, strides, itemsize)
    before, inside, after = _split(order, (channel_axis,))
    images = [i for i in order if i == 0]
    if not inside and order[: len(images)] == images:
        # One channel lies anywhere: here it makes the images planes.
        before, after = images, order[len(images) :]
    if per_image:
        image = [0] if shape[0] != 1 else []
        within = before[len(image) :]
        if before[: len(image)] != image or (within and after):
            before, after = image, [i for i in order if i not in (0, channel_axis)]
    frame = _frame(shape, (channel_axis,), before, inside, after, dense)
    outer, channels, inner = frame.shape
    outermost = max(shape[0], 1) if per_image else 1
    if inner == 1 and not (per_image and outer == outermost):
        lain = (outermost, outer // outermost, channels)
        return frame._replace(problem="channels_last", shape=lain)
    return frame._replace(problem="channels_first")


def _memory_order(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[list[int], bool]:
    """Return the axes longer than 1, outermost in memory first, and whether x is dense.

    An array with gaps is copied anyway, so its axes are left in their logical order.
    """
    axes = [i for i, n in enumerate(shape) if n != 1]
    order = sorted(axes, key=lambda i: -strides[i])
    expected = itemsize
    for i in reversed(order):
        if strides[i] != expected:
            return axes, False
        expected *= shape[i]
    return order, True


def _split(order: list[int], axes: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Split a memory order into what lies before, inside and after `axes`.

    An order in which `axes` do not lie side by side is given up, at the price of a copy, for the
    nearest one in which they come last.
    """
    inside = [i for i in order if i in axes]
    first = order.index(inside[0]) if inside else len(order)
    if order[first : first + len(inside)] != inside:
        return [i for i in order if i not in axes], inside, []
    return order[:first], inside, order[first + len(inside) :]


def _frame(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    before: list[int],
    inside: list[int],
    after: list[int],
    dense: bool,
) -> Frame:
    # Axes of length 1 lie anywhere: put them where they disturb nothing.
    short = [i for i, n in enumerate(shape) if n == 1]
    inside = inside + [i for i in short if i in axes]
    before = [i for i in short if i not in axes] + before
    parts = (before, inside, after)
    sizes = tuple(math.prod(shape[i] for i in part) for part in parts)
    kept = (*before, *after)
    return Frame(
        problem="",
        perm=(*before, *inside, *after),
        shape=sizes,
        axes=tuple(inside),
        kept=kept,
        kept_shape=tuple(shape[i] for i in kept),
        dense=dense,
    )
