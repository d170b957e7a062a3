"""Layouts, threads, dtypes and groups: what each choice costs cpunorm, by shape or size."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from matplotlib import colormaps

from ..results import DTYPES, LAYOUTS, OPERATIONS, Row
from . import heat
from .libraries import size_axis
from .style import OPERATIONS as LOOKS
from .style import Figure, common_legend, panels, ratio_axis, scatter
from .table import NAMES, PASSES, Measured, Plane, nbytes

COLUMNS = ("shape", "num_groups", "pass", "operation", "of", "µs", "against", "its µs", "ratio")
MOST = 4.0

Other = Callable[[Row], Row | None]


def figures(measured: Measured) -> Iterator[Figure]:
    """Yield a figure per choice that was measured."""
    for plane in measured.planes[:1]:
        if {row.layout for row in measured.rows} == set(LAYOUTS):
            yield _layouts(measured, plane)
    if len(measured.threads) > 1:
        yield _threads(measured)
    if len({row.dtype for row in measured.select(dtype=None)}) > 1:
        yield _dtypes(measured)
    yield from _groups(measured)


def _finder(measured: Measured, **other: object) -> Other:
    """Return what finds the row that differs from a row in some fields."""
    rows = {_key(row): row for row in measured.select(dtype=None, threads=None)}
    return lambda row: rows.get(_key(replace(row, **other)))


def _key(row: Row) -> tuple[object, ...]:
    return row.case, row.threads


def _numbers(row: Row, what: str, other: Row, against: str) -> tuple[object, ...]:
    times = (float(f"{r.median * 1e6:.4g}") for r in (row, other))
    one, two = times
    shape = "x".join(map(str, row.shape))
    ratio = round(row.median / other.median, 3)
    return (shape, row.num_groups, row.pass_, row.operation, what, one, against, two, ratio)


def _layouts(measured: Measured, plane: Plane) -> Figure:
    drawing, panel = panels(len(PASSES), len(OPERATIONS), 13, 9)
    last = _finder(measured, layout="NHWC")
    numbers, image = [], None
    for line, pass_ in enumerate(PASSES):
        for column, operation in enumerate(OPERATIONS):
            one = panel[line][column]
            heat.frame(one, plane, f"{NAMES[operation]}, {pass_}", inner=column > 0)
            cells = {}
            for cell, row in measured.on(plane, measured.select(operation, pass_, "NCHW")).items():
                if other := last(row):
                    ratio = row.median / other.median
                    cells[cell] = ratio, heat.number(ratio)
                    numbers.append(_numbers(row, "NCHW", other, "NHWC"))
            image = heat.ratios(
                one, plane, cells, colormaps["PuOr"], heat.around_one(MOST), boundary=True
            )
    text = "time in NCHW ÷ in NHWC (above 1: NHWC is faster)"
    heat.colour_bar(image, panel, text, [1 / 4, 1 / 2, 1, 2, 4], extend="both")
    title = "NCHW or NHWC"
    drawing.suptitle(f"{title} (float32, {measured.threads_line}, {plane})")
    caption = (
        f"cpunorm's time in NCHW ÷ in NHWC at {plane}: below 1 channels first are faster, above 1 "
        "channels last. Heavy lines part what is ahead by 5 % from the rest."
    )
    return Figure("layout", title, caption, drawing, COLUMNS, numbers)


def _threads(measured: Measured) -> Figure:
    drawing, panel = panels(1, len(PASSES), 13, 4.4, sharey=True)
    most = measured.most_threads
    one_thread = _finder(measured, threads=measured.threads[0])
    numbers = []
    for one, pass_ in zip(panel[0], PASSES, strict=True):
        for operation in OPERATIONS:
            points = []
            for row in measured.select(operation, pass_):
                if other := one_thread(row):
                    points.append((nbytes(row), other.median / row.median))
                    numbers.append(_numbers(other, str(other.threads), row, str(row.threads)))
            if points:
                scatter(one, *zip(*points, strict=True), LOOKS[operation], NAMES[operation])
        one.axhline(1, color="black", lw=1.2)
        one.axhline(most, color="black", lw=1, ls="--")
        one.set_title(pass_)
        size_axis(one)
    first = measured.threads[0]
    panel[0][0].set_ylabel(f"time on {first} thread{'s'[: first != 1]} ÷ on {most}")
    common_legend(drawing, panel[0])
    title = f"Threads: {first} and {most}"
    caption = (
        f"How many times as fast cpunorm is on {most} threads, by the size of x; the dashed "
        f"line is {most}. Small arrays run on one thread whatever is allowed."
    )
    return Figure("threads", title, caption, drawing, COLUMNS, list(dict.fromkeys(numbers)))


def _dtypes(measured: Measured) -> Figure:
    drawing, panel = panels(1, len(PASSES), 13, 4.6, sharey=True)
    float32 = _finder(measured, dtype="float32")
    numbers, names, rows = [], [], {}
    for one, pass_ in zip(panel[0], PASSES, strict=True):
        others = [d for d in DTYPES[1:] if measured.select(dtype=d)]
        names = [*others]
        for operation in OPERATIONS:
            points = []
            for offset, dtype in enumerate(others):
                for row in measured.select(operation, pass_, dtype=dtype):
                    if other := float32(row):
                        place = offset + (OPERATIONS.index(operation) - 2) * 0.13
                        points.append((place, other.median / row.median))
                        numbers.append(_numbers(other, "float32", row, dtype))
                        rows[row.shape] = None
            if points:
                scatter(one, *zip(*points, strict=True), LOOKS[operation], NAMES[operation])
        one.axhline(1, color="black", lw=1.2)
        one.axhline(2, color="black", lw=0.8, ls="--")
        one.axhline(0.5, color="black", lw=0.8, ls="--")
        one.set_title(pass_)
        one.set_xticks(range(len(names)), names)
        one.set_xlim(-0.5, len(names) - 0.5)
        ratio_axis(one)
        one.grid(axis="x", visible=False)
    panel[0][0].set_ylabel("time in float32 ÷ in this type")
    common_legend(drawing, panel[0])
    title = "Data types beside float32"
    shapes = ", ".join(f"({', '.join(map(str, shape))})" for shape in list(rows)[:5])
    caption = (
        "How many times as fast cpunorm is in another type than in float32, a point per shape "
        f"({shapes}{', …' if len(rows) > 5 else ''}). Half the bytes is at best half the time "
        "(dashed: 2); within the caches the conversion counts instead."
    )
    return Figure("dtypes", title, caption, drawing, COLUMNS, list(dict.fromkeys(numbers)))


def _groups(measured: Measured) -> Iterator[Figure]:
    """Yield group norm by the number of groups, on the shape that has the most."""
    by_shape: dict[tuple[int, ...], list[Row]] = {}
    for row in measured.select("group_norm"):
        by_shape.setdefault(row.shape, []).append(row)
    counts = {shape: len({r.num_groups for r in some}) for shape, some in by_shape.items()}
    shape = max(counts, key=counts.__getitem__, default=None)
    if shape is None or counts[shape] < 3:
        return
    drawing, panel = panels(1, 2, 9, 4)
    numbers = []
    for one, (pass_, word) in zip(
        panel[0], (("inference", "forward"), ("backward", "backward")), strict=True
    ):
        for layout, (color, marker) in zip(
            LAYOUTS, (("#0072B2", "o"), ("#D55E00", "s")), strict=True
        ):
            some = [r for r in by_shape[shape] if r.layout == layout and r.pass_ == pass_]
            some = sorted(some, key=lambda r: r.num_groups or 0)
            if some:
                times = [r.median * 1e6 for r in some]
                one.plot(
                    [r.num_groups for r in some], times, marker=marker, color=color, label=layout
                )
                numbers += [
                    _numbers(r, f"G={r.num_groups}", some[0], f"G={some[0].num_groups}")
                    for r in some
                ]
        one.set_xscale("log", base=2)
        one.xaxis.set_major_formatter("{x:g}")
        one.set_ylim(bottom=0)
        one.set_title(word)
        one.set_xlabel(heat.AXIS["G"])
    panel[0][0].set_ylabel("µs of a call")
    common_legend(drawing, panel[0])
    title = f"Group norm by its number of groups, {shape}"
    caption = "cpunorm's time; 1 group is layer norm over the whole image, C groups instance norm."
    yield Figure("groups", title, caption, drawing, COLUMNS, numbers)
