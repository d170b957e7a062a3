"""Draw the maps from a results file: python -m bench report [RESULTS.json]

Writes the page, its figures with their numbers, and the interactive page to docs/maps, and the data
of `cpunorm.advise` into the package. A figure that the file has no data for is left out, and the
page says so. Nothing is written before everything is made.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from cpunorm import _advice

from .results import Results, ResultsError, Row, read, read_document
from .run import Parser
from .suites import suite

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OUTPUT = HERE.parent / "docs" / "maps"
# Of the cases of the grid, to be the maps that are shipped.
ENOUGH = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and write everything; return the exit code."""
    parser = Parser(
        prog="python -m bench report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="?", type=Path, help="the latest of bench/results")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a folder, docs/maps")
    parser.add_argument(
        "--advice", type=Path, help="a file, the instruction set's in cpunorm/advice"
    )
    args = parser.parse_args(argv)
    output = args.output.absolute()
    if not next(folder for folder in (output, *output.parents) if folder.exists()).is_dir():
        parser.error(f"--output {args.output}: no place for a folder")
    path = args.results or latest(RESULTS)
    results = read(path)
    if not results.rows:
        raise ResultsError(f"{path}: holds no measurement")
    if args.output == OUTPUT or args.advice is None:
        _refuse_a_part(parser, path, results)
    advice_path = args.advice or _advice.shipped_path(results.machine["instruction set"])
    if not advice_path.parent.is_dir() or advice_path.is_dir():
        parser.error(f"--advice {advice_path}: no place for a file")
    try:
        from .maps import advice, explore, page
        from .maps.table import Measured
    except ModuleNotFoundError as error:
        parser.exit(2, f"{parser.prog}: {error.name} is missing: pip install '.[bench]'\n")
    measured = Measured(results)
    advice_text = advice.text(measured)
    files = page.files(measured)
    files["explore.html"] = explore.page(measured).encode()
    files |= explore.bundle()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {args.output}: {error.strerror}")
    _replace(args.output, files)
    _replace(advice_path.parent, {advice_path.name: advice_text.encode()})
    print(f"{len(files)} files in {args.output}, and {advice_path}")
    return 0


def _refuse_a_part(parser: Parser, path: Path, results: Results) -> None:
    """End with an error unless the grid of the maps was measured, or nearly."""
    grid = {astuple(case)[:6] for case in suite("maps") if case.source == "grid"}
    found = {_as_case(row) for row in results.rows} & grid
    if len(found) < ENOUGH * len(grid):
        parser.error(
            f"{path} has {len(found)} of the {len(grid)} cases of the maps, too few to replace "
            "docs/maps and cpunorm/advice: name others with --output and --advice"
        )


def _as_case(row: Row) -> tuple[object, ...]:
    return row.operation, row.pass_, row.layout, row.shape, row.num_groups, row.dtype


def latest(folder: Path) -> Path:
    """Return the results file with the latest date."""

    def date(path: Path) -> str:
        try:
            return str(read_document(path)["datetime"])
        except (KeyError, TypeError):
            raise ResultsError(f"{path}: no results of python -m bench") from None

    paths = sorted(folder.glob("*.json*"))
    if not paths:
        raise ResultsError(f"no results file in {folder}: name one, or measure: python -m bench")
    return max(paths, key=date)


def _replace(folder: Path, files: dict[str, bytes]) -> None:
    """Write files beside their places, then move them there; drop what only the old page had."""
    page = folder / "index.md"
    before = page.read_text(encoding="utf-8") if page.name in files and page.exists() else ""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as beside:
        for name, content in files.items():
            (Path(beside) / name).write_bytes(content)
        for name in files:
            os.replace(Path(beside) / name, folder / name)
    for name in set(re.findall(r"\]\(([\w-]+\.(?:png|csv|json))\)", before)) - set(files):
        (folder / name).unlink(missing_ok=True)
