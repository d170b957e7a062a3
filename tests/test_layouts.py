"""Any layout is read where it lies: dense ones keep their strides, the others give C order."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest

import cpunorm

from .cases import SMALL_CASES, Case
from .support import (
    assert_gradients_close,
    assert_values_close,
    first,
    permuted,
    pick,
    read_only,
    real_strides,
    reversed_in_memory,
    run,
    run_backward,
    run_oracle,
    run_oracle_backward,
    spread,
    statistics,
    unaligned,
)


def nhwc_strides(a):
    """Shape NCHW, channels last in memory: what torch calls channels_last."""
    return permuted(a, (0, *range(2, a.ndim), 1))


def memmapped(a):
    """Plain memory under another class."""
    return a.copy().view(np.memmap)


def sliced(axis):
    """A part of a larger array: gaps along `axis`."""

    def place(a):
        part = tuple(slice(n) for n in a.shape)
        return np.concatenate([a, a], axis=axis if a.ndim > 1 else 0)[part]

    return place


DENSE = {
    "C order": np.ascontiguousarray,
    "F order": np.asfortranarray,
    "NHWC strides": nhwc_strides,
    "first axes swapped": lambda a: permuted(a, (1, 0, *range(2, a.ndim))),
    "last axis first": lambda a: permuted(a, (a.ndim - 1, *range(a.ndim - 1))),
    "read-only": read_only,
    "memmap": memmapped,
}
OTHER = {
    "every other element": spread,
    "a slice of axis 1": sliced(1),
    "a slice of the last axis": sliced(-1),
    "negative strides": reversed_in_memory,
    "last axis reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
}


def lay(place, a):
    """Place an array of any rank: a vector as a row."""
    return place(a) if a.ndim > 1 else place(a[None])[0]


def writeable(a):
    """The array, or a copy of it that may be written."""
    return a if a.flags.writeable else a.copy()


PLACES = {**DENSE, **OTHER, "unaligned": unaligned}
places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
small_cases = pytest.mark.parametrize("case", SMALL_CASES, ids=str)

# Every operation on four axes, as (N, C, H, W) or rows of it.
SHAPE = (2, 6, 5, 3)
FOUR_AXES = (
    Case("batch_norm", SHAPE, {"training": True, "layout": "NCHW"}),
    Case("batch_norm", SHAPE, {"training": False, "layout": "NCHW"}),
    Case("instance_norm", SHAPE, {"layout": "NCHW"}),
    Case("group_norm", SHAPE, {"num_groups": 2, "layout": "NCHW"}),
    Case("group_norm", SHAPE, {"num_groups": 3, "layout": "NHWC"}),
    Case("layer_norm", SHAPE, {"normalized_shape": (5, 3), "axis": None}),
    Case("layer_norm", SHAPE, {"normalized_shape": 6, "axis": 1}),
    Case("layer_norm", SHAPE, {"normalized_shape": (3, 2), "axis": (3, 0)}),
    Case("add_rms_norm", SHAPE, {"normalized_shape": (5, 6), "axis": (2, 1)}),
)


@places
@small_cases
def test_values(case, place, backend):
    arrays = case.arrays(residual=case.is_channel_op)
    expected = run_oracle(case, arrays).y
    for names in ({"x"}, set(arrays) - {"x"}, set(arrays)):
        lying = {name: lay(place, a) if name in names else a for name, a in arrays.items()}
        running = pick(lying, "running_mean", "running_var")
        if not case.is_frozen:  # then they are written
            running = {name: writeable(a) for name, a in running.items()}
        y = first(run(case, {**lying, **running}, backend=backend))
        assert_values_close(y, expected)


@places
@small_cases
def test_gradients(case, place, backend):
    arrays, grad_y = case.arrays(), case.grad_y()
    expected = run_oracle_backward(case, arrays, grad_y)
    stats = statistics(case, arrays, backend=backend)
    lying_stats = cpunorm.Stats(*(None if s is None else lay(place, s) for s in stats))
    lying = {**arrays, "x": place(arrays["x"])}
    lying_grad_y = place(grad_y)
    for a, g, s in (
        (lying, grad_y, stats),
        (arrays, lying_grad_y, stats),
        (lying | {"weight": lay(place, arrays["weight"])}, lying_grad_y, lying_stats),
    ):
        assert_gradients_close(run_backward(case, a, g, s, backend=backend), expected)


@places
@pytest.mark.parametrize("case", [c for c in SMALL_CASES if not c.is_channel_op], ids=str)
def test_grad_sum(case, place, backend):
    arrays, grad_y = case.arrays(), case.grad_y()
    grad_sum = np.random.default_rng(5).normal(1, 2, case.shape).astype("float32")
    expected = run_oracle_backward(case, arrays, grad_y, grad_sum=grad_sum)
    gradients = run_backward(case, arrays, grad_y, grad_sum=place(grad_sum), backend=backend)
    assert_gradients_close(gradients, expected)


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
@pytest.mark.parametrize("case", FOUR_AXES, ids=str)
def test_every_permutation_keeps_its_strides(case, order, backend):
    arrays, grad_y = case.arrays(), case.grad_y()
    lying = {**arrays, "x": permuted(arrays["x"], order)}
    expected, gradients = run_oracle(case, arrays), run_oracle_backward(case, arrays, grad_y)
    stats = statistics(case, lying, backend=backend)
    y = run(case, lying, backend=backend)
    for result in y if case.adds else (y,):
        assert result.strides == lying["x"].strides
    assert_values_close(first(y), expected.y)
    assert_values_close(stats.rstd, expected.rstd)
    got = run_backward(case, lying, permuted(grad_y, order), stats, backend=backend)
    assert_gradients_close(got, gradients)
    if not case.adds:  # otherwise the sum is x, and NumPy has laid it
        assert got.x.strides == lying["x"].strides


@pytest.mark.parametrize(
    "shape", [(1, 6, 5, 3), (2, 1, 5, 3), (2, 6, 1, 1), (2, 6, 1, 3), (2, 6, 5, 1)]
)
@pytest.mark.parametrize("case", FOUR_AXES[:5], ids=str)
def test_axes_of_length_one_lie_anywhere(case, shape, backend):
    """In a dense array their strides mean nothing, and NumPy and torch set them differently."""
    groups = {"num_groups": 1} if case.op == "group_norm" else {}
    case = Case(case.op, shape, {**case.kwargs, **groups})
    if case.op == "instance_norm" and shape[2:] == (1, 1):
        case = Case(case.op, shape, {**case.kwargs, "use_input_stats": False})
    arrays, grad_y = case.arrays(), case.grad_y()
    expected, gradients = run_oracle(case, arrays), run_oracle_backward(case, arrays, grad_y)
    for order in permutations(range(4)):
        lying = {**arrays, "x": permuted(arrays["x"], order)}
        lying = {name: a.copy(order="K") for name, a in lying.items()}
        y = run(case, lying, backend=backend)
        assert real_strides(y) == real_strides(lying["x"])
        assert_values_close(y, expected.y)
        lying = {**arrays, "x": lying["x"]}
        assert_gradients_close(run_backward(case, lying, grad_y, backend=backend), gradients)


@pytest.mark.parametrize("place", DENSE.values(), ids=DENSE)
@small_cases
def test_dense_arrays_keep_their_strides(case, place, backend):
    arrays = case.arrays()
    arrays["x"] = place(arrays["x"])
    y = first(run(case, arrays, backend=backend))
    assert real_strides(y) == real_strides(arrays["x"])
    assert type(y) is np.ndarray


@pytest.mark.parametrize("place", OTHER.values(), ids=OTHER)
@small_cases
def test_other_arrays_give_c_order(case, place, backend):
    arrays = case.arrays()
    arrays["x"] = place(arrays["x"])
    if arrays["x"].flags.c_contiguous:
        pytest.skip("this slice of this shape is dense")
    result = run(case, arrays, backend=backend)
    for y in result if case.adds else (result,):
        assert y.flags.c_contiguous


@small_cases
def test_broadcast_input(case, backend):
    """Axes of stride 0 repeat the values; the result has memory of its own."""
    arrays, grad_y = case.arrays(), case.grad_y()
    repeated = arrays["x"][:1, ..., :1]
    lying = {**arrays, "x": np.broadcast_to(repeated, case.shape)}
    dense = {**arrays, "x": np.ascontiguousarray(lying["x"])}
    # a statistic over equal values has rstd near 1/√eps: keep that out of this test
    options = {"eps": 0.5}
    y = first(run(case, lying, backend=backend, **options))
    assert_values_close(y, run_oracle(case, arrays | {"x": dense["x"]}, **options).y)
    assert y.flags.c_contiguous
    stats = statistics(case, case.arrays() | {"x": dense["x"]}, backend=backend, **options)
    got = run_backward(case, lying, np.broadcast_to(grad_y[:1], case.shape), stats, backend=backend)
    repeated_grad_y = np.repeat(grad_y[:1], len(grad_y), axis=0)
    expected = run_oracle_backward(
        case, case.arrays() | {"x": dense["x"]}, repeated_grad_y, **options
    )
    assert_gradients_close(got, expected)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_stats_of_permuted_input_are_in_logical_order(order, backend):
    x = np.random.default_rng(0).normal(2, 1, (2, 3, 4, 5))
    x = np.array(x, order=order)
    _, stats = cpunorm.layer_norm(x, (3, 5), axis=(1, 3), return_stats=True, backend=backend)
    np.testing.assert_allclose(stats.mean, x.mean(axis=(1, 3)), rtol=1e-12)
    _, stats = cpunorm.group_norm(x, 3, return_stats=True, backend=backend)
    np.testing.assert_allclose(stats.mean, x.mean(axis=(2, 3)), rtol=1e-12)


BIG = (4, 32, 40, 41)
IN_PLACE = (
    (Case("batch_norm", BIG, {"training": True, "layout": "NCHW"}), nhwc_strides),
    (Case("batch_norm", BIG, {"training": False, "layout": "NCHW"}), nhwc_strides),
    (Case("instance_norm", BIG, {"layout": "NCHW"}), nhwc_strides),
    (Case("group_norm", BIG, {"num_groups": 8, "layout": "NCHW"}), nhwc_strides),
    (Case("batch_norm", BIG, {"training": True, "layout": "NCHW"}), np.ascontiguousarray),
    (
        Case("group_norm", (4, 40, 41, 32), {"num_groups": 2, "layout": "NHWC"}),
        np.ascontiguousarray,
    ),
    (Case("layer_norm", BIG, {"normalized_shape": 32, "axis": 1}), np.ascontiguousarray),
    (Case("rms_norm", BIG, {"normalized_shape": 32, "axis": 1}), nhwc_strides),
    (Case("layer_norm", BIG, {"normalized_shape": (40, 41), "axis": None}), np.ascontiguousarray),
    (Case("layer_norm", BIG, {"normalized_shape": (41, 40), "axis": (3, 2)}), np.asfortranarray),
)


@pytest.mark.parametrize(
    ("case", "place"), IN_PLACE, ids=[f"{c}-{p.__name__}" for c, p in IN_PLACE]
)
def test_nothing_is_copied(case, place, backend):
    """What NumPy allocates in a call, sums of blocks for instance, is no copy of x or grad_y."""
    if backend == "numpy":
        pytest.skip("plain NumPy needs its temporaries")
    arrays, grad_y = case.arrays(), place(case.grad_y())
    arrays["x"] = place(arrays["x"])
    out = np.empty_like(arrays["x"])
    stats = statistics(case, arrays, backend=backend)

    def backward():
        run_backward(case, arrays, grad_y, stats, backend=backend)

    def forward():
        run(case, arrays, out=out, backend=backend)

    x = arrays["x"].nbytes
    for call, allowed in ((forward, x // 2), (backward, x + x // 2)):
        call()
        tracemalloc.start()
        call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < allowed
