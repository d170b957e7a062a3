"""The compiled kernels of every instruction set this CPU has, not only of the one in use."""

import os
import subprocess
import sys
from functools import partial
from itertools import product

import numpy as np
import pytest

import cpunorm

from .cases import CASES, SMALL_CASES, SMALL_IMAGES, channel_cases
from .support import (
    AVAILABLE,
    DTYPES,
    HALF_DTYPES,
    assert_gradients_close,
    assert_same_bits,
    assert_values_close,
    first,
    run,
    run_backward,
    run_oracle,
    run_oracle_backward,
)

if "cython" not in AVAILABLE:
    pytest.skip("the compiled backend was not built", allow_module_level=True)

from cpunorm import _threads
from cpunorm.backends import cython

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2}


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


@pytest.fixture(params=["0", "1"])
def fetching(request, monkeypatch):
    """Have planes fetched early, or not, which are many to a small L2."""
    monkeypatch.setenv("CPUNORM_FETCH", request.param)
    monkeypatch.setenv("CPUNORM_L2", str(1 << 16))
    cython.install(cython.ISA)
    yield
    monkeypatch.undo()
    cython.install(cython.ISA)


@pytest.fixture
def both_ways(level, monkeypatch):
    """Compute something with the stores of small arrays, and with those of large ones."""

    def results(function):
        with monkeypatch.context() as patched:
            patched.setenv("CPUNORM_L3", str(1 << 40))
            cython.install(level)
            plainly = function()
            patched.setenv("CPUNORM_L3", "1")
            cython.install(level)
            return plainly, function()

    return results


def assert_right(case, dtype):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    expected = run_oracle(case, arrays)
    gradients = run_backward(case, arrays, grad_y, backend="cython")
    assert_values_close(first(run(case, arrays, backend="cython")), expected.y)
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *product([*SMALL_CASES, *SMALL_IMAGES, *CASES[::3]], DTYPES),
        *product([*SMALL_CASES, *SMALL_IMAGES[::3], *CASES[::30]], HALF_DTYPES),
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


@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((9, 40, 14, 14), 8), ((3, 7, 23, 31), 7), ((40, 300, 7, 7), 4), ((2, 3, 150, 150), 1)],
)
def test_planes_with_and_without_fetching(shape, num_groups, fetching):
    for case in channel_cases(shape, (num_groups,)):
        assert_right(case, "float32")


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("spatial", [(7, 7), (13, 11), (8, 8)])
def test_planes_that_end_within_lines(spatial, layout, with_residual, activation, past_the_caches):
    """Every line is stored once, and nothing else is written, wherever out begins."""
    rng = np.random.default_rng(0)
    shape = (2, 70, *spatial) if layout == "NCHW" else (2, *spatial, 70)
    x, residual = (rng.normal(size=shape).astype("float32") for _ in range(2))
    for start in range(4):
        room = np.full(x.size + 8, np.nan, "float32")
        out = room[start : start + x.size].reshape(shape)
        options = {"activation": activation, "residual": residual if with_residual else None}
        options["layout"] = layout
        cpunorm.group_norm(x, 7, out=out, backend="cython", **options)
        expected = cpunorm.group_norm(x, 7, backend="numpy", **options)
        np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)
        assert np.isnan(room[:start]).all() and np.isnan(room[start + x.size :]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 70, 129, 285, 1001, 5000])
