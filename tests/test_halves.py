"""float16 and bfloat16: what is promised of float32 holds, and every result is rounded once."""

import os
import subprocess
import sys

import numpy as np
import pytest

import cpunorm
from cpunorm.backends import ACTIVATIONS

from .cases import CASES, SMALL_CASES, Case
from .support import (
    AVAILABLE,
    BFLOAT16,
    FLOAT16,
    HALF_DTYPES,
    HALF_ULP,
    assert_close,
    assert_gradients_close,
    assert_same_bits,
    assert_values_close,
    copies,
    first,
    permuted,
    pick,
    real_strides,
    reversed_in_memory,
    run,
    run_backward,
    run_oracle,
    run_oracle_backward,
    spread,
    statistics,
    unaligned,
)

RUNNING = ("running_mean", "running_var")

# The dtypes of x and of the parameters: as torch allows, these may be float32.
PAIRS = [(dtype, p) for dtype in HALF_DTYPES for p in (dtype, "float32")]
pairs = pytest.mark.parametrize(("dtype", "parameters"), PAIRS)
dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES)
small_cases = pytest.mark.parametrize("case", SMALL_CASES, ids=str)

# The loops over 16 bits are those of float32: a part of the many cases will do.
CALLS = [
    *((case, *pair) for case in SMALL_CASES for pair in PAIRS),
    *((case, *PAIRS[i % len(PAIRS)]) for i, case in enumerate(CASES[::5])),
]
calls = pytest.mark.parametrize(("case", "dtype", "parameters"), CALLS, ids=str)

LAYINGS = (
    np.asfortranarray,
    lambda a: permuted(a, (0, *range(2, a.ndim), 1)),
    spread,
    reversed_in_memory,
    unaligned,
)


# --- Values --------------------------------------------------------------------------------------


@calls
def test_values(case, dtype, parameters, backend_or_auto):
    arrays = case.arrays(dtype, parameters)
    expected = run_oracle(case, arrays)
    running = copies(pick(arrays, *RUNNING))
    y, *total, stats = run(case, {**arrays, **running}, return_stats=True, backend=backend_or_auto)
    assert y.dtype == dtype
    assert_values_close(y, expected.y)
    assert stats.rstd.dtype == np.float32
    assert_values_close(stats.rstd, expected.rstd)
    assert (stats.mean is None) == case.is_rms
    if not case.is_rms:
        assert stats.mean.dtype == np.float32
        assert_values_close(stats.mean, expected.mean)
    if case.adds:
        assert_same_bits(total[0], arrays["x"] + arrays["residual"])
    for name, got in running.items():
        assert got.dtype == parameters
        assert_values_close(got, getattr(expected, name))


@calls
def test_gradients(case, dtype, parameters, backend_or_auto):
    arrays, grad_y = case.arrays(dtype, parameters), case.grad_y(dtype)
    gradients = run_backward(case, arrays, grad_y, backend=backend_or_auto)
    assert gradients.x.dtype == dtype
    assert {g.dtype for g in gradients[1:] if g is not None} == {np.dtype(parameters)}
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y))


@dtypes
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.is_channel_op], ids=str)
def test_residual_and_activation(case, dtype, backend):
    for activation in ACTIVATIONS:
        arrays = case.arrays(dtype, weight=False, bias=False, residual=True, running=False)
        y = run(case, arrays, activation=activation, backend=backend)
        assert_values_close(y, run_oracle(case, arrays, activation=activation).y)


@dtypes
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if not c.is_channel_op], ids=str)
def test_grad_sum_and_no_weight(case, dtype, backend):
    """grad_x is rounded after the sum; gradients without a weight are not rounded to 16 bits."""
    arrays, grad_y = case.arrays(dtype, weight=False), case.grad_y(dtype)
    grad_sum = np.random.default_rng(5).normal(1, 2, case.shape).astype(dtype)
    gradients = run_backward(case, arrays, grad_y, grad_sum=grad_sum, backend=backend)
    assert gradients.weight.dtype == np.float32
    expected = run_oracle_backward(case, arrays, grad_y, grad_sum=grad_sum)
    assert_gradients_close(gradients, expected)


