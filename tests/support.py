"""What every test file needs: how to call an operation and its oracle, and how close is close."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

import cpunorm
from cpunorm import reference

from .cases import Case

AVAILABLE = cpunorm.available_backends()
DTYPES = ("float32", "float64")
HALF_DTYPES = ("float16", "bfloat16")

FLOAT16, BFLOAT16 = np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)

# |got - oracle| <= tolerance·(1 + |oracle|), and half an ulp where got has 16 bits: those results
# are computed like those of float32, and rounded once.
VALUE_TOLERANCE = {np.dtype("float64"): 1e-12}
GRADIENT_TOLERANCE = {np.dtype("float64"): 1e-11}
for dtype in (np.dtype("float32"), FLOAT16, BFLOAT16):
    VALUE_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype] = 3e-6, 3e-5
HALF_ULP = {FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}


# --- Comparing -----------------------------------------------------------------------------------


def assert_close(got, expected, tolerance):
    """|got - expected| <= tolerance·(1 + |expected|) everywhere, and the same shape."""
    assert got.shape == np.shape(expected)
    rtol = tolerance + HALF_ULP.get(got.dtype, 0.0)
    np.testing.assert_allclose(got.astype("float64"), expected, rtol=rtol, atol=tolerance)


def assert_values_close(got, expected):
    assert_close(got, expected, VALUE_TOLERANCE[got.dtype])


def assert_gradients_close(got, expected):
    """All three gradients, None where the oracle has none."""
    for gradient, wanted in zip(got, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            assert_close(gradient, wanted, GRADIENT_TOLERANCE[gradient.dtype])


def assert_same_bits(got, expected):
    """Two results, arrays or None or tuples of them, are the same to the last bit."""
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)
    elif expected is None:
        assert got is None
    else:
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert got.tobytes() == expected.tobytes()


def numeric_gradient(loss: Callable[[], float], array: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of `loss` by each element of `array`, which is moved in place."""
    gradient = np.empty_like(array)
    for i in np.ndindex(array.shape):
        here = array[i]
        array[i] = here + h
        above = loss()
        array[i] = here - h
        below = loss()
        array[i] = here
        gradient[i] = (above - below) / (2 * h)
    return gradient


# --- Calling -------------------------------------------------------------------------------------


def pick(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: arguments[name] for name in names if name in arguments}


def copies(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in arrays.items()}


def arguments(case: Case, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward pass is called with; batch norm alone has to be told of no statistics."""
    required = {"running_mean": None, "running_var": None} if case.op == "batch_norm" else {}
    return {**required, **case.kwargs, **arrays, **options}


def run(case: Case, arrays: Mapping[str, Any], **options: Any) -> Any:
    """The public function of the case on these arrays."""
    return getattr(cpunorm, case.op)(**arguments(case, arrays, options))


def run_oracle(case: Case, arrays: Mapping[str, Any], **options: Any) -> reference.Forward:
    return getattr(reference, case.op)(**arguments(case, arrays, options))


def first(result: Any) -> np.ndarray:
    """The y of a forward pass, whatever else came with it."""
    return result[0] if isinstance(result, tuple) else result


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


# --- Memory --------------------------------------------------------------------------------------


def real_strides(array: np.ndarray) -> tuple[int, ...]:
    """The strides that mean something: those of axes longer than one."""
    pairs = zip(array.strides, array.shape, strict=True)
    return tuple(stride for stride, size in pairs if size > 1)


def permuted(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """The same values with axes lying in memory in `order`, outermost first."""
    return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))


def spread(array: np.ndarray) -> np.ndarray:
    """The same values as every other element, along each axis, of a larger array."""
    wide = np.full([2 * n + 1 for n in array.shape], 7, array.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def reversed_in_memory(array: np.ndarray) -> np.ndarray:
    """The same values behind negative strides."""
    backwards = tuple(slice(None, None, -1) for _ in array.shape)
    return array[backwards].copy()[backwards]


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same values at an address that is no multiple of their size."""
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy(order="K")
    copy.flags.writeable = False
    return copy


# --- Commands ------------------------------------------------------------------------------------


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """What is started inside ends by Ctrl-C, even if we are a job in the background of a script.

    Such a job is started with the signal ignored, and hands that on.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
