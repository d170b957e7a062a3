"""Which of cpunorm's backends is fastest by shape: one figure per pass, both layouts."""

from collections.abc import Iterator

from matplotlib.patches import Patch

from ..results import LAYOUTS, OPERATIONS, OURS, Row
from . import heat
from .style import IMPLEMENTATIONS as LOOKS
from .style import SHOWN, Figure, panels
from .table import NAMES, PASSES, Measured, Plane, axes

COLUMNS = ("N", "C", "HW", "layout", "pass", "operation", "backend", "microseconds", "÷ fastest")


def figures(measured: Measured) -> Iterator[Figure]:
    """Yield a figure per pass, on the first plane."""
    if len(measured.implementations(OURS)) < 2:
        return
    for plane in measured.planes[:1]:
        for pass_ in PASSES:
            if measured.on(plane, measured.select(pass_=pass_)):
                yield _figure(measured, plane, pass_)


def _figure(measured: Measured, plane: Plane, pass_: str) -> Figure:
    drawing, panel = panels(len(LAYOUTS), len(OPERATIONS), 13, 6.6)
    numbers = []
    for line, layout in enumerate(LAYOUTS):
        for column, operation in enumerate(OPERATIONS):
            one = panel[line][column]
            heat.frame(one, plane, f"{NAMES[operation]}, {layout}", inner=column > 0)
            cells = {}
            for cell, row in measured.on(plane, measured.select(operation, pass_, layout)).items():
                some = {n: r for n, r in measured.beside(row).items() if n in OURS}
                cells[cell] = _winner(some)
                numbers += _numbers(some, pass_)
            heat.winners(one, plane, cells, LOOKS)
    names = measured.implementations(OURS)
    drawing.legend(
        handles=[Patch(color=LOOKS[n][0], label=f"{LOOKS[n][2]}: {SHOWN[n]}") for n in names],
        loc="outside upper right", ncols=len(names),
    )  # fmt: skip
    title = f"Fastest backend: {pass_}"
    drawing.suptitle(f"{title} (float32, {measured.threads_line}, {plane})", x=0.3)
    caption = (
        "Which of cpunorm's backends is fastest, and by what factor the next one is slower, at "
        f"{plane}. This is the evidence for the backend that `auto` takes."
    )
    return Figure(f"backend-{pass_}", title, caption, drawing, COLUMNS, numbers)


def _winner(some: dict[str, Row]) -> tuple[str, str]:
    first, *others = sorted(some, key=lambda name: some[name].median)
    behind = f"\n{heat.number(some[others[0]].median / some[first].median)}" if others else ""
    return first, LOOKS[first][2] + behind


def _numbers(some: dict[str, Row], pass_: str) -> Iterator[tuple[object, ...]]:
    least = min(row.median for row in some.values())
    for name, row in some.items():
        at = axes(row) or {}
        yield (
            *(at["N"], at["C"], at["HW"], row.layout, pass_, row.operation, name),
            *(float(f"{row.median * 1e6:.4g}"), round(row.median / least, 3)),
        )