@dtypes
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.adds], ids=str)
def test_what_is_normalised_is_the_sum_as_it_is_stored(case, dtype, backend_or_auto):
    arrays = case.arrays(dtype)
    y, total, stats = run(case, arrays, return_stats=True, backend=backend_or_auto)
    plain = Case(case.op.removeprefix("add_"), case.shape, case.kwargs)
    of_total = {**pick(arrays, "weight", "bias"), "x": total}
    y_of_total, stats_of_total = run(plain, of_total, return_stats=True, backend=backend_or_auto)
    assert_values_close(y, y_of_total.astype("float64"))
    assert_values_close(stats.rstd, stats_of_total.rstd)


@dtypes
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_eps_none_is_that_of_the_statistics(op, dtype, backend):
    case = Case(op, (5, 33), {"normalized_shape": 33})
    arrays = case.arrays(dtype)
    for name in ("x", "residual"):
        if name in arrays:
            arrays[name] *= arrays[name].dtype.type(2.0**-11)
    y = first(run(case, arrays, backend=backend))
    eps = float(np.finfo("float32").eps)
    assert_same_bits(y, first(run(case, arrays, eps=eps, backend=backend)))
    assert_values_close(y, run_oracle(case, arrays).y)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pairs
@pytest.mark.parametrize(
    "case", [c for c in SMALL_CASES if c.takes_running_statistics and not c.is_frozen], ids=str
)
def test_running_statistics(case, dtype, parameters, momentum, backend):
    arrays = case.arrays(dtype, parameters)
    before = copies(arrays)
    expected = run_oracle(case, arrays, momentum=momentum)
    run(case, arrays, momentum=momentum, backend=backend)
    for name in RUNNING:
        assert_values_close(arrays[name], getattr(expected, name))
        if momentum == 0:
            assert_same_bits(arrays[name], before[name])


# --- Memory --------------------------------------------------------------------------------------


@dtypes
@small_cases
def test_layouts(case, dtype, backend):
    arrays, grad_y = case.arrays(dtype, running=False), case.grad_y(dtype)
    expected, gradients = run_oracle(case, arrays), run_oracle_backward(case, arrays, grad_y)
    for lay in LAYINGS:
        lying = {name: lay(a) if a.ndim > 1 else a for name, a in arrays.items()}
        y = first(run(case, lying, backend=backend))
        assert_values_close(y, expected.y)
        if lay in LAYINGS[:2]:
            assert real_strides(y) == real_strides(lying["x"])
        got = run_backward(case, lying, lay(grad_y), backend=backend)
        assert_gradients_close(got, gradients)


@dtypes
@small_cases
def test_in_place(case, dtype, backend_or_auto):
    arrays = case.arrays(dtype, residual=case.is_channel_op, running=False)
    expected = run_oracle(case, arrays).y
    for name in ("x", "residual") if "residual" in arrays else ("x",):
        for lay in (np.array, *LAYINGS):
            out = lay(arrays[name].copy())
            y = first(run(case, {**arrays, name: out}, out=out, backend=backend_or_auto))
            assert y is out
            assert_values_close(y, expected)


@dtypes
@pytest.mark.parametrize("case", [c for c in CASES if np.prod(c.shape) >= 2**15][::3], ids=str)
def test_any_number_of_threads(case, dtype, backend, restore_threads):
    arrays, grad_y = case.arrays(dtype, running=False), case.grad_y(dtype)
    results = []
    for threads in (1, 2, 3):
        cpunorm.set_num_threads(threads)
        stats = statistics(case, arrays, backend=backend)
        gradients = run_backward(case, arrays, grad_y, stats, backend=backend)
        results.append((first(run(case, arrays, backend=backend)), stats, gradients))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


# --- Large, small, and not numbers ---------------------------------------------------------------


def identity(x, dtype, backend, scale=1.0):
    """x·scale and no more: batch norm with frozen statistics."""
    zero, one = np.zeros(1, "float32"), np.ones(1, "float32")
    scale = np.full(1, scale, "float32")
    x = x.astype(dtype)[:, None]
    return cpunorm.batch_norm(x, zero, one, scale, eps=0.0, backend=backend)[:, 0]


def as_float64(a):
    with np.errstate(invalid="ignore"):  # signalling NaN
        return a.astype("float64")


