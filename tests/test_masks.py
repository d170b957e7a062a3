"""A mask leaves positions out: of statistics, gradients, and the result, which is zero there."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cpunorm
from cpunorm import _masked, _no_runs, reference

from .cases import Case, in_layout
from .support import (
    HALF_DTYPES,
    assert_close,
    assert_gradients_close,
    assert_same_bits,
    assert_values_close,
    copies,
    numeric_gradient,
    permuted,
    run,
    run_backward,
    run_oracle,
    run_oracle_backward,
    spread,
)

N, C, H, W = 3, 6, 5, 7


def cases(shape=(N, C, H, W)):
    for layout in ("NCHW", "NHWC"):
        lain = in_layout(shape, layout)
        for training in (True, False):
            yield Case("batch_norm", lain, {"training": training, "layout": layout})
            yield Case("instance_norm", lain, {"use_input_stats": training, "layout": layout})
        yield Case("group_norm", lain, {"num_groups": 2, "layout": layout})
        yield Case("group_norm", lain, {"num_groups": 1, "layout": layout})
    for op in ("layer_norm", "rms_norm"):
        yield Case(op, shape, {"normalized_shape": shape[-1]})
        yield Case(op, shape, {"normalized_shape": shape[1], "axis": 1})
        yield Case(op, shape, {"normalized_shape": shape[-2:]})
        yield Case(op, shape, {"normalized_shape": shape[1:]})
        yield Case(op, shape, {"normalized_shape": (*shape[2:], shape[1]), "axis": (2, 3, 1)})


CASES = tuple(cases())
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
TRAINED = [c for c in CASES if c.takes_running_statistics and not c.is_frozen]


def channel_axis(case):
    if case.is_channel_op:
        return case.channel_axis % len(case.shape)
    return np.atleast_1d(case.kwargs.get("axis", -1))[-1] % len(case.shape)


def positions(case):
    return tuple(np.delete(case.shape, channel_axis(case)))


def random_mask(case, share=0.6):
    return np.random.default_rng(3).random(positions(case)) < share


def padded_mask(case):
    """The second of the axes of positions, filled to another length in each image."""
    shape = positions(case)
    lengths = np.array([shape[1], shape[1] // 2, 0])[:, None]
    padded = np.arange(shape[1]) < lengths
    return np.broadcast_to(padded.reshape(*padded.shape, *[1] * (len(shape) - 2)), shape).copy()


MASKS = {"random": random_mask, "padded": padded_mask}
all_masks = pytest.mark.parametrize("mask_of", MASKS.values(), ids=MASKS)


def on_x(case, mask):
    """The mask against x, channels and all."""
    return np.broadcast_to(np.expand_dims(mask, channel_axis(case)), case.shape)


def poisoned(case, arrays, mask, value=np.nan):
    """The same arrays, with something bad wherever nothing counts."""
    arrays = copies(arrays)
    for name in ("x", "residual", "grad_y"):
        if name in arrays:
            arrays[name][~on_x(case, mask)] = value
    return arrays


# --- Values and gradients ------------------------------------------------------------------------


@all_masks
@all_cases
def test_against_the_oracle(case, mask_of, backend):
    """With NaN wherever nothing counts."""
    mask = mask_of(case)
    arrays = poisoned(case, case.arrays(residual=case.is_channel_op), mask)
    options = {"activation": "sigmoid"} if case.is_channel_op else {}
    with np.errstate(invalid="ignore"):
        expected = run_oracle(case, arrays, mask=mask, **options)
    y = run(case, arrays, mask=mask, backend=backend, **options)
    assert_values_close(y, expected.y)
    assert not y[~on_x(case, mask)].any()
    if case.takes_running_statistics:
        for name in ("running_mean", "running_var"):
            assert_values_close(arrays[name], getattr(expected, name))


@all_masks
@all_cases
def test_stats_and_gradients_against_the_oracle(case, mask_of, backend):
    mask = mask_of(case)
    arrays, grad_y = case.arrays(), case.grad_y()
    arrays = poisoned(case, {**arrays, "grad_y": grad_y}, mask)
    grad_y = arrays.pop("grad_y")
    expected = run_oracle_backward(case, arrays, grad_y, mask=mask)
    forward = run_oracle(case, arrays, mask=mask)
    _, stats = run(case, copies(arrays), mask=mask, return_stats=True, backend=backend)
    assert_values_close(stats.rstd, forward.rstd)
    if stats.mean is not None:
        assert_values_close(stats.mean, forward.mean)
    gradients = run_backward(case, arrays, grad_y, stats, mask=mask, backend=backend)
    assert_gradients_close(gradients, expected)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@all_cases
def test_halves(case, dtype):
    mask = random_mask(case)
    arrays = case.arrays(dtype, "float32")
    expected = run_oracle(case, arrays, mask=mask)
    assert_values_close(run(case, arrays, mask=mask), expected.y)


@pytest.mark.parametrize("case", [c for c in cases((2, 4, 3, 3)) if not c.is_frozen], ids=str)
def test_gradients_against_finite_differences(case):
    """In float64, of the oracle and of the library; a weighted sum of y is differentiated."""
    mask = random_mask(case)
    arrays, grad_y = case.arrays("float64", running=False), case.grad_y("float64")

    def loss():
        return float((run_oracle(case, arrays, mask=mask).y * grad_y).sum())

    names = ("x", "weight") if case.is_rms else ("x", "weight", "bias")
    numeric = [numeric_gradient(loss, arrays[name]) for name in names]
    _, stats = run(case, arrays, mask=mask, return_stats=True)
    for gradients in (
        run_oracle_backward(case, arrays, grad_y, mask=mask),
        run_backward(case, arrays, grad_y, stats, mask=mask),
    ):
        for gradient, wanted in zip(gradients, numeric, strict=False):
            np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-7)


@all_masks
@all_cases
def test_channel_by_channel(case, mask_of, backend, monkeypatch):
    """Little is gathered at a time: what is more is solved in parts."""
    monkeypatch.setattr(_masked, "PART_BYTES", 1)
    mask, arrays, grad_y = mask_of(case), case.arrays(), case.grad_y()
    y, stats = run(case, copies(arrays), mask=mask, return_stats=True, backend=backend)
    assert_values_close(y, run_oracle(case, copies(arrays), mask=mask).y)
    gradients = run_backward(case, arrays, grad_y, stats, mask=mask, backend=backend)
    assert_gradients_close(gradients, run_oracle_backward(case, arrays, grad_y, mask=mask))


@all_masks
@all_cases
def test_where_nothing_was_compiled(case, mask_of, monkeypatch):
    """The bits of the compiled way to gather."""
    mask, arrays, grad_y = mask_of(case), case.arrays(), case.grad_y()
    results = []
    for module in (_masked, _no_runs):
        monkeypatch.setattr(_masked, "Runs", module.Runs)
        y, stats = run(case, copies(arrays), mask=mask, return_stats=True, backend="numpy")
        gradients = run_backward(case, arrays, grad_y, stats, mask=mask, backend="numpy")
        results.append((y, tuple(stats), tuple(gradients)))
    assert_same_bits(results[1], results[0])


# --- What a mask means ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm", "group_norm", "layer_norm"])
def test_a_padded_batch_gives_what_its_images_give(op, layout, lengths, seed):
    """Sequences of several lengths, padded with NaN, beside the same ones without padding."""
    rng = np.random.default_rng(seed)
    images = [rng.normal(3, 2, (4, length)) for length in lengths]
    x = np.full((len(lengths), 4, 9), np.nan)
    for padded, image in zip(x, images, strict=True):
        padded[:, : image.shape[1]] = image
    mask = np.arange(9) < np.array(lengths)[:, None]
    weight, bias = rng.normal(1, 1, (2, 4))

    def call(x, **options):
        if op == "layer_norm":
            return cpunorm.layer_norm(x, 4, weight, bias, axis=1, **options)
        if op == "group_norm":
            return cpunorm.group_norm(x, 2, weight, bias, **options)
        if op == "instance_norm":
            return cpunorm.instance_norm(x, None, None, weight, bias, **options)
        return cpunorm.batch_norm(x, None, None, weight, bias, training=True, **options)

    lain = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) if layout == "NHWC" else x
    y = call(lain, mask=mask)
    if op == "batch_norm":
        together = np.concatenate(images, axis=1)[None]
        alone = (
            call(together)[0] if together.shape[-1] > 1 else np.tile(bias[:, None], sum(lengths))
        )
    else:
        parts = [call(i[None])[0] if i.shape[1] > 1 else i - i + bias[:, None] for i in images]
        if op == "layer_norm":
            parts = [call(i[None])[0] for i in images]
        elif op == "group_norm":
            parts = [call(i[None])[0] if i.size else i for i in images]
        alone = np.concatenate(parts, axis=1)
    got = np.concatenate([a[:, :n] for a, n in zip(y, lengths, strict=True)], axis=1)
    np.testing.assert_allclose(got, alone, rtol=1e-12, atol=1e-12)
    assert not y[~np.broadcast_to(mask[:, None], y.shape)].any()


@all_cases
def test_a_mask_that_leaves_nothing_out(case, backend):
    """The bits of the call without one."""
    arrays = case.arrays()
    everything = np.ones(positions(case), bool)
    with_mask = run(case, copies(arrays), mask=everything, return_stats=True, backend=backend)
    assert_same_bits(with_mask, run(case, copies(arrays), return_stats=True, backend=backend))


@all_cases
def test_a_mask_that_leaves_nothing(case, backend):
    """Zeros, and running statistics as they were."""
    arrays, mask = case.arrays(), np.zeros(positions(case), bool)
    before = copies(arrays)
    y, stats = run(case, arrays, mask=mask, return_stats=True, backend=backend)
    assert not y.any()
    if not case.is_frozen:
        assert not stats.rstd.any()
    gradients = run_backward(case, arrays, case.grad_y(), stats, mask=mask, backend=backend)
    assert not any(g.any() for g in gradients if g is not None)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_one_value_comes_out_as_the_bias_and_moves_no_statistics(case, backend):
    mask = np.zeros(positions(case), bool)
    mask[0].flat[3] = True
    arrays = case.arrays()
    before = copies(arrays)
    y, stats = run(case, arrays, mask=mask, return_stats=True, backend=backend)
    assert_same_bits(y[on_x(case, mask)], arrays["bias"])
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
    gradients = run_backward(case, arrays, case.grad_y(), stats, mask=mask, backend=backend)
    assert_close(gradients.x, np.zeros(case.shape), 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
@all_cases
def test_what_does_not_count_changes_no_bit(case, value, backend):
    mask = random_mask(case)
    clean = {**case.arrays(), "grad_y": case.grad_y()}
    results = []
    for arrays in (copies(clean), poisoned(case, clean, mask, value)):
        grad_y = arrays.pop("grad_y")
        y, stats = run(case, arrays, mask=mask, return_stats=True, backend=backend)
        gradients = run_backward(case, arrays, grad_y, stats, mask=mask, backend=backend)
        results.append((y, tuple(stats), tuple(gradients)))
    assert_same_bits(results[1], results[0])


# --- Memory, threads, layers ---------------------------------------------------------------------


@pytest.mark.parametrize("lay", [np.asfortranarray, spread, lambda a: a[::-1].copy()[::-1]])
@all_cases
def test_any_strides(case, lay, backend):
    mask = random_mask(case)
    arrays = case.arrays()
    plain = run(case, copies(arrays), mask=mask, backend=backend)
    lain = {name: lay(a) for name, a in arrays.items()}
    y = run(case, lain, mask=lay(mask), out=lay(np.ones(case.shape, "float32")), backend=backend)
    assert_values_close(y, plain.astype("float64"))


@all_cases
def test_in_place(case, backend):
    for mask in (random_mask(case), padded_mask(case)):
        arrays = case.arrays()
        expected = run(case, copies(arrays), mask=mask, backend=backend)
        y = run(case, arrays, mask=mask, out=arrays["x"], backend=backend)
        assert y is arrays["x"]
        assert_same_bits(y, expected)


def test_permuted_memory_stays_permuted():
    x = permuted(np.random.default_rng(0).normal(size=(N, C, H, W)), (0, 2, 3, 1))
    y = cpunorm.group_norm(x, 2, mask=np.eye(H, W, dtype=bool)[None].repeat(N, 0))
    assert y.strides == x.strides


@pytest.mark.parametrize("case", list(cases((4, 32, 24, 24))), ids=str)
def test_the_number_of_threads_changes_no_bit(case, backend, restore_threads):
    mask, arrays, grad_y = random_mask(case), case.arrays(), case.grad_y()
    results = []
    for threads in (1, 2, 5):
        cpunorm.set_num_threads(threads)
        y, stats = run(case, copies(arrays), mask=mask, return_stats=True, backend=backend)
        gradients = run_backward(case, arrays, grad_y, stats, mask=mask, backend=backend)
        results.append((y, tuple(stats), tuple(gradients)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_mean_of_ten_thousand():
    x = np.random.default_rng(0).normal(1e4, 1, (4, 6, 33, 31)).astype("float32")
    mask = np.random.default_rng(1).random((4, 33, 31)) < 0.5
    y = cpunorm.batch_norm(x, None, None, training=True, mask=mask)
    assert_close(y, reference.batch_norm(x, None, None, training=True, mask=mask).y, 2e-3)


@pytest.mark.parametrize(
    "layer",
    [
        cpunorm.BatchNorm(C),
        cpunorm.InstanceNorm(C, affine=True),
        cpunorm.GroupNorm(2, C),
        cpunorm.LayerNorm(C, axis=1),
        cpunorm.RMSNorm(C, axis=1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers(layer):
    """A layer's mask goes with its x, back as well."""
    rng = np.random.default_rng(0)
    x, grad_y = rng.normal(2, 3, (2, N, C, H, W)).astype("float32")
    mask = rng.random((N, H, W)) < 0.5
    spoiled = np.where(mask[:, None], x, np.float32(np.nan))
    for mode in (layer.train(), layer.eval()):
        y = mode(x, mask=mask)
        assert not y.swapaxes(0, 1)[:, ~mask].any()
    y = layer.train()(spoiled, mask=mask)
    grad_x = layer.backward(grad_y)
    assert np.isfinite(y).all()
    assert np.isfinite(grad_x).all()
    assert not grad_x.swapaxes(0, 1)[:, ~mask].any()


