"""Error against float64 by offset and dtype, next to speed, for every implementation."""

import math
from collections.abc import Iterator

from ..results import IMPLEMENTATIONS, OPERATIONS, Accuracy
from .style import IMPLEMENTATIONS as LOOKS
from .style import SHOWN, Figure, common_legend, panels, scatter
from .table import CPUNORM, NAMES, Measured, geometric_mean

COLUMNS = ("operation", "pass", "dtype", "implementation", "version", "offset", "shape", "error")
SPEED_COLUMNS = ("operation", "implementation", "largest error", "at offset", "time ÷ cpunorm's")
LOST = 1e4  # where NaN and infinite are drawn


def figures(measured: Measured) -> Iterator[Figure]:
    """Yield error by offset, and error next to speed."""
    entries = measured.results.accuracy
    if not entries:
        return
    for name, passes in (("forward", ("training", "inference")), ("backward", ("backward",))):
        some = [a for a in entries if a.pass_ in passes]
        # Batch norm's error is that of finding the statistics.
        some = [a for a in some if a.operation != "batch_norm" or a.pass_ != "inference"]
        if some:
            yield _by_offset(some, name)
    forward = [a for a in entries if a.pass_ in ("training", "inference") and a.dtype == "float32"]
    forward = [a for a in forward if a.operation != "batch_norm" or a.pass_ != "inference"]
    if forward:
        yield _next_to_speed(measured, forward)


def _error(entry: Accuracy) -> float:
    return LOST if entry.error is None else max(entry.error, 1e-17)


def _by_offset(entries: list[Accuracy], name: str) -> Figure:
    dtypes = list(dict.fromkeys(a.dtype for a in entries))
    drawing, panel = panels(
        len(dtypes), len(OPERATIONS), 14, 1.1 + 2.5 * len(dtypes), sharex=True, sharey="row"
    )
    for line, dtype in enumerate(dtypes):
        for one, operation in zip(panel[line], OPERATIONS, strict=True):
            for who in IMPLEMENTATIONS:
                some = [a for a in entries if (a.operation, a.dtype) == (operation, dtype)]
                some = sorted((a for a in some if a.implementation == who), key=lambda a: a.offset)
                if some:
                    color, marker, _ = LOOKS[who]
                    one.plot(
                        [a.offset for a in some], [_error(a) for a in some], marker=marker, ms=4,
                        color=color, label=SHOWN.get(who, who), lw=1.1, alpha=0.9,
                    )  # fmt: skip
            one.set_title(f"{NAMES[operation]}, {dtype}")
            one.set_xscale("symlog", linthresh=10)
            one.set_yscale("log")
    for one in panel[-1]:
        one.set_xlabel("offset (mean of x, deviation 1)")
    for line in panel:
        line[0].set_ylabel("error")
    common_legend(drawing, panel.flat)
    title = f"Accuracy by offset: {name}"
    lost = f" NaN and infinite results are drawn at {LOST:g}." if any(
        a.error is None for a in entries
    ) else ""  # fmt: skip
    caption = (
        "Largest |y − oracle| ÷ (1 + |oracle|) against the float64 oracle, of normal numbers with "
        "deviation 1 around an offset. A curve that climbs is an implementation that loses digits "
        "at large means; what x itself cannot hold in its type is not counted, as the oracle gets "
        f"the same x.{lost}"
    )
    numbers = [
        (
            *(a.operation, a.pass_, a.dtype, a.implementation, a.version, a.offset),
            *("x".join(map(str, a.shape)), None if a.error is None else float(f"{a.error:.3g}")),
        )
        for a in entries
    ]
    return Figure(f"accuracy-{name}", title, caption, drawing, COLUMNS, numbers)


def _next_to_speed(measured: Measured, entries: list[Accuracy]) -> Figure:
    offset = max(a.offset for a in entries if a.offset <= 1e4)
    drawing, panel = panels(1, len(OPERATIONS), 14, 4.2, sharey=True)
    numbers = []
    for one, operation in zip(panel[0], OPERATIONS, strict=True):
        for who in IMPLEMENTATIONS:
            some = [a for a in entries if (a.operation, a.implementation) == (operation, who)]
            some = [a for a in some if a.offset <= offset]
            slowness = _slowness(measured, operation, who)
            if some and not math.isnan(slowness):
                worst = max(some, key=_error)
                scatter(one, [slowness], [_error(worst)], LOOKS[who], SHOWN.get(who, who))
                one.lines[-1].set_markersize(8)
                error = None if worst.error is None else float(f"{worst.error:.3g}")
                numbers.append((operation, who, error, worst.offset, round(slowness, 3)))
        one.axvline(1, color="black", lw=0.8)
        one.set_title(NAMES[operation])
        one.set_xscale("log", base=2)
        one.xaxis.set_major_formatter("{x:g}")
        one.set_yscale("log")
        one.set_xlabel("time ÷ cpunorm's")
    panel[0][0].set_ylabel(f"largest error up to offset {offset:g}")
    common_legend(drawing, panel[0])
    title = "Accuracy next to speed"
    caption = (
        f"Forward with statistics, float32: the largest error up to an offset of {offset:g} "
        "against the time ÷ cpunorm's (geometric mean over the cases that both compute). Best is "
        "below, on the left."
    )
    return Figure("accuracy-speed", title, caption, drawing, SPEED_COLUMNS, numbers)


def _slowness(measured: Measured, operation: str, who: str) -> float:
    """Return the time ÷ cpunorm's, over the cases that both compute."""
    ratios = []
    for row in measured.select(operation, "training"):
        other = measured.beside(row).get(who)
        if other is not None:
            ratios.append(other.median / row.median)
    return 1.0 if who == CPUNORM else geometric_mean(ratios)
