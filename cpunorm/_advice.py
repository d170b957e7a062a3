"""What to choose for a shape, from measured times: `advise`, and the shipped data it reads.

The data, a file for each instruction set that was measured, is a part of a full run of the
comparison suite, written by ``python -m bench report``. A file holds one table per normalization,
pass, layout, dtype, number of threads and backend, of times at points (N, C, positions). Between
them the time beside a copy's is interpolated, by local linear regression of its logarithm over
those of N, C and positions.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._canonical import CHANNELS_LAST, DTYPE_NAMES, flag, integer, integers, is_supported
from ._dispatch import instruction_set
from ._threads import get_num_threads

FORMAT = 1
SHIPPED = Path(__file__).with_name("advice")

NORMALIZATIONS = ("batch_norm", "layer_norm", "instance_norm", "group_norm", "rms_norm")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float16", "bfloat16", "float64")

# How many measured shapes an interpolated one is made from.
NEIGHBOURS = 12
# How far from the measured shapes, in powers of two, the answer is sure, and is one at all.
NEAR, FAR = 2.0, 4.0

Shape = tuple[int, ...]
Floats = NDArray[np.float64]
Sureness = Literal["measured", "inside", "outside", "unknown"]


def settings(shape: Shape) -> tuple[int, int, int]:
    """Return N, C and the number of positions of a shape, channels first."""
    n, c, *spatial = shape
    return n, c, math.prod(spatial)


def usual_groups(channels: int) -> int:
    """Return the number of groups of a group norm that nobody chose."""
    return math.gcd(channels, 32)


def place(normalization: str, layout: str | None, shape: Shape) -> tuple[str, tuple[int, int, int]]:
    """Return the layout and the (N, C, positions) that a problem is filed under.

    One position is the same in both layouts. Channels last, what is over all images or over the
    channels of one position does not know images from positions.
    """
    n, c, positions = settings(shape)
    if layout is None or positions == 1:
        layout = "NHWC"
    if layout == "NHWC" and normalization in ("batch_norm", "layer_norm", "rms_norm"):
        return layout, (n * positions, c, 1)
    return layout, (n, c, positions)


def interpolate(points: Floats, values: Floats, target: Floats) -> float:
    """Return a value at a target: linear regression on the nearest points, the nearer the heavier.

    This is loess (W. S. Cleveland, "Robust Locally Weighted Regression and Smoothing Scatterplots",
    J. Am. Stat. Assoc. 74, 1979) with a neighbourhood of `NEIGHBOURS` points.
    """
    distances = np.linalg.norm(points - target, axis=1)
    nearest = np.argsort(distances, kind="stable")[:NEIGHBOURS]
    reach = 1.1 * distances[nearest[-1]] or 1.0
    weights = (1 - (distances[nearest] / reach) ** 3) ** 1.5
    design = np.column_stack([np.ones(len(nearest)), points[nearest] - target])
    solution, *_ = np.linalg.lstsq(design * weights[:, None], values[nearest] * weights)
    return float(solution[0])


class Copies:
    """The time of a copy, or of the triad, by the number of elements.

    Parameters
    ----------
    elements : sequence of int
        Ascending.
    times : sequence of float
        In microseconds.
    """

    def __init__(self, elements: Sequence[int], times: Sequence[float]) -> None:
        logs, values = np.log2(elements), np.log(np.asarray(times) * 1e-6)
        # Less than was measured takes as long as a call, more as long as memory takes.
        self._logs = np.concatenate([[logs[0] - FAR], logs, [logs[-1] + FAR]])
        self._values = np.concatenate([values[:1], values, values[-1:] + FAR * math.log(2)])

    def log_seconds(self, log2_elements: Floats) -> Floats:
        """Return logarithms of times."""
        return np.asarray(np.interp(log2_elements, self._logs, self._values))


class Table:
    """The measured times of one normalization, pass, layout, dtype, thread count and backend.

    Parameters
    ----------
    shapes : sequence of (N, C, positions)
    times : sequence of float
        Medians in microseconds.
    below, above : sequence of int
        By how many percent the quartiles are lower and higher.
    error : float
        Measured times, each left out and interpolated from the others, were off by less than this
        factor in nine of ten cases.
    copies : Copies
        What the times are compared with.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        times: Sequence[float],
        below: Sequence[int],
        above: Sequence[int],
        error: float,
        copies: Copies,
    ) -> None:
        self.shapes, self.times, self.below, self.above = shapes, times, below, above
        self.error, self.copies = error, copies
        self.logs: Floats = np.log2(shapes)
        copy = copies.log_seconds(self.logs.sum(axis=1))
        # Smoother than times: what a copy does at the edges of the caches is taken out.
        self.ratios: Floats = np.log(np.asarray(times) * 1e-6) - copy

    def look_up(self, shape: tuple[int, int, int]) -> "Found | None":
        """Return the time of a shape, None too far from everything measured."""
        target: Floats = np.log2(shape)
        distances = np.linalg.norm(self.logs - target, axis=1)
        i = int(np.argmin(distances))
        near = tuple(self.shapes[i])
        log_copy = float(self.copies.log_seconds(target.sum()))
        copy = math.exp(log_copy)
        if near == shape:
            seconds = self.times[i] * 1e-6
            low, high = 1 - self.below[i] / 100, 1 + self.above[i] / 100
            return Found(seconds, seconds * low, seconds * high, copy, "measured", near)
        outside = np.maximum(self.logs.min(axis=0) - target, target - self.logs.max(axis=0))
        beyond = float(max(outside.max(), distances[i] - NEAR, 0.0))
        if beyond > FAR - NEAR:
            return None
        seconds = math.exp(log_copy + interpolate(self.logs, self.ratios, target))
        factor = self.error ** (1 + beyond)
        sure: Sureness = "inside" if beyond == 0 else "outside"
        return Found(seconds, seconds / factor, seconds * factor, copy, sure, near)


