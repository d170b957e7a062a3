"""Offsets, constants, outliers, huge values, NaN and Inf: where implementations usually part."""

import numpy as np
import pytest

import cpunorm
from cpunorm import reference
from cpunorm.backends import ACTIVATIONS

from .cases import SMALL_CASES, Case, channel_cases, row_cases
from .support import (
    DTYPES,
    assert_close,
    assert_gradients_close,
    assert_same_bits,
    assert_values_close,
    first,
    permuted,
    pick,
    run,
    run_backward,
    run_oracle,
    run_oracle_backward,
    statistics,
)

# Beyond one block, one tail of a vector and one thread; with the small ones.
LARGE_CASES = (
    *channel_cases((3, 4, 41, 43), (2,)),
    *channel_cases((1021, 19), (19,)),
    *row_cases((3, 9001), 9001),
    *row_cases((37, 770), 770),
    *row_cases((70, 33), 33),
    *row_cases((2, 515, 33), 515, 1),
)
ALL_CASES = SMALL_CASES + LARGE_CASES
CENTRED = [c for c in ALL_CASES if not c.is_rms and not c.is_frozen]
all_cases = pytest.mark.parametrize("case", ALL_CASES, ids=str)
small_cases = pytest.mark.parametrize("case", SMALL_CASES, ids=str)


# --- Offset --------------------------------------------------------------------------------------


def with_offset(case, offset, dtype="float32"):
    """x of the given mean and deviation 1, and whatever else there is as always."""
    arrays = case.arrays(dtype)
    rng = np.random.default_rng(11)
    arrays["x"] = (offset + rng.standard_normal(case.shape)).astype(dtype)
    if case.is_frozen:
        arrays["running_mean"] += np.asarray(offset, dtype)
    return arrays


@pytest.mark.parametrize("offset", [-1e3, 1e4])
@all_cases
def test_offset(case, offset, backend):
    """2·10⁻³ at a mean of 10⁴ is the promise; kernels that hold the mean in float64 keep 3·10⁻⁶."""
    arrays = with_offset(case, offset)
    expected = run_oracle(case, arrays)
    orders = [tuple(range(len(case.shape))), (*range(1, len(case.shape)), 0)]
    if len(case.shape) > 2:
        orders.append((0, *range(2, len(case.shape)), 1))
    for order in orders:
        lying = {name: a.copy() for name, a in arrays.items()} | {"x": permuted(arrays["x"], order)}
        y = first(run(case, lying, backend=backend))
        if case.adds:  # the sum is rounded to float32 before its mean is taken away
            np.testing.assert_allclose(y, expected.y, rtol=0, atol=2e-7 * abs(offset))
        else:
            assert_values_close(y, expected.y)
        for name in pick(lying, "running_mean", "running_var"):
            assert_values_close(lying[name], getattr(expected, name))


@pytest.mark.parametrize("offset", [1e4, -1e8])
@small_cases
def test_offset_in_float64(case, offset, backend):
    arrays = with_offset(case, offset, "float64")
    y = first(run(case, arrays, backend=backend))
    # an ulp of the mean or two, times rstd, which units of few values have up to 10
    np.testing.assert_allclose(y, run_oracle(case, arrays).y, rtol=0, atol=2e-15 * abs(offset))


@all_cases
def test_gradients_under_an_offset(case, backend):
    """Stats bring the mean in float32, half an ulp off: 5·10⁻⁴ that must not be seen."""
    arrays, grad_y = with_offset(case, 1e4), case.grad_y()
    gradients = run_backward(case, arrays, grad_y, backend=backend)
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y))


# --- Constants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, -1e4, 3.3e7, 1e30, 1e38])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CENTRED, ids=str)
def test_a_constant_gives_exactly_the_bias(case, dtype, value, backend):
    arrays = case.arrays(dtype)
    arrays["x"][...] = value
    if case.adds:
        arrays["residual"][...] = value
    y, *_, stats = run(case, arrays, return_stats=True, backend=backend)
    bias = arrays["bias"]
    if 1 in (case.channel_axis, case.kwargs.get("axis")):
        bias = bias.reshape(-1, *(1,) * (len(case.shape) - 2))
    assert_same_bits(y, np.broadcast_to(bias, case.shape).copy())
    mean = value * (2 if case.adds else 1)
    assert_same_bits(stats.mean, np.full(stats.mean.shape, mean, dtype))
    assert_values_close(stats.rstd, np.full(stats.rstd.shape, 1e-5**-0.5))


