"""The same input gives the same bits, whatever the number of threads and wherever it lies."""

import numpy as np
import pytest

import cpunorm

from .cases import CASES, SMALL_CASES, SMALL_IMAGES, channel_cases, row_cases
from .support import (
    DTYPES,
    HALF_DTYPES,
    assert_same_bits,
    copies,
    pick,
    run,
    run_backward,
    statistics,
)

# Large enough for more than one thread: 64 KiB and above. Some are kept small, for many runs.
THREADED_CASES = [c for c in CASES if np.prod(c.shape) >= 2**14]
# As many units as threads, or nearly: where the way of sharing the work changes with their number.
FEW_UNITS = [
    c
    for shape, groups in (((9, 3, 3960), (1, 3)), ((2, 3, 66000), (3,)), ((3, 8, 65, 16), (2,)))
    for c in channel_cases(shape, groups)
]
# Groups whose planes fill no vectors of sums: what is beside them changes with who is dealt what.
ODD_GROUPS = [
    c
    for shape, groups in (
        ((8, 80, 64), (8,)),
        ((16, 80, 36), (8,)),
        ((64, 96, 16), (8,)),
        ((1, 1290, 64), (30,)),
        ((170, 7, 99), ()),
    )
    for c in channel_cases(shape, groups)
]
# Rows of whole vectors, of which some are left when they are taken together.
ROWS_ONE_BY_ONE = [*row_cases((2, 2, 65), 2, 0), *row_cases((2, 5, 65), 5, 1)]
REPEATED_CASES = [
    *SMALL_CASES,
    *SMALL_IMAGES[::2],
    *[c for c in THREADED_CASES if np.prod(c.shape) < 2**17][::3],
]


def everything(case, arrays, grad_y, backend):
    """All that forward and backward give, running statistics included, which are put back."""
    before = copies(pick(arrays, "running_mean", "running_var"))
    stats = statistics(case, arrays, backend=backend)
    gradients = run_backward(case, arrays, grad_y, stats, backend=backend)
    result = run(case, arrays, backend=backend)
    running = tuple(arrays[name].copy() for name in before)
    for name, array in before.items():
        arrays[name][...] = array
    return (*(result if case.adds else (result,)), stats, gradients, running)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [*THREADED_CASES, *FEW_UNITS, *ODD_GROUPS, *SMALL_IMAGES], ids=str)
def test_any_number_of_threads(case, dtype, backend, restore_threads):
    arrays, grad_y = case.arrays(dtype), case.grad_y(dtype)
    cpunorm.set_num_threads(1)
    expected = everything(case, arrays, grad_y, backend)
    for threads in (2, 3, 5):
        cpunorm.set_num_threads(threads)
        assert_same_bits(everything(case, arrays, grad_y, backend), expected)


def at_offset(array, count):
    """The same values, `count` elements after where NumPy would have put them."""
    buffer = np.empty(array.size + count, array.dtype)
    view = buffer[count:].reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("case", REPEATED_CASES, ids=str)
def test_any_address(case, backend):
    """Neither the inputs nor what the kernels allocate begin where it suits a vector."""
    arrays, grad_y = case.arrays(), case.grad_y()
    expected = everything(case, arrays, grad_y, backend)
    rng, kept = np.random.default_rng(0), []
    for count in (1, 3, 8, 0, 5, 16):
        kept += [np.empty(size) for size in rng.integers(1, 3000, 3)]  # moves the heap about
        moved = {name: at_offset(a, count) for name, a in arrays.items()}
        got = everything(case, moved, at_offset(grad_y, count), backend)
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", (*DTYPES, *HALF_DTYPES))
@pytest.mark.parametrize("case", [*SMALL_CASES, *ROWS_ONE_BY_ONE], ids=str)
def test_what_else_is_wanted_changes_no_bits_of_a_gradient(case, dtype, backend):
    arrays, grad_y = case.arrays(dtype), case.grad_y().astype(dtype)
    stats = statistics(case, arrays, backend=backend)
    every = run_backward(case, arrays, grad_y, stats, backend=backend)
    for need in ((True, False, False), (False, True, True)):
        some = run_backward(case, arrays, grad_y, stats, backend=backend, need=need)
        for wanted, one, all_ in zip(need, some, every, strict=True):
            if wanted and all_ is not None:
                assert_same_bits(one, all_)
            else:
                assert one is None
