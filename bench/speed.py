"""Side by side with other libraries: python -m bench.speed [--suite quick] [--only REGEX]

One line per case: microseconds of a parallel copy of x (of a triad of x, its gradient and the
output in the backward pass), of cpunorm, and of every other library that is installed and has the
operation; then the best of those ÷ cpunorm, above 1 where cpunorm is faster, and cpunorm ÷ copy.
Everyone runs in a process of its own with the same number of threads and is given existing memory
where it takes any. With --of, nothing is measured: the cases are those of float32 in a results file
of python -m bench.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpunorm.backends.caches import cache_bytes

from . import marks, peers
from .machine import machine
from .results import COPY as RECORDED_COPY
from .results import ResultsError, Row, read, write_bytes
from .shapes import CLASSES, Case
from .suites import suite
from .workers import Contestant, Result, crew, measure

COPY = "copy|triad"
WORST = 5


def contestants(args: argparse.Namespace) -> list[Contestant]:
    """Return who takes part: the traffic of memory, each of ours, the peers that are installed."""
    found = []
    for peer in (peers.MEMORY, *args.peers):
        if package := peers.missing(peer):
            print(f"left out: {peer}, since {package} is not installed")
        else:
            name = COPY if peer == peers.MEMORY else peer
            found.append(Contestant(name, peer, args.threads))
    ours = []
    for spec in args.backend:
        backend, _, checkout = spec.partition("@")
        name = backend if backend != "auto" else peers.OURS
        if checkout:
            name += f"@{Path(checkout).resolve().name}"
        for fresh in (False, True)[: 1 + args.fresh]:
            options = {"backend": backend, "fresh": fresh}
            where = str(Path(checkout).resolve()) if checkout else None
            label = f"{name} fresh" if fresh else name
            ours.append(Contestant(label, peers.OURS, args.threads, options, where))
    if args.marks:
        one = Contestant(marks.ONE_THREAD, peers.OURS, 1, ours[0].options, ours[0].checkout)
        ours.append(one)
    # Ours right after the copy, where the eye looks for it.
    memory = [c for c in found if c.peer == peers.MEMORY]
    return [*memory, *ours, *(c for c in found if c.peer != peers.MEMORY)]


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean, NaN of nothing."""
    values = list(values)
    return statistics.geometric_mean(values) if values else math.nan