@pytest.mark.parametrize("case", CENTRED, ids=str)
def test_one_constant_statistic_among_others(case, backend):
    """The first unit is constant, the rest is not, and both come out as if alone."""
    arrays = case.arrays()
    if case.is_channel_op:
        where = [slice(None)] * len(case.shape)
        where[case.channel_axis] = slice(case.parameter_shape[0] // case.groups)
        where[0] = where[0] if case.op == "batch_norm" else 0
    else:
        where = [0] * len(case.shape)
        where[-1 if case.kwargs["axis"] is None else case.kwargs["axis"]] = slice(None)
    where = tuple(where)
    arrays["x"][where] = 1234.5
    if case.adds:
        arrays["residual"][where] = 1.0
    expected = run_oracle(case, arrays).y
    y = first(run(case, arrays, backend=backend))
    assert_values_close(y, expected)
    np.testing.assert_allclose(y[where], expected[where], rtol=2e-7)


@small_cases
def test_the_gradients_of_a_constant_are_finite(case, backend):
    arrays, grad_y = case.arrays(), case.grad_y()
    arrays["x"][...] = 3.25
    if case.adds:
        arrays["residual"][...] = 1.0
    gradients = run_backward(case, arrays, grad_y, backend=backend)
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y))


# --- Size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e5, 1e17])
@all_cases
def test_scale(case, scale, backend):
    """As far as the squares, which rstd is made of, are numbers of float32."""
    arrays = case.arrays()
    for name in ("x", "residual", "running_mean"):
        if name in arrays:
            arrays[name] *= np.float32(scale)
    if case.is_frozen:
        arrays["running_var"] *= np.float32(scale) ** 2
    expected = run_oracle(case, arrays)
    y, *_, stats = run(case, arrays, return_stats=True, backend=backend)
    assert_values_close(y, expected.y)
    np.testing.assert_allclose(stats.rstd, expected.rstd, rtol=3e-6)


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("outlier", [1e6, -1e6])
@pytest.mark.parametrize("case", [c for c in ALL_CASES if not c.adds], ids=str)
def test_an_outlier(case, outlier, position, backend):
    """Whoever shifts by the first element has all the others far away."""
    arrays = case.arrays()
    arrays["x"][...] = np.random.default_rng(2).standard_normal(case.shape)
    arrays["x"].flat[position] = outlier
    expected = run_oracle(case, arrays)
    y, stats = run(case, arrays, return_stats=True, backend=backend)
    assert_values_close(y, expected.y)
    assert_values_close(stats.rstd, expected.rstd)
    if stats.mean is not None:
        # the mean of what is left is lost below an ulp of the outlier, 0.06, over the count
        assert_close(stats.mean, expected.mean, 3e-6)


@pytest.mark.parametrize("op", ["layer_norm", "batch_norm"])
def test_a_slope(op, backend):
    """Blocks whose means lie far apart: merging them is what makes the variance."""
    x = np.linspace(-500, 1500, 300_007, dtype="float32")
    if op == "layer_norm":
        case, x = Case(op, (1, x.size), {"normalized_shape": x.size}), x[None]
    else:
        case, x = Case(op, (x.size, 1), {"training": True, "layout": "NHWC"}), x[:, None]
    expected = run_oracle(case, {"x": x})
    y, stats = run(case, {"x": x}, return_stats=True, backend=backend)
    assert_values_close(y, expected.y)
    assert_values_close(stats.mean, expected.mean)
    np.testing.assert_allclose(stats.rstd, expected.rstd, rtol=3e-7)


