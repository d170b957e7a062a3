"""Functions timed in turn, in one process: for tables of before and after."""

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any


def seconds(functions: Sequence[Callable[[], Any]], blocks: int, calls: int = 1) -> list[float]:
    """Return the median time of a call of each, in blocks by turns, after one to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for block in range(blocks + 1):
        for function, found in zip(functions, times, strict=True):
            start = perf_counter()
            for _ in range(calls):
                function()
            if block:
                found.append((perf_counter() - start) / calls)
    return [statistics.median(found) for found in times]


def row(*cells: Any) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells: str) -> str:
    """Return the first two lines of one."""
    return f"{row(*cells)}\n{row(*['---'] * len(cells))}"


def compared(before: float, after: float, unit: float = 1e3) -> tuple[str, ...]:
    """Return two times, in milliseconds unless another unit is given, and their ratio, as cells."""
    times = (f"{t:.1f}" if t >= 10 else f"{t:.2f}" for t in (before * unit, after * unit))
    return *times, f"{before / after:.2f}"
