"""Compare two results files: what became slower or faster, beyond noise.

The interval of a ratio is a bootstrap over the blocks of both runs. Blocks of one run lie within a
second and cannot show how a machine drifts from one run to the next; the scatter of all ratios
can. So a difference is one that leaves the interval and that scatter behind.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from .results import COPY, Results, Row, counted, read
from .run import Parser

CONFIDENCE = 0.99
RESAMPLES = 999
# Deviations of a normal distribution that its median absolute deviation makes; the scatter that is
# still noise.
OF_MAD, DEVIATIONS = 1.4826, 3.0

# Up to so many are all shown.
FEW = 40

SAME, SLOWER, FASTER = "no difference", "slower", "faster"


@dataclass(frozen=True)
class Change:
    """How a row changed: the ratio of the medians, new ÷ old, and its interval."""

    old: Row
    new: Row
    ratio: float
    low: float
    high: float

    def verdict(self, noise: float) -> str:
        """Return what is to be said, where ratios within `noise` of one are noise."""
        if self.low > 1 and self.ratio > noise:
            return SLOWER
        return FASTER if self.high < 1 and self.ratio < 1 / noise else SAME


def _ratio(new: NDArray[np.float64], old: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.median(new, axis=axis) / np.median(old, axis=axis)


def change(old: Row, new: Row) -> Change:
    """Return how a row changed."""
    ratio = new.median / old.median
    if min(len(old.seconds), len(new.seconds)) < 2:
        return Change(old, new, ratio, 0.0, math.inf)
    interval = bootstrap(
        (new.seconds, old.seconds),
        _ratio,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Change(old, new, ratio, float(interval.low), float(interval.high))


def _keyed(results: Results) -> dict[tuple, Row]:
    return {(r.case, r.implementation, r.threads): r for r in results.rows}


def changes(old: Results, new: Results) -> list[Change]:
    """Return the changes of all rows that both have."""
    before, after = _keyed(old), _keyed(new)
    return [change(before[key], after[key]) for key in before if key in after]


def noise(found: Sequence[Change]) -> float:
    """Return the factor by which ratios scatter around their median."""
    logs = [math.log(c.ratio) for c in found]
    middle = statistics.median(logs)
    return math.exp(DEVIATIONS * OF_MAD * statistics.median(abs(x - middle) for x in logs))


def main(argv: Sequence[str]) -> int:
    """Print what changed; return 1 if anything became slower."""
    parser = Parser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("old", metavar="OLD.json")
    parser.add_argument("new", metavar="NEW.json")
    args = parser.parse_args(argv)
    old, new = read(args.old), read(args.new)
    found = changes(old, new)
    if not found:
        parser.error(f"{args.old} and {args.new} have no case in common")
    console = Console()
    factor = noise(found)
    table = Table("case", "implementation", "new ÷ old", f"{CONFIDENCE:.0%} interval", "")
    counts = {SLOWER: 0, FASTER: 0, SAME: 0}
    for one in sorted(found, key=lambda c: -c.ratio):
        verdict = one.verdict(factor)
        counts[verdict] += 1
        if verdict != SAME or len(found) <= FEW:
            style = {SLOWER: "red", FASTER: "green"}.get(verdict)
            row = one.new
            table.add_row(
                row.text,
                f"{row.implementation}, {counted(row.threads, 'thread')}",
                f"{one.ratio:.2f}",
                f"{one.low:.2f}–{one.high:.2f}",
                verdict,
                style=style,
            )
    for key in ("cpu", "instruction set", "versions"):
        if old.machine.get(key) != new.machine.get(key):
            console.print(f"{key}: {old.machine.get(key)} → {new.machine.get(key)}")
    if table.row_count:
        console.print(table)
    for path, one, other in ((args.old, old, new), (args.new, new, old)):
        if alone := _keyed(one).keys() - _keyed(other).keys():
            cases = counted(len({case for case, *_ in alone}), "case")
            console.print(f"only in {path}: {counted(len(alone), 'time')} of {cases}")
    copies = [c.ratio for c in found if c.new.implementation == COPY]
    if copies:
        console.print(f"the copy itself, new ÷ old: {statistics.geometric_mean(copies):.2f}")
    console.print(
        f"{counts[SLOWER]} slower, {counts[FASTER]} faster, {counts[SAME]} no difference "
        f"of {len(found)}; changes below {factor - 1:.0%} are the noise between the runs"
    )
    return 1 if counts[SLOWER] else 0
