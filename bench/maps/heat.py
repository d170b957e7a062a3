"""Heat maps over a `Plane`: who wins, and ratios, with the numbers in the cells."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, to_rgb
from matplotlib.patches import Rectangle

from .table import Plane, label

Cell = tuple[int, int]
# Nearer to 1 than this is equal.
CLEAR = 1.05
AXIS = {
    "N": "N (images)",
    "C": "C (channels)",
    "HW": "HW (positions)",
    "M": "M (rows)",
    "D": "D (length of a row)",
    "G": "groups",
}


def frame(axes: Axes, plane: Plane, title: str, inner: bool = False) -> None:
    """Set ticks, labels and limits; an inner panel has its neighbour's y axis."""
    axes.set_title(title)
    axes.set_xlim(-0.5, len(plane.xs) - 0.5)
    axes.set_ylim(-0.5, len(plane.ys) - 0.5)
    axes.set_xticks(range(len(plane.xs)), [label(plane.x, v) for v in plane.xs])
    axes.set_yticks(range(len(plane.ys)), [label(plane.y, v) for v in plane.ys])
    axes.set_xlabel(AXIS[plane.x])
    if inner:
        axes.tick_params(labelleft=False)
    else:
        axes.set_ylabel(AXIS[plane.y])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_facecolor("0.96")
    for spine in axes.spines.values():
        spine.set_visible(False)


def winners(
    axes: Axes,
    plane: Plane,
    cells: Mapping[Cell, tuple[str, str]],
    looks: Mapping[str, Sequence[str]],
) -> None:
    """Colour every cell by who wins and write a text in it; a line where that changes."""
    for (line, column), (name, text) in cells.items():
        color = looks[name][0]
        axes.add_patch(
            Rectangle((column - 0.5, line - 0.5), 1, 1, facecolor=color, edgecolor="white", lw=0.8)
        )
        _write(axes, line, column, text, color)
    crossover(axes, {cell: name for cell, (name, _) in cells.items()})


def crossover(axes: Axes, of: Mapping[Cell, Any]) -> None:
    """Draw the edges between neighbours that differ."""
    for (line, column), value in of.items():
        right, above = of.get((line, column + 1), value), of.get((line + 1, column), value)
        if right != value:
            axes.plot([column + 0.5] * 2, [line - 0.5, line + 0.5], color="black", lw=2.2)
        if above != value:
            axes.plot([column - 0.5, column + 0.5], [line + 0.5] * 2, color="black", lw=2.2)


def ratios(
    axes: Axes,
    plane: Plane,
    cells: Mapping[Cell, tuple[float, str]],
    cmap: Colormap,
    norm: LogNorm,
    boundary: bool = False,
) -> Any:
    """Colour every cell by a ratio and write a text in it; return what a colour bar needs."""
    values = np.full((len(plane.ys), len(plane.xs)), math.nan)
    for cell, (value, _) in cells.items():
        values[cell] = value
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=cmap, norm=norm, origin="lower", aspect="auto"
    )
    for (line, column), (value, text) in cells.items():
        _write(axes, line, column, text, cmap(norm(value)))
    if boundary:
        sides = {c: (value > CLEAR) - (value < 1 / CLEAR) for c, (value, _) in cells.items()}
        crossover(axes, sides)
    return image


def colour_bar(image: Any, axes: Any, text: str, ticks: Sequence[float], **options: Any) -> None:
    """Put a bar beside many axes that says what their colours mean."""
    axes[0][0].figure.colorbar(
        image, ax=axes, label=text, shrink=0.8, aspect=40, format="%g", **options
    ).set_ticks(ticks, minor=False)
    axes[0][0].figure.axes[-1].minorticks_off()


def _write(axes: Axes, line: int, column: int, text: str, background: Any) -> None:
    red, green, blue = to_rgb(background)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
    axes.text(
        column, line, text, ha="center", va="center", fontsize=7.5, linespacing=1.1,
        color="white" if dark else "black",
    )  # fmt: skip


def around_one(most: float) -> LogNorm:
    """Return a scale of ratios that is centred at 1."""
    return LogNorm(1 / most, most, clip=True)


def number(value: float) -> str:
    """Return a ratio with two digits, or what there is of them."""
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"
