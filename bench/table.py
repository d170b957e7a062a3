"""The table at the end of a run: who wins, by how much, and how near to the speed of memory."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from .results import COPY, OPERATIONS, OURS, Row, counted, pass_text

# More cases than these are summed up by operation, pass, layout and type.
MOST_LINES = 80
WORST = 5

Found = dict[str, Row]


def summary(console: Console, rows: Iterable[Row], document: Mapping[str, Any]) -> None:
    """Print the table of a run, and who is missing from it."""
    facts = document["machine_info"]["cpunorm"]
    by_case: dict[tuple[Any, ...], Found] = {}
    for row in sorted(rows, key=lambda row: (OPERATIONS.index(row.operation), row.text)):
        by_case.setdefault((*row.case, row.threads), {})[row.implementation] = row
    several = len({key[-1] for key in by_case}) > 1
    table = (_by_group if len(by_case) > MOST_LINES else _by_case)(by_case, several)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = counted(facts["threads"], "thread")
    table.title = f"{facts['cpu']}, {facts['instruction set']}, {threads}"
    table.caption = f"{versions}, {facts['date'][:10]}"
    console.print(table)
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in document["absent"]:
        if entry["reason"].startswith("wrong"):
            reasons.setdefault((entry["implementation"], "wrong"), []).append(entry["case"])
    for (name, reason), cases in reasons.items():
        console.print(f"{name} is {reason} on {len(cases)}: {', '.join(cases[:WORST])}")


def ratios(above: Row, below: Row) -> tuple[float, float, float]:
    """Return one time ÷ another, block by block: the median and the quartiles around it."""
    pairs = [a / b for a, b in zip(above.seconds, below.seconds, strict=False)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return middle, low, high


def fastest(rows: Iterable[Row]) -> Row | None:
    """Return the fastest row."""
    return min(rows, key=lambda row: row.median, default=None)


def verdict(found: Found) -> tuple[Row, Row | None]:
    """Return who wins, and the fastest of the other side: cpunorm, or everyone else."""
    ours = fastest(row for name, row in found.items() if name in OURS)
    others = fastest(row for name, row in found.items() if name not in (*OURS, COPY))
    pair = sorted((row for row in (ours, others) if row), key=lambda row: row.median)
    return pair[0], pair[1] if len(pair) > 1 else None


def _text(middle: float, low: float, high: float, unit: str = "×") -> str:
    digits = 2 if unit == "×" else 0
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f}–{high:.{digits}f})"


def _share(found: Found, row: Row) -> str:
    """Return the share of the speed of memory, in per cent."""
    if COPY not in found:
        return "–"
    return _text(*(100 * ratio for ratio in ratios(found[COPY], row)), "%")


def _by_case(by_case: Mapping[tuple[Any, ...], Found], several: bool) -> Table:
    table = Table("case", "winner", "margin", "over", "of memory speed")
    for key, found in by_case.items():
        if set(found) <= {COPY}:
            continue
        first, second = verdict(found)
        shape = "×".join(map(str, first.shape))
        parts = [first.operation, pass_text(first.operation, first.pass_), first.layout, shape]
        parts += [f"G={first.num_groups}"] * (first.num_groups is not None)
        parts += [first.dtype] * (first.dtype != "float32")
        parts += [counted(key[-1], "thread")] * several
        winner, margin, over = f"[bold]{first.implementation}[/]", "–", "–"
        if second:
            middle, low, high = ratios(second, first)
            margin, over = _text(middle, low, high), second.implementation
            if low <= 1:
                winner = f"no difference ({first.implementation})"
        table.add_row(" ".join(parts), winner, margin, over, _share(found, first))
    return table


def _by_group(by_case: Mapping[tuple[Any, ...], Found], several: bool) -> Table:
    table = Table(
        "operation", "cpunorm wins", "fastest other ÷ cpunorm", "slowest case", "of memory speed"
    )
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for key, found in by_case.items():
        row = next(iter(found.values()))
        parts = [row.operation, pass_text(row.operation, row.pass_), row.layout, row.dtype]
        parts += [counted(key[-1], "thread")] * several
        groups.setdefault(tuple(parts), []).append(found)
    for parts, group in sorted(groups.items()):
        leads, shares = [], []
        for found in group:
            ours = fastest(row for name, row in found.items() if name in OURS)
            others = fastest(row for name, row in found.items() if name not in (*OURS, COPY))
            if ours and others:
                leads.append((ratios(others, ours)[0], "×".join(map(str, ours.shape))))
            if ours and COPY in found:
                shares.append(100 * ratios(found[COPY], ours)[0])
        if leads:
            values = [lead for lead, _ in leads]
            wins = f"{sum(lead > 1 for lead in values)} of {len(values)}"
            lead = _text(statistics.geometric_mean(values), min(values), max(values))
        else:
            wins, lead = "–", "–"
        share = _text(statistics.geometric_mean(shares), min(shares), max(shares), "%")
        table.add_row(
            " ".join(parts), wins, lead, min(leads)[1] if leads else "–", share if shares else "–"
        )
    return table
