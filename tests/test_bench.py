"""The speed harness: what it compares computes the same thing."""

from dataclasses import replace

import pytest

from bench import peers
from bench.results import DTYPES
from bench.shapes import Case
from bench.suites import on_shape, suite
from bench.workers import Contestant, crew, measure

from .support import AVAILABLE

SHAPES = ((3, 32, 5, 4), (2, 8, 5), (2, 3, 5, 7, 11))


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
        for shape in (*SHAPES, (7, 33)):
            for case in on_shape(shape):
                yield replace(case, dtype=dtype)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_everyone_agrees_with_the_oracle(case, workers):
    result = measure(case, workers, blocks=1)
    assert {name: why for name, why in result.notes.items() if "wrong" in why} == {}
    assert {"cython", "numba", "numpy"} <= set(result.blocks)
    assert all(seconds > 0 for seconds in result.seconds.values())
    print(result.notes, result.errors)


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
