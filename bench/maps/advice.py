"""The data of `cpunorm.advise`, a compact part of a results file."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cpunorm._advice import FORMAT, Copies, Data, Key, Table, interpolate, place, usual_groups

from ..results import OURS, Row
from .table import Measured

Problem = tuple[int, int, int]

# With fewer points than these, nothing is learnt from leaving one out.
FEW, UNKNOWN_ERROR = 5, 2.0


def data(measured: Measured) -> Data:
    """Return the data that `text` ships."""
    return Data.of(json.loads(text(measured)))


def text(measured: Measured) -> str:
    """Return the file, a line per table."""
    tables = _tables(measured)
    shapes = sorted({problem for by_problem in tables.values() for problem in by_problem})
    copies = _copies(measured)
    parts = {
        "format": FORMAT,
        "machine": f"{measured.machine_line()}, {measured.date}",
        "shapes": shapes,
        "copies": [
            {"of": of, "elements": list(times), "times": list(times.values())}
            for of, times in sorted(copies.items())
        ],
        "tables": [
            _entry(key, by_problem, shapes, copies) for key, by_problem in sorted(tables.items())
        ],
    }
    return "{\n" + ",\n".join(f"{_json(k)}: {_lines(v)}" for k, v in parts.items()) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _lines(value: Any) -> str:
    entries = isinstance(value, list) and value and isinstance(value[0], dict)
    return "[\n" + ",\n".join(map(_json, value)) + "\n]" if entries else _json(value)


def _rows(measured: Measured) -> Iterator[tuple[Key, Problem, Row]]:
    for row in measured.rows:
        if row.pass_ != "backward_frozen":
            layout, problem = place(row.operation, row.layout, row.shape)
            of = row.operation, row.pass_, layout, row.dtype, row.threads, row.implementation
            yield Key(*of), problem, row


def _tables(measured: Measured) -> dict[Key, dict[Problem, list[Row]]]:
    """Return our rows, where there is a copy to compare them with."""
    tables: dict[Key, dict[Problem, list[Row]]] = {}
    for key, problem, row in _rows(measured):
        if row.implementation in OURS and row.share_of_copy is not None:
            tables.setdefault(key, {}).setdefault(problem, []).append(row)
    return tables


def _copies(measured: Measured) -> dict[tuple[str, str, int], dict[int, float]]:
    """Return the times of copies and triads by the number of elements."""
    found: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for key, problem, row in _rows(measured):
        if row.implementation in OURS and row.share_of_copy is not None:
            times = found.setdefault((key.traffic, key.dtype, key.threads), {})
            times.setdefault(math.prod(problem), []).append(row.share_of_copy * row.median)
    return {
        of: {
            elements: _microseconds(statistics.median(some)) for elements, some in sorted(t.items())
        }
        for of, t in found.items()
    }


def _microseconds(seconds: float) -> float:
    return float(f"{seconds * 1e6:.3g}")


def _entry(
    key: Key,
    by_problem: dict[Problem, list[Row]],
    shapes: list[Problem],
    copies: dict[tuple[str, str, int], dict[int, float]],
) -> dict[str, Any]:
    problems = sorted(by_problem)
    quartiles = [_quartiles(_usual_groups(by_problem[problem])) for problem in problems]
    times = [_microseconds(median) for _, median, _ in quartiles]
    below = [round(100 * (1 - low / median)) for low, median, _ in quartiles]
    above = [round(100 * (high / median - 1)) for _, median, high in quartiles]
    copy = copies[key.traffic, key.dtype, key.threads]
    table = Table(problems, times, below, above, 1.0, Copies(list(copy), list(copy.values())))
    return {
        "of": key,
        "error": _error(table),
        "shapes": [shapes.index(problem) for problem in problems],
        "times": times,
        "below": below,
        "above": above,
    }


def _quartiles(rows: Sequence[Row]) -> tuple[float, float, float]:
    blocks = [seconds for row in rows for seconds in row.seconds]
    low, median, high = map(float, np.quantile(blocks, (0.25, 0.5, 0.75)))
    return low, median, high


def _usual_groups(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the number of groups that is nearest to gcd(C, 32)."""

    def distance(row: Row) -> float:
        return abs(math.log(row.num_groups / usual_groups(row.shape[1]))) if row.num_groups else 0.0

    least = min(map(distance, rows))
    return [row for row in rows if distance(row) == least]


def _error(table: Table) -> float:
    """Return the factor within which nine of ten points come out when left out."""
    if len(table.ratios) < FEW:
        return UNKNOWN_ERROR
    off = []
    for i, (point, ratio) in enumerate(zip(table.logs, table.ratios, strict=True)):
        others = np.arange(len(table.ratios)) != i
        off.append(abs(interpolate(table.logs[others], table.ratios[others], point) - ratio))
    return round(math.exp(float(np.quantile(off, 0.9))), 2)
