"""The command ``python -m cpunorm``: its arguments, its parts in turn, its exit code."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from .. import get_num_threads, show_config
from .._advice import DTYPES, LAYOUTS, NORMALIZATIONS, advise
from .._dispatch import check_backend, config
from ..backends import BACKENDS
from . import checks, neighbours, pipeline, report, timing, warmup

DESCRIPTION = """\
Check every normalization against the float64 oracle, run a small network on real images, and time
each normalization by layout and backend, next to a memory copy and plain NumPy. Takes less than a
minute. The exit code is 1 if a check failed, 2 for a wrong argument.
"""

EPILOG = """\
Another command is `python -m cpunorm fold`, which folds the batch norms of an ONNX model.
"""

# Where Numba compiles slowly, this keeps the whole within a minute.
SHORTEN_AFTER_SECONDS = 40


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line; the usage is a `--help` away."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the main job and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "advise":
            return _advise(options)
        usable, broken = _backends(options.backend)
        if options.backend in broken:
            parser.error(f"argument --backend: {broken[options.backend]}")
        return _run(usable, broken, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(f"{parser.prog}: error: not enough memory: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has left; leave nothing that the interpreter would flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _backends(only: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the backends that can be used, and why the others cannot."""
    usable, broken = [], {}
    for name in BACKENDS if only is None else (only,):
        try:
            check_backend(name)
        except RuntimeError as error:
            broken[name] = str(error)
        else:
            usable.append(name)
    return usable, broken


def _run(backends: Sequence[str], broken: dict[str, str], options: argparse.Namespace) -> int:
    start = time.perf_counter()
    text = report.Text(_ansi())
    if not options.json:
        print(text.bold("cpunorm: normalization of NumPy arrays on the CPU"), end="\n\n")
        show_config()
        for reason in broken.values():
            print(reason)

    def show(lines: Iterable[str]) -> None:
        if not options.json:
            print(*lines, sep="\n", flush=True)

    shapes = options.shape or timing.SHAPES
    warmed = warmup.run(shapes) if "numba" in backends else None
    if warmed is not None:
        show(report.warmup(warmed))
    found, seconds = checks.run(backends)
    ok = all(check.ok for check in found)
    show(report.checks(found, seconds, text))
    runs = pipeline.run(options.backend, options.repeat or timing.BLOCKS)
    show(report.pipeline(runs, text))
    before = neighbours.mark()
    tables = timing.run(shapes, backends, options.repeat, start + SHORTEN_AFTER_SECONDS)
    busy = neighbours.busy_since(before)
    took = time.perf_counter() - start
    show(report.timing(tables, backends, text))
    if busy is not None and neighbours.disturb(busy, get_num_threads()):
        show(report.disturbed(busy, text))
    show(report.summary(tables, backends, ok, took, text))
    if options.json:
        content = {
            "config": config(),
            "broken_backends": broken,
            "ok": ok,
            "numba_warmup_seconds": warmed,
            "checks": [{**asdict(check), "ok": check.ok} for check in found],
            "check_seconds": seconds,
            "pipeline": [asdict(run) for run in runs],
            "timing": [asdict(table) for table in tables],
            "cpus_busy_with_other_programs": busy,
            "seconds": took,
        }
        print(json.dumps(_finite(content), indent=1))
    return 0 if ok else 1


def _advise(options: argparse.Namespace) -> int:
    advice = advise(
        options.tensor,
        options.layout,
        options.training,
        normalization=options.normalization,
        dtype=options.dtype,
        threads=options.threads,
    )
    print(json.dumps({**asdict(advice), "sure": advice.sure}, indent=1) if options.json else advice)
    return 0


def _ansi() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for: an infinite error becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if value in (float("inf"), float("-inf")) else value


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m cpunorm", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON, and nothing else"
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,C,...",
        help="time this shape (channels second, two or more axes) instead of the usual ten; "
        "may be given several times",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="use this backend alone")
    parser.add_argument(
        "--repeat",
        type=_positive,
        metavar="N",
        help="blocks of calls per time, of which the median is shown (default: "
        f"{timing.BLOCKS}, or 1 for what is left after {SHORTEN_AFTER_SECONDS} seconds)",
    )
    commands = parser.add_subparsers(dest="command", metavar="advise")
    _add_advise(
        commands.add_parser(
            "advise",
            help="instead, say what is cheapest for a shape: advise 32,256,14,14",
            description="Say which normalization, layout and backend is cheapest for a shape, by "
            "times that were measured with every release, and how sure that is.",
        )
    )
    return parser


def _add_advise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tensor", type=_shape, metavar="N,C,...", help="the shape, channels second in any layout"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help="where the channels lie (default: both)")
    parser.add_argument(
        "--training", action="store_true", help="forward and backward, instead of inference"
    )
    parser.add_argument("--normalization", choices=NORMALIZATIONS, help="consider this one alone")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="float32 by default")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="(default: as many as cpunorm would use)"
    )
    # Without a default of its own, or it would undo the same option before the command.
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the numbers as JSON"
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape) >= 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape: give two or more positive integers, as in 8,64,56,56"
        )
    return shape


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
