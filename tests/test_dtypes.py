"""Results have x's dtype, statistics the accumulation dtype; nothing is converted silently."""

import numpy as np
import pytest

import cpunorm

from .cases import SMALL_CASES
from .support import DTYPES, pick, run, run_backward, statistics

small_cases = pytest.mark.parametrize("case", SMALL_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES)

WRONG_FOR_X = (
    *map(np.dtype, ("i4", "u1", "?", "O", "longdouble", "c8", "U8", "M8[s]")),
    np.dtype("float32").newbyteorder(),
)


@dtypes
@small_cases
def test_forward(case, dtype, backend_or_auto):
    arrays = case.arrays(dtype)
    *results, stats = run(case, arrays, return_stats=True, backend=backend_or_auto)
    assert len(results) == 1 + case.adds
    for y in results:
        assert type(y) is np.ndarray
        assert y.dtype == dtype
        assert y.shape == case.shape
    assert isinstance(stats, cpunorm.Stats)
    assert (stats.mean is None) == case.is_rms
    for statistic in stats if stats.mean is not None else stats[1:]:
        assert type(statistic) is np.ndarray
        assert statistic.dtype == dtype
    for name in ("running_mean", "running_var"):
        if name in arrays:
            assert arrays[name].dtype == dtype


@dtypes
@small_cases
def test_backward(case, dtype, backend_or_auto):
    for weight in (False, True):
        arrays, grad_y = case.arrays(dtype, weight=weight), case.grad_y(dtype)
        gradients = run_backward(case, arrays, grad_y, backend=backend_or_auto)
        assert isinstance(gradients, cpunorm.Gradients)
        assert gradients.x.shape == case.shape
        assert gradients.weight.shape == case.parameter_shape
        assert (gradients.bias is None) == case.is_rms
        for gradient in gradients[: 2 if case.is_rms else 3]:
            assert type(gradient) is np.ndarray
            assert gradient.dtype == dtype


@small_cases
def test_the_shapes_of_stats(case, backend_or_auto):
    stats = statistics(case, case.arrays(), backend=backend_or_auto)
    assert stats.rstd.shape == case.stats_shape
    assert stats.mean is None or stats.mean.shape == case.stats_shape


@small_cases
def test_stats_are_copies(case, backend):
    """With frozen statistics too: a later change of running_mean does not reach them."""
    arrays = case.arrays()
    running = pick(arrays, "running_mean", "running_var")
    _, *_, stats = run(case, arrays, return_stats=True, backend=backend)
    for statistic in stats:
        for array in running.values():
            assert statistic is None or not np.shares_memory(statistic, array)


@small_cases
def test_x_of_another_dtype(case, backend_or_auto):
    for dtype in WRONG_FOR_X:
        arrays = case.arrays() | {"x": np.ones(case.shape, dtype)}
        with pytest.raises(TypeError, match=r"\bx\b.*float32"):
            run(case, arrays, backend=backend_or_auto)


@dtypes
@small_cases
def test_everything_else_has_the_dtype_of_x(case, dtype, backend_or_auto):
    arrays = case.arrays(dtype, residual=case.is_channel_op)
    other = "float32" if dtype == "float64" else "float64"
    for name in set(arrays) - {"x"}:
        for wrong in (other, "int64", "float16"):
            with pytest.raises(TypeError, match=rf"{name}.*{dtype}.*{wrong}"):
                run(case, arrays | {name: arrays[name].astype(wrong)}, backend=backend_or_auto)


@dtypes
@small_cases
def test_everything_in_backward_has_the_dtype_of_x(case, dtype, backend_or_auto):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    other = "float32" if dtype == "float64" else "float64"
    stats = statistics(case, arrays, backend=backend_or_auto)
    wrong_weight = arrays | {"weight": arrays["weight"].astype(other)}
    wrong_rstd = cpunorm.Stats(stats.mean, stats.rstd.astype(other))
    for name, call in {
        "grad_y": (arrays, grad_y.astype(other), stats),
        "weight": (wrong_weight, grad_y, stats),
        "rstd": (arrays, grad_y, wrong_rstd),
    }.items():
        with pytest.raises(TypeError, match=rf"{name}.*{dtype}.*{other}"):
            run_backward(case, *call, backend=backend_or_auto)
