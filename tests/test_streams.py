"""Stores past the caches in the Numba backend: where they go, nothing but the way is different."""

import numpy as np
import pytest

import cpunorm

from .cases import CASES, SMALL_CASES
from .support import AVAILABLE, DTYPES, assert_same_bits, first, run, run_backward

if "numba" not in AVAILABLE:
    pytest.skip("Numba is not installed", allow_module_level=True)

from cpunorm.backends.numba import sweeps


@pytest.fixture
def everything_large(monkeypatch):
    def switch():
        monkeypatch.setattr(sweeps, "STREAM", (0, 0))

    return switch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*SMALL_CASES, *CASES[::3]], ids=str)
def test_the_same_bits(case, dtype, everything_large):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)

    def results():
        gradients = run_backward(case, arrays, grad_y, backend="numba")
        return first(run(case, arrays, backend="numba")), *gradients

    expected = results()
    everything_large()
    for found, wanted in zip(results(), expected, strict=True):
        if wanted is not None:
            assert_same_bits(found, wanted)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [6, 5000])
def test_nothing_else_is_written(channels, layout, activation, everything_large):
    """Wherever out begins, in a line of memory or at its start; with rows longer than a block."""
    rng = np.random.default_rng(0)
    shape = (2, channels, 5, 9) if layout == "NCHW" else (2, 5, 9, channels)
    x, residual = (rng.normal(size=shape).astype("float32") for _ in range(2))
    options = {"activation": activation, "residual": residual, "layout": layout}
    expected = cpunorm.group_norm(x, 1, backend="numba", **options)
    everything_large()
    for start in range(4):
        room = np.full(x.size + 8, np.nan, "float32")
        out = room[start : start + x.size].reshape(shape)
        cpunorm.group_norm(x, 1, out=out, backend="numba", **options)
        assert_same_bits(out, expected)
        assert np.isnan(room[:start]).all() and np.isnan(room[start + x.size :]).all()
