"""The same input gives the same bits: whatever the threads, the moment, the address, the caller."""

import numpy as np
import pytest

import cpunorm

from .cases import CASES, SMALL_CASES
from .support import assert_same_bits, copies, run, run_backward, statistics

# Large enough for more than one thread: 64 KiB and above.
THREADED_CASES = [c for c in CASES if np.prod(c.shape) >= 2**14]


def everything(case, arrays, grad_y, backend):
    """All that forward and backward give, running statistics included."""
    arrays = copies(arrays)
    stats = statistics(case, arrays, backend=backend)
    gradients = run_backward(case, arrays, grad_y, stats, backend=backend)
    result = run(case, arrays, backend=backend)
    running = tuple(arrays.get(name) for name in ("running_mean", "running_var"))
    return (*(result if case.adds else (result,)), stats, gradients, running)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", THREADED_CASES, ids=str)
def test_any_number_of_threads(case, dtype, backend, restore_threads):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    cpunorm.set_num_threads(1)
    expected = everything(case, arrays, grad_y, backend)
    for threads in (2, 3):
        cpunorm.set_num_threads(threads)
        assert_same_bits(everything(case, arrays, grad_y, backend), expected)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_again_and_again(case, backend):
    arrays, grad_y = case.arrays(), case.grad_y()
    expected = everything(case, arrays, grad_y, backend)
    for _ in range(3):
        assert_same_bits(everything(case, arrays, grad_y, backend), expected)


def at_offset(array, count):
    """The same values, `count` elements after where NumPy would have put them."""
    buffer = np.empty(array.size + count, array.dtype)
    view = buffer[count:].reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("case", [*SMALL_CASES, *THREADED_CASES[::7]], ids=str)
def test_any_address(case, backend):
    """Vectors do not begin where the address suits them."""
    arrays, grad_y = case.arrays(), case.grad_y()
    expected = everything(case, arrays, grad_y, backend)
    for count in (1, 3, 8):
        moved = {name: at_offset(a, count) for name, a in arrays.items()}
        stats = statistics(case, moved, backend=backend)
        gradients = run_backward(case, moved, at_offset(grad_y, count), stats, backend=backend)
        result = run(case, moved, backend=backend)
        running = tuple(moved.get(name) for name in ("running_mean", "running_var"))
        got = (*(result if case.adds else (result,)), stats, gradients, running)
        assert_same_bits(got, expected)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_neighbours_do_not_matter(case, backend):
    """Each statistic is computed for itself: a batch of one gives what it gives in a batch."""
    alone_means_the_same = case.is_frozen or (
        case.op in ("instance_norm", "group_norm") or case.kwargs.get("normalized_shape") == 35
    )
    if not alone_means_the_same:
        pytest.skip("the batch shares statistics, or D is not the last axis")
    arrays = case.arrays(running=False)
    arrays = {name: a for name, a in arrays.items()}
    whole = run(case, arrays, backend=backend)
    whole = whole[0] if case.adds else whole
    one = {name: a[:1] if a.shape == case.shape else a for name, a in arrays.items()}
    alone = run(case, one, backend=backend)
    alone = alone[0] if case.adds else alone
    np.testing.assert_allclose(alone, whole[:1], rtol=1e-6, atol=1e-6)
