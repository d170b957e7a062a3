"""What figures share: a `Figure` with its numbers, colours and markers, the line about the run."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from PIL import Image

from ..results import counted
from .table import NAMES, Measured

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
DPI, COLOURS = 105, 256
RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200)
rcParams.update(STYLE)
# Okabe and Ito's palette, which the colour-blind can tell apart; each with a marker and a letter.
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
OPERATIONS = {
    "batch_norm": (BLUE, "o", "B"),
    "layer_norm": (ORANGE, "s", "L"),
    "instance_norm": (PURPLE, "^", "I"),
    "group_norm": (GREEN, "D", "G"),
    "rms_norm": (VERMILION, "v", "R"),
}
IMPLEMENTATIONS = {
    "cython": (BLUE, "o", "C"),
    "numba": (ORANGE, "s", "N"),
    "numpy": (GREY, "x", "P"),
    "plain": ("black", "+", "p"),
    "torch": (VERMILION, "^", "t"),
    "onnxruntime": (GREEN, "D", "o"),
    "openvino": (PURPLE, "v", "v"),
    "jax": (SKY, "P", "j"),
    "copy": ("black", "_", "c"),
}
SHOWN = {"cython": "cpunorm (cython)", "numba": "cpunorm (numba)", "numpy": "cpunorm (numpy)"}
SHOWN |= {"plain": "plain NumPy"}


@dataclass
class Figure:
    """A drawing, what it shows, and the numbers in it.

    Parameters
    ----------
    name : str
        Of its files.
    title, caption : str
    drawing : matplotlib figure
    columns, rows
        The numbers, as a table.
    """

    name: str
    title: str
    caption: str
    drawing: Drawing
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def files(self, measured: Measured) -> dict[str, bytes]:
        """Return the contents of the figure's files by name."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        about = {"title": self.title, **about_run(measured), "columns": self.columns}
        head = json.dumps(about, ensure_ascii=False)[:-1]
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in self.rows)
        return {
            f"{self.name}.png": self._png(measured),
            f"{self.name}.csv": table.getvalue().encode(),
            f"{self.name}.json": f'{head}, "rows": [\n{lines}\n]}}\n'.encode(),
        }

    def _png(self, measured: Measured) -> bytes:
        """Return the picture in few colours, a quarter of the bytes."""
        self.drawing.text(0.005, 0.005, footer(measured), fontsize=7, color="0.3", va="bottom")
        full, small = io.BytesIO(), io.BytesIO()
        self.drawing.savefig(full, format="png", dpi=DPI)
        with Image.open(full) as image:
            _in_few_colours(image.convert("RGB")).save(small, "PNG", optimize=True)
        return small.getvalue()


def _in_few_colours(image: Image.Image) -> Image.Image:
    """Return a picture in its most frequent colours: areas keep theirs, edges the nearest."""
    frequent = sorted(image.getcolors(image.width * image.height), reverse=True)[:COLOURS]
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for _, colour in frequent for channel in colour])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def about_run(measured: Measured) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "machine": measured.machine_line(),
        "versions": measured.machine["versions"],
        "threads": measured.threads,
        "date": measured.date,
        "measured with": measured.machine["command"],
        "drawn with": "python -m bench report",
    }


def footer(measured: Measured) -> str:
    """Return the two lines under every figure."""
    *fewer, most = measured.threads
    threads = " or ".join([*map(str, fewer), counted(most, "thread")])
    return (
        f"{measured.machine_line()}; {threads}; measured {measured.date} with "
        f"`{measured.machine['command']}`, drawn with `python -m bench report`\n"
        f"{measured.versions_line()}"
    )


def panels(
    lines: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Drawing, Any]:
    """Return a drawing with room for the footer, and a matrix of axes."""
    drawing = Drawing(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(lines, columns, squeeze=False, **options)
    low = 0.4 / height
    drawing.get_layout_engine().set(rect=(0, low, 1, 1 - low), h_pad=0.06, w_pad=0.06)
    return drawing, axes


def scatter(axes: Axes, xs: Iterable[float], ys: Iterable[float], look: Sequence[str], name: str):
    """Draw points that colour and marker tell apart."""
    color, marker, _ = look
    filled = marker not in "x+_"
    axes.plot(
        list(xs), list(ys), marker, color=color, label=name, ms=4, alpha=0.85,
        mec="white" if filled else color, mew=0.4 if filled else 1.2,
    )  # fmt: skip


def ratio_axis(axes: Axes) -> None:
    """Make y a logarithmic axis of ratios, with a line where both are equal."""
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    ticks = [t for t in RATIOS if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.axhline(1, color="black", lw=1.2)


def common_legend(drawing: Drawing, axes: Iterable[Axes], columns: int = 8) -> None:
    """Put one legend for all axes above them."""
    found: dict[str, Any] = {}
    for one in axes:
        for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    drawing.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=min(columns, len(found)),
        fontsize=8,
    )  # fmt: skip


def titled(operation: str, pass_: str | None = None, layout: str | None = None) -> str:
    """Return the title of a panel."""
    return ", ".join(filter(None, (NAMES[operation], pass_, layout)))
