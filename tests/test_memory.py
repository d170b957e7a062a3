"""The memory of results: where it lies, when it is used again, how much is kept."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

import cpunorm

from .support import AVAILABLE

if "cython" not in AVAILABLE:
    pytest.skip("the compiled backend was not built", allow_module_level=True)

from cpunorm import _memory

LARGE = np.ones((1024, 1024), "float32")


@pytest.fixture(autouse=True)
def empty_pool():
    """Nothing waits from other tests."""
    gc.collect()
    _memory.clear()


@pytest.mark.parametrize("size", [1, 3, 17, 1000, 2**18, 2**20])
def test_results_begin_at_a_cache_line(size):
    x = np.ones((2, size), "float32")
    kept = [cpunorm.layer_norm(x, size) for _ in range(5)]
    y, stats = cpunorm.layer_norm(x, size, return_stats=True)
    assert all(a.ctypes.data % 64 == 0 for a in (*kept, y, *stats))
    assert all(a.flags.owndata and a.flags.writeable for a in kept)


def test_a_block_is_used_again_once_nothing_refers_to_it():
    y = cpunorm.layer_norm(LARGE, 1024)
    place, view = y.ctypes.data, y[3:, ::2]
    del y
    assert _memory.waiting() == 0
    other = cpunorm.layer_norm(LARGE, 1024)
    assert other.ctypes.data != place
    del view
    assert _memory.waiting() == LARGE.nbytes
    assert cpunorm.layer_norm(LARGE, 1024).ctypes.data == place


def test_a_block_serves_requests_of_its_size_only():
    del_me = cpunorm.layer_norm(LARGE, 1024)
    del del_me
    half = cpunorm.layer_norm(LARGE[:512], 1024)
    assert _memory.waiting() == LARGE.nbytes
    del half
    assert _memory.waiting() == LARGE.nbytes + LARGE.nbytes // 2


def test_the_pool_is_bounded():
    results = [cpunorm.layer_norm(LARGE[: 256 + i], 1024) for i in range(40)]
    del results
    assert 0 < _memory.waiting() <= 16 * LARGE.nbytes
    _memory.clear()
    assert _memory.waiting() == 0


def test_the_pool_can_be_turned_off():
    text = """
import numpy, cpunorm
from cpunorm import _memory
y = cpunorm.layer_norm(numpy.ones((1024, 1024)), 1024)
del y
print(_memory.waiting())
"""
    printed = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"CPUNORM_POOL_BYTES": "0"},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert printed.strip() == "0"


def test_arrays_can_be_resized():
    y = cpunorm.layer_norm(LARGE, 1024)
    first = y[0].copy()
    y.resize((2048, 1024), refcheck=False)
    assert (y[0] == first).all()
    assert (y[1024:] == 0).all()
    y.resize((2, 8), refcheck=False)
    del y
