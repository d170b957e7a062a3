"""What a run measures: which cases, by whom, on how many threads."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cpunorm

from . import peers
from .results import COPY, LAYOUTS, OPERATIONS, OURS, PASSES, PEERS, PLAIN
from .shapes import Case, Shape
from .suites import CHANNELS, EXAMPLES, PLANE_IMAGES, on_shape, suite
from .workers import Contestant

OTHERS = (PLAIN, *PEERS)
# Who is also measured on one thread, and where.
SCALING = ("cython", "numba", "torch", COPY)
SCALING_CHANNELS = CHANNELS[2]
# Of x's size, that a contestant holds at a time: x, its gradient, a result, a temporary.
ARRAYS = 4


@dataclass(frozen=True)
class Choice:
    """What was asked for.

    Parameters
    ----------
    quick : bool
        A small choice of everything, or all that the maps need.
    operations, passes, layouts : sequence of str
    shapes : sequence of tuple of int
        Everything that is defined for these instead.
    dtypes : sequence of str
        The float32 cases in these types instead; none for the types as they come.
    backends, against : sequence of str
        Of cpunorm, and the others.
    threads : sequence of int
        None for all CPUs, and one thread on some cases.
    blocks : int
    """

    quick: bool = False
    operations: Sequence[str] = OPERATIONS
    passes: Sequence[str] = PASSES
    layouts: Sequence[str] = LAYOUTS
    shapes: Sequence[Shape] = ()
    dtypes: Sequence[str] = ()
    backends: Sequence[str] = OURS
    against: Sequence[str] = OTHERS
    threads: Sequence[int] = ()
    blocks: int = 5


@dataclass(frozen=True)
class Task:
    """A case and those who compute it, by name; only errors are of interest if it is not timed."""

    case: Case
    names: tuple[str, ...]
    timed: bool = True

    def __str__(self) -> str:
        return str(self.case) if self.timed else f"accuracy of {self.case}"


@dataclass(frozen=True)
class Plan:
    """The tasks of a run, and who takes part: contestants by name, and who does not and why."""

    tasks: tuple[Task, ...]
    contestants: dict[str, Contestant]
    left_out: dict[str, str]
    blocks: int


def implementation(contestant: Contestant) -> str:
    """Return what a contestant is called in results."""
    if contestant.peer == peers.OURS:
        return str(contestant.options["backend"])
    return COPY if contestant.peer == peers.MEMORY else contestant.peer


def make(choice: Choice) -> Plan:
    """Return the plan of a choice."""
    all_threads = tuple(choice.threads) or (cpunorm.get_num_threads(),)
    present, left_out = [], {}
    for name in (*choice.backends, *choice.against, COPY):
        if reason := _missing(name):
            left_out[name] = reason
        else:
            present.append(name)
    contestants: dict[str, Contestant] = {}

    def names(case: Case) -> tuple[str, ...]:
        pairs = [(name, threads) for threads in all_threads for name in present]
        if not choice.threads and all_threads != (1,) and _scales(case):
            pairs += [(name, 1) for name in SCALING if name in present]
        for pair in pairs:
            contestant = _contestant(*pair)
            contestants.setdefault(contestant.name, contestant)
        return tuple(_contestant(*pair).name for pair in pairs)

    tasks = [Task(case, names(case)) for case in _cases(choice)]
    if not (choice.quick or choice.shapes):
        able = [_contestant(name, all_threads[0]).name for name in present if name != COPY]
        tasks = [Task(case, tuple(able), False) for case in _accuracy(choice)] + tasks
    return Plan(tuple(tasks), contestants, left_out, choice.blocks)


def _cases(choice: Choice) -> list[Case]:
    if choice.shapes:
        cases = [case for shape in choice.shapes for case in on_shape(shape)]
    else:
        cases = suite("quick" if choice.quick else "maps")
    if choice.dtypes:
        plain = [case for case in cases if case.dtype == "float32"]
        cases = [replace(case, dtype=dtype) for dtype in choice.dtypes for case in plain]
    # Should time be short: first what the maps are drawn from, each part in an order of which every
    # beginning is an even sample.
    random.Random(0).shuffle(cases)
    cases.sort(key=lambda case: case.source != "grid" and case.shape not in EXAMPLES)
    return _chosen(choice, cases)


def _accuracy(choice: Choice) -> list[Case]:
    cases = _chosen(choice, suite("accuracy"))
    return [case for case in cases if not choice.dtypes or case.dtype in choice.dtypes]


def _chosen(choice: Choice, cases: Sequence[Case]) -> list[Case]:
    return [
        case
        for case in cases
        if case.operation in choice.operations
        and case.layout in choice.layouts
        # Whoever asks for training wants the forward pass that serves it.
        and (case.pass_ in choice.passes or ("training" in choice.passes and case.same_forward))
    ]


def _scales(case: Case) -> bool:
    on_plane = case.source == "grid" and case.dtype == "float32" and len(case.shape) == 4
    return on_plane and case.shape[:2] == (PLANE_IMAGES, SCALING_CHANNELS)


def _contestant(name: str, threads: int) -> Contestant:
    peer, options = {COPY: peers.MEMORY}.get(name, name), {}
    if name in OURS:
        peer, options = peers.OURS, {"backend": name}
    return Contestant(f"{name}-{threads}", peer, threads, options)


def _missing(name: str) -> str | None:
    """Return why an implementation cannot take part."""
    if name in OURS:
        if name in cpunorm.available_backends():
            return None
        return "this backend is not available"
    package = peers.missing({COPY: peers.MEMORY}.get(name, name))
    return package and f"{package} is not installed"


def memory(task: Task) -> int:
    """Return about how many bytes a task takes: everyone has its own data."""
    return len(task.names) * ARRAYS * task.case.nbytes


def weight(task: Task) -> float:
    """Return about how long a task takes, in units of a small one."""
    return len(task.names) * (1 + task.case.nbytes / 2**23) if task.timed else 5.0
