"""cpunorm beside other libraries: by shape, over all cases, on rows, and where it loses."""

import math
from collections.abc import Iterator

from matplotlib import colormaps

from ..results import LAYOUTS, OPERATIONS, PEERS, Row
from . import heat
from .style import IMPLEMENTATIONS as LOOKS
from .style import Figure, common_legend, panels, ratio_axis, scatter
from .table import NAMES, PASSES, Measured, Plane, geometric_mean, nbytes, size, spread

COLUMNS = (
    *("shape", "num_groups", "layout", "pass", "operation", "dtype", "source", "cpunorm µs"),
    *("best peer", "its version", "its µs", "speed-up", "within spread"),
)
MOST = 8.0


def lead(measured: Measured, row: Row) -> tuple[float, Row] | None:
    """Return the best peer ÷ cpunorm on the case of a row, and the peer."""
    peer = measured.best_peer(row)
    return None if peer is None else (peer.median / row.median, peer)


def lost(measured: Measured) -> list[tuple[float, Row, Row, bool]]:
    """Return where a peer is faster, the worst first: ratio, ours, theirs, whether it is clear."""
    found = []
    for row in measured.select(dtype=None):
        if (leads := lead(measured, row)) and leads[0] < 1:
            ratio, peer = leads
            found.append((ratio, row, peer, spread(peer)[1] < spread(row)[0]))
    return sorted(found, key=lambda entry: entry[0])


def figures(measured: Measured) -> Iterator[Figure]:
    """Yield a figure per pass on the first plane, one of all cases, and one of rows."""
    if not measured.implementations(PEERS):
        return
    for plane in measured.planes[:1]:
        for pass_ in PASSES:
            if measured.on(plane, measured.select(pass_=pass_)):
                yield _map(measured, plane, pass_)
    yield _all(measured)
    yield from _rows(measured)


def _map(measured: Measured, plane: Plane, pass_: str) -> Figure:
    drawing, panel = panels(len(LAYOUTS), len(OPERATIONS), 13, 6.6)
    numbers, image = [], None
    for line, layout in enumerate(LAYOUTS):
        for column, operation in enumerate(OPERATIONS):
            one = panel[line][column]
            heat.frame(one, plane, f"{NAMES[operation]}, {layout}", inner=column > 0)
            cells = {}
            for cell, row in measured.on(plane, measured.select(operation, pass_, layout)).items():
                if leads := lead(measured, row):
                    ratio, peer = leads
                    cells[cell] = ratio, f"{heat.number(ratio)}\n{LOOKS[peer.implementation][2]}"
                    numbers.append(_numbers(row, peer))
            image = heat.ratios(
                one, plane, cells, colormaps["PuOr"], heat.around_one(MOST), boundary=True
            )
    text = "best peer's time ÷ cpunorm's\n(above 1: cpunorm is faster)"
    heat.colour_bar(image, panel, text, [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], extend="both")
    title = f"cpunorm beside the best peer: {pass_}"
    drawing.suptitle(f"{title} (float32, {measured.threads_line}, {plane})")
    letters = ", ".join(f"{LOOKS[n][2]} {n}" for n in measured.implementations(PEERS))
    caption = (
        f"The fastest peer's time ÷ cpunorm's (cython) at {plane}; the letter is that peer "
        f"({letters}). Below 1 the peer is faster; heavy lines part who is ahead by 5 % from the "
        "rest. Empty cells: no peer computes the case."
    )
    return Figure(f"library-{pass_}", title, caption, drawing, COLUMNS, numbers)


def _numbers(row: Row, peer: Row) -> tuple[object, ...]:
    hidden = spread(row)[1] >= spread(peer)[0] and spread(peer)[1] >= spread(row)[0]
    return (
        *("x".join(map(str, row.shape)), row.num_groups, row.layout, row.pass_, row.operation),
        *(row.dtype, row.source, float(f"{row.median * 1e6:.4g}")),
        *(peer.implementation, peer.version, float(f"{peer.median * 1e6:.4g}")),
        *(round(peer.median / row.median, 3), hidden),
    )