class Report:
    """The lines that are printed, and the rows that are kept; `l2` is in bytes."""

    def __init__(self, everyone: Sequence[Contestant], l2: int) -> None:
        self.l2 = l2
        self.names = [c.name for c in everyone]
        self.peers = [c.name for c in everyone if c.peer in peers.PEERS]
        self.ours = next(c.name for c in everyone if c.peer == peers.OURS)
        self.results: list[Result] = []

    def header(self) -> str:
        """Return the names of the columns."""
        names = "".join(f"{name:>{width}}" for name, width in self._columns())
        return f"{'µs of a call':56}{names}{'peer÷ours':>11}{'ours÷copy':>11}"

    def _columns(self) -> Iterable[tuple[str, int]]:
        return ((name, max(12, len(name) + 2)) for name in self.names)

    def add(self, result: Result) -> str:
        """Keep a result and return its line."""
        self.results.append(result)
        seconds = result.seconds
        times = "".join(
            f"{seconds[name] * 1e6:{width}.1f}" if name in seconds else f"{'–':>{width}}"
            for name, width in self._columns()
        )
        ratios = "".join(
            f"{'–':>11}" if math.isnan(ratio) else f"{ratio:11.2f}"
            for ratio in (self.lead(result), self.over_copy(result))
        )
        notes = "".join(f"\n    {name}: {why}" for name, why in result.notes.items())
        return f"{result.case!s:56}{times}{ratios}{notes}"

    def lead(self, result: Result) -> float:
        """Return the best peer ÷ ours."""
        theirs = [s for name, s in result.seconds.items() if name in self.peers]
        return min(theirs, default=math.nan) / result.seconds.get(self.ours, math.nan)

    def over_copy(self, result: Result) -> float:
        """Return ours ÷ the traffic of memory."""
        seconds = result.seconds
        return seconds.get(self.ours, math.nan) / seconds.get(COPY, math.nan)

    def summary(self) -> str:
        """Return geometric means and the worst cases."""
        leads = [(self.lead(r), r) for r in self.results]
        leads = [(lead, r) for lead, r in leads if not math.isnan(lead)]
        lines = ["best peer ÷ cpunorm, geometric means:"]
        for kind in CLASSES:
            some = [lead for lead, r in leads if r.case.kind == kind]
            lines.append(f"  {kind:26}{geometric_mean(some):7.2f}  over {len(some)}")
        lines.append("worst:")
        for lead, result in sorted(leads, key=lambda pair: pair[0])[:WORST]:
            best = min(
                (n for n in result.seconds if n in self.peers), key=result.seconds.__getitem__
            )
            lines.append(f"  {lead:5.2f}  {result.case}  ({best})")
        return "\n".join(lines)


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return results as plain data."""
    return [
        {"case": asdict(r.case), "name": str(r.case), "seconds": r.blocks, "notes": r.notes}
        for r in results
    ]


def recorded(path: Path) -> Report:
    """Return what a results file of python -m bench holds, the compiled backend being ours."""
    results = read(path)
    rows_ = [row for row in results.rows if row.dtype == "float32"]
    most = max((row.threads for row in rows_), default=1)
    everyone = {name: Contestant(name, name, most) for name in peers.PEERS}
    everyone[COPY] = Contestant(COPY, peers.MEMORY, most)
    everyone["cython"] = Contestant("cython", peers.OURS, most)
    everyone["numba"] = Contestant("numba", peers.OURS, most)
    everyone[marks.ONE_THREAD] = Contestant(marks.ONE_THREAD, peers.OURS, 1)
    found: dict[Case, Result] = {}
    for row in rows_:
        name = _recorded_name(row, most)
        if name in everyone:
            shape, groups = row.shape, row.num_groups
            case = Case(row.operation, row.pass_, row.layout, shape, groups, row.dtype)
            found.setdefault(case, Result(case)).blocks[name] = list(row.seconds)
    report = Report(list(everyone.values()), results.machine.get("l2", cache_bytes(2)))
    report.results = list(found.values())
    return report


def _recorded_name(row: Row, most: int) -> str:
    if row.threads == most:
        return COPY if row.implementation == RECORDED_COPY else row.implementation
    return marks.ONE_THREAD if (row.implementation, row.threads) == ("cython", 1) else ""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=("quick", "marks", "full"), help="quick; with --marks, marks")
    add("--only", type=re.compile, metavar="REGEX", help="cases whose line matches")
    add("--max-mib", type=float, default=math.inf, help="leave out larger x")
    add("--threads", type=int, default=2)
    add("--blocks", type=int, default=5)
    add("--peers", type=_names, default=list(peers.PEERS), help="comma-separated; empty for none")
    add(
        "--backend",
        nargs="+",
        default=["auto"],
        metavar="BACKEND[@CHECKOUT]",
        help="ours; the first is the one compared",
    )
    add("--fresh", action="store_true", help="also time ours when it allocates its output")
    add("--marks", action="store_true", help="report every mark; adds cpunorm on one thread")
    add("--json", type=Path, metavar="FILE", help="keep the raw rows")
    add("--of", type=Path, metavar="FILE", help="of what was measured before")
    add("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args()
    args.suite = args.suite or ("marks" if args.marks else "quick")
    return args


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(peers.PEERS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return names


def _select(args: argparse.Namespace) -> list[Case]:
    cases = [c for c in suite(args.suite) if c.nbytes <= args.max_mib * 2**20]
    return [c for c in cases if args.only is None or args.only.search(str(c))]


def main() -> None:
    """Measure, printing as it goes."""
    args = _parse()
    if args.of:
        try:
            report = recorded(args.of)
        except ResultsError as error:
            raise SystemExit(f"python -m bench.speed: {error}") from None
        _conclude(report, args.marks)
        return
    cases = _select(args)
    if args.list:
        print(*cases, sep="\n")
        return
    everyone = contestants(args)
    facts = machine(args.threads)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(
        f"{facts['cpu']}, {facts['instruction set']}, {args.threads} threads of "
        f"{facts['cores']} cores, float32, {args.blocks} blocks\n{versions}"
    )
    report = Report(everyone, facts["l2"])
    print(report.header())
    with crew(everyone) as (workers, left_out):
        for name, why in left_out.items():
            print(f"left out: {name}, {why}")
        try:
            for case in cases:
                print(report.add(measure(case, workers, args.blocks)), flush=True)
        finally:
            if args.json:
                content = {**facts, "blocks": args.blocks, "rows": rows(report.results)}
                write_bytes(args.json, (json.dumps(content, indent=1) + "\n").encode())
    _conclude(report, args.marks)


def _conclude(report: Report, with_marks: bool) -> None:
    print(report.summary())
    if with_marks:
        print(marks.table(report))


if __name__ == "__main__":
    main()