class Found(NamedTuple):
    """A time with its bounds, that of a copy, how sure they are, and the nearest shape."""

    seconds: float
    low: float
    high: float
    copy: float
    sure: Sureness
    nearest: tuple[int, ...]

    def after(self, other: "Found") -> "Found":
        """Return what both take, one after the other."""
        order: tuple[Sureness, ...] = ("measured", "inside", "outside")
        seconds, low, high, copy = (a + b for a, b in zip(self[:4], other[:4], strict=True))
        sure = max(self.sure, other.sure, key=order.index)
        return Found(seconds, low, high, copy, sure, self.nearest)


class Key(NamedTuple):
    """What a table is about."""

    normalization: str
    pass_: str
    layout: str
    dtype: str
    threads: int
    backend: str

    @property
    def traffic(self) -> str:
        """Return what the time is compared with."""
        return "triad" if self.pass_ == "backward" else "copy"


class Data(NamedTuple):
    """The measured tables, and the machine they are from."""

    machine: str
    tables: dict[Key, Table]

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Data":
        """Return the data that a file's content holds."""
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, but this version reads {FORMAT}")
        copies = {tuple(e["of"]): Copies(e["elements"], e["times"]) for e in content["copies"]}
        tables = {}
        for entry in content["tables"]:
            key = Key(*entry["of"])
            shapes = [content["shapes"][i] for i in entry["shapes"]]
            columns = {name: entry[name] for name in ("times", "below", "above", "error")}
            of_copies = copies[key.traffic, key.dtype, key.threads]
            tables[key] = Table(shapes, **columns, copies=of_copies)
        return cls(content["machine"], tables)


@cache
def shipped() -> Data:
    """Return the data in the package: of this machine's instruction set, else of the highest."""
    here = shipped_path(instruction_set())
    path = here if here.exists() else max(SHIPPED.glob("*.json"))
    return Data.of(json.loads(path.read_text(encoding="utf-8")))


def _vectors(isa: str | None) -> str | None:
    """Return an instruction set without what only bfloat16 makes use of."""
    return isa and isa.removesuffix("_bf16")


