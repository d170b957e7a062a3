"""The front door: it answers the common case as the general way does, and declines the rest."""

import numpy as np
import pytest

import cpunorm
from cpunorm import _no_front, functional

from .cases import CASES, SMALL_CASES, Case
from .support import AVAILABLE, assert_same_bits, assert_values_close, first, run, run_oracle
from .test_determinism import everything

if "cython" not in AVAILABLE:
    pytest.skip("the compiled backend was not built", allow_module_level=True)

from cpunorm import _front

X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
W = np.ones(6, "float32")


@pytest.fixture
def answers(monkeypatch):
    """Whether each call since was answered at the front door."""
    seen = []

    class Watched:
        def __getattr__(self, name):
            function = getattr(_front, name)

            def watched(*args):
                result = function(*args)
                seen.append(result is not None)
                return result

            return watched

    monkeypatch.setattr(functional, "_front", Watched())
    return seen


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", [*SMALL_CASES, *CASES[::2]], ids=str)
def test_the_same_bits_as_the_general_way(case, dtype, monkeypatch):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    got = everything(case, arrays, grad_y, "cython")
    monkeypatch.setattr(functional, "_front", _no_front)
    assert_same_bits(got, everything(case, arrays, grad_y, "cython"))


@pytest.mark.skipif("numba" not in AVAILABLE, reason="Numba is not installed")
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_the_same_bits_by_numba(case, answers, monkeypatch):
    arrays, grad_y = case.arrays(), case.grad_y()
    got = everything(case, arrays, grad_y, "numba")
    assert all(answers)
    monkeypatch.setattr(functional, "_front", _no_front)
    assert_same_bits(got, everything(case, arrays, grad_y, "numba"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_common_calls_are_answered(case, dtype, answers):
    everything(case, case.arrays(dtype), case.grad_y(dtype), None)
    assert answers == [True] * 3


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_half_with_parameters_of_float32(case, answers):
    arrays = case.arrays("float16", "float32")
    expected = run_oracle(case, arrays)
    assert_values_close(first(run(case, arrays)), expected.y)
    assert answers == [True]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((X.T[:6], 4), {}),
        ((X[:, ::2], 3), {}),
        ((X, np.int64(6)), {}),
        ((X, [6]), {}),
        ((X, 6, None, None, 1), {}),
        ((X, 6, W[::-1]), {}),
        ((X, (6, 4)), {"axis": (1, 0)}),
        ((X, (4, 6)), {"axis": [0, 1]}),
        ((X, 4), {"axis": np.int64(0)}),
        ((X.reshape(2, 2, 2, 3), (2, 2)), {"axis": (0, 2)}),
        ((X, 6), {"backend": "numpy"}),
        ((X[:0], 6), {}),
        ((X, 6), {"out": np.empty((8, 6), "float32")[::2]}),
    ],
)
def test_what_is_not_common_is_declined(answers, arguments, options):
    cpunorm.layer_norm(*arguments, **options)
    assert answers == [False]


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4, 6), 0),
        ((4, 6), -2),
        ((4, 6), (-1,)),
        ((2, 3, 4, 5), (1, -2)),
        ((2, 3, 4, 5), (-4, 1)),
        ((2, 3, 4, 5), (0, 1, 2, 3)),
        ((2, 3, 1, 1), 1),
        ((2, 1, 4, 5), 1),
        ((1, 3, 1, 5), (1, 2)),
        ((2, 3, 4, 5, 2, 1, 2), (2, 3)),
    ],
)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_axes_that_follow_one_another(op, shape, axis, answers, monkeypatch):
    axes = (axis,) if isinstance(axis, int) else axis
    normalized = tuple(shape[a] for a in axes)
    case = Case(op, shape, {"normalized_shape": normalized, "axis": axis})
    arrays, grad_y = case.arrays(), case.grad_y()
    got = everything(case, arrays, grad_y, "cython")
    assert answers == [True] * 3
    monkeypatch.setattr(functional, "_front", _no_front)
    assert_same_bits(got, everything(case, arrays, grad_y, "cython"))


@pytest.mark.parametrize(
    ("normalized_shape", "axis"),
    [
        (6, 0),
        (6, 2),
        (6, -3),
        (6, 2**70),
        ((4, 6), (0,)),
        ((4, 6), (1, 2)),
        ((6, 4), (0, 1)),
        ((6, 6), (1, 1)),
        ((4, 6, 1), (0, 1, 2)),
        ((), ()),
        (6, True),
    ],
)
def test_axes_that_are_wrong_are_declined(normalized_shape, axis, answers):
    with pytest.raises((TypeError, ValueError)):
        cpunorm.layer_norm(X, normalized_shape, axis=axis)
    assert answers == [False]


def test_the_context_is_heeded(answers):
    with cpunorm.use_backend("numpy"):
        cpunorm.layer_norm(X, 6)
    with cpunorm.use_backend("cython"):
        cpunorm.layer_norm(X, 6)
    assert answers == [False, True]


def test_nothing_is_written_by_a_call_that_is_declined(answers):
    out = np.full_like(X, 7)
    for wrong in ({"eps": -1.0}, {"weight": W[:5]}, {"return_stats": 1}):
        with pytest.raises((TypeError, ValueError)):
            cpunorm.layer_norm(X, 6, out=out, **wrong)
    assert answers == [False] * 3
    assert (out == 7).all()
