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
from pathlib import Path

from cpunorm import _advice

from .results import ResultsError, read, read_document
from .run import Parser

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OUTPUT = HERE.parent / "docs" / "maps"


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
        "--advice", type=Path, default=_advice.SHIPPED, help="a file, cpunorm/advice.json"
    )
    args = parser.parse_args(argv)
    if not args.advice.parent.is_dir() or args.advice.is_dir():
        parser.error(f"--advice {args.advice}: no place for a file")
    path = args.results or latest(RESULTS)
    results = read(path)
    if not results.rows:
        raise ResultsError(f"{path}: holds no measurement")
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
    _replace(args.advice.parent, {args.advice.name: advice_text.encode()})
    print(f"{len(files)} files in {args.output}, and {args.advice}")
    return 0


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
