"""Stands in for `_runs` where nothing was compiled."""

from ._frame import Array


class Runs:
    """The places of a mask (planes, places) that count."""

    def __init__(self, mask: Array, place_bytes: int) -> None:
        self.mask = mask

    def gather(self, a: Array, counted: Array, threads: int) -> None:
        """Copy what counts of `a` (planes, channels, places, width) to (channels, count, width)."""
        first = 0
        for plane, places in zip(a, self.mask, strict=True):
            taken = plane[:, places]
            counted[:, first : first + taken.shape[1]] = taken
            first += taken.shape[1]

    def scatter(self, counted: Array | None, a: Array, threads: int) -> None:
        """Copy `counted` to where it belongs in `a`, or leave that as it is; zeros elsewhere."""
        first = 0
        for plane, places in zip(a, self.mask, strict=True):
            plane[:, ~places] = 0
            if counted is not None:
                last = first + int(places.sum())
                plane[:, places] = counted[:, first:last]
                first = last
