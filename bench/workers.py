"""Every contestant in a process of its own, measured in blocks in turn.

A thread pool goes on spinning for a while after a call and would take the cores from whoever runs
next (ONNX Runtime's for 50 ms). So a process stops, by a signal, with its answer, and goes on with
the next question. A figure is the median over blocks; inside a block it is the mean over calls,
after calls that are not measured.
"""

import ctypes
import gc
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from . import oracle, peers
from .shapes import Case

BLOCK_SECONDS = 0.003
LONG_SECONDS = 0.012
FEWEST_CALLS = 4
MOST_CALLS = 10_000

# A call that takes longer is measured in no more blocks than needed for a spread.
SLOW_SECONDS = 0.03
FEWEST_BLOCKS = 3
# A block of so many times the least one was disturbed, and is taken again, once.
DISTURBED = 3.0
PATIENCE_SECONDS = 2
# Of Linux: the signal that a process gets when its parent ends.
PARENT_DEATH_SIGNAL = 1


@dataclass(frozen=True)
class Contestant:
    """Who is measured: a peer by name, a backend of cpunorm, or the traffic of memory.

    Parameters
    ----------
    name : str
        How it is called in the report.
    peer : str
        A key of `peers.PEERS`, or `peers.OURS` or `peers.MEMORY`.
    threads : int
    options : dict
        For cpunorm, the backend and whether outputs are fresh.
    checkout : str, optional
        The directory that cpunorm is imported from.
    """

    name: str
    peer: str
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    checkout: str | None = None


class Failed(RuntimeError):
    """What went wrong inside a worker."""


class Worker:
    """A contestant, seen from the process that asks. Its first answer is that it is ready."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, self.contestant)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        # An interrupt is for the process that asks: ignoring it is inherited.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()

    def send(self, verb: str, *arguments: Any) -> None:
        """Send a question."""
        self._signal(signal.SIGCONT)
        self.pipe.send((verb, *arguments))

    def receive(self) -> Any:
        """Wait for the answer to the last question; with it the process stops."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._start()
            self.pipe.recv()
            raise Failed("its process ended") from None
        finally:
            self._signal(signal.SIGSTOP)
        if isinstance(answer, Failed):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        self._signal(signal.SIGCONT)
        self.pipe.close()
        self.process.join(PATIENCE_SECONDS)
        self.process.kill()
        self.process.join()

    def _signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)


@contextmanager
def crew(contestants: Sequence[Contestant]) -> Iterator[tuple[list[Worker], dict[str, str]]]:
    """Start everyone; give those who are ready, and of the others the names and reasons."""
    workers = [Worker(contestant) for contestant in contestants]
    try:
        ready, left_out = [], {}
        for worker in workers:
            try:
                worker.receive()
                ready.append(worker)
            except Failed as failure:
                left_out[worker.contestant.name] = str(failure)
        yield ready, left_out
    finally:
        for worker in workers:
            worker.close()


@dataclass
class Result:
    """What was found for a case, by name of contestant.

    Parameters
    ----------
    case : Case
    blocks : dict of list of float
        Seconds of a call in each block.
    errors : dict of float
        Distance from the oracle.
    notes : dict of str
        Who failed or was wrong, and how.
    """

    case: Case
    blocks: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """The median over blocks of everyone who took part."""
        return {name: statistics.median(times) for name, times in self.blocks.items()}


def measure(case: Case, workers: Sequence[Worker], blocks: int) -> Result:
    """Have a case computed by everyone who can, compare with the oracle, and measure blocks.

    Everyone prepares at once, and is timed alone, with the fastest of its forms that are right.
    With no blocks only errors are found, and no form is wrong.
    """
    result = Result(case)

    def ask(worker: Worker, *question: Any) -> Any:
        worker.send(*question)
        return _answer(result, worker)

    for worker in workers:
        worker.send("prepare", case)
    expected = oracle.expected(peers.Data(case))
    answers = [_answer(result, worker) for worker in workers]
    ready = []
    for worker, samples in zip(workers, answers, strict=True):
        name = worker.contestant.name
        if not samples:
            continue
        # A peer that is no normalization has samples without values.
        errors = [oracle.error(s, expected) if s is not None else 0.0 for s in samples]
        right = [i for i, e in enumerate(errors) if not (blocks and oracle.wrong(e, case.dtype))]
        if not right:
            result.errors[name] = min(errors)
            result.notes[name] = f"wrong, off by {min(errors):.2g}"
            continue
        form = ask(worker, "settle", right)
        if form is not None:
            ready.append(worker)
            if samples[form] is not None:
                result.errors[name] = errors[form]
    for block in range(1, blocks + 1):
        for worker in list(ready):
            seconds = ask(worker, "block")
            if seconds is not None:
                result.blocks.setdefault(worker.contestant.name, []).append(seconds)
            if seconds is None or (seconds > SLOW_SECONDS and block >= FEWEST_BLOCKS):
                ready.remove(worker)
    for worker in workers:
        times = result.blocks.get(worker.contestant.name, [])
        for i in _disturbed(times):
            times[i] = ask(worker, "block") or times[i]
    for worker in workers:
        worker.send("release")
    for worker in workers:
        worker.receive()
    return result


