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
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from . import peers
from .shapes import Case

BLOCK_SECONDS = 0.003
LONG_SECONDS = 0.012
PAUSE_SECONDS = 0.015
FEWEST_CALLS = 4
MOST_CALLS = 10_000

SAMPLES = 64
TOLERANCE = 2e-3


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
        """End the process."""
        self.pipe.close()
        self.process.join()


@dataclass
class Result:
    """What was found for a case: seconds of a call in each block, and notes on who failed."""

    case: Case
    blocks: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> dict[str, float]:
        """The median over blocks of everyone who took part."""
        return {name: statistics.median(times) for name, times in self.blocks.items()}


def measure(case: Case, workers: Sequence[Worker], blocks: int) -> Result:
    """Measure a case with everyone who can compute it, and see that they agree."""
    result = Result(case)
    try:
        for worker in workers:
            worker.send("prepare", case)
        ready = [worker for worker in workers if _answer(result, worker)]
        samples = {}
        for worker in list(ready):
            worker.send("settle")
            sample = _answer(result, worker)
            time.sleep(PAUSE_SECONDS)
            if sample is None:
                ready.remove(worker)
            elif sample.size:
                samples[worker.contestant.name] = sample
        for _ in range(blocks):
            for worker in list(ready):
                worker.send("block")
                seconds = _answer(result, worker)
                time.sleep(PAUSE_SECONDS)
                if seconds is None:
                    ready.remove(worker)
                else:
                    result.blocks.setdefault(worker.contestant.name, []).append(seconds)
    finally:
        for worker in workers:
            worker.send("release")
            worker.receive()
    compare(result, samples)
    return result


def _answer(result: Result, worker: Worker) -> Any:
    """Return a worker's answer, or None and a note when it is a failure."""
    try:
        return worker.receive()
    except Failed as failure:
        result.notes.append(f"{worker.contestant.name}: {failure}")
        return None


def compare(result: Result, samples: dict[str, peers.Array]) -> None:
    """Note who has a form that is far from the median of all forms."""
    middle = np.median(np.concatenate(list(samples.values())), axis=0) if samples else 0
    for name, sample in samples.items():
        off = float(np.max(np.abs(sample - middle) / (1 + np.abs(middle))))
        if not off <= TOLERANCE:
            result.notes.append(f"{name} is off by {off:.2g}")


def _serve(pipe: Connection, contestant: Contestant) -> None:
    """Answer questions until the pipe is closed."""
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(contestant.threads)
    if contestant.checkout is not None:
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

    def settle(self) -> peers.Array:
        """Warm up, keep the fastest form, return a sample of the result of each."""
        times, samples = [], []
        for call in self.forms:
            samples.append(self._sample(call()))
            seconds = _seconds(call, 1)
            if len(self.forms) > 1:
                count = min(MOST_CALLS, math.ceil(BLOCK_SECONDS / seconds))
                seconds = min(_seconds(call, count) for _ in range(3))
            times.append(seconds)
        self.forms = [self.forms[times.index(min(times))]]
        return np.array(samples)

    def _sample(self, returned: Any) -> peers.Array:
        answer = self.peer.answer(returned, self.data)
        if answer is None:
            return np.empty(0, np.float32)
        flat = answer.reshape(-1)
        return flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)]

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
