"""What is written: out, sum_out and the running statistics; nothing else, and nothing twice."""

import numpy as np
import pytest

import cpunorm

from .cases import SMALL_CASES
from .support import (
    assert_close,
    assert_same_bits,
    assert_values_close,
    copies,
    first,
    permuted,
    reversed_in_memory,
    run,
    run_backward,
    run_oracle,
    spread,
    statistics,
)

small_cases = pytest.mark.parametrize("case", SMALL_CASES, ids=str)
residual_cases = pytest.mark.parametrize(
    "case", [c for c in SMALL_CASES if c.is_channel_op or c.adds], ids=str
)
add_cases = pytest.mark.parametrize("case", [c for c in SMALL_CASES if c.adds], ids=str)
LAYINGS = {
    "C order": np.ascontiguousarray,
    "F order": np.asfortranarray,
    "channels last": lambda a: permuted(a, (0, *range(2, a.ndim), 1)),
    "gaps": spread,
    "reversed": reversed_in_memory,
}
layings = pytest.mark.parametrize("lay", LAYINGS.values(), ids=LAYINGS)


def inputs(case):
    """Everything the operation takes, without running statistics that would be written."""
    return case.arrays(residual=case.is_channel_op, running=False)


def own(lying, array):
    """The laid array itself where it has memory of its own, a copy where it is `array`."""
    return lying.copy() if np.may_share_memory(lying, array) else lying


# --- Nothing else --------------------------------------------------------------------------------


@small_cases
def test_forward_writes_no_input(case, backend_or_auto):
    arrays = inputs(case)
    before = copies(arrays)
    run(case, arrays, backend=backend_or_auto)
    for array in arrays.values():
        array.flags.writeable = False
    run(case, arrays, backend=backend_or_auto)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])


@small_cases
def test_backward_writes_no_input(case, backend_or_auto):
    arrays, grad_y = case.arrays(), case.grad_y()
    stats = statistics(case, arrays, backend=backend_or_auto)
    for need in ((True, True, True), (True, False, False), (False, True, True)):
        kept = (*arrays.values(), grad_y, *(s for s in stats if s is not None))
        before = [a.copy() for a in kept]
        run_backward(case, arrays, grad_y, stats, need=need, backend=backend_or_auto)
        for array, was in zip(kept, before, strict=True):
            array.flags.writeable = False
            assert_same_bits(array, was)


@small_cases
def test_results_have_memory_of_their_own(case, backend_or_auto):
    arrays = inputs(case)
    result = run(case, arrays, return_stats=True, backend=backend_or_auto)
    made = [*result[:-1], *(s for s in result[-1] if s is not None)]
    for i, one in enumerate(made):
        for other in (*arrays.values(), *made[:i]):
            assert not np.shares_memory(one, other)
        assert one.flags.writeable


# --- out -----------------------------------------------------------------------------------------


@layings
@small_cases
def test_out(case, lay, backend_or_auto):
    """Whatever its strides; it is what is returned, and the gaps in it stay as they were."""
    arrays = inputs(case)
    out = lay(np.full(case.shape, np.nan, "float32"))
    y = first(run(case, arrays, out=out, backend=backend_or_auto))
    assert y is out
    assert_values_close(out, run_oracle(case, arrays).y)
    if lay is spread:
        whole = out.base.copy()
        whole[tuple(slice(1, None, 2) for _ in case.shape)] = 7
        assert (whole == 7).all()


@layings
@small_cases
def test_out_is_x(case, lay, backend_or_auto):
    arrays = inputs(case)
    expected = run_oracle(case, arrays)
    x = own(lay(arrays["x"]), arrays["x"])
    y = first(run(case, arrays | {"x": x}, out=x, backend=backend_or_auto))
    assert y is x
    assert_values_close(x, expected.y)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 7, 11, 13])
def test_out_is_x_of_groups_side_by_side(channels, backend_or_auto):
    """No vector ends where a group does: what one writes, the next must not have to read."""
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 24 * channels)).astype("float32")
    y = cpunorm.reference.group_norm(x, 24, layout="NHWC").y
    cpunorm.group_norm(x, 24, layout="NHWC", out=x, backend=backend_or_auto)
    assert_values_close(x, y)


@small_cases
def test_out_is_another_view_of_x(case, backend_or_auto):
    """The same memory with the same strides is x itself, whatever object it is."""
    arrays = inputs(case)
    expected = run_oracle(case, arrays)
    out = arrays["x"][...]
    run(case, arrays, out=out, backend=backend_or_auto)
    assert_values_close(arrays["x"], expected.y)


@layings
@residual_cases
def test_out_is_residual(case, lay, backend):
    arrays = inputs(case)
    expected = run_oracle(case, arrays)
    for lay_x in LAYINGS.values():
        residual = own(lay(arrays["residual"]), arrays["residual"])
        y = first(
            run(
                case, arrays | {"x": lay_x(arrays["x"]), "residual": residual}, out=residual,
                backend=backend,
            )
        )  # fmt: skip
        assert y is residual
        assert_values_close(residual, expected.y)


# --- sum_out -------------------------------------------------------------------------------------


@layings
@add_cases
def test_sum_out(case, lay, backend_or_auto):
    arrays = case.arrays()
    sum_out = lay(np.full(case.shape, np.nan, "float32"))
    y, total = run(case, arrays, sum_out=sum_out, backend=backend_or_auto)
    expected = run_oracle(case, arrays)
    assert total is sum_out
    assert_values_close(y, expected.y)
    assert_values_close(total, expected.total)


