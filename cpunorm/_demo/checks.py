"""Every operation, forward and backward, on every backend, held against the float64 oracle."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import functional, reference
from .._canonical import Array
from ..backends import ACTIVATIONS
from .progress import stage

# The largest error allowed, relative to 1 + |expected|.
FORWARD, GRADIENT, OFFSET = 3e-6, 3e-5, 2e-3

# All large enough for kernels to use threads, so that Numba compiles one version of each, not two.
SHAPES = ((16, 12, 19, 17), (4, 48, 17, 23), (5, 64, 14, 14))
ROWS = (643, 96)
WAYS = ("NCHW", "NHWC", "permuted", "strided")
GROUPS = 4

Arrays = tuple[Any, ...]


@dataclass
class Check:
    """How one operation fared on one backend."""

    operation: str
    backend: str
    tolerance: float
    cases: int = 0
    error: float = 0.0
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every case came out, and close enough."""
        return self.problem is None and self.error <= self.tolerance


@dataclass(frozen=True, eq=False)
class Case:
    """The arguments of one operation, in the order in which both directions take them."""

    name: str
    x: Array
    grad_y: Array | None  # None: forward alone
    arguments: Arrays  # after x and the running statistics
    before: Arrays = ()  # in backward, between x and stats
    after: Arrays = ()  # in backward, after stats
    running: Arrays = ()
    options: dict[str, Any] = field(default_factory=dict)
    forward_options: dict[str, Any] = field(default_factory=dict)
    backward_options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    tolerance: float = FORWARD


def run(backends: Sequence[str]) -> tuple[list[Check], dict[str, float]]:
    """Check all operations; return how each fared, and the seconds each backend took."""
    found: dict[tuple[str, str], Check] = {}
    seconds = dict.fromkeys(backends, 0.0)
    all_cases = list(cases())
    with stage("checking against the oracle", len(all_cases)) as advance:
        for case in all_cases:
            for suffix, tolerance, actual, expected in _directions(case):
                operation = f"{case.name}{suffix}{case.note}"
                values = expected(case)
                for backend in backends:
                    key = (operation, backend)
                    check = found.setdefault(key, Check(*key, tolerance))
                    start = time.perf_counter()
                    _compare(check, actual, case, values)
                    seconds[backend] += time.perf_counter() - start
            advance()
    return list(found.values()), seconds


def compute(case: Case, backend: str) -> None:
    """Do what `run` does on one backend, and look at nothing."""
    for _, _, actual, _ in _directions(case):
        actual(case, backend)


def _directions(
    case: Case,
) -> Iterator[tuple[str, float, Callable[[Case, str], Arrays], Callable[[Case], Arrays]]]:
    """Yield the suffix, tolerance, function and oracle of forward and, where wanted, backward."""
    yield "", case.tolerance, _forward, _expected_forward
    if case.grad_y is not None:
        yield "_backward", GRADIENT, _backward, _expected_backward


def _compare(
    check: Check, compute: Callable[[Case, str], Arrays], case: Case, expected: Arrays
) -> None:
    check.cases += 1
    try:
        actual = compute(case, check.backend)
    except Exception as raised:  # whatever it is belongs in the report, beside what does work
        check.problem = f"{type(raised).__name__}: {raised}"
        return
    if [np.shape(a) for a in actual] != [np.shape(e) for e in expected]:
        check.problem = "a result is missing or has the wrong shape"
        return
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            error = float(np.max(np.abs(a - e) / (1 + np.abs(e))))
            # NaN compares false with everything, and would pass for no error at all.
            check.error = max(check.error, np.inf if np.isnan(error) else error)


def _forward(case: Case, backend: str) -> Arrays:
    running = tuple(r.copy() for r in case.running)
    result = getattr(functional, case.name)(
        case.x, *running, *case.arguments, **case.options, **case.forward_options, backend=backend
    )
    return (*(result if isinstance(result, tuple) else (result,)), *running)


def _expected_forward(case: Case) -> Arrays:
    f = getattr(reference, case.name)(
        case.x, *case.running, *case.arguments, **case.options, **case.forward_options
    )
    return tuple(a for a in (f.y, f.total, f.running_mean, f.running_var) if a is not None)