# --- Errors --------------------------------------------------------------------------------------


def test_out_may_not_be_the_mask():
    """Memory that is both: an array of bools over the bytes of y."""
    x = np.ones((2, 3, 8), "float64")
    out = np.zeros_like(x)
    mask = out.view(bool)[:, 0, :8]
    with pytest.raises(ValueError, match="out must not overlap mask"):
        cpunorm.group_norm(x, 1, mask=mask, out=out)


@pytest.mark.parametrize("backward", [False, True])
@all_cases
def test_wrong_masks(case, backward):
    case = replace(case)
    arrays, grad_y = case.arrays(), case.grad_y()
    before = copies(arrays)
    shape = positions(case)
    for mask, error, text in (
        (np.ones(shape), TypeError, "mask must have dtype bool"),
        (np.ones(shape, "uint8"), TypeError, "mask must have dtype bool"),
        (np.ones(shape, bool).tolist(), TypeError, "mask must be a numpy.ndarray"),
        (np.ones(case.shape, bool), ValueError, "mask must have shape"),
        (np.ones(shape[:-1], bool), ValueError, "mask must have shape"),
    ):
        with pytest.raises(error, match=text):
            if backward:
                stats = run(case, copies(arrays), return_stats=True)[-1]
                run_backward(case, arrays, grad_y, stats, mask=mask)
            else:
                run(case, arrays, mask=mask)
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