@dtypes
def test_every_number_is_read_and_written(dtype, backend):
    """Subnormal and infinite ones too; a NaN stays one, whatever its sign and payload."""
    x = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))
    y = identity(x, dtype, backend)
    np.testing.assert_array_equal(as_float64(y), as_float64(x))


@dtypes
def test_nan_of_float32_stays_nan(dtype, backend):
    """Where a bias brings one whose digits rounding would carry over into the sign."""
    bias = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001, 0x7F80FFFF], np.uint32).view("float32")
    x = np.zeros((33, 4), dtype)
    assert np.isnan(cpunorm.group_norm(x, 2, bias=bias, backend=backend)).all()
    assert np.isnan(cpunorm.layer_norm(x, 4, bias=bias, backend=backend)).all()


@pytest.mark.parametrize("scale", [1 + 2.0**-12, 1 + 2.0**-9, 1.5, 3.0, 2.0**-17, 1e30])
@dtypes
def test_rounding_is_to_nearest_even(dtype, scale, backend):
    """Of the product of two numbers that float32 holds: below, at and above the middle."""
    x = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))
    x = x[np.isfinite(as_float64(x))]
    with np.errstate(over="ignore"):
        expected = (x.astype("float32") * np.float32(scale)).astype(dtype)
    got = identity(x, dtype, backend, scale)
    np.testing.assert_array_equal(as_float64(got), as_float64(expected))


@pytest.mark.skipif("numba" not in AVAILABLE, reason="numba is missing")
def test_processors_that_do_not_convert():
    """numba is told of the least of its kind: then float16 is converted by arithmetic."""
    text = """
import warnings; warnings.simplefilter("ignore")
import numpy as np, cpunorm
x = np.arange(2**16, dtype=np.uint16).view(np.float16)[:, None]
zero, one = np.zeros(1, "float32"), np.ones(1, "float32")
for scale in (1, 1 + 2.0**-12, 3, 2.0**-17):
    arguments = x, zero, one, np.full(1, scale, "float32")
    y, expected = (cpunorm.batch_norm(*arguments, eps=0.0, backend=b) for b in ("numba", "numpy"))
    np.testing.assert_array_equal(y, expected)
"""
    subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"NUMBA_CPU_NAME": "generic"},
        timeout=120, check=True,
    )  # fmt: skip


@dtypes
@small_cases
def test_offset(case, dtype, backend):
    """Mean 10, deviation 1: bfloat16 keeps 16ths of it, and nothing further is lost."""
    arrays, grad_y = case.arrays(dtype, "float32"), case.grad_y(dtype)
    arrays["x"] = (10 + np.random.default_rng(11).standard_normal(case.shape)).astype(dtype)
    if case.is_frozen:
        arrays["running_mean"] += np.float32(8)
    expected, gradients = run_oracle(case, arrays), run_oracle_backward(case, arrays, grad_y)
    got = run_backward(case, arrays, grad_y, backend=backend)
    y = first(run(case, arrays, backend=backend))
    assert_values_close(y, expected.y)
    assert_gradients_close(got, gradients)


@pytest.mark.parametrize("value", [0.1, -1e4, 3e4])
@dtypes
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if not (c.is_rms or c.is_frozen)], ids=str)
def test_a_constant_gives_exactly_the_bias(case, dtype, value, backend):
    arrays = case.arrays(dtype)
    for name in pick(arrays, "x", "residual"):
        arrays[name][...] = value
    arrays["bias"][...] = 0.75
    y = first(run(case, arrays, backend=backend))
    assert_same_bits(y, np.full(case.shape, 0.75, dtype))


