"""An x of zero size gives an empty y, Stats of zeros, zero gradients, and no complaint."""

import numpy as np
import pytest

import cpunorm

from .cases import LAYOUTS, Case, in_layout, row_cases
from .support import DTYPES, HALF_DTYPES, assert_same_bits, copies, run, run_backward, statistics

# (N, C, *spatial), and whether the channels can be grouped by two
SHAPES = ((0, 4), (0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 0), (3, 0), (2, 0, 3, 3), (0, 0), (0, 4, 0))
MODES = (
    ("batch_norm", {"training": True}),
    ("batch_norm", {"training": False}),
    ("instance_norm", {"use_input_stats": True}),
    ("instance_norm", {"use_input_stats": False}),
    ("group_norm", {"num_groups": 2}),
)
CASES = (
    *(
        Case(op, in_layout(shape, layout), {**kwargs, "layout": layout})
        for shape in SHAPES
        for layout in LAYOUTS
        for op, kwargs in MODES
    ),
    *row_cases((0, 4), 4),
    *row_cases((2, 0), 0),
    *row_cases((0, 0), 0),
    *row_cases((0,), 0),
    *row_cases((0, 1), 1),
    *row_cases((2, 0, 3), (0, 3)),
    *row_cases((0, 6, 2, 2), 6, 1),
    *row_cases((2, 6, 0, 2), 6, 1),
    *row_cases((2, 0, 2, 2), 0, 1),
    *row_cases((2, 6, 0), (6, 2), (1, 0)),
)
cases = pytest.mark.parametrize("case", CASES, ids=str)


def assert_zeros(array, shape):
    assert array.shape == shape
    assert not array.any()


@cases
def test_forward(case, backend_or_auto):
    for dtype in (*DTYPES, *HALF_DTYPES):
        arrays = case.arrays(dtype, residual=case.is_channel_op)
        before = copies(arrays)
        result = run(case, arrays, backend=backend_or_auto)
        for y in result if case.adds else (result,):
            assert y.shape == case.shape
            assert y.dtype == dtype
        for name, array in arrays.items():
            assert_same_bits(array, before[name])


@cases
def test_stats(case):
    arrays = case.arrays()
    stats = statistics(case, arrays)
    if case.is_frozen:
        np.testing.assert_array_equal(stats.mean, arrays["running_mean"])
        return
    assert_zeros(stats.rstd, case.stats_shape)
    assert (stats.mean is None) == case.is_rms
    if not case.is_rms:
        assert_zeros(stats.mean, case.stats_shape)


@cases
def test_backward(case, backend_or_auto):
    for dtype in (*DTYPES, *HALF_DTYPES):
        arrays = case.arrays(dtype)
        gradients = run_backward(case, arrays, case.grad_y(dtype), backend=backend_or_auto)
        assert gradients.x.shape == case.shape
        assert_zeros(gradients.weight, case.parameter_shape)
        assert (gradients.bias is None) == case.is_rms
        if not case.is_rms:
            assert_zeros(gradients.bias, case.parameter_shape)
        for gradient in gradients[: 2 if case.is_rms else 3]:
            assert gradient.dtype == dtype


@cases
def test_out(case):
    arrays = case.arrays()
    out = np.empty(case.shape, "float32")
    result = run(case, arrays, out=out)
    assert (result[0] if case.adds else result) is out


@pytest.mark.parametrize("training", [False, True])
def test_a_vector_without_values_is_a_batch_without_channels(training, backend_or_auto):
    """As torch has it."""
    x, none = np.zeros(0, "float32"), np.zeros(0, "float32")
    y = cpunorm.batch_norm(x, none, none, training=training, backend=backend_or_auto)
    assert y.shape == (0,)


@cases
def test_wrong_arguments_are_wrong_all_the_same(case):
    arrays = case.arrays()
    with pytest.raises(ValueError, match="eps"):
        run(case, arrays, eps=-1.0)
    arrays["weight"] = np.ones((7, 7), "float32")
    with pytest.raises(ValueError, match="weight"):
        run(case, arrays)
