"""The marks that the library holds itself to, each with the figure that was found.

Run by ``python -m bench.speed --marks``, with ``--of FILE`` for what python -m bench has measured;
a figure that the cases do not give is missing.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from .shapes import BACKWARD, INFERENCE, WITH_STATISTICS, Case
from .workers import Result

if TYPE_CHECKING:
    from .speed import Report

MIB = 2**20
ONE_THREAD = "one thread"
IMPORTS = 7
# What is left of a mark within noise.
NOISE = 0.95

Rows = Iterable[tuple[float, Result]]


def table(report: "Report") -> str:
    """Return one line per mark: the aim, what was found, pass or miss, and where."""
    lines = [f"{'mark':66}{'aim':>9}{'found':>9}"]
    for what, aim, at_least, found, where in _marks(report):
        if found is None:
            lines.append(f"{what:66}{_aim(aim, at_least):>9}{'–':>9}")
            continue
        passed = found >= aim if at_least else found <= aim
        verdict = "pass" if passed else "MISS"
        lines.append(f"{what:66}{_aim(aim, at_least):>9}{found:9.2f}  {verdict}  {where}")
    return "\n".join(lines)


def _aim(aim: float, at_least: bool) -> str:
    return f"{'≥' if at_least else '≤'} {aim:g}"


Mark = tuple[str, float, bool, float | None, str]


def _marks(report: "Report") -> Iterator[Mark]:
    l2 = report.l2
    leads = _ratios(report.results, report.lead)
    copies = _ratios(report.results, report.over_copy)

    for kind, aim in ((WITH_STATISTICS, 2.5), (BACKWARD, 1.8), (INFERENCE, 1.3)):
        some = [(lead, r) for lead, r in leads if r.case.kind == kind]
        yield (f"best peer ÷ cpunorm, {kind}, mean", aim, True, *_mean(some))
        yield (f"best peer ÷ cpunorm, {kind}, worst", NOISE, True, *_extreme(some, min))

    def of_channels(case: Case) -> bool:
        return (
            case.kind == WITH_STATISTICS
            and not case.over_rows
            and case.slab <= l2
            and case.spatial_size >= 49
        )

    def one_sweep(case: Case) -> bool:
        return (case.kind == WITH_STATISTICS and case.over_rows) or case.kind == INFERENCE

    def backward(case: Case) -> bool:
        return case.kind == BACKWARD and case.nbytes >= 4 * MIB

    def fits(case: Case) -> bool:
        # x and its gradient are both read twice, unless the statistics are given.
        return case.frozen or 2 * case.slab <= l2

    groups: list[tuple[str, float, Callable[[Case], bool]]] = [
        (
            "÷ copy, statistics, S ≥ 49, slab in L2, ≥ 8 MiB",
            1.3,
            lambda c: of_channels(c) and c.nbytes >= 8 * MIB,
        ),
        (
            "÷ copy, statistics, S ≥ 49, slab in L2, < 8 MiB",
            2.5,
            lambda c: of_channels(c) and c.nbytes < 8 * MIB,
        ),
        (
            "÷ copy, inference, layer and RMS norm, ≥ 4 MiB",
            1.1,
            lambda c: one_sweep(c) and c.nbytes >= 4 * MIB,
        ),
        ("÷ triad, backward, slab in L2, ≥ 4 MiB", 1.3, lambda c: backward(c) and fits(c)),
        ("÷ triad, backward, slab not in L2, ≥ 4 MiB", 1.9, lambda c: backward(c) and not fits(c)),
    ]
    for what, aim, belongs in groups:
        some = [(ratio, r) for ratio, r in copies if belongs(r.case)]
        yield (f"{what}, mean", aim, False, *_mean(some))
        yield (f"{what}, worst", aim, False, *_extreme(some, max))

    large = [
        (ratio, r)
        for ratio, r in _ratios(report.results, _over("torch", report.ours))
        if r.case.operation == "batch_norm" and r.case.kind == WITH_STATISTICS
        if r.case.nbytes >= 64 * MIB
    ]
    yield ("torch ÷ cpunorm, batch norm training, ≥ 64 MiB, worst", 3, True, *_extreme(large, min))

    calls = [r for r in report.results if str(r.case) == "layer_norm forward 1x768"]
    seconds = calls[0].seconds if calls else {}
    ours, theirs = seconds.get(report.ours), seconds.get("torch")
    yield ("µs of layer_norm on (1, 768)", 1.0, False, ours and ours * 1e6, "")
    yield ("the same ÷ torch's", 0.25, False, ours / theirs if ours and theirs else None, "or")

    second = _ratios(report.results, _over(ONE_THREAD, report.ours))
    large = [(ratio, r) for ratio, r in second if r.case.nbytes >= 2 * MIB]
    yield ("one thread ÷ two, ≥ 2 MiB, mean", 1.7, True, *_mean(large))
    yield ("one thread ÷ two, ≥ 2 MiB, worst", 1.7, True, *_extreme(large, min))
    yield ("one thread ÷ two, any size, worst", NOISE, True, *_extreme(second, min))

    yield ("ms of import cpunorm beyond numpy", 30, False, import_milliseconds(), "")

    family = _ratios(report.results, _over("numba", "cython", report.ours))
    family = [(ratio, r) for ratio, r in family if r.case.nbytes >= 256 * 1024]
    yield ("Numba ÷ Cython, ≥ 256 KiB, mean", 1.25, False, *_mean(family))


def _over(above: str, *below: str) -> Callable[[Result], float]:
    """Return the function that divides one contestant's time by that of the first one there."""

    def ratio(result: Result) -> float:
        seconds = result.seconds
        beside = [seconds[name] for name in below if name in seconds]
        return seconds[above] / beside[0] if above in seconds and beside else float("nan")

    return ratio


def _ratios(
    results: Iterable[Result], ratio: Callable[[Result], float]
) -> list[tuple[float, Result]]:
    found = [(ratio(r), r) for r in results]
    return [(value, r) for value, r in found if value == value]


def _mean(some: Rows) -> tuple[float | None, str]:
    values = [value for value, _ in some]
    if not values:
        return None, ""
    return statistics.geometric_mean(values), f"over {len(values)}"


def _extreme(some: Rows, which: Callable[..., tuple[float, Result]]) -> tuple[float | None, str]:
    pairs = list(some)
    if not pairs:
        return None, ""
    value, result = which(pairs, key=lambda pair: pair[0])
    return value, str(result.case)


def import_milliseconds() -> float:
    """Return what importing cpunorm takes once numpy is there, the median of several processes.

    As for an installed package, the bytecode of both is there.
    """
    code = (
        "import sys, time, numpy; start = time.perf_counter(); import cpunorm; "
        "print(time.perf_counter() - start); assert 'numba' not in sys.modules"
    )
    times = []
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(1 + IMPORTS):
            run = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, env=environment
            )
            times.append(float(run.stdout) * 1e3)
    return statistics.median(times[1:])