def _backward(case: Case, backend: str) -> Arrays:
    running = tuple(r.copy() for r in case.running)
    _, stats = getattr(functional, case.name)(
        case.x, *running, *case.arguments, **case.options, return_stats=True, backend=backend
    )
    gradients = getattr(functional, f"{case.name}_backward")(
        case.grad_y, case.x, *case.before, stats, *case.after,
        **case.options, **case.backward_options, backend=backend,
    )  # fmt: skip
    return tuple(gradients)


def _expected_backward(case: Case) -> Arrays:
    running = dict(zip(("running_mean", "running_var"), case.running, strict=False))
    gradients = getattr(reference, f"{case.name}_backward")(
        case.grad_y, case.x, *case.before, *case.after,
        **case.options, **case.backward_options, **running,
    )  # fmt: skip
    return tuple(gradients)


def _lay(x: Array, way: str) -> tuple[Array, str]:
    """Return NCHW data lying in memory in one of the ways, and the layout to name for it."""
    if way == "strided":
        return np.repeat(x, 2, axis=-1)[..., ::2], "NCHW"
    if way == "NCHW":
        return x, way
    channels_last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    return (channels_last, way) if way == "NHWC" else (np.moveaxis(channels_last, -1, 1), "NCHW")


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)

    def normal(*shape: int, mean: float = 0.0, deviation: float = 1.0) -> Array:
        return rng.normal(mean, deviation, shape).astype(np.float32)

    extras = itertools.cycle(itertools.product(ACTIVATIONS, (False, True)))
    for shape, way in itertools.product(SHAPES, WAYS):
        c = shape[1]
        x, layout = _lay(normal(*shape, mean=1.0, deviation=2.0), way)
        grad_y, residual = (_lay(normal(*shape), way)[0] for _ in range(2))
        weight, bias = normal(c, mean=1.0, deviation=0.3), normal(c)
        running = (normal(c), np.square(normal(c)) + np.float32(0.5))
        activation, added = next(extras)
        of_channels: dict[str, Any] = {
            "x": x,
            "grad_y": grad_y,
            "options": {"layout": layout},
            "forward_options": {"activation": activation, "residual": residual if added else None},
        }
        for name, own in itertools.product(("batch_norm", "instance_norm"), (True, False)):
            yield Case(
                name,
                arguments=(weight, bias, own, 0.3),
                after=(weight, own),
                running=running,
                note="" if own else ", running stats",
                **of_channels,
            )
        yield Case(
            "group_norm",
            arguments=(GROUPS, weight, bias),
            before=(GROUPS,),
            after=(weight,),
            **of_channels,
        )
        axis = 1 if layout == "NCHW" else -1
        yield from _axis_cases(x, residual, grad_y, weight, bias, axis)

    rows = (normal(*ROWS, mean=1.0, deviation=2.0), normal(*ROWS), normal(*ROWS))
    yield from _axis_cases(*rows, normal(ROWS[1]), normal(ROWS[1]), None)

    for way in WAYS[:2]:
        x, layout = _lay(normal(*SHAPES[2], mean=1e4), way)
        c = SHAPES[2][1]
        offset: dict[str, Any] = {"x": x, "grad_y": None, "note": ", mean 10⁴", "tolerance": OFFSET}
        in_layout = {"layout": layout}
        training = (None, None, None, None, True)
        yield Case("batch_norm", arguments=training, options=in_layout, **offset)
        yield Case("instance_norm", arguments=training, options=in_layout, **offset)
        yield Case("group_norm", arguments=(GROUPS,), options=in_layout, **offset)
        over_channels = {"axis": 1 if layout == "NCHW" else -1}
        yield Case("layer_norm", arguments=(c,), options=over_channels, **offset)


def _axis_cases(
    x: Array, residual: Array, grad_y: Array, weight: Array, bias: Array, axis: int | None
) -> Iterator[Case]:
    """Layer and RMS norm, and both with the addition in front."""
    options = {"axis": axis}
    size = weight.size
    for name, parameters in (("layer_norm", (weight, bias)), ("rms_norm", (weight,))):
        yield Case(
            name, x, grad_y, (size, *parameters), (size,), (weight,),
            options=options, backward_options={"grad_sum": residual},
        )  # fmt: skip
        yield Case(f"add_{name}", x, None, (residual, size, *parameters), options=options)
