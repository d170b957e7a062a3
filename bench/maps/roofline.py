"""How far from memory speed: GB/s by the size of x, with the copy's line and the caches."""

from collections.abc import Iterator
from statistics import median

from ..results import COPY, OPERATIONS
from .libraries import size_axis
from .style import OPERATIONS as LOOKS
from .style import Figure, common_legend, panels, scatter
from .table import NAMES, PASSES, Measured, nbytes

COLUMNS = ("shape", "layout", "pass", "operation", "bytes of x", "GB/s", "share of copy")
CACHES = ("l1d", "l2", "l3")


def figures(measured: Measured) -> Iterator[Figure]:
    """Yield the roofline."""
    if not measured.select():
        return
    drawing, panel = panels(1, len(PASSES), 13, 5.2, sharey=True)
    numbers = []
    for one, pass_ in zip(panel[0], PASSES, strict=True):
        for operation in OPERATIONS:
            rows = measured.select(operation, pass_)
            if rows:
                points = ([nbytes(r) for r in rows], [r.gb_per_s for r in rows])
                scatter(one, *points, LOOKS[operation], NAMES[operation])
            for r in (r for r in rows if r.pass_ == pass_):
                share = r.share_of_copy and round(r.share_of_copy, 3)
                shape = "x".join(map(str, r.shape))
                speed = float(f"{r.gb_per_s:.3g}")
                numbers.append((shape, r.layout, pass_, operation, nbytes(r), speed, share))
        copies: dict[int, list[float]] = {}
        for row in measured.select(pass_=pass_, implementation=COPY):
            copies.setdefault(nbytes(row), []).append(row.gb_per_s)
        if copies:
            line = [(size, median(some)) for size, some in sorted(copies.items())]
            name = "copy (backward: triad)"
            one.plot(*zip(*line, strict=True), color="black", lw=1.5, label=name, zorder=1)
        one.set_yscale("log", base=2)
        one.yaxis.set_major_formatter("{x:g}")
        one.set_title(pass_)
        size_axis(one)
        for cache in CACHES:
            if measured.machine.get(cache):
                # x and its result (and gradient) share the cache.
                one.axvline(measured.machine[cache], color="0.4", lw=1, ls=":")
                one.text(
                    measured.machine[cache], 1.0, f" {cache.upper()}", fontsize=8, color="0.3",
                    transform=one.get_xaxis_transform(), va="top",
                )  # fmt: skip
    panel[0][0].set_ylabel("GB/s (the least that has to be moved ÷ time)")
    common_legend(drawing, panel[0])
    title = "Roofline: how far from memory speed"
    caption = (
        "Bytes that have to be moved at least ÷ time, in float32 and both layouts, by the size of "
        "x; the line is a parallel copy of as many bytes (in backward passes the triad, which "
        "reads two arrays and writes one). Dotted: the sizes of the caches (L1 and L2 of one core)."
    )
    yield Figure("roofline", title, caption, drawing, COLUMNS, numbers)
