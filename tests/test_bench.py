"""The speed harness: what it compares computes the same thing."""

import math

import numpy as np
import pytest

from bench import peers
from bench.shapes import Case, suite
from bench.workers import Contestant, Result, Worker, compare, measure

SHAPES = ((3, 32, 5, 4), (2, 8, 5), (2, 3, 5, 7, 11))


@pytest.fixture(scope="module")
def workers():
    """Return a worker for cpunorm and for each library that is installed."""
    pytest.importorskip("torch")
    names = [name for name in (peers.OURS, *peers.PEERS) if peers.missing(name) is None]
    workers = [Worker(Contestant(name, name, 1)) for name in names]
    assert [worker.receive() for worker in workers] == ["ready"] * len(workers)
    yield workers
    for worker in workers:
        worker.close()


def _cases():
    for shape in SHAPES:
        for layout in ("NCHW", "NHWC"):
            for direction in ("forward", "backward"):
                for frozen in (False, True):
                    yield Case("batch_norm", direction, frozen, layout, shape)
                yield Case("instance_norm", direction, False, layout, shape)
                yield Case("group_norm", direction, False, layout, shape, math.gcd(shape[1], 2))
    for operation in ("layer_norm", "rms_norm"):
        for direction in ("forward", "backward"):
            yield Case(operation, direction, False, "NCHW", (7, 33))


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_everyone_agrees(case, workers):
    result = measure(case, workers, blocks=1)
    assert result.notes == []
    assert len(result.blocks) >= 2
    assert all(seconds > 0 for seconds in result.seconds.values())


def test_a_failure_is_noted(workers):
    case = Case("layer_norm", "forward", False, "NCHW", (7, 33))
    broken = Worker(Contestant("broken", peers.OURS, 1, {"backend": "no such thing"}))
    try:
        assert broken.receive() == "ready"
        (note,) = measure(case, [*workers, broken], blocks=1).notes
        assert note.startswith("broken: ValueError")
    finally:
        broken.close()


def test_a_wrong_answer_is_noted():
    result = Result(Case("layer_norm", "forward", False, "NCHW", (7, 33)))
    right, wrong = np.ones((1, 64), np.float32), np.full((1, 64), np.nan, np.float32)
    compare(result, {"one": right, "two": right, "three": right})
    assert result.notes == []
    compare(result, {"one": right, "two": right, "three": right + np.float32(0.1)})
    assert result.notes == ["three is off by 0.05"]
    compare(result, {"one": wrong})
    assert len(result.notes) == 2


@pytest.mark.parametrize("name", ["quick", "marks", "full"])
def test_suites_name_each_case_once(name):
    names = [str(case) for case in suite(name)]
    assert len(set(names)) == len(names) > 0


def test_full_holds_the_marks():
    assert set(suite("marks")) <= set(suite("full"))


def test_slab_is_what_one_statistic_reads():
    assert Case("batch_norm", "forward", False, "NCHW", (32, 64, 7, 7)).slab == 32 * 49 * 4
    assert Case("instance_norm", "forward", False, "NHWC", (32, 64, 7, 7)).slab == 49 * 64
    assert Case("group_norm", "forward", False, "NCHW", (32, 64, 7, 7), 2).slab == 32 * 49 * 4
