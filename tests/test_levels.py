"""The compiled kernels of every instruction set this CPU has, not only of the one in use."""

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

import cpunorm

from .cases import CASES, SMALL_CASES
from .support import (
    AVAILABLE,
    DTYPES,
    HALF_DTYPES,
    assert_gradients_close,
    assert_values_close,
    first,
    run,
    run_backward,
    run_oracle,
    run_oracle_backward,
)

if "cython" not in AVAILABLE:
    pytest.skip("the compiled backend was not built", allow_module_level=True)

from cpunorm.backends import cython


@pytest.fixture(params=cython.LEVELS)
def level(request):
    """Run the kernels of one instruction set in place of those in use."""
    cython.install(request.param)
    yield request.param
    cython.install(cython.ISA)


@pytest.fixture
def past_the_caches(monkeypatch):
    """Have everything stored past the caches, as what is too large for them is."""
    monkeypatch.setenv("CPUNORM_L3", "1")
    cython.install(cython.ISA)
    yield
    monkeypatch.undo()
    cython.install(cython.ISA)


def assert_right(case, dtype):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    expected = run_oracle(case, arrays)
    gradients = run_backward(case, arrays, grad_y, backend="cython")
    assert_values_close(first(run(case, arrays, backend="cython")), expected.y)
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *product([*SMALL_CASES, *CASES[::3]], DTYPES),
        *product([*SMALL_CASES, *CASES[::30]], HALF_DTYPES),
    ],
    ids=str,
)
def test_values_and_gradients(case, dtype, level):
    assert_right(case, dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *product([*SMALL_CASES, *CASES[::2]], ["float32"]),
        *product([*SMALL_CASES, *CASES[::30]], ["float64", *HALF_DTYPES]),
    ],
    ids=str,
)
def test_stored_past_the_caches(case, dtype, past_the_caches):
    assert_right(case, dtype)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("spatial", [(7, 7), (13, 11), (8, 8)])
def test_planes_that_end_within_lines(spatial, with_residual, activation, past_the_caches):
    """Every line is stored once, and nothing else is written, wherever out begins."""
    rng = np.random.default_rng(0)
    shape = (2, 70, *spatial)
    x, residual = (rng.normal(size=shape).astype("float32") for _ in range(2))
    for start in range(4):
        room = np.full(x.size + 8, np.nan, "float32")
        out = room[start : start + x.size].reshape(shape)
        options = {"activation": activation, "residual": residual if with_residual else None}
        cpunorm.group_norm(x, 7, out=out, backend="cython", **options)
        expected = cpunorm.group_norm(x, 7, backend="numpy", **options)
        np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)
        assert np.isnan(room[:start]).all() and np.isnan(room[start + x.size :]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("size", [3, 15, 16, 17, 33, 49, 100])
def test_planes_side_by_side(size, dtype, level):
    """A vector that ends one plane begins the next, which has terms of its own."""
    rng = np.random.default_rng(size)
    x, grad_y, residual = (rng.normal(size=(3, 5, size)).astype(dtype) for _ in range(3))
    kind = "float32" if dtype == "float16" else dtype
    mean, weight, bias = (rng.normal(size=5).astype(kind) for _ in range(3))
    var = rng.uniform(0.5, 2, 5).astype(kind)

    def results(backend):
        options = {"residual": residual, "activation": "relu", "backend": backend}
        stats = cpunorm.instance_norm(x, return_stats=True, backend=backend)[1]
        fixed = cpunorm.Stats(mean, 1 / np.sqrt(var))
        yield cpunorm.batch_norm(x, mean, var, weight, bias, **options)
        yield cpunorm.instance_norm(x, weight=weight, bias=bias, **options)
        yield cpunorm.instance_norm_backward(grad_y, x, stats, weight, backend=backend)[0]
        yield cpunorm.batch_norm_backward(grad_y, x, fixed, weight, False, backend=backend)[0]

    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2}[dtype]
    for found, expected in zip(results("cython"), results("numpy"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wanted", cython.LEVELS)
def test_the_environment_chooses(wanted):
    printed = subprocess.run(
        [sys.executable, "-c", "import cpunorm; cpunorm.show_config()"],
        env=os.environ | {"CPUNORM_ISA": wanted},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert f"instruction set   {wanted}" in printed


def test_an_unknown_choice_is_said():
    """The library works without, and says why the backend that was asked for is missing."""
    text = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    import cpunorm
import numpy
print(*[warning.message for warning in caught])
print(cpunorm.available_backends())
try: cpunorm.layer_norm(numpy.eye(2), 2, backend="cython")
except RuntimeError as error: print(error)
"""
    printed = subprocess.run(
        [sys.executable, "-W", "always", "-c", text],
        env=os.environ | {"CPUNORM_ISA": "x86_64_v9"},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    warning, available, error = printed.strip().splitlines()
    assert "cython" not in available
    for word in ("CPUNORM_ISA", "x86_64_v9", *cython.LEVELS):
        assert word in error
        assert word in warning
    assert "Set CPUNORM_ISA" in warning  # to build it anew would not help
    assert "compiler" not in warning
