"""Forward passes give the oracle's values, for every case, option and spelling of the arguments."""

from itertools import product

import numpy as np
import pytest

import cpunorm
from cpunorm.backends import ACTIVATIONS

from .cases import CASES, SMALL_CASES, Case
from .support import DTYPES, assert_same_bits, assert_values_close, first, run, run_oracle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, dtype, backend_or_auto):
    arrays = case.arrays(dtype)
    expected = run_oracle(case, arrays)
    running = {name: a.copy() for name, a in arrays.items() if name.startswith("running")}
    y, *total, stats = run(case, {**arrays, **running}, return_stats=True, backend=backend_or_auto)
    assert_values_close(y, expected.y)
    assert_values_close(stats.rstd, expected.rstd)
    assert (stats.mean is None) == case.is_rms
    if not case.is_rms:
        assert_values_close(stats.mean, expected.mean)
    assert len(total) == case.adds
    if case.adds:
        assert_values_close(total[0], expected.total)
    for name, got in running.items():
        assert_values_close(got, getattr(expected, name))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.is_channel_op], ids=str)
def test_every_option_over_channels(case, activation, backend_or_auto):
    for dtype, weight, bias, residual in product(DTYPES, *[(False, True)] * 3):
        arrays = case.arrays(dtype, weight=weight, bias=bias, residual=residual, running=False)
        y = run(case, arrays, activation=activation, backend=backend_or_auto)
        assert_values_close(y, run_oracle(case, arrays, activation=activation).y)


@pytest.mark.parametrize("case", [c for c in SMALL_CASES if not c.is_channel_op], ids=str)
def test_every_option_over_axes(case, backend_or_auto):
    for dtype, weight, bias in product(DTYPES, (False, True), (False, True)):
        arrays = case.arrays(dtype, weight=weight, bias=bias)
        y = first(run(case, arrays, backend=backend_or_auto))
        assert_values_close(y, run_oracle(case, arrays).y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_far_from_zero(activation, dtype, backend):
    # Statistics frozen at mean 0, var 1: what reaches the activation is x itself.
    x = np.array([-1e4, -100, -88, -20, -9, -6, -1e-3, 0, 1e-3, 6, 9, 20, 88, 100, 1e4], dtype)
    frozen = {"running_mean": np.zeros(1, dtype), "running_var": np.ones(1, dtype)}
    case = Case("batch_norm", (15, 1), {"layout": "NCHW", "eps": 0.0, "activation": activation})
    arrays = {"x": x.reshape(15, 1), **frozen}
    assert_values_close(run(case, arrays, backend=backend), run_oracle(case, arrays).y)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.5, 3, np.float32(0.25)])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_eps(case, eps, backend):
    arrays = case.arrays(running=False)
    expected = run_oracle(case, arrays, eps=float(eps))
    y, *_, stats = run(case, arrays, eps=eps, return_stats=True, backend=backend)
    assert_values_close(y, expected.y)
    assert_values_close(stats.rstd, expected.rstd)


@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.op != "batch_norm"], ids=str)
def test_eps_may_be_zero(case, backend):
    arrays = case.arrays(running=False)
    expected = run_oracle(case, arrays, eps=0.0)
    assert_values_close(first(run(case, arrays, eps=0.0, backend=backend)), expected.y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.is_rms], ids=str)
def test_eps_none_is_the_machine_epsilon(case, dtype, backend):
    # Small enough that eps weighs as much as the mean square does.
    scale = np.sqrt(np.finfo(dtype).eps)
    arrays = {name: (a * scale).astype(dtype) for name, a in case.arrays(dtype).items()}
    y = first(run(case, arrays, eps=None, backend=backend))
    assert_values_close(y, run_oracle(case, arrays).y)
    assert_same_bits(y, first(run(case, arrays, backend=backend)))


def test_arguments_in_the_order_of_torch(backend):
    rng = np.random.default_rng(3)
    x = rng.normal(1, 2, (4, 6, 5)).astype("float32")
    mean, var, weight, bias = rng.uniform(1, 2, (4, 6)).astype("float32")
    scale, shift = rng.uniform(1, 2, (2, 5)).astype("float32")
    both = {"weight": weight, "bias": bias, "backend": backend}
    with cpunorm.use_backend(backend):
        for got, named in (
            (
                cpunorm.batch_norm(x, mean.copy(), var.copy(), weight, bias, True, 0.3, 0.1),
                cpunorm.batch_norm(
                    x, running_mean=mean.copy(), running_var=var.copy(),
                    training=True, momentum=0.3, eps=0.1, **both,
                ),
            ),
            (
                cpunorm.instance_norm(x, mean, var, weight, bias, False, 0.3, 0.1),
                cpunorm.instance_norm(
                    x, running_mean=mean, running_var=var, use_input_stats=False, eps=0.1, **both
                ),
            ),
            (
                cpunorm.group_norm(x, 3, weight, bias, 0.1),
                cpunorm.group_norm(x, num_groups=3, eps=0.1, **both),
            ),
            (
                cpunorm.layer_norm(x, 5, scale, shift, 0.1),
                cpunorm.layer_norm(x, normalized_shape=5, weight=scale, bias=shift, eps=0.1),
            ),
            (
                cpunorm.rms_norm(x, 5, scale, 0.1),
                cpunorm.rms_norm(x, normalized_shape=5, weight=scale, eps=0.1),
            ),
        ):  # fmt: skip
            assert_same_bits(got, named)


@pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.is_channel_op], ids=str)
def test_layout_has_two_spellings(case, backend):
    word = {"NCHW": "channels_first", "NHWC": "channels_last"}[case.kwargs["layout"]]
    arrays = case.arrays(running=False)
    expected = run(case, arrays, backend=backend)
    assert_same_bits(run(case, arrays, layout=word, backend=backend), expected)


@pytest.mark.parametrize("spelling", [6, np.int64(6), (6,), [6], (np.int32(6),), np.array([6])])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_normalized_shape_has_many_spellings(op, spelling, backend):
    x = Case(op, (4, 6), {"normalized_shape": 6}).arrays()["x"]
    function = getattr(cpunorm, op)
    assert_same_bits(function(x, spelling, backend=backend), function(x, 6, backend=backend))


@pytest.mark.parametrize("axis", [1, -2, (1,), [1], np.int64(1), (-2,)])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_axis_has_many_spellings(op, axis, backend):
    x = Case(op, (2, 3, 4), {"normalized_shape": 3}).arrays()["x"]
    function = getattr(cpunorm, op)
    expected = function(x, (3,), axis=(1,), backend=backend)
    assert_same_bits(function(x, 3, axis=axis, backend=backend), expected)


def test_one_value_per_statistic_gives_the_bias(backend):
    x = np.full((4, 3), 5.5, "float32")
    bias = np.array([1, -2, 3], "float32")
    y, stats = cpunorm.group_norm(x, 3, None, bias, return_stats=True, backend=backend)
    assert_same_bits(y, np.tile(bias, (4, 1)))
    assert_same_bits(stats.mean, x)
    y = cpunorm.layer_norm(x[..., None], 1, None, bias[:1], backend=backend)
    assert_same_bits(y, np.full((4, 3, 1), bias[0]))
