"""The rows of a results file, found by what they are about."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cpunorm._advice import usual_groups

from ..results import COPY, PEERS, Results, Row, counted

# Our own implementation that others are compared with: what `auto` means nearly everywhere.
CPUNORM = "cython"
# What the maps compare; frozen statistics backwards is a matter of the tables.
PASSES = ("training", "inference", "backward")

NAMES = {
    "batch_norm": "batch norm",
    "layer_norm": "layer norm",
    "instance_norm": "instance norm",
    "group_norm": "group norm",
    "rms_norm": "RMS norm",
}


def size(nbytes: float) -> str:
    """Return a number of bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


def positions(row: Row) -> int:
    """Return the number of positions of a channel in an image."""
    return math.prod(row.shape[2:])


def nbytes(row: Row) -> int:
    """Return the bytes of x."""
    return math.prod(row.shape) * {"float64": 8, "float32": 4}.get(row.dtype, 2)


def spread(row: Row) -> tuple[float, float]:
    """Return the quartiles of a row's blocks."""
    low, high = np.quantile(row.seconds, (0.25, 0.75))
    return float(low), float(high)


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean, NaN of nothing."""
    values = list(values)
    return statistics.geometric_mean(values) if values else math.nan


@dataclass(frozen=True)
class Plane:
    """A section through the shapes: two of N, C and HW vary, the third is fixed.

    Parameters
    ----------
    x, y, fixed : {"N", "C", "HW"}
    value : int
        Of what is fixed.
    xs, ys : tuple of int
        The values along each axis, ascending.
    """

    x: str
    y: str
    fixed: str
    value: int
    xs: tuple[int, ...]
    ys: tuple[int, ...]

    def cell(self, row: Row) -> tuple[int, int] | None:
        """Return the (line, column) of a row, None if it is not on the plane."""
        at = axes(row)
        if at is None or at[self.fixed] != self.value:
            return None
        if at[self.x] not in self.xs or at[self.y] not in self.ys:
            return None
        return self.ys.index(at[self.y]), self.xs.index(at[self.x])

    def __str__(self) -> str:
        return f"{self.fixed} = {label(self.fixed, self.value)}"


def axes(row: Row) -> dict[str, int] | None:
    """Return N, C and HW of square images, None of anything else."""
    if len(row.shape) != 4 or row.shape[2] != row.shape[3]:
        return None
    return {"N": row.shape[0], "C": row.shape[1], "HW": row.shape[2] * row.shape[3]}


def label(axis: str, value: int) -> str:
    """Return a value on an axis for people: 49 positions are 7²."""
    return f"{math.isqrt(value)}²" if axis == "HW" else str(value)


class Measured:
    """A results file, and questions to it."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.rows = results.rows
        self.machine = results.machine
        self.threads = sorted({row.threads for row in self.rows})
        self.most_threads = max(self.threads, default=1)
        self._by_case: dict[tuple[object, ...], dict[str, Row]] = {}
        for row in self.rows:
            self._by_case.setdefault((row.case, row.threads), {})[row.implementation] = row

    @property
    def threads_line(self) -> str:
        """How many threads there are unless it is said."""
        return counted(self.most_threads, "thread")

    @property
    def date(self) -> str:
        """The day of the measurement."""
        return str(self.machine["date"])[:10]

    def machine_line(self) -> str:
        """Return the machine for people."""
        m = self.machine
        return f"{m['cpu']}, {m['cores']} cores, {m['instruction set']}"

    def versions_line(self) -> str:
        """Return whose versions were measured."""
        return ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())

    @cached_property
    def planes(self) -> list[Plane]:
        """The fullest section over C and HW, and the fullest over N and C."""
        grid = [a for row in self.rows if row.source == "grid" and (a := axes(row))]
        found = []
        for x, y, fixed in (("HW", "C", "N"), ("C", "N", "HW")):
            cells = {(a[fixed], a[x], a[y]) for a in grid}
            if not cells:
                continue
            value = Counter(cell[0] for cell in cells).most_common(1)[0][0]
            xs = tuple(sorted({cell[1] for cell in cells if cell[0] == value}))
            ys = tuple(sorted({cell[2] for cell in cells if cell[0] == value}))
            if len(xs) > 1 and len(ys) > 1:
                found.append(Plane(x, y, fixed, value, xs, ys))
        return found

    def implementations(self, some: Iterable[str]) -> list[str]:
        """Return those of some that have rows, in their order."""
        here = {row.implementation for row in self.rows}
        return [name for name in some if name in here]

    def select(
        self,
        operation: str | None = None,
        pass_: str | None = None,
        layout: str | None = None,
        dtype: str | None = "float32",
        implementation: str | None = CPUNORM,
        threads: int | None = 0,
        where: Callable[[Row], bool] = lambda row: True,
    ) -> list[Row]:
        """Return rows; None is any, no threads the most that were measured.

        A pass has the rows that serve it: the forward pass that training and inference share.
        """
        threads = self.most_threads if threads == 0 else threads
        return [
            row
            for row in self.rows
            if operation in (None, row.operation)
            and (pass_ is None or row.serves(pass_))
            and layout in (None, row.layout)
            and dtype in (None, row.dtype)
            and implementation in (None, row.implementation)
            and threads in (None, row.threads)
            and where(row)
        ]

    def on(self, plane: Plane, rows: Iterable[Row]) -> dict[tuple[int, int], Row]:
        """Return rows by their cell on a plane; group norm with the usual number of groups."""
        found: dict[tuple[int, int], Row] = {}
        for row in rows:
            usual = row.num_groups in (None, usual_groups(row.shape[1]))
            if usual and (cell := plane.cell(row)) is not None:
                found[cell] = row
        return found

    def beside(self, row: Row) -> dict[str, Row]:
        """Return everyone's rows on the case of one, with as many threads."""
        return self._by_case[row.case, row.threads]

    def best_peer(self, row: Row) -> Row | None:
        """Return the fastest peer on the case of a row."""
        theirs = [r for name, r in self.beside(row).items() if name in PEERS]
        return min(theirs, key=lambda r: r.median, default=None)

    def copy(self, row: Row) -> Row | None:
        """Return the copy beside a row."""
        return self.beside(row).get(COPY)