@pytest.mark.parametrize("target", ["x", "residual"])
@add_cases
def test_sum_out_is_an_input(case, target, backend_or_auto):
    """The residual stream of a transformer, kept in one array."""
    arrays = case.arrays()
    expected = run_oracle(case, arrays)
    y, total = run(case, arrays, sum_out=arrays[target], backend=backend_or_auto)
    assert total is arrays[target]
    assert_values_close(y, expected.y)
    assert_values_close(total, expected.total)


@pytest.mark.parametrize("swapped", [False, True])
@add_cases
def test_out_and_sum_out_are_the_two_inputs(case, swapped, backend_or_auto):
    arrays = case.arrays()
    expected = run_oracle(case, arrays)
    out, sum_out = (arrays[name] for name in (("residual", "x") if swapped else ("x", "residual")))
    run(case, arrays, out=out, sum_out=sum_out, backend=backend_or_auto)
    assert_values_close(out, expected.y)
    assert_values_close(sum_out, expected.total)


# --- Overlap -------------------------------------------------------------------------------------


def overlapping(case, dtype="float32"):
    """x inside a larger buffer, and views of the buffer that share some of its memory."""
    size = int(np.prod(case.shape))
    buffer = np.random.default_rng(0).normal(size=2 * size).astype(dtype)
    x = buffer[:size].reshape(case.shape)
    yield x, buffer[1 : size + 1].reshape(case.shape)
    yield x, buffer[size - 1 : 2 * size - 1].reshape(case.shape)
    yield x, x[::-1]
    yield x, x[..., ::-1]
    yield buffer[: 2 * size : 2].reshape(case.shape), buffer[:size].reshape(case.shape)


@small_cases
def test_partial_overlap_with_x_is_refused(case, backend_or_auto):
    for x, out in overlapping(case):
        arrays = inputs(case) | {"x": x}
        before = x.base.copy()
        with pytest.raises(ValueError, match=r"\bout\b.*overlap.*\bx\b"):
            run(case, arrays, out=out, backend=backend_or_auto)
        assert_same_bits(x.base, before)


@residual_cases
def test_partial_overlap_with_residual_is_refused(case, backend_or_auto):
    for residual, out in overlapping(case):
        arrays = inputs(case) | {"residual": residual}
        with pytest.raises(ValueError, match=r"\bout\b.*overlap.*\bresidual\b"):
            run(case, arrays, out=out, backend=backend_or_auto)


@small_cases
def test_overlap_with_parameters_and_running_statistics_is_refused(case, backend_or_auto):
    size = int(np.prod(case.shape))
    parameter_size = int(np.prod(case.parameter_shape))
    arrays = case.arrays()
    for name in set(arrays) - {"x", "residual"}:
        buffer = np.ones(size, "float32")
        parameter = buffer[-parameter_size:].reshape(case.parameter_shape)
        with pytest.raises(ValueError, match=rf"\bout\b.*overlap.*{name}"):
            run(
                case, arrays | {name: parameter}, out=buffer.reshape(case.shape),
                backend=backend_or_auto,
            )  # fmt: skip
        assert (buffer == 1).all()


@add_cases
def test_sum_out_must_not_overlap_out(case, backend_or_auto):
    arrays = case.arrays()
    size = int(np.prod(case.shape))
    buffer = np.zeros(size + 1, "float32")
    out, shifted = buffer[:size].reshape(case.shape), buffer[1:].reshape(case.shape)
    for sum_out in (out, shifted):
        with pytest.raises(ValueError, match=r"sum_out.*overlap.*out"):
            run(case, arrays, out=out, sum_out=sum_out, backend=backend_or_auto)
    assert not buffer.any()
    with pytest.raises(ValueError, match=r"sum_out.*overlap.*out"):
        run(case, arrays, out=arrays["x"], sum_out=arrays["x"], backend=backend_or_auto)


@small_cases
def test_out_that_overlaps_itself_is_refused(case, backend_or_auto):
    """Two elements in one place cannot both be written."""
    row = np.zeros(case.shape[1:], "float32")
    strides = (0, *row.strides)
    out = np.lib.stride_tricks.as_strided(row, case.shape, strides)
    with pytest.raises(ValueError, match=r"\bout\b"):
        run(case, inputs(case), out=out, backend=backend_or_auto)
    assert not row.any()


@small_cases
def test_interleaved_views_are_no_overlap(case, backend_or_auto):
    """Their bounds overlap, their elements do not."""
    buffer = np.zeros((*case.shape, 2), "float32")
    arrays = inputs(case)
    x, out = buffer[..., 0], buffer[..., 1]
    x[...] = arrays["x"]
    expected = run_oracle(case, arrays)
    run(case, arrays | {"x": x}, out=out, backend=backend_or_auto)
    assert_values_close(out, expected.y)
    assert_same_bits(x.copy(), arrays["x"])


@residual_cases
def test_inputs_may_overlap_each_other(case, backend_or_auto):
    """They are only read."""
    arrays = inputs(case)
    arrays |= {"residual": arrays["x"]}
    y = first(run(case, arrays, backend=backend_or_auto))
    assert_values_close(y, run_oracle(case, arrays).y)
    grad_y = arrays["x"]
    stats = statistics(case, arrays, backend=backend_or_auto)
    gradients = run_backward(case, arrays, grad_y, stats, backend=backend_or_auto)
    other = run_backward(case, arrays, grad_y.copy(), stats, backend=backend_or_auto)
    assert_close(gradients.x, other.x, 0)
