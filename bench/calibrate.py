"""Measure what `auto` should mean on this machine: python -m bench.calibrate [--write]

Cython against Numba on every kernel and class of size, in processes of their own. A kernel changes
hands only where Numba is clearly faster on each of its cases and in each block. The table that
results is printed, and kept with --write (in the user's cache folder, from where cpunorm takes it)
or with --ship (in the package).
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpunorm import _auto
from cpunorm._dispatch import config

from . import peers
from .machine import machine
from .shapes import Case, Shape
from .workers import Contestant, Worker, crew, measure

MIB = 2**20
# Where each class begins and what it is measured on. Below the first, the detour that leads to
# Numba costs a good part of the call.
CLASSES = {20: 2 * MIB, 23: 16 * MIB, 26: 64 * MIB}
# Without doubt.
CLEAR = 1.05

PIXELS = ((64, 56, 56), (256, 14, 14))
ROWS = (1024, 64)


def cases(nbytes: int) -> Iterator[tuple[str, Case]]:
    """Yield kernels, as the table names them, with cases of so many bytes or a little more."""

    def fill(*rest: int) -> Shape:
        return (math.ceil(nbytes / (math.prod(rest) * 4)), *rest)

    for pass_, verb in (("inference", "normalize"), ("backward", "backward")):
        for length in ROWS:
            yield f"rows {verb}", Case("layer_norm", pass_, "NCHW", fill(length))
        for image in PIXELS:
            shape = fill(*image)
            yield f"columns {verb}", Case("layer_norm", pass_, "NCHW", shape)
            for problem, layout in (("channels_first", "NCHW"), ("channels_last", "NHWC")):
                statistics = "training" if pass_ == "inference" else pass_
                name = f"{problem} {verb}"
                yield name, Case("batch_norm", statistics, layout, shape)
                yield name, Case("group_norm", pass_, layout, shape, 32)
                constants = "inference" if pass_ == "inference" else "backward_frozen"
                name = f"{problem} {'apply' if pass_ == 'inference' else 'backward_apply'}"
                yield name, Case("batch_norm", constants, layout, shape)


def fastest(ratios: dict[str, dict[int, list[float]]]) -> dict[str, list[str]]:
    """Return a backend per kernel and class, from Cython's time ÷ Numba's in every block."""
    return {
        name: ["numba" if min(some) >= CLEAR else "cython" for some in by_class.values()]
        for name, by_class in ratios.items()
    }


def text(made: str, machine: str, table: dict[str, list[str]]) -> str:
    """Return the file: a line per kernel, so that it is read at a glance."""
    names = {name: json.dumps(name) + ":" for name in table}
    width = max(map(len, names.values()))
    rows = [f"    {names[name]:{width}} {json.dumps(row)}" for name, row in table.items()]
    return "\n".join(
        (
            "{",
            f'  "made": {json.dumps(made)},',
            f'  "machine": {json.dumps(machine)},',
            f'  "log2_bytes": {json.dumps(list(CLASSES))},',
            '  "fastest": {',
            ",\n".join(rows),
            "  }",
            "}",
            "",
        )
    )


def _measure(workers: Sequence[Worker], blocks: int) -> dict[str, dict[int, list[float]]]:
    ratios: dict[str, dict[int, list[float]]] = {}
    print(f"{'cython ÷ numba':56}{'cython µs':>12}{'numba µs':>12}")
    for log2, nbytes in CLASSES.items():
        for name, case in cases(nbytes):
            result = measure(case, workers, blocks)
            if result.notes:
                raise SystemExit("\n".join(f"{n}: {why}" for n, why in result.notes.items()))
            cython, numba = (result.seconds[backend] for backend in _auto.CHOICES)
            # Side by side, since the machine drifts.
            pairs = zip(*(result.blocks[backend] for backend in _auto.CHOICES), strict=True)
            ratios.setdefault(name, {}).setdefault(log2, []).extend(c / n for c, n in pairs)
            print(f"{case!s:56}{cython * 1e6:12.1f}{numba * 1e6:12.1f}{cython / numba:8.2f}")
    return ratios


def main() -> None:
    """Measure, print and, if asked, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=config()["threads"])
    parser.add_argument("--blocks", type=int, default=5)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--write", action="store_true", help=f"keep it in {_auto.own_path()}")
    where.add_argument("--ship", action="store_true", help=f"keep it in {_auto.SHIPPED}")
    args = parser.parse_args()
    everyone = [
        Contestant(backend, peers.OURS, args.threads, {"backend": backend})
        for backend in _auto.CHOICES
    ]
    with crew(everyone) as (workers, left_out):
        if left_out:
            raise SystemExit("\n".join(f"{name}: {why}" for name, why in left_out.items()))
        ratios = _measure(workers, args.blocks)
    facts = machine(args.threads)
    versions = facts["versions"]
    made = f"{facts['date'][:10]}, cpunorm {versions['cpunorm']}, numba {versions['numba']}"
    computer = f"{facts['cpu']}, {facts['instruction set']}, {args.threads} threads"
    content = text(made, computer, fastest(ratios))
    print(content, end="")
    if args.write or args.ship:
        path = Path(_auto.own_path() if args.write else _auto.SHIPPED)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        _auto.read(str(path))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
