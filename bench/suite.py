"""The suite as a plugin of pytest: it measures a case when the first of its tests asks for it.

Everyone's blocks are interleaved, so one measurement serves the tests of all implementations. Each
test then plays its blocks to pytest-benchmark on a clock of its own.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from .journal import Journal
from .machine import machine
from .plan import Plan, Task, implementation
from .results import COPY, FORMAT, OURS, PEERS, Absent, Accuracy, Row, plain  # fmt: skip
from .workers import Result, Worker, crew, measure

OUT_OF_TIME = "out of time"
NO_OPERATION = "it has no such operation"


class Clock:
    """A clock that stands still until it is told how much time has passed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


CLOCK = Clock()


class Suite:
    """The tests of a plan, and what they have found.

    Parameters
    ----------
    plan : Plan
    journal : Journal, optional
        Where results are taken from and kept.
    command : str
        What the results file says made it.
    seconds : float
        After so many, no case is begun.
    done : callable, optional
        Called with each task that is over.
    """

    def __init__(
        self,
        plan: Plan,
        journal: Journal | None = None,
        command: str = "pytest bench",
        seconds: float = math.inf,
        done: Callable[[Task], None] = lambda task: None,
    ) -> None:
        self.plan, self.journal, self.done = plan, journal, done
        self.facts = machine(max(c.threads for c in plan.contestants.values()))
        self.command = command
        self.deadline = time.monotonic() + seconds
        self.results: dict[Task, Result] = {}
        self.skipped: list[Task] = []
        self.failures: list[str] = []
        self.left_out: dict[str, str] = {}
        self._stack = ExitStack()
        self._workers: list[Worker] | None = None

    def result(self, task: Task) -> Result:
        """Return what is found for a task, measured now if it was not before."""
        if task not in self.results:
            self.results[task] = self._result(task)
            self.done(task)
        return self.results[task]

    def _result(self, task: Task) -> Result:
        found = self.journal and self.journal.get(task)
        if found:
            return found
        if time.monotonic() > self.deadline:
            self.skipped.append(task)
            return Result(task.case, notes=dict.fromkeys(task.names, OUT_OF_TIME))
        if self._workers is None:
            everyone = list(self.plan.contestants.values())
            self._workers, self.left_out = self._stack.enter_context(crew(everyone))
        workers = [w for w in self._workers if w.contestant.name in task.names]
        found = measure(task.case, workers, self.plan.blocks if task.timed else 0)
        reasons = {name: why for name, why in self.left_out.items() if name in task.names}
        found.notes |= reasons
        if self.journal:
            try:
                self.journal.add(task, found)
            except OSError as error:
                pytest.exit(f"{self.journal.path}: {error.strerror}", returncode=1)
        return found

    def why_absent(self, task: Task, name: str) -> str | None:
        """Return why somebody has no figure."""
        result = self.result(task)
        measured = result.blocks if task.timed else result.errors
        return None if name in measured else result.notes.get(name, NO_OPERATION)

    def row(self, task: Task, name: str) -> Row:
        """Return the row of somebody who has figures."""
        case, result, contestant = task.case, self.result(task), self.plan.contestants[name]
        median = result.seconds[name]
        copy = result.seconds.get(f"{COPY}-{contestant.threads}")
        return Row(
            **self._who(task, name),
            layout=case.layout,
            num_groups=case.num_groups,
            source=case.source,
            model=case.model,
            threads=contestant.threads,
            bytes=case.traffic,
            gb_per_s=case.traffic / median / 1e9,
            share_of_copy=copy and copy / median,
            error=result.errors.get(name),
            seconds=tuple(result.blocks[name]),
        )

    def rows(self) -> list[Row]:
        """Return the rows of everything that was measured."""
        return [
            self.row(task, name)
            for task, result in self.results.items()
            for name in task.names
            if name in result.blocks
        ]

    def _who(self, task: Task, name: str) -> dict[str, Any]:
        who, case, versions = implementation(self.plan.contestants[name]), task.case, self.facts
        package = who if who in PEERS else "numpy" if who == "plain" else "cpunorm"
        return {
            "operation": case.operation,
            "pass_": case.pass_,
            "dtype": case.dtype,
            "shape": case.shape,
            "implementation": who,
            "version": versions["versions"][package],
        }

    def _accuracy(self) -> list[dict[str, Any]]:
        return [
            plain(Accuracy(**self._who(task, name), offset=task.case.offset, error=_finite(error)))
            for task, result in self.results.items()
            if not task.timed
            for name, error in result.errors.items()
        ]

    def _absent(self) -> list[dict[str, Any]]:
        left_out = [plain(Absent("all", name, why)) for name, why in self.plan.left_out.items()]
        return left_out + [
            plain(Absent(str(task), name, why))
            for task in self.results
            for name in task.names
            if (why := self.why_absent(task, name))
        ]

    # --- What pytest asks ------------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per case and implementation, those of a case side by side."""
        if "task" not in metafunc.fixturenames:
            return
        timed = "benchmark" in metafunc.fixturenames
        pairs = [(t, name) for t in self.plan.tasks if t.timed == timed for name in t.names]
        metafunc.parametrize(("task", "name"), pairs, ids=[f"{t}-{name}" for t, name in pairs])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember what failed."""
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember what could not be collected."""
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longrepr}")

    def pytest_unconfigure(self) -> None:
        """End the processes."""
        self._stack.close()

    def pytest_benchmark_update_json(self, benchmarks: list, output_json: dict[str, Any]) -> None:
        """Add what a results file has beyond pytest-benchmark's own."""
        output_json["machine_info"]["cpunorm"] = {
            "format": FORMAT,
            **self.facts,
            "command": self.command,
            "blocks": self.plan.blocks,
        }
        for entry in output_json["benchmarks"]:
            info = entry["extra_info"]
            entry["params"] = {
                "case": entry["group"],
                "implementation": info["implementation"],
                "threads": info["threads"],
            }
        output_json["accuracy"] = self._accuracy()
        output_json["absent"] = self._absent()


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def is_ours(name: str) -> bool:
    """Whether a contestant is cpunorm, which has to be right."""
    return name.rpartition("-")[0] in OURS