def _disturbed(times: Sequence[float]) -> list[int]:
    """Return which blocks are out of all proportion."""
    return [i for i, seconds in enumerate(times) if seconds > DISTURBED * min(times)]


def _answer(result: Result, worker: Worker) -> Any:
    """Return a worker's answer, or None and a note when it is a failure."""
    try:
        return worker.receive()
    except Failed as failure:
        result.notes[worker.contestant.name] = str(failure)
        return None


def _serve(pipe: Connection, contestant: Contestant) -> None:
    """Answer questions until the pipe is closed."""
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(contestant.threads)
    if contestant.checkout is not None:
        # What this process has imported on its way is of another checkout.
        for name in [name for name in sys.modules if name.partition(".")[0] == "cpunorm"]:
            del sys.modules[name]
        sys.path.insert(0, contestant.checkout)
    # What is stopped does not see the process end that asks.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # Nor is a block the place to look for garbage.
    gc.disable()
    try:
        table = _Table(peers.load(contestant.peer, contestant.threads, **contestant.options))
    except Exception as error:
        pipe.send(_failed(error))
        return
    pipe.send("ready")
    while True:
        try:
            verb, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(table, verb)(*arguments))
        except Exception as error:
            pipe.send(_failed(error))


def _failed(error: Exception) -> Failed:
    return Failed(f"{type(error).__name__}: {str(error)[:200]}")


class _Table:
    """A contestant, seen from its own process."""

    def __init__(self, peer: peers.Peer) -> None:
        self.peer = peer
        self.release()

    def prepare(self, case: Case) -> list[peers.Array | None]:
        """Make data and forms of a case; return samples of results, None of no normalization."""
        # The data is kept: some libraries only borrow its memory.
        self.data = peers.Data(case)
        self.forms = list(self.peer.forms(case, self.data))
        return [self._sample(call()) for call in self.forms]

    def _sample(self, returned: Any) -> peers.Array | None:
        answer = self.peer.answer(returned, self.data)
        return None if answer is None else self.data.sample(answer)

    def settle(self, right: list[int]) -> int:
        """Keep the fastest of some forms and say which that is."""
        fastest = right[0]
        if len(right) > 1:
            fastest = min(right, key=lambda form: _trial(self.forms[form]))
        self.forms = [self.forms[fastest]]
        return fastest

    def block(self) -> float:
        """Return the seconds of one call."""
        (call,) = self.forms
        seconds = _seconds(call, 1)
        if seconds < SLOW_SECONDS:
            seconds = _seconds(call, 1)
        # Twice: the first calls say too little of how many a block needs, and what lies in a
        # shared cache takes a few to come back.
        for fewest in (1, FEWEST_CALLS):
            if seconds < LONG_SECONDS:
                seconds = _seconds(call, max(fewest, _calls(seconds)))
        return seconds

    def release(self) -> None:
        """Let go of the case."""
        self.forms: list[peers.Call] = []
        self.data: peers.Data | None = None
        # All of it is young, as nothing is collected in between.
        gc.collect(0)


def _trial(call: peers.Call) -> float:
    """Return about the seconds of a call."""
    seconds = _seconds(call, 1)
    if seconds < LONG_SECONDS:
        seconds = min(_seconds(call, _calls(seconds)) for _ in range(3))
    return seconds


def _calls(seconds: float) -> int:
    """Return how many calls fill a block."""
    return min(MOST_CALLS, math.ceil(BLOCK_SECONDS / seconds))


def _seconds(call: peers.Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
