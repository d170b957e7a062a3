"""Backward passes give the oracle's gradients and those of finite differences."""

from itertools import product

import numpy as np
import pytest

import cpunorm

from .cases import CASES, SMALL_CASES, TINY_CASES
from .support import (
    DTYPES,
    assert_close,
    assert_gradients_close,
    assert_same_bits,
    first,
    numeric_gradient,
    pick,
    run,
    run_backward,
    run_oracle_backward,
    statistics,
)

FROZEN_CASES = [c for c in SMALL_CASES if c.is_frozen]
AXIS_CASES = [c for c in SMALL_CASES if not c.is_channel_op]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, dtype, backend_or_auto):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    gradients = run_backward(case, arrays, grad_y, backend=backend_or_auto)
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y))


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_finite_differences(case, backend):
    """The backward functions differentiate the forward functions, eps and all: no oracle here."""
    arrays, grad_y = case.arrays("float64"), case.grad_y("float64")
    frozen = case.is_frozen
    inputs = arrays if frozen else {n: a for n, a in arrays.items() if "running" not in n}
    options = {"eps": 0.3, "backend": backend}

    def loss():
        return float((first(run(case, inputs, **options)) * grad_y).sum())

    stats = statistics(case, inputs, **options)
    gradients = run_backward(case, inputs, grad_y, stats, backend=backend)
    checked = pick(inputs, "x", "weight", "bias")
    assert len(checked) == (2 if case.is_rms else 3)
    for array, gradient in zip(checked.values(), gradients, strict=False):
        # h² times the third derivative, and rounding over h
        assert_close(gradient, numeric_gradient(loss, array), 1e-7)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_need(case, backend_or_auto):
    arrays, grad_y = case.arrays(), case.grad_y()
    stats = statistics(case, arrays, backend=backend_or_auto)
    everything = run_oracle_backward(case, arrays, grad_y)
    for need in product((False, True), repeat=3):
        expected = [g if wanted else None for g, wanted in zip(everything, need, strict=True)]
        gradients = run_backward(case, arrays, grad_y, stats, need=need, backend=backend_or_auto)
        assert_gradients_close(gradients, expected)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_without_weight(case, backend_or_auto):
    """The gradients of weight and bias are there all the same, in the Stats' dtype."""
    arrays, grad_y = case.arrays(weight=False), case.grad_y()
    gradients = run_backward(case, arrays, grad_y, backend=backend_or_auto)
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y))
    assert gradients.weight.dtype == np.float32


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("case", AXIS_CASES, ids=str)
def test_grad_sum(case, weight, backend_or_auto):
    arrays, grad_y = case.arrays(weight=weight), case.grad_y()
    grad_sum = np.random.default_rng(5).normal(1, 2, case.shape).astype("float32")
    gradients = run_backward(case, arrays, grad_y, grad_sum=grad_sum, backend=backend_or_auto)
    expected = run_oracle_backward(case, arrays, grad_y, grad_sum=grad_sum)
    assert_gradients_close(gradients, expected)


@pytest.mark.parametrize("case", [c for c in TINY_CASES if c.adds], ids=str)
def test_grad_sum_by_finite_differences(case, backend):
    """Both summands have the gradient of the sum, which y and the sum itself send back."""
    arrays, grad_y = case.arrays("float64"), case.grad_y("float64")
    grad_sum = np.random.default_rng(5).normal(1, 2, case.shape)

    def loss():
        y, total = run(case, arrays, backend=backend)
        return float((y * grad_y).sum() + (total * grad_sum).sum())

    gradients = run_backward(case, arrays, grad_y, grad_sum=grad_sum, backend=backend)
    for name in ("x", "residual"):
        assert_close(gradients.x, numeric_gradient(loss, arrays[name]), 1e-7)


@pytest.mark.parametrize("case", FROZEN_CASES, ids=str)
def test_frozen_statistics_are_constants(case, backend):
    """The gradient is weight·rstd·grad_y, and a shift of x moves the weight's gradient alone."""
    arrays, grad_y = case.arrays("float64"), case.grad_y("float64")
    stats = statistics(case, arrays, backend=backend)
    gradients = run_backward(case, arrays, grad_y, stats, backend=backend)
    axis = case.channel_axis
    scale = arrays["weight"] / np.sqrt(arrays["running_var"] + 1e-5)
    scaled = np.moveaxis(np.moveaxis(grad_y, axis, -1) * scale, -1, axis)
    assert_close(gradients.x, scaled, 1e-12)
    shifted = {**arrays, "x": arrays["x"] + 1}
    of_shifted = run_backward(case, shifted, grad_y, stats, backend=backend)
    assert_same_bits(of_shifted.x, gradients.x)
    assert_close(of_shifted.weight, gradients.weight + gradients.bias * stats.rstd, 1e-11)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_stats_hold_eps(case, backend):
    """Backward takes no eps: what it needs of it is in rstd."""
    arrays, grad_y = case.arrays(), case.grad_y()
    stats = statistics(case, arrays, eps=2.0, backend=backend)
    gradients = run_backward(case, arrays, grad_y, stats, backend=backend)
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y, eps=2.0))


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_any_pair_will_do_as_stats(case, backend):
    """Stats is a tuple: one that has been saved and loaded has lost its name."""
    arrays, grad_y = case.arrays(), case.grad_y()
    stats = statistics(case, arrays, backend=backend)
    named = run_backward(case, arrays, grad_y, stats, backend=backend)
    assert_same_bits(run_backward(case, arrays, grad_y, tuple(stats), backend=backend), named)


def test_the_gradient_of_x_is_orthogonal_to_what_normalization_takes_away(backend):
    """Neither a shift of x nor, with eps = 0, a scaling of it changes y."""
    rng = np.random.default_rng(0)
    x, grad_y = rng.normal(3, 2, (2, 5, 40))
    _, stats = cpunorm.layer_norm(x, 40, eps=0.0, return_stats=True, backend=backend)
    gradient = cpunorm.layer_norm_backward(grad_y, x, 40, stats, backend=backend).x
    assert_close(gradient.sum(axis=1), np.zeros(5), 1e-12)
    assert_close((gradient * x).sum(axis=1), np.zeros(5), 1e-12)
    assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("weight", [None, np.float32(1.37)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_units_of_one_value_pass_no_gradient(layout, weight, backend):
    """The terms cancel while rstd is large: nothing may be left."""
    rng = np.random.default_rng(0)
    x = np.full((64, 1, 1, 3) if layout == "NHWC" else (64, 3, 1, 1), 100, "float32")
    grad_y = rng.normal(0, 2, x.shape).astype("float32")
    weight = None if weight is None else np.full(3, weight)
    _, stats = cpunorm.group_norm(x, 3, weight, layout=layout, return_stats=True, backend=backend)
    grads = cpunorm.group_norm_backward(grad_y, x, 3, stats, weight, layout=layout, backend=backend)
    assert not grads.x.any()
    assert not grads.weight.any()


def test_constant_rows_with_a_constant_gradient(backend):
    x, grad_y = np.ones((4, 64), "float32"), np.full((4, 64), 2.7, "float32")
    _, stats = cpunorm.layer_norm(x, 64, return_stats=True, backend=backend)
    grads = cpunorm.layer_norm_backward(grad_y, x, 64, stats, backend=backend)
    assert np.abs(grads.x).max() <= 3e-5