def test_rows_that_end_within_lines(width, dtype, both_ways):
    """The same bits wherever out begins, of what is right, and nothing else is written."""
    rng = np.random.default_rng(width)
    shape = (max(5, 700 // width), width)
    x, grad_y = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    kind = "float32" if dtype == "float16" else dtype
    weight, bias = rng.normal(size=(2, width)).astype(kind)

    def forward(start):
        room = np.full(x.size + 16, np.nan, dtype)
        out = room[start : start + x.size].reshape(shape)
        for operation in (partial(cpunorm.layer_norm, bias=bias), cpunorm.rms_norm):
            operation(x, width, weight=weight, out=out, backend="cython")
            assert np.isnan(room[:start]).all() and np.isnan(room[start + x.size :]).all()
            yield out.copy()
        running = np.zeros(width, weight.dtype), np.ones(width, weight.dtype)
        cpunorm.batch_norm(x, *running, weight, bias, out=out, backend="cython")
        assert np.isnan(room[:start]).all() and np.isnan(room[start + x.size :]).all()
        yield out

    def backward():
        _, stats = cpunorm.layer_norm(x, width, return_stats=True, backend="cython")
        yield from cpunorm.layer_norm_backward(grad_y, x, width, stats, weight, backend="cython")
        stats = cpunorm.Stats(None, stats.rstd)
        yield cpunorm.rms_norm_backward(grad_y, x, width, stats, backend="cython").x
        stats = cpunorm.Stats(*np.ones((2, width), weight.dtype))
        yield from cpunorm.batch_norm_backward(grad_y, x, stats, weight, False, backend="cython")
        yield from cpunorm.batch_norm_backward(grad_y, x, stats, weight, backend="cython")

    plainly, past = both_ways(lambda: [list(forward(start)) for start in (0, 1, 3)])
    for results in (*plainly[1:], *past):
        for found, expected in zip(results, plainly[0], strict=True):
            assert_same_bits(found, expected)
    plainly, past = both_ways(lambda: list(backward()))
    for found, expected in zip(past, plainly, strict=True):
        largest = np.abs(expected).max(initial=1, where=np.isfinite(expected))
        tolerance = TOLERANCES[dtype] * largest
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("eps", [1e-46, 1e-60])
@pytest.mark.parametrize("width", [2, 4, 7, 8, 9])
def test_an_eps_that_only_float64_holds(width, eps, level):
    """Equal values have a variance of 0: eps alone keeps the root from it."""
    x = np.full((5, width), 3, "float32")
    assert (cpunorm.layer_norm(x, width, eps=eps, backend="cython") == 0).all()
    assert (cpunorm.rms_norm(np.zeros_like(x), width, eps=eps, backend="cython") == 0).all()
    given = np.full(width, 3, "float32"), np.zeros(width, "float32")
    assert (cpunorm.batch_norm(x, *given, eps=eps, backend="cython") == 0).all()


@pytest.mark.parametrize("positions", [3, 9, 16, 49, 100, 600])
def test_positions_that_end_within_lines(positions, both_ways):
    """The same of layer norm over the channels of NCHW."""
    rng = np.random.default_rng(positions)
    x, grad_y = rng.normal(size=(2, 3, 21, positions)).astype("float32")
    weight, bias = rng.normal(size=(2, 21)).astype("float32")
    options = {"axis": 1, "backend": "cython"}

    def everything():
        y, stats = cpunorm.layer_norm(x, 21, weight, bias, return_stats=True, **options)
        return y, *cpunorm.layer_norm_backward(grad_y, x, 21, stats, weight, **options)

    for plainly, past in zip(*both_ways(everything), strict=True):
        np.testing.assert_allclose(past, plainly, rtol=0, atol=1e-4)


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

    tolerance = TOLERANCES[dtype]
    for found, expected in zip(results("cython"), results("numpy"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 12])
def test_short_groups_with_what_follows(size, activation, num_groups, both_ways):
    """Rows that are put together before they are activated and sent on their way."""
    rng = np.random.default_rng(size)
    x, residual = rng.normal(size=(2, 90, 9, size)).astype("float32")
    weight, bias = rng.normal(size=(2, 9)).astype("float32")
    room = np.full(x.size + 16, np.nan, "float32")
    out = room[5 : 5 + x.size].reshape(x.shape)

    def normalized(residual, out=None, backend="cython"):
        return cpunorm.group_norm(
            x, num_groups, weight, bias,
            residual=residual, activation=activation, out=out, backend=backend,
        ).copy()  # fmt: skip

    for added in (None, residual):
        expected = normalized(added, backend="numpy")
        for found in both_ways(partial(normalized, added, out)):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            assert np.isnan(room[:5]).all() and np.isnan(room[5 + x.size :]).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_threads_change_no_bits(activation, training, level, monkeypatch, restore_threads):
    """Whatever is added after a multiply-add, and wherever a share ends within a vector."""
    monkeypatch.setattr(_threads, "BYTES_PER_THREAD", 1)
    rng = np.random.default_rng(3)
    x, residual = rng.normal(5, 2, (2, 44, 55, 29)).astype("float32")
    mean, weight, bias = rng.normal(size=(3, 55)).astype("float32")

    def normalized(threads):
        cpunorm.set_num_threads(threads)
        return cpunorm.batch_norm(
            x, mean.copy(), weight**2, weight, bias, training,
            activation=activation, residual=residual, backend="cython",
        )  # fmt: skip

    expected = normalized(1)
    for threads in (2, 3, 5, 8):
        assert_same_bits(normalized(threads), expected)


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
