"""What every test file needs: how to call an operation and its oracle, and how close is close."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import cpunorm
from cpunorm import reference

from .cases import Case

DTYPES = (np.float32, np.float64)

# |got - oracle| <= tolerance·(1 + |oracle|)
VALUE_TOLERANCE = {np.dtype(np.float32): 3e-6, np.dtype(np.float64): 1e-12}
GRADIENT_TOLERANCE = {np.dtype(np.float32): 3e-5, np.dtype(np.float64): 1e-11}


def assert_close(got, expected, tolerance):
    """|got - expected| <= tolerance·(1 + |expected|) everywhere, and the same shape."""
    assert got.shape == np.shape(expected)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def assert_values_close(got, expected):
    assert_close(got, expected, VALUE_TOLERANCE[got.dtype])


def assert_gradients_close(got, expected):
    """All three gradients, None where the oracle has none."""
    for gradient, wanted in zip(got, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            assert_close(gradient, wanted, GRADIENT_TOLERANCE[gradient.dtype])


def pick(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: arguments[name] for name in names if name in arguments}


def copies(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in arrays.items()}


def run(case: Case, arrays: Mapping[str, Any], **options: Any) -> Any:
    """The public function of the case on these arrays."""
    return getattr(cpunorm, case.op)(**arrays, **{**case.kwargs, **options})


def run_oracle(case: Case, arrays: Mapping[str, Any], **options: Any) -> reference.Forward:
    return getattr(reference, case.op)(**arrays, **{**case.kwargs, **options})


def statistics(case: Case, arrays: Mapping[str, Any], **options: Any) -> cpunorm.Stats:
    """The Stats of the forward pass; running statistics are left as they are."""
    running = copies(pick(arrays, "running_mean", "running_var"))
    return run(case, {**arrays, **running}, return_stats=True, **options)[-1]


def backward_of(case: Case) -> str:
    return case.op.removeprefix("add_") + "_backward"


def backward_arrays(case: Case, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of the backward pass: after `add_*`, the sum is the x of backward."""
    x = arrays["x"] + arrays["residual"] if case.adds else arrays["x"]
    return {"x": x, **pick(arrays, "weight")}


def run_backward(
    case: Case, arrays: Mapping[str, Any], grad_y: np.ndarray, stats: Any = None, **options: Any
) -> cpunorm.Gradients:
    """The public backward function; its Stats come from the forward pass unless given."""
    if stats is None:
        stats = statistics(case, arrays, **pick(options, "backend"))
    function = getattr(cpunorm, backward_of(case))
    given = backward_arrays(case, arrays)
    return function(grad_y=grad_y, stats=stats, **given, **{**case.kwargs, **options})


def run_oracle_backward(
    case: Case, arrays: Mapping[str, Any], grad_y: np.ndarray, **options: Any
) -> reference.Gradient:
    function = getattr(reference, backward_of(case))
    given = backward_arrays(case, arrays)
    if case.is_frozen:
        given |= pick(arrays, "running_mean", "running_var")
    return function(grad_y=grad_y, **given, **{**case.kwargs, **options})


def real_strides(array: np.ndarray) -> tuple[int, ...]:
    """The strides that mean something: those of axes longer than one."""
    return tuple(
        stride for stride, size in zip(array.strides, array.shape, strict=True) if size > 1
    )


def is_c_ordered(array: np.ndarray) -> bool:
    return bool(array.flags.c_contiguous)
