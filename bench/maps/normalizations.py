"""Which normalization is cheapest by shape: one figure per pass and layout."""

from collections.abc import Iterator

from matplotlib import colormaps
from matplotlib.colors import LogNorm

from ..results import LAYOUTS, OPERATIONS, Row
from . import heat
from .style import OPERATIONS as LOOKS
from .style import Figure, panels
from .table import NAMES, PASSES, Measured, label, spread

Cells = dict[heat.Cell, dict[str, Row]]
COLUMNS = (
    *("N", "C", "HW", "layout", "pass", "normalization", "microseconds", "low", "high"),
    *("times_copy", "times_cheapest", "version"),
)
MOST = 4.0


def figures(measured: Measured) -> Iterator[Figure]:
    """Yield a figure per pass and layout that has planes."""
    for pass_ in PASSES:
        for layout in LAYOUTS:
            found = [_cells(measured, plane, pass_, layout) for plane in measured.planes]
            if any(len(some) > 1 for cells in found for some in cells.values()):
                yield _figure(measured, found, pass_, layout)


def _cells(measured: Measured, plane: heat.Plane, pass_: str, layout: str) -> Cells:
    cells: Cells = {}
    for operation in OPERATIONS:
        rows = measured.select(operation, pass_, layout)
        for cell, row in measured.on(plane, rows).items():
            cells.setdefault(cell, {})[operation] = row
    return cells


def winner(some: dict[str, Row]) -> tuple[str, str]:
    """Return who is fastest and by how much the next is behind; ≈ where the spread hides it."""
    names = sorted(some, key=lambda name: some[name].median)
    first = names[0]
    if len(names) == 1:
        return first, LOOKS[first][2]
    one, next_ = some[first], some[names[1]]
    sign = "≈" if spread(one)[1] >= spread(next_)[0] else ""
    return first, f"{LOOKS[first][2]}\n{sign}{next_.median / one.median:.2f}"


def _figure(measured: Measured, found: list[Cells], pass_: str, layout: str) -> Figure:
    operations = [o for o in OPERATIONS if any(o in some for c in found for some in c.values())]
    drawing, axes = panels(len(found), 1 + len(operations), 15.5, 0.9 + 2.9 * len(found))
    cmap, norm = colormaps["cividis_r"], LogNorm(1, MOST, clip=True)
    numbers, image = [], None
    for line, (plane, cells) in enumerate(zip(measured.planes, found, strict=True)):
        first, *others = axes[line]
        heat.frame(first, plane, f"the cheapest, next ÷ it\n({plane})")
        heat.winners(first, plane, {cell: winner(some) for cell, some in cells.items()}, LOOKS)
        least = {c: min(row.median for row in some.values()) for c, some in cells.items()}
        for one, operation in zip(others, operations, strict=True):
            letter = LOOKS[operation][2]
            heat.frame(one, plane, f"{NAMES[operation]} ({letter})\n÷ cheapest", inner=True)
            relative = {
                cell: (r := some[operation].median / least[cell], heat.number(r))
                for cell, some in cells.items()
                if operation in some
            }
            image = heat.ratios(one, plane, relative, cmap, norm)
        for cell, some in cells.items():
            at = {plane.fixed: plane.value, plane.x: plane.xs[cell[1]], plane.y: plane.ys[cell[0]]}
            for operation, row in some.items():
                numbers.append(
                    (
                        *(at["N"], at["C"], at["HW"], layout, pass_, operation),
                        *(_micro(s) for s in (row.median, *spread(row))),
                        row.share_of_copy and round(1 / row.share_of_copy, 2),
                        round(row.median / least[cell], 3),
                        row.version,
                    )
                )
    ticks = [1, 1.5, 2, 3, 4]
    heat.colour_bar(image, axes, "time ÷ the cheapest's", ticks, extend="max", pad=0.01)
    fixed = " and ".join(f"{p.fixed} = {label(p.fixed, p.value)}" for p in measured.planes)
    what = "layer and RMS norm over the channels of every position, group norm of gcd(C, 32) groups"
    title = f"Cheapest normalization: {pass_}, {layout}"
    drawing.suptitle(f"{title} (float32, {measured.threads_line}, cpunorm cython)")
    caption = (
        f"Equal tensors, {fixed}; {what}. Left: the cheapest, and by what factor the next one is "
        "slower (≈: the quartiles of the two overlap); heavy lines are the crossovers. Right: the "
        "time of each ÷ the cheapest's."
    )
    if pass_ == "inference":
        caption += " Batch norm uses given statistics here; the others have to find theirs."
    name = f"normalization-{pass_}-{layout.lower()}"
    return Figure(name, title, caption, drawing, COLUMNS, numbers)


def _micro(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")