# --- NaN and Inf ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@small_cases
def test_not_finite_values_stay_inside_their_statistic(case, value, backend):
    arrays = case.arrays()
    position = tuple(n // 2 for n in case.shape)
    clean = run_oracle(case, arrays)
    arrays["x"][position] = value
    with np.errstate(invalid="ignore"):
        expected = run_oracle(case, arrays)
    spoiled = ~np.isclose(expected.y, clean.y, rtol=1e-9, atol=1e-9)
    assert spoiled.any()
    assert not spoiled.all()
    running = pick(arrays, "running_mean", "running_var")
    y, *_, stats = run(case, arrays, return_stats=True, backend=backend)
    assert_values_close(y[~spoiled], clean.y[~spoiled])
    np.testing.assert_allclose(y[spoiled], expected.y[spoiled], rtol=3e-6, atol=3e-6)
    assert_values_close(stats.rstd, expected.rstd)
    for name, got in running.items():
        finite = np.isfinite(getattr(expected, name))
        assert (np.isfinite(got) == finite).all()
        assert_values_close(got[finite], getattr(expected, name)[finite])


@pytest.mark.parametrize("spoil", ["x", "grad_y"])
@small_cases
def test_nan_stays_inside_its_statistic_in_backward(case, spoil, backend):
    arrays, grad_y = case.arrays(), case.grad_y()
    position = tuple(n // 2 for n in case.shape)
    (arrays["x"] if spoil == "x" else grad_y)[position] = np.nan
    expected = run_oracle_backward(case, arrays, grad_y)
    assert any(np.isnan(gradient).any() for gradient in expected if gradient is not None)
    assert not np.isnan(expected[0]).all()
    # NaN compares equal to NaN here, and to nothing else
    assert_gradients_close(run_backward(case, arrays, grad_y, backend=backend), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_passes_through_activations(activation, dtype, backend):
    x = np.array([[1], [np.nan], [-1]] * 11, dtype)
    y = cpunorm.batch_norm(
        x, np.zeros(1, dtype), np.ones(1, dtype), activation=activation, backend=backend
    )
    assert (np.isnan(y) == np.isnan(x)).all()


@pytest.mark.parametrize(
    ("activation", "limits"),
    [(None, (-np.inf, np.inf)), ("relu", (0, np.inf)), ("sigmoid", (0, 1)), ("tanh", (-1, 1))],
)
def test_infinities_pass_through_activations(activation, limits, backend):
    x = np.array([[-np.inf], [np.inf]] * 9, "float32")
    y = cpunorm.batch_norm(
        x, np.zeros(1, "float32"), np.ones(1, "float32"), activation=activation, backend=backend
    )
    # exp ends where float32 does, if not at zero
    assert_close(y, np.array([[limits[0]], [limits[1]]] * 9), 1e-37)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
def test_activations_are_accurate_where_they_are_small(activation, backend):
    """Relative to the value itself, not to 1 + |value|, near zero; float32's own grain."""
    x = np.concatenate([-np.logspace(-30, -1, 60), np.logspace(-30, -1, 60)]).astype("float32")
    zeros, ones = np.zeros(1, "float32"), np.ones(1, "float32")
    y = cpunorm.batch_norm(x[:, None], zeros, ones, eps=0.0, activation=activation, backend=backend)
    expected = reference.ACTIVATIONS[activation](x.astype("float64"))
    np.testing.assert_allclose(y[:, 0], expected, rtol=1e-6)


@all_cases
def test_stats_are_as_good_as_the_values(case, backend):
    """A mean of 10⁴ is right to float32's last bit, rstd to a few."""
    arrays = with_offset(case, 1e4)
    expected, stats = run_oracle(case, arrays), statistics(case, arrays, backend=backend)
    if stats.mean is not None:
        np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-7)
    # after an addition x is a sum in float32 and not in float64
    np.testing.assert_allclose(stats.rstd, expected.rstd, rtol=1e-3 if case.adds else 1e-6)


def test_denormals_survive(backend):
    """A library linked with -ffast-math would have the whole process flush them to zero."""
    tiny = np.array([1e-40], "float32")
    cpunorm.layer_norm(np.ones((64, 1024), "float32"), 1024, backend=backend)
    assert (tiny * np.float32(0.5) > 0).all()