def shipped_path(isa: str | None) -> Path:
    """Return where the data of an instruction set are, or would be."""
    return SHIPPED / f"{_vectors(isa)}.json"


@dataclass(frozen=True)
class Estimate:
    """What one way to normalize takes.

    Attributes
    ----------
    normalization : str
        A function of cpunorm. Group norm has gcd(C, 32) groups.
    layout : {"NCHW", "NHWC", None}
        None where there is one position, and both are the same.
    backend : str
    seconds, low, high : float
        The time of a call (in training, of forward and backward together) and its spread: the
        quartiles of what was measured, or the bounds of nine interpolations in ten.
    copy_seconds : float
        A copy of the tensor; in training also the triad, which reads two and writes one.
    sure : {"measured", "inside", "outside"}
        Measured at this shape, interpolated inside the measured region, or guessed outside of it.
    nearest : tuple of int
        N, C and positions of the nearest measured problem. Channels last, batch, layer and RMS norm
        do not know images from positions: they count as N.
    """

    normalization: str
    layout: str | None
    backend: str
    seconds: float
    low: float
    high: float
    copy_seconds: float
    sure: Sureness
    nearest: tuple[int, ...]

    @property
    def times_copy(self) -> float:
        """How many times as long as a copy."""
        return self.seconds / self.copy_seconds

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the spread hides which of two is the faster."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Advice:
    """What `advise` answers. As a string, in words.

    Parameters
    ----------
    shape : tuple of int
        The one asked for.
    layout : {"NCHW", "NHWC", None}
        The one asked for.
    training : bool
        Whether a training step was asked for.
    dtype : str
        The one asked for.
    threads : int
        Those of the measurement, the nearest to those asked for; 0 if nothing is known.
    estimates : tuple of Estimate
        Every normalization, layout and backend that is known, the fastest first, guesses last.
    machine : str
        What was measured on, and when.
    """

    shape: Shape
    layout: str | None
    training: bool
    dtype: str
    threads: int
    estimates: tuple[Estimate, ...]
    machine: str

    @property
    def best(self) -> Estimate | None:
        """The fastest of all, None where nothing is known."""
        return self.estimates[0] if self.estimates else None

    @property
    def sure(self) -> Sureness:
        """How sure `best` is."""
        return self.best.sure if self.best else "unknown"

    @property
    def ranking(self) -> tuple[Estimate, ...]:
        """The fastest way for each normalization, the cheapest first."""
        first: dict[str, Estimate] = {}
        for estimate in self.estimates:
            first.setdefault(estimate.normalization, estimate)
        return tuple(first.values())

    def __str__(self) -> str:
        return "\n".join(_words(self))


