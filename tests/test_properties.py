"""Whatever shape, strides and values Hypothesis thinks of: the oracle's numbers, and identities."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cpunorm

from .cases import Case
from .support import (
    AVAILABLE,
    DTYPES,
    GRADIENT_TOLERANCE,
    VALUE_TOLERANCE,
    first,
    permuted,
    reversed_in_memory,
    run,
    run_backward,
    run_oracle,
    run_oracle_backward,
    spread,
    statistics,
)

backends = pytest.mark.parametrize("backend", AVAILABLE)
# Always the same examples, as many as a few seconds hold.
suite = settings(max_examples=60, deadline=None, derandomize=True, database=None)

sizes = st.one_of(st.integers(1, 5), st.sampled_from([7, 15, 16, 17, 31, 32, 33, 64, 67]))


@st.composite
def shapes(draw, least_rank=1, most=20_000):
    shape = tuple(draw(st.lists(sizes, min_size=least_rank, max_size=5)))
    assume(np.prod(shape) <= most)
    return shape


@st.composite
def channel_cases(draw):
    shape = draw(shapes(least_rank=2))
    layout = draw(st.sampled_from(["NCHW", "NHWC"]))
    channels = shape[1 if layout == "NCHW" else -1]
    per_channel = np.prod(shape) // channels
    modes = [
        ("batch_norm", {"training": False}),
        ("instance_norm", {"use_input_stats": False}),
        *(("group_norm", {"num_groups": g}) for g in range(1, channels + 1) if channels % g == 0),
    ]
    if per_channel > 1:
        modes.append(("batch_norm", {"training": True}))
    if per_channel // shape[0] > 1:
        modes.append(("instance_norm", {"use_input_stats": True}))
    op, kwargs = draw(st.sampled_from(modes))
    return Case(op, shape, {**kwargs, "layout": layout})


@st.composite
def axis_cases(draw):
    shape = draw(shapes())
    axes = draw(st.permutations(range(len(shape))))[: draw(st.integers(1, len(shape)))]
    axes = [a - draw(st.sampled_from([0, len(shape)])) for a in axes]
    op = draw(st.sampled_from(["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]))
    return Case(op, shape, {"normalized_shape": [shape[a] for a in axes], "axis": axes})


@st.composite
def layings(draw):
    """A function that lays an array in memory somehow."""
    seed = draw(st.integers(0, 119))
    kind = draw(st.sampled_from([None, spread, reversed_in_memory]))

    def lay(a):
        order = np.random.default_rng(seed).permutation(a.ndim)
        return (kind or np.asarray)(permuted(a, tuple(order)))

    return lay


cases = st.one_of(channel_cases(), axis_cases())
offsets = st.sampled_from([0.0, 0.5, -3.0, 100.0])


def drawn(case, dtype, offset):
    arrays = case.arrays(dtype)
    arrays["x"] += np.asarray(offset, dtype)
    if case.is_frozen:
        arrays["running_mean"] += np.asarray(offset, dtype)
    return arrays


def assert_close(got, expected, tolerance, conditioning):
    """The usual bound, times what the statistics of few values that lie close together amplify."""
    bound = tolerance * conditioning
    np.testing.assert_allclose(got, expected, rtol=bound, atol=bound)


@backends
@given(case=cases, dtype=st.sampled_from(DTYPES), offset=offsets, lay=layings())
@suite
def test_forward(backend, case, dtype, offset, lay):
    arrays = drawn(case, dtype, offset)
    expected = run_oracle(case, arrays)
    lying = {name: a.copy() for name, a in arrays.items()} | {"x": lay(arrays["x"])}
    y = first(run(case, lying, backend=backend))
    ulps = 1 + abs(offset) / 10  # of the mean, which is about offset
    conditioning = ulps * max(1, float(expected.rstd.max()))
    assert_close(y, expected.y, VALUE_TOLERANCE[y.dtype], conditioning)


@backends
@given(case=cases, dtype=st.sampled_from(DTYPES), lay=layings(), lay_grad=layings())
@suite
def test_backward(backend, case, dtype, lay, lay_grad):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    stats = statistics(case, arrays, backend=backend)
    lying = arrays | {"x": lay(arrays["x"])}
    gradients = run_backward(case, lying, lay_grad(grad_y), stats, backend=backend)
    conditioning = max(1, float(stats.rstd.max())) ** 2
    expected = run_oracle_backward(case, arrays, grad_y)
    for got, wanted in zip(gradients, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert_close(got, wanted, GRADIENT_TOLERANCE[got.dtype], conditioning)


@backends
@given(case=cases, lay=layings())
@suite
def test_in_place_is_as_good(backend, case, lay):
    arrays = case.arrays()
    expected = run_oracle(case, arrays)
    x = lay(arrays["x"]).view()
    y = first(run(case, arrays | {"x": x}, out=x, backend=backend))
    assert y is x
    conditioning = max(1, float(expected.rstd.max()))
    assert_close(y, expected.y, VALUE_TOLERANCE[y.dtype], conditioning)


@backends
@given(shape=shapes(least_rank=3))
@suite
def test_instance_norm_is_group_norm_with_a_group_per_channel(backend, shape):
    assume(np.prod(shape[2:]) > 1)
    x = np.random.default_rng(0).normal(1, 2, shape)
    weight, bias = np.random.default_rng(1).normal(1, 2, (2, shape[1]))
    instance = cpunorm.instance_norm(x, None, None, weight, bias, backend=backend)
    group = cpunorm.group_norm(x, shape[1], weight, bias, backend=backend)
    np.testing.assert_allclose(instance, group, rtol=1e-9, atol=1e-9)


@backends
@given(shape=shapes(least_rank=2))
@suite
def test_one_group_is_layer_norm_over_everything_but_the_batch(backend, shape):
    x = np.random.default_rng(0).normal(1, 2, shape)
    group = cpunorm.group_norm(x, 1, backend=backend)
    layer = cpunorm.layer_norm(x, shape[1:], backend=backend)
    np.testing.assert_allclose(group, layer, rtol=1e-9, atol=1e-9)


@backends
@given(shape=shapes(least_rank=2), axis=st.integers(0, 4))
@suite
def test_an_axis_is_a_trailing_one_moved(backend, shape, axis):
    axis %= len(shape)
    x = np.random.default_rng(0).normal(1, 2, shape)
    y = cpunorm.layer_norm(x, shape[axis], axis=axis, backend=backend)
    moved = cpunorm.layer_norm(np.moveaxis(x, axis, -1), shape[axis], backend=backend)
    np.testing.assert_allclose(y, np.moveaxis(moved, -1, axis), rtol=1e-9, atol=1e-9)


@backends
@given(shape=shapes(least_rank=2), scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
@suite
def test_scale_and_shift_of_x_cancel(backend, shape, scale, shift):
    """What normalization is for; with eps in proportion, exactly so."""
    x = np.random.default_rng(0).normal(1, 2, shape)
    y = cpunorm.layer_norm(x, shape[1:], eps=1e-3, backend=backend)
    moved = scale * x + shift
    again = cpunorm.layer_norm(moved, shape[1:], eps=1e-3 * scale**2, backend=backend)
    np.testing.assert_allclose(again, y, rtol=1e-9, atol=1e-9)
