"""The main job's results as text, in lines of at most 100 columns."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from .checks import Check
from .pipeline import Run
from .timing import LAYOUTS, PLAIN, Row, Table

NAME, CELL = 23, 8  # widths of columns
NAME_OF_CHECK = 38


class Text:
    """Headings and the best of a row, set apart as the terminal allows."""

    def __init__(self, ansi: bool) -> None:
        self.ansi = ansi

    def bold(self, text: str) -> str:
        """Set text in bold where the terminal can."""
        return f"\x1b[1m{text}\x1b[0m" if self.ansi else text

    def heading(self, text: str) -> str:
        """Return the title of a section."""
        return f"\n{self.bold(text)}\n"

    def best(self, text: str, width: int) -> str:
        """Right-align the best of a row, in bold or else with an asterisk."""
        return self.bold(text.rjust(width)) if self.ansi else f"*{text}".rjust(width)


def warmup(seconds: float) -> Iterator[str]:
    """Say what Numba's compiler took."""
    yield ""
    yield f"Numba's kernels took {seconds:.0f} s to compile or to load; compiled ones stay on disk."


def checks(found: Sequence[Check], seconds: dict[str, float], text: Text) -> Iterator[str]:
    """Describe how close every operation came to the oracle."""
    yield text.heading(
        "Against the float64 oracle: largest error in float32, relative to 1 + |expected|"
    )
    backends = list(seconds)
    yield " " * NAME_OF_CHECK + "".join(b.rjust(11) for b in backends) + "  allowed"
    rows: dict[str, dict[str, Check]] = {}
    for check in found:
        rows.setdefault(check.operation, {})[check.backend] = check
    for operation, row in rows.items():
        cells = [f"{row[b].error:.1e}" if row[b].problem is None else "error" for b in backends]
        ok = all(check.ok for check in row.values())
        yield (
            operation.ljust(NAME_OF_CHECK)
            + "".join(cell.rjust(11) for cell in cells)
            + f"{next(iter(row.values())).tolerance:9.0e}  {'ok' if ok else text.bold('FAIL')}"
        )
    for check in found:
        if check.problem is not None:
            yield f"{check.backend}, {check.operation}: {check.problem}"
    failed = sum(not check.ok for check in found)
    times = ", ".join(f"{b} {s:.1f} s" for b, s in seconds.items())
    cases = sum(check.cases for check in found)
    yield f"{failed or 'None'} of {len(found)} failed; {cases} calls in all ({times})"


def pipeline(runs: Sequence[Run], text: Text) -> Iterator[str]:
    """Describe the network, layer by layer."""
    yield text.heading("A small network on real images: NumPy formulas against cpunorm")
    yield (
        f"{'':24}{'output':>18}{'NumPy ms':>12}{'cpunorm ms':>13}{'faster':>9}"
        f"{'max |difference|':>20}"
    )
    for run in runs:
        yield run.images
        for layer in run.layers:
            ours = "same code" if layer.cpunorm is None else f"{layer.cpunorm:.3f}"
            ratio = "" if layer.cpunorm is None else f"{layer.numpy / layer.cpunorm:.1f}x"
            yield (
                f"  {layer.layer:<22}{_shape(layer.shape):>18}{layer.numpy:12.3f}{ours:>13}"
                f"{ratio:>9}{layer.difference:20.1e}"
            )
        both = [(layer.numpy, layer.cpunorm) for layer in run.layers if layer.cpunorm is not None]
        numpy, cpunorm = (sum(times) for times in zip(*both, strict=True))
        yield (
            f"  {'normalizations':<22}{'':18}{numpy:12.3f}{cpunorm:13.3f}"
            f"{f'{numpy / cpunorm:.1f}x':>9}"
        )
        yield f"  {run.outcome}"


def timing(tables: Sequence[Table], backends: Sequence[str], text: Text) -> Iterator[str]:
    """Describe the times."""
    yield text.heading("Times in microseconds, float32, result written into existing memory")
    mark = "in bold" if text.ansi else "with *"
    yield f"Best of each row and layout {mark}; plain: the formula in NumPy, without cpunorm."
    columns = (*backends, PLAIN)
    for table in tables:
        yield ""
        yield text.bold(
            f"{_shape(table.shape)}, {_size(table.nbytes)}; memory copy {_micro(table.copy)} µs"
        )
        rows: dict[str, dict[str, Row]] = {}
        for row in table.rows:
            rows.setdefault(row.operation, {})[row.layout] = row
        layouts = [layout for layout in LAYOUTS if any(layout in row for row in rows.values())]
        head = [_head(layout if len(layouts) > 1 else "", columns) for layout in layouts]
        yield " " * NAME + "".join(head)
        for operation, by_layout in rows.items():
            cells = (_cells(by_layout.get(layout), columns, text) for layout in layouts)
            yield operation.ljust(NAME) + "".join(cells)


def disturbed(busy: float, text: Text) -> Iterator[str]:
    """Warn of times that other programs have spoilt."""
    yield ""
    yield text.bold(
        f"Other programs kept {busy:.1f} CPUs busy meanwhile: the times of anything that"
    )
    yield text.bold("uses threads are too long. Try an idle machine, or OMP_NUM_THREADS=1.")


def _head(layout: str, columns: Sequence[str]) -> str:
    names = ["plain" if name == PLAIN else name for name in columns]
    return layout.rjust(5) + "".join(name.rjust(CELL) for name in names)


def _cells(row: Row | None, columns: Sequence[str], text: Text) -> str:
    if row is None:
        return " " * (5 + CELL * len(columns))
    cells = []
    for name in columns:
        cell = _micro(row.times[name])
        cells.append(text.best(cell, CELL) if name == row.best else cell.rjust(CELL))
    return " " * 5 + "".join(cells)


def summary(
    tables: Sequence[Table], backends: Sequence[str], ok: bool, seconds: float, text: Text
) -> Iterator[str]:
    """Say in a few lines what the rest amounts to."""
    yield text.heading("In short")
    rows = [(table, row) for table in tables for row in table.rows]
    ours = [min(row.times[b] for b in backends) for _, row in rows]
    wins = Counter(row.best for _, row in rows)
    faster = [row.times[PLAIN] / t for (_, row), t in zip(rows, ours, strict=True)]
    copies = [t / table.copy for (table, _), t in zip(rows, ours, strict=True)]
    yield f"Every operation agrees with the oracle: {'yes' if ok else text.bold('NO')}"
    yield f"Plain NumPy takes {_spread(faster)} times as long as the best backend"
    yield f"The best backend takes {_spread(copies)} times as long as a memory copy"
    yield f"Fastest of {len(rows)} rows: " + ", ".join(f"{n} {wins[n]}" for n in (*backends, PLAIN))
    hurried = sum(table.blocks == 1 for table in tables)
    if 0 < hurried < len(tables):
        yield f"The last {hurried} shapes were measured once only, to save time (see --repeat)"
    yield f"All this took {seconds:.0f} s"


def _spread(ratios: Sequence[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{statistics.median(ratios):.1f} (median; {low:.1f} to {high:.1f})"


def _size(nbytes: int) -> str:
    if nbytes < 2**10:
        return f"{nbytes} B"
    return f"{nbytes / 2**10:.0f} KiB" if nbytes < 2**20 else f"{nbytes / 2**20:.1f} MiB"


def _micro(microseconds: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(max(microseconds, 1e-3))))
    return f"{microseconds:.{min(digits, 2)}f}"


def _shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