def advise(
    shape: Sequence[int],
    layout: str | None = None,
    training: bool = False,
    *,
    normalization: str | None = None,
    dtype: Any = "float32",
    threads: int | None = None,
) -> Advice:
    r"""Say which normalization, layout and backend is cheapest for a shape, and how sure that is.

    The answer comes from times measured on one machine, which it names; between measured shapes
    they are interpolated, and far from all of them it says that it does not know. Cost alone is
    compared: which normalization a network learns best with is another question.

    Parameters
    ----------
    shape : sequence of int
        (N, C) or (N, C, \*spatial), channels first whatever the layout.
    layout : {"NCHW", "NHWC", "channels_first", "channels_last"}, optional
        Where the channels lie; None compares both.
    training : bool
        Whether to count a forward pass with statistics and the backward pass; else inference.
    normalization : str, optional
        The only one to consider: ``"batch_norm"``, ``"layer_norm"``, ``"instance_norm"``,
        ``"group_norm"`` or ``"rms_norm"``. Layer and RMS norm are over the channels.
    dtype : dtype or str
        One that the kernels take.
    threads : int, optional
        None is `get_num_threads()`.

    Returns
    -------
    Advice
        The estimates; ``str(advice)`` says them in words.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, or `dtype` none that the kernels take.
    ValueError
        If the shape has fewer than two axes or one that is not positive, or a name is unknown.

    Examples
    --------
    >>> import cpunorm
    >>> advice = cpunorm.advise((8, 512, 7, 7), layout="NCHW")
    >>> advice.best.normalization  # doctest: +ELLIPSIS
    '..._norm'
    >>> advice.best.low <= advice.best.seconds <= advice.best.high
    True
    >>> print(advice)  # doctest: +ELLIPSIS
    (8, 512, 7, 7), float32, NCHW, inference, ...
    """
    shape = integers("shape", shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be two or more positive ints, (N, C, ...), got {shape}")
    if math.prod(shape) >= 2**63:
        raise ValueError(f"shape must have fewer than 2**63 elements, got {shape}")
    if layout is not None:
        _one_of("layout", layout, tuple(CHANNELS_LAST))
        layout = LAYOUTS[CHANNELS_LAST[layout]]
    if normalization is not None:
        _one_of("normalization", normalization, NORMALIZATIONS)
    asked = get_num_threads() if threads is None else integer("threads", threads)
    if asked < 1:
        raise ValueError(f"threads must be at least 1, got {asked}")
    return answer(
        shipped(), shape, layout, flag("training", training), normalization, _dtype(dtype), asked
    )


def _one_of(name: str, given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, str):
        raise TypeError(f"{name} must be a string or None, got {type(given).__name__}")
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {given!r}")


def _dtype(given: Any) -> str:
    """Return the name of a dtype, which may be of a package that is not installed."""
    if given == "bfloat16":
        return "bfloat16"
    try:
        dtype = np.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or not is_supported(dtype):
        raise TypeError(f"dtype must be {DTYPE_NAMES}, got {given!r}")
    return str(dtype.name)


def answer(
    data: Data,
    shape: Shape,
    layout: str | None,
    training: bool,
    normalization: str | None,
    dtype: str,
    threads: int,
) -> Advice:
    """Return the advice that data hold, all arguments being sound."""
    known = sorted({key.threads for key in data.tables if key.dtype == dtype})
    measured = max((t for t in known if t <= threads), default=min(known, default=0))
    layouts: Iterable[str | None] = LAYOUTS if layout is None else (layout,)
    if settings(shape)[2] == 1:
        layouts = (None,)
    found = [
        estimate
        for name in NORMALIZATIONS
        if normalization in (None, name) and _is_defined(name, shape, training)
        for one in layouts
        for estimate in _estimates(data, name, one, shape, training, dtype, measured)
    ]
    ordered = tuple(sorted(found, key=lambda e: (e.sure == "outside", e.seconds)))
    return Advice(shape, layout, training, dtype, measured, ordered, data.machine)


def _is_defined(normalization: str, shape: Shape, training: bool) -> bool:
    """Whether there is more than one value to a statistic."""
    n, c, positions = settings(shape)
    values = {"batch_norm": n * positions if training else 2, "instance_norm": positions}
    values["group_norm"] = c // usual_groups(c) * positions
    return values.get(normalization, c) > 1


def _estimates(
    data: Data,
    normalization: str,
    layout: str | None,
    shape: Shape,
    training: bool,
    dtype: str,
    threads: int,
) -> Iterator[Estimate]:
    """Yield what each backend takes."""
    filed, target = place(normalization, layout, shape)
    # Only batch norm computes anything else forward in training.
    forward = "training" if training and normalization == "batch_norm" else "inference"
    passes = (forward, "backward") if training else (forward,)
    for backend in dict.fromkeys(key.backend for key in data.tables):
        keys = (Key(normalization, p, filed, dtype, threads, backend) for p in passes)
        found = [data.tables[key].look_up(target) if key in data.tables else None for key in keys]
        first, *rest = found
        for other in rest:
            first = first.after(other) if first and other else None
        if first is not None:
            yield Estimate(normalization, layout, backend, *first)


# --- In words ------------------------------------------------------------------------------------


def _words(advice: Advice) -> Iterator[str]:
    kind = "training (forward and backward)" if advice.training else "inference"
    asked = [str(advice.shape), advice.dtype, *([advice.layout] if advice.layout else []), kind]
    what = ", ".join(asked)
    best = advice.best
    if best is None:
        yield f"{what}: I do not know. Nothing near it was measured ({advice.machine})."
        return
    threads = f"{advice.threads} thread{'s'[: advice.threads != 1]}"
    yield f"{what}, {threads}: {_verdict(advice.ranking)}"
    ratio = _ratio(best.times_copy)
    yield f"It takes {time_of(best)}, {ratio} times as long as {_traffic(advice)}."
    yield ""
    yield f"{'':16}{'time':>9}  {'spread':17}{'÷ copy':>7}  fastest with"
    for e in advice.ranking:
        note = "" if e.sure == best.sure else f"  ({e.sure})"
        yield (
            f"{_name(e):16}{_short(e.seconds):>9}  {_spread(e):17}{_ratio(e.times_copy):>7}  "
            f"{', '.join(filter(None, (e.layout, e.backend)))}{note}"
        )
    yield ""
    same = [e for e in advice.estimates if e.normalization == best.normalization]
    yield from _against("Layout", best, [e for e in same if e.backend == best.backend], "layout")
    yield from _against("Backend", best, [e for e in same if e.layout == best.layout], "backend")
    yield f"How sure: {_how_sure(best)}"
    yield f"Source: {advice.machine}. Elsewhere the order may be another."
    here = _vectors(instruction_set())
    if here and here not in advice.machine:
        yield f"This machine is another: it computes with {here}. Trust the order more than times."


def _verdict(ranking: Sequence[Estimate]) -> str:
    best, *others = ranking
    equal = [_name(e) for e in others if e.overlaps(best)]
    if not others:
        return f"{_name(best)} is the one that is known."
    if equal:
        return f"{_name(best)} is cheapest, but within the spread as cheap: {', '.join(equal)}."
    ratio = _ratio(others[0].seconds / best.seconds)
    return f"{_name(best)} is cheapest; {_name(others[0])}, the next, takes {ratio} times as long."


def _against(what: str, best: Estimate, some: Sequence[Estimate], field: str) -> Iterator[str]:
    """Say how the best one stands to those that differ from it in one field."""
    others = [e for e in some if getattr(e, field) != getattr(best, field)]
    if others:
        parts = ", ".join(
            f"{getattr(e, field)} is the same within the spread"
            if e.overlaps(best)
            else f"{getattr(e, field)} takes {_ratio(e.seconds / best.seconds)} times as long"
            for e in others
        )
        yield f"{what}: {getattr(best, field)}; {parts}."


def _how_sure(e: Estimate) -> str:
    n, c, positions = e.nearest
    near = f"N={n}, C={c}" + (f", {positions} positions" if positions > 1 else "")
    return {
        "measured": "measured at this very shape; half of the blocks of calls lie in the spread.",
        "inside": f"inside the measured region, interpolated (nearest: {near}). Measured shapes "
        "that were left out and interpolated came out within such a spread nine times in ten.",
        "outside": f"outside the measured region (nearest: {near}): a guess.",
    }[e.sure]


def _traffic(advice: Advice) -> str:
    if advice.training:
        return "copying the tensor and then reading two and writing one"
    return "copying the tensor"


def _name(e: Estimate) -> str:
    return e.normalization.replace("_", " ").replace("rms", "RMS")


def time_of(e: Estimate) -> str:
    """Return a time and its spread for people."""
    return f"{_short(e.seconds)} ({_spread(e)})"


def _spread(e: Estimate) -> str:
    return f"{_short(e.low)} to {_short(e.high)}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _short(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, scale = next((u for u in units if seconds >= 0.9995 * u[1]), units[-1])
    value = seconds / scale
    digits = max(0, 2 - math.floor(math.log10(max(value, 0.01))))
    return f"{value:.{digits}f} {unit}"