@dtypes
@small_cases
def test_not_finite_values_stay_inside_their_statistic(case, dtype, backend):
    clean = run_oracle(case, case.arrays(dtype)).y
    for value in (np.nan, np.inf, -np.inf):
        arrays = case.arrays(dtype)
        arrays["x"][tuple(n // 2 for n in case.shape)] = value
        with np.errstate(invalid="ignore"):
            expected = run_oracle(case, arrays).y
        assert not np.isclose(expected, clean).all()
        y = first(run(case, arrays, backend=backend))
        assert_values_close(y, expected)


@dtypes
@small_cases
def test_nan_stays_inside_its_statistic_in_backward(case, dtype, backend):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    grad_y[tuple(n // 2 for n in case.shape)] = np.nan
    expected = run_oracle_backward(case, arrays, grad_y)
    assert_gradients_close(run_backward(case, arrays, grad_y, backend=backend), expected)


@pytest.mark.parametrize("case", [c for c in SMALL_CASES if len(c.shape) == 4], ids=str)
def test_what_is_too_large_for_float16_is_infinite(case, backend):
    """Values, gradients and running statistics; a warning of NumPy's would be an error here."""
    arrays = case.arrays("float16")
    arrays["weight"][...] = 6e4
    expected = run_oracle(case, arrays).y
    y = first(run(case, copies(arrays), backend=backend))
    assert (np.isinf(y) == (np.abs(expected) >= 65520)).all()
    assert np.isinf(y).any()
    grad_y = np.sign(expected).astype("float16") * np.float16(6e4)
    gradients = run_backward(case, arrays, grad_y, backend=backend)
    assert np.isinf(gradients.weight).all()
    if case.takes_running_statistics and not case.is_frozen:
        arrays["x"] *= np.float16(1e3)
        run(case, arrays, momentum=1.0, backend=backend)
        assert np.isinf(arrays["running_var"]).all()


# --- Errors --------------------------------------------------------------------------------------


@dtypes
@small_cases
def test_other_dtypes_beside_x(case, dtype, backend_or_auto):
    """Like x everything of its size, like x or its statistics the rest."""
    arrays = case.arrays(dtype, residual=case.is_channel_op)
    other_half = HALF_DTYPES[dtype == "float16"]
    for name in set(arrays) - {"x"}:
        like_x = name == "residual"
        for wrong in ("float64", "int16", other_half, *(["float32"] if like_x else [])):
            allowed = dtype if like_x else rf"{dtype} or float32"
            with pytest.raises(TypeError, match=rf"{name} must have .*{allowed}, got {wrong}"):
                run(case, arrays | {name: arrays[name].astype(wrong)}, backend=backend_or_auto)
    for wrong in (other_half, "float32"):
        with pytest.raises(TypeError, match=rf"out must have x's dtype {dtype}, got {wrong}"):
            run(case, arrays, out=np.empty(case.shape, wrong), backend=backend_or_auto)


@dtypes
@small_cases
def test_other_dtypes_in_backward(case, dtype, backend_or_auto):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    stats = statistics(case, arrays, backend=backend_or_auto)
    wide = grad_y.astype("float32")
    with pytest.raises(TypeError, match=rf"grad_y must have x's dtype {dtype}, got float32"):
        run_backward(case, arrays, wide, stats, backend=backend_or_auto)
    half_stats = stats._replace(rstd=stats.rstd.astype(dtype))
    with pytest.raises(TypeError, match=rf"rstd must have dtype float32, got {dtype}"):
        run_backward(case, arrays, grad_y, half_stats, backend=backend_or_auto)
    wrong_weight = arrays | {"weight": arrays["weight"].astype("float64")}
    with pytest.raises(TypeError, match=rf"weight must have dtype {dtype} or float32, got float64"):
        run_backward(case, wrong_weight, grad_y, stats, backend=backend_or_auto)


@pytest.mark.parametrize(
    "dtype", [FLOAT16.newbyteorder(), BFLOAT16.newbyteorder(), "float8_e5m2", "int4"], ids=str
)
def test_other_dtypes_of_few_bits(dtype, backend_or_auto):
    x = np.ones((4, 6), np.uint8).astype(dtype)
    with pytest.raises(TypeError, match=r"x must have dtype float16, bfloat16, float32 or"):
        cpunorm.layer_norm(x, 6, backend=backend_or_auto)


def test_a_half_ulp_is_what_the_tolerances_say():
    for dtype, half_ulp in HALF_ULP.items():
        one = np.ones((), dtype)
        for step, moved in ((0.99, 1), (1.01, 1 + 2 * half_ulp)):
            assert float((one.astype("float64") + step * half_ulp).astype(dtype)) == moved
    with pytest.raises(AssertionError):
        assert_close(np.ones(1, FLOAT16), [1 + 2.0**-10], 3e-6)
