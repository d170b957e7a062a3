"""The speed harness: what it compares computes the same thing."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import marks, peers
from bench.results import DTYPES
from bench.shapes import Case
from bench.speed import recorded
from bench.suites import SUITES, on_shape, suite
from bench.workers import Contestant, Failed, _Table, crew, measure
from cpunorm import reference

from .support import AVAILABLE
from .synthetic import seconds_of, write_results

IN_FLOAT32 = ("openvino", "onnxruntime")
SHAPES = {"float32": ((3, 32, 5, 4), (7, 33))}


@pytest.fixture(scope="module")
def workers():
    """Return a worker for each backend and each library that is installed."""
    pytest.importorskip("torch")
    names = [name for name in (*peers.PEERS, peers.PLAIN) if peers.missing(name) is None]
    everyone = [Contestant(name, peers.OURS, 1, {"backend": name}) for name in AVAILABLE]
    everyone += [Contestant(name, name, 1) for name in names]
    with crew(everyone) as (workers, left_out):
        assert left_out == {}
        yield workers


def _cases():
    for dtype in DTYPES:
        for shape in SHAPES.get(dtype, ((7, 33),)):
            # Of images, and of other types, every other case.
            step = 1 if dtype == "float32" and len(shape) == 2 else 2
            for case in on_shape(shape)[::step]:
                yield replace(case, dtype=dtype)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_everyone_agrees_with_the_oracle(case, workers):
    result = measure(case, workers, blocks=1)
    wrong = {name: why for name, why in result.notes.items() if "wrong" in why}
    if case.dtype == "float64":
        # They compute in float32.
        wrong = {
            name: why for name, why in wrong.items() if name not in ("openvino", "onnxruntime")
        }
    assert wrong == {}
    assert set(AVAILABLE) <= set(result.blocks)
    assert all(seconds > 0 for seconds in result.seconds.values())


class Fake:
    """A library, by what it returns for a case; it is asked without a process."""

    def __init__(self, name, *answers):
        self.contestant = Contestant(name, name, 1)
        self.answers, self.calls = answers, 0
        self.table = _Table(self)

    def forms(self, case, data):
        def form(answer):
            def call():
                self.calls += 1
                return answer(case, data)

            return call

        return map(form, self.answers)

    def answer(self, returned, data):
        return returned

    def send(self, verb, *arguments):
        self.question = verb, arguments

    def receive(self):
        verb, arguments = self.question
        try:
            return getattr(self.table, verb)(*arguments)
        except Exception as error:
            raise Failed(str(error)) from None


CASE = Case("rms_norm", "inference", "NCHW", (7, 33))


def right(case, data):
    return reference.rms_norm(data.x, case.features, data.weight, peers.EPS).y.astype(case.type)


def off(case, data):
    return right(case, data) + np.float32(0.1)


def nan(case, data):
    return np.full(case.shape, np.nan, np.float32)


def broken(case, data):
    raise RuntimeError("no such kernel")


def test_what_is_wrong_or_fails_is_noted_and_not_timed():
    everyone = [Fake("right", right), Fake("off", off), Fake("nan", nan), Fake("broken", broken)]
    result = measure(CASE, [*everyone, Fake("unable")], blocks=3)
    assert list(result.blocks) == ["right"]
    assert len(result.blocks["right"]) == 3
    assert result.errors["right"] < 1e-6
    assert result.notes.pop("off").startswith("wrong, off by 0.")
    assert result.notes == {"nan": "wrong, off by nan", "broken": "no such kernel"}
    assert everyone[1].calls == 1


def test_a_wrong_form_does_not_hide_a_right_one():
    result = measure(CASE, [Fake("both", nan, right)], blocks=2)
    assert len(result.blocks["both"]) == 2
    assert result.errors["both"] < 1e-6


def test_a_block_out_of_proportion_is_taken_again_once(monkeypatch):
    blocks = iter([1.0, 1.2, 3.6, 5.0, 1.1, 4.0])
    monkeypatch.setattr(_Table, "block", lambda self: next(blocks))
    result = measure(CASE, [Fake("right", right)], blocks=3)
    assert result.blocks == {"right": [1.0, 1.2, 5.0]}


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "ended"


def _becomes(pid, *states):
    deadline = time.monotonic() + 10
    while _state(pid) not in states and time.monotonic() < deadline:
        time.sleep(0.01)
    return _state(pid) in states


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")


@needs_proc
def test_who_is_not_asked_is_stopped():
    with crew([Contestant("plain", peers.PLAIN, 1)]) as (workers, _):
        (worker,) = workers
        pid = worker.process.pid
        assert _becomes(pid, "T")
        assert list(measure(CASE, workers, blocks=2).blocks) == ["plain"]
        assert _becomes(pid, "T")
    assert _becomes(pid, "ended")


@needs_proc
def test_a_stopped_process_ends_with_who_asks():
    code = """if True:
        import os, signal
        from bench.workers import Contestant, Worker
        if __name__ == "__main__":
            worker = Worker(Contestant("plain", "plain", 1))
            worker.receive()
            print(worker.process.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert _becomes(int(done.stdout), "ended", "Z"), done.stderr


def test_errors_alone():
    result = measure(replace(CASE, offset=1e3), [Fake("off", off), Fake("right", right)], blocks=0)
    assert result.blocks == result.notes == {}
    assert result.errors["off"] > 1e-2 > 1e-5 > result.errors["right"]


def test_a_process_that_fails_to_start_is_left_out():
    made = Contestant("none", peers.OURS, 1, {"no such option": 1})
    with crew([made]) as (workers, left_out):
        assert workers == []
        assert left_out["none"].startswith("TypeError")


@pytest.mark.parametrize("name", sorted(SUITES))
def test_suites_name_each_case_once(name):
    names = [str(case) for case in suite(name)]
    assert len(set(names)) == len(names) > 0


def test_full_holds_the_marks():
    assert set(suite("marks")) <= set(suite("full"))


def test_slab_is_what_one_statistic_reads():
    def slab(operation, layout, num_groups=None, pass_="inference"):
        return Case(operation, pass_, layout, (32, 64, 7, 7), num_groups).slab

    assert slab("batch_norm", "NCHW", pass_="training") == 32 * 49 * 4
    assert slab("instance_norm", "NHWC") == 49 * 64
    assert slab("group_norm", "NCHW", 2) == 32 * 49 * 4


def test_marks_of_a_results_file(tmp_path, monkeypatch):
    monkeypatch.setattr(marks, "import_milliseconds", lambda: 12.0)
    report = recorded(write_results(tmp_path / "results.json"))
    case = Case("batch_norm", "training", "NCHW", (8, 128, 28, 28))
    (result,) = [r for r in report.results if r.case == case]

    def seconds(name):
        return seconds_of("batch_norm", "training", "NCHW", "float32", case.shape, 2, name)

    lead = min(map(seconds, ("torch", "onnxruntime"))) / seconds("cython")
    assert report.lead(result) == pytest.approx(lead, rel=0.1)
    assert report.over_copy(result) == pytest.approx(seconds("cython") / seconds("copy"), rel=0.1)
    lines = {line[:66].strip(): line[66:].split() for line in marks.table(report).splitlines()}
    assert float(lines["one thread ÷ two, ≥ 2 MiB, mean"][2]) == pytest.approx(2, rel=0.1)
    assert lines["µs of layer_norm on (1, 768)"][2] == "–"
    assert lines["ms of import cpunorm beyond numpy"][2:4] == ["12.00", "pass"]
