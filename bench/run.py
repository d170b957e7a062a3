"""Measure, side by side with other libraries.

Also: python -m bench compare OLD.json NEW.json, and python -m bench report.
"""

import argparse
import os
import shlex
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import INTERRUPTED
from . import plan as planning
from .journal import Journal
from .machine import machine, physical_memory
from .results import DTYPES, LAYOUTS, OPERATIONS, OURS, PASSES, read_document, write
from .shapes import Shape
from .suite import Suite
from .table import summary

TESTS = Path(__file__).with_name("test_normalization.py")
# Of which starting and writing take a little more.
QUICK_MINUTES, FULL_MINUTES = 2.6, 43.0
MOST_AXES = 5
# Of a table that goes to a file.
WIDTH = 120


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _among(*known: str) -> Callable[[str], list[str]]:
    """Return the type of a comma-separated list of known names."""

    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return list(dict.fromkeys(found))

    return names


def _shape(text: str) -> Shape:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not 2 <= len(shape) <= MOST_AXES or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: 2 to {MOST_AXES} positive sizes, N,C and pixels, like 8,512,7,7"
        )
    return shape


def _threads(text: str) -> list[int]:
    try:
        counts = [int(count) for count in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of thread counts, like 1,2")
    return list(dict.fromkeys(counts))


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return number


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path


def parser() -> Parser:
    """Return the parser of the command line."""
    made = Parser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--quick", action="store_true", help="a small choice of everything, in three minutes")
    add("--op", type=_among(*OPERATIONS), default=OPERATIONS, metavar="NAMES")
    add("--pass", dest="passes", type=_among(*PASSES), default=PASSES, metavar="NAMES")
    add("--layout", type=_among(*LAYOUTS), default=LAYOUTS, metavar="NAMES")
    add(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="N,C,…",
        help="everything on this shape, channels first, or M,D for rows; may be repeated",
    )
    add("--backend", type=_among(*OURS), default=OURS, metavar="NAMES", help="of cpunorm")
    add(
        "--against",
        type=_among(*planning.OTHERS),
        default=planning.OTHERS,
        metavar="NAMES",
        help="other libraries, '' for none",
    )
    add("--dtype", type=_among(*DTYPES), default=[], metavar="NAMES")
    add("--threads", type=_threads, default=[], metavar="1,2")
    add("--blocks", type=int, choices=range(2, 101), default=planning.Choice.blocks, metavar="N")
    add("--minutes", type=_positive, help="begin no case after so many")
    add("--json", type=_file, default=Path("bench-results.json"), metavar="FILE")
    add("--fresh", action="store_true", help="do not go on with an interrupted run")
    return made


def main(argv: Sequence[str]) -> int:
    """Measure what is asked for, or go on with it; return the exit code."""
    arguments = parser()
    args = arguments.parse_args(argv)
    plan = planning.make(
        planning.Choice(
            quick=args.quick,
            operations=args.op,
            passes=args.passes,
            layouts=args.layout,
            shapes=args.shape,
            dtypes=args.dtype,
            backends=args.backend,
            against=args.against,
            threads=args.threads,
            blocks=args.blocks,
        )
    )
    if not any(task.timed for task in plan.tasks):
        arguments.error("nothing is defined for this choice of operation, pass, layout and shape")
    needed, memory = max(map(planning.memory, plan.tasks)), physical_memory()
    if needed > memory:
        arguments.error(
            f"the largest case needs {needed / 2**30:.3g} GiB, and there are {memory / 2**30:.3g}"
        )
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    minutes = args.minutes or (QUICK_MINUTES if args.quick else FULL_MINUTES)
    command = shlex.join(["python", "-m", "bench", *argv])
    try:
        return _run(plan, args.json, args.fresh, 60 * minutes, command, console)
    except OSError as error:
        console.print(f"{error.filename or args.json}: {error.strerror}", style="red")
        return 1


def _run(
    plan: planning.Plan, path: Path, fresh: bool, seconds: float, command: str, console: Console
) -> int:
    facts = machine(max(contestant.threads for contestant in plan.contestants.values()))
    conditions = {key: facts[key] for key in ("cpu", "instruction set", "versions")}
    journal = Journal(
        path.with_name(path.name + ".journal"), conditions | {"blocks": plan.blocks}, fresh
    )
    for name, reason in plan.left_out.items():
        console.print(f"left out: {name}, since {reason}")
    known = sum(journal.get(task) is not None for task in plan.tasks)
    if known:
        console.print(f"going on after {known} of {len(plan.tasks)} cases (--fresh starts anew)")
    columns = TextColumn("{task.description}"), BarColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=sum(map(planning.weight, plan.tasks)))

        def done(task: planning.Task) -> None:
            text = f"{len(suite.results)} of {len(plan.tasks)}"
            progress.update(bar, advance=planning.weight(task), description=text)

        suite = Suite(plan, journal, command, seconds, done)
        code, document = _pytest(suite, path)
    if code == pytest.ExitCode.INTERRUPTED:
        kept = len(suite.results)
        console.print(f"stopped after {kept} cases; the same command goes on from there")
        return INTERRUPTED
    if document is None:
        console.print(*suite.failures or ["nothing could be measured"], sep="\n", style="red")
        return 1
    write(path, document)
    journal.close()
    summary(console, suite.rows(), document)
    if suite.skipped:
        console.print(f"out of time: {len(suite.skipped)} cases not measured (--minutes)")
    console.print(*suite.failures, sep="\n", style="red", end="\n" * bool(suite.failures))
    console.print(f"written to {path}")
    return 1 if suite.failures else 0


class _Patience:
    """Interrupts wait until pytest has read its arguments: argparse would make errors of them."""

    def __enter__(self) -> Self:
        self._waiting = False
        numbers = signal.SIGINT, signal.SIGTERM
        self._before = {number: signal.signal(number, self._wait) for number in numbers}
        return self

    def _wait(self, number: int, frame: object) -> None:
        self._waiting = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pytest_sessionstart(self) -> None:
        """Have them heard again, the one that waits first."""
        self.__exit__()
        if self._waiting:
            raise KeyboardInterrupt


def _pytest(suite: Suite, path: Path) -> tuple[int, dict[str, Any] | None]:
    """Run the tests; return pytest's exit code and the document, None if there is none."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        file = os.path.join(folder, "benchmark.json")
        options = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "filterwarnings="]
        options += ["--benchmark-quiet", f"--benchmark-json={file}"]
        with warnings.catch_warnings():
            # Of pytest-benchmark, after an interrupt.
            warnings.filterwarnings("ignore", message="Not saving anything")
            with _Patience() as patience:
                code = pytest.main([str(TESTS), *options], plugins=[suite, patience])
        whole = os.path.exists(file) and os.path.getsize(file)
        return code, read_document(file) if whole else None
