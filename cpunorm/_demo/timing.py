"""How long each normalization takes, by layout and backend, beside a copy and plain NumPy."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .. import functional
from .._canonical import Array
from . import formulas
from .progress import stage

# What networks use: one image or one token at a time at inference, batches in training.
SHAPES = (
    (1, 768),
    (128, 768),
    (4096, 768),
    (1, 512, 7, 7),
    (1, 256, 14, 14),
    (1, 64, 56, 56),
    (8, 512, 7, 7),
    (16, 128, 28, 28),
    (32, 256, 14, 14),
    (32, 64, 56, 56),
)
LAYOUTS = ("NCHW", "NHWC")

PLAIN = "plain NumPy"
COPY = "copy"

BLOCKS = 3
BLOCK_SECONDS = 0.003
LONG_SECONDS = 0.012
PAUSE_SECONDS = 0.015

Call = Callable[[], object]


@dataclass
class Row:
    """The times of one normalization in one layout, in microseconds."""

    operation: str
    layout: str
    times: dict[str, float]

    @property
    def best(self) -> str:
        """The fastest way."""
        return min(self.times, key=self.times.__getitem__)


@dataclass
class Table:
    """All normalizations on one shape."""

    shape: tuple[int, ...]
    nbytes: int
    copy: float
    blocks: int
    rows: list[Row] = field(default_factory=list)


def measure(calls: Mapping[str, Call], pooled: Sequence[str], count: int) -> dict[str, float]:
    """Return the seconds of one call of each, the median over blocks of calls in turn.

    The threads of a pool go on spinning for a while after a call, and would take the cores from
    whatever runs next: hence blocks, a pause after each of those in `pooled`, and calls that are
    not measured at the start of each: two, or one where a call takes long.
    """
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            call()
            seconds = _seconds(call, 1)
            if seconds < LONG_SECONDS:
                seconds = _seconds(call, min(1000, math.ceil(BLOCK_SECONDS / max(seconds, 1e-9))))
            blocks[name].append(seconds)
            if name in pooled:
                time.sleep(PAUSE_SECONDS)
    return {name: statistics.median(seconds) for name, seconds in blocks.items()}


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def run(
    shapes: Sequence[tuple[int, ...]], backends: Sequence[str], blocks: int | None, until: float
) -> list[Table]:
    """Measure each shape, (N, C, ...) with the channels on axis 1, or with two axes (rows, C).

    Every time is the median over `blocks`. If that is None it is over `BLOCKS`, and over one for
    the shapes that are left when `time.perf_counter` reaches `until`.
    """
    tables = []
    with stage("measuring", sum(len(layouts(shape)) for shape in shapes)) as advance:
        for shape in shapes:
            count = blocks or (BLOCKS if time.perf_counter() < until else 1)
            tables.append(_table(shape, backends, count, advance))
    return tables


def call_once(shape: tuple[int, ...], layout: str, backend: str) -> None:
    """Call what `run` measures of one backend, layout and shape."""
    for _, _, ours in _operations(_lay(np.ones(shape, np.float32), layout), layout):
        ours(backend=backend)


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the layouts that differ for a shape."""
    return LAYOUTS if len(shape) > 2 else LAYOUTS[:1]


def _table(
    shape: tuple[int, ...], backends: Sequence[str], blocks: int, advance: Callable[[], None]
) -> Table:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    y = np.empty_like(x)
    copy = measure({COPY: partial(np.copyto, y, x)}, (), blocks)[COPY]
    table = Table(shape, x.nbytes, copy * 1e6, blocks)
    for layout in layouts(shape):
        x = _lay(x, layout)
        y = np.empty_like(x)
        for operation, plain, ours in _operations(x, layout):
            calls: dict[str, Call] = {b: partial(ours, out=y, backend=b) for b in backends}
            calls[PLAIN] = plain
            seconds = measure(calls, backends, blocks)
            times = {name: s * 1e6 for name, s in seconds.items()}
            table.rows.append(Row(operation, layout, times))
        advance()
    return table


def _lay(x: Array, layout: str) -> Array:
    return x if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(x, 1, -1))


def _operations(x: Array, layout: str) -> Iterator[tuple[str, Call, Callable[..., object]]]:
    """Yield each normalization that x's shape allows: its name, as NumPy writes it, and ours."""
    rng = np.random.default_rng(1)
    axis = 1 if layout == "NCHW" else x.ndim - 1
    c = x.shape[axis]
    weight, bias, mean = (rng.standard_normal((c,), np.float32) for _ in range(3))
    var = np.square(mean) + np.float32(1)
    running = (mean.copy(), var.copy())
    groups = math.gcd(c, 32)
    spatial = tuple(i for i in range(1, x.ndim) if i != axis)
    in_layout = {"layout": layout}

    yield (
        "batch norm, inference",
        partial(formulas.transform, x, mean, var, weight, bias, axis),
        partial(functional.batch_norm, x, mean, var, weight, bias, **in_layout),
    )
    if x.size > c:
        yield (
            "batch norm, training",
            partial(formulas.batch_norm_training, x, *running, weight, bias, axis),
            partial(functional.batch_norm, x, *running, weight, bias, True, **in_layout),
        )
    if math.prod(x.shape[i] for i in spatial) > 1:
        yield (
            "instance norm",
            partial(formulas.standardise, x, spatial, weight, bias, axis),
            partial(functional.instance_norm, x, None, None, weight, bias, **in_layout),
        )
    if spatial:
        yield (
            f"group norm, {groups} group{'s' * (groups > 1)}",
            partial(formulas.group_norm, x, groups, weight, bias, axis),
            partial(functional.group_norm, x, groups, weight, bias, **in_layout),
        )
    yield (
        "layer norm, channels",
        partial(formulas.standardise, x, (axis,), weight, bias, axis),
        partial(functional.layer_norm, x, c, weight, bias, axis=axis),
    )
    yield (
        "RMS norm, channels",
        partial(formulas.rms_norm, x, weight, axis),
        partial(functional.rms_norm, x, c, weight, axis=axis),
    )