def _all(measured: Measured) -> Figure:
    """Return every case of float32, by the size of x."""
    drawing, panel = panels(1, len(PASSES), 13, 4.6, sharey=True)
    numbers = []
    for one, pass_ in zip(panel[0], PASSES, strict=True):
        points: dict[str, list[tuple[int, float]]] = {}
        for row in measured.select(pass_=pass_):
            if leads := lead(measured, row):
                points.setdefault(leads[1].implementation, []).append((nbytes(row), leads[0]))
                if pass_ != "training" or row.operation == "batch_norm":
                    numbers.append(_numbers(row, leads[1]))
        for name in PEERS:
            if some := points.get(name):
                scatter(one, *zip(*some, strict=True), LOOKS[name], f"best peer: {name}")
        ratios = [ratio for some in points.values() for _, ratio in some]
        won = sum(ratio >= 1 for ratio in ratios)
        mean = geometric_mean(ratios)
        one.set_title(
            f"{pass_}: {mean:.2f} in the geometric mean,\nahead on {won} of {len(ratios)} cases"
            if ratios
            else pass_
        )
        size_axis(one)
        ratio_axis(one)
    panel[0][0].set_ylabel("best peer's time ÷ cpunorm's")
    common_legend(drawing, panel[0])
    title = "cpunorm beside the best peer: all cases"
    caption = (
        "Every measured case of float32 (grid, shapes of networks, odd sizes), by the size of x. "
        "Points below the line are cases that cpunorm loses; the end of the page lists them."
    )
    return Figure("library-all", title, caption, drawing, COLUMNS, numbers)


def size_axis(axes) -> None:
    """Make x an axis of bytes."""
    axes.set_xscale("log", base=2)
    low, high = (math.log2(v) for v in axes.get_xlim())
    ticks = [2**e for e in range(10, 31, 4) if low <= e <= high]
    axes.set_xticks(ticks, [size(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("size of x")


def _rows(measured: Measured) -> Iterator[Figure]:
    """Yield layer and RMS norm of rows (M, D): time beside a copy's, and beside the best peer."""
    rows = [row for row in measured.select() if len(row.shape) == 2 and row.source == "grid"]
    rows = [row for row in rows if row.operation in ("layer_norm", "rms_norm")]
    if not rows:
        return
    drawing, panel = panels(2, 2, 9, 6.6, sharex=True)
    numbers = []
    for column, (pass_, word) in enumerate((("inference", "forward"), ("backward", "backward"))):
        above, below = panel[0][column], panel[1][column]
        for operation, elements in sorted({(r.operation, _magnitude(r)) for r in rows}):
            some = [r for r in rows if (r.operation, _magnitude(r)) == (operation, elements)]
            some = sorted((r for r in some if r.pass_ == pass_), key=lambda r: r.shape[1])
            style = {"ls": ":-"[operation == "rms_norm"], "color": SIZES[elements % len(SIZES)]}
            style |= {"marker": "sv"[operation == "rms_norm"], "ms": 5}
            name = f"{NAMES[operation]}, {size(4 * 2**elements)}"
            copied = [(r.shape[1], 1 / r.share_of_copy) for r in some if r.share_of_copy]
            leads = [(r.shape[1], found[0]) for r in some if (found := lead(measured, r))]
            if copied:
                above.plot(*zip(*copied, strict=True), label=name, **style)
            if leads:
                below.plot(*zip(*leads, strict=True), label=name, **style)
            numbers += [_numbers(r, p) for r in some if (p := measured.best_peer(r))]
        above.set_title(word)
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            ratio_axis(axes)
        below.set_xlabel(heat.AXIS["D"])
    panel[0][0].set_ylabel("time ÷ a copy's (a triad's)")
    panel[1][0].set_ylabel("best peer's time ÷ cpunorm's")
    common_legend(drawing, panel.flat, columns=3)
    title = "Rows: layer and RMS norm by their length"
    caption = (
        "Rows (M, D) of float32 with M·D fixed, one line per size of x. Above: how many times as "
        "long as a copy (backward: as the triad) cpunorm takes. Below: the best peer's time ÷ "
        "cpunorm's; below 1 the peer is faster."
    )
    yield Figure("rows", title, caption, drawing, COLUMNS, numbers)


SIZES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")


def _magnitude(row: Row) -> int:
    return round(math.log2(math.prod(row.shape)))
