"""The interactive page: what to compare, operation, pass, layout, dtype; values by hovering."""

import json
from pathlib import Path
from typing import Any

from ..results import COPY, PLAIN
from .style import IMPLEMENTATIONS as LOOKS
from .style import OPERATIONS, SHOWN, footer
from .table import NAMES, PASSES, Measured, spread

TEMPLATE = Path(__file__).with_name("explore.html")
# What the page loads from beside it, and the licence of that.
BUNDLE = Path(__file__).parents[2] / "docs" / "maps"
BUNDLED = ("plotly-basic.min.js", "plotly-LICENSE.txt")


def page(measured: Measured) -> str:
    """Return the page with its data in it."""
    text = json.dumps(_data(measured), ensure_ascii=False, separators=(",", ":"))
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("/* the data */ null", text.replace("</", "<\\/"))


def _data(measured: Measured) -> dict[str, Any]:
    shapes: dict[tuple[int, ...], int] = {}
    tables: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for row in measured.rows:
        if row.pass_ in PASSES:
            shape = shapes.setdefault(row.shape, len(shapes))
            of = row.operation, row.pass_, row.layout, row.dtype, row.threads, row.implementation
            # The quartiles in percent, which is shorter.
            percent = (round(100 * (s / row.median - 1)) for s in spread(row))
            numbers = float(f"{row.median * 1e6:.3g}"), *percent
            tables.setdefault(of, []).append((shape, row.num_groups or 0, *numbers))
    shown = SHOWN | {PLAIN: "plain NumPy", COPY: "copy, in backward passes triad"}
    return {
        "footer": footer(measured),
        "operations": {
            name: {"shown": NAMES[name], "letter": letter, "colour": colour}
            for name, (colour, _, letter) in OPERATIONS.items()
        },
        "implementations": {
            name: {"shown": shown.get(name, name), "letter": letter, "colour": colour}
            for name, (colour, _, letter) in LOOKS.items()
        },
        "shapes": list(shapes),
        "tables": [[of, rows] for of, rows in tables.items()],
    }


def bundle() -> dict[str, bytes]:
    """Return what the page loads, by name of file."""
    return {name: (BUNDLE / name).read_bytes() for name in BUNDLED}
