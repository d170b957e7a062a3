"""Every contestant in a process of its own, measured in blocks in turn.

A thread pool goes on spinning for a while after a call and would take the cores from whatever runs
next, so only one process computes at a time, and after each block there is a pause. A figure is the
median over blocks; inside a block it is the mean over calls, after calls that are not measured.
"""

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
PAUSE_SECONDS = 0.015
FEWEST_CALLS = 4
MOST_CALLS = 10_000

# A call that takes longer is measured in no more blocks than needed for a spread.
SLOW_SECONDS = 0.03
FEWEST_BLOCKS = 3
PATIENCE_SECONDS = 2


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
        self.process.start()
        theirs.close()

    def send(self, verb: str, *arguments: Any) -> None:
        """Send a question."""
        self.pipe.send((verb, *arguments))

    def receive(self) -> Any:
        """Wait for the answer to the last question."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._start()
            self.pipe.recv()
            raise Failed("its process ended") from None
        if isinstance(answer, Failed):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        self.pipe.close()
        self.process.join(PATIENCE_SECONDS)
        self.process.kill()
        self.process.join()


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

    Everyone keeps the fastest of its forms, of those that are right. With no blocks only errors are
    found, and no form is wrong.
    """
    result = Result(case)

    def ask(worker: Worker, *question: Any) -> Any:
        worker.send(*question)
        return _answer(result, worker)

    for worker in workers:
        worker.send("prepare", case)
    expected = oracle.expected(peers.Data(case))
    able = [worker for worker in workers if _answer(result, worker)]
    ready = []
    for worker in able:
        name = worker.contestant.name
        samples = ask(worker, "check")
        if samples is None:
            continue
        # A peer that is no normalization has samples without values.
        errors = [oracle.error(s, expected) if s is not None else 0.0 for s in samples]
        right = [i for i, e in enumerate(errors) if not (blocks and oracle.wrong(e, case.dtype))]
        if not right:
            result.errors[name] = min(errors)
            result.notes[name] = f"wrong, off by {min(errors):.2g}"
            continue
        form = ask(worker, "settle", right)
        time.sleep(PAUSE_SECONDS)
        if form is not None:
            ready.append(worker)
            if samples[form] is not None:
                result.errors[name] = errors[form]
    for block in range(1, blocks + 1):
        for worker in list(ready):
            seconds = ask(worker, "block")
            time.sleep(PAUSE_SECONDS)
            if seconds is not None:
                result.blocks.setdefault(worker.contestant.name, []).append(seconds)
            if seconds is None or (seconds > SLOW_SECONDS and block >= FEWEST_BLOCKS):
                ready.remove(worker)
    for worker in workers:
        worker.send("release")
    for worker in workers:
        worker.receive()
    return result


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
    # An interrupt is for the process that asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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

    def prepare(self, case: Case) -> int:
        """Make the data and the forms of a case; return how many forms there are."""
        # The data is kept: some libraries only borrow its memory.
        self.data = peers.Data(case)
        self.forms = list(self.peer.forms(case, self.data))
        return len(self.forms)

    def check(self) -> list[peers.Array | None]:
        """Return the sampled result of each form, None if the peer is no normalization."""
        return [self._sample(call()) for call in self.forms]

    def _sample(self, returned: Any) -> peers.Array | None:
        answer = self.peer.answer(returned, self.data)
        return None if answer is None else self.data.sample(answer)

    def settle(self, right: list[int]) -> int:
        """Warm up, keep the fastest of some forms and say which that is."""
        times = {}
        for form in right:
            call = self.forms[form]
            call()
            seconds = _seconds(call, 1)
            if len(right) > 1:
                count = min(MOST_CALLS, math.ceil(BLOCK_SECONDS / seconds))
                seconds = min(_seconds(call, count) for _ in range(3))
            times[form] = seconds
        fastest = min(times, key=times.__getitem__)
        self.forms = [self.forms[fastest]]
        return fastest

    def block(self) -> float:
        """Return the seconds of one call."""
        (call,) = self.forms
        call()
        seconds = _seconds(call, 1)
        # Twice: the first call after a pause says too little of how many a block needs, and what
        # lies in a shared cache takes a few calls to come back.
        for fewest in (1, FEWEST_CALLS):
            if seconds < LONG_SECONDS:
                count = max(fewest, math.ceil(BLOCK_SECONDS / seconds))
                seconds = _seconds(call, min(MOST_CALLS, count))
        return seconds

    def release(self) -> None:
        """Let go of the case."""
        self.forms: list[peers.Call] = []
        self.data: peers.Data | None = None
        gc.collect()


def _seconds(call: peers.Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
