"""Moments of parts, merged, are those of the whole."""

import pickle

import numpy as np
import pytest

import cpunorm
from cpunorm import Moments, reference

from .cases import LAYOUTS, in_layout
from .support import DTYPES, HALF_DTYPES, assert_close, assert_same_bits, assert_values_close

C = 5


def batch(dtype="float32", mean=3.0, layout="NCHW", images=40):
    shape = in_layout((images, C, 6, 7), layout)
    return np.random.default_rng(0).normal(mean, 2, shape).astype(dtype)


def whole(x, layout="NCHW", **options):
    """What one batch of everything leaves behind, by the oracle."""
    running = np.zeros(C), np.ones(C)
    forward = reference.batch_norm(
        x, *running, training=True, momentum=1.0, layout=layout, **options
    )
    return forward.running_mean, forward.running_var


@pytest.mark.parametrize("parts", [1, 2, 7, 40])
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_one_batch(dtype, layout, mean, parts, backend):
    x = batch(dtype, mean, layout)
    moments = Moments(C, layout=layout, backend=backend)
    for part in np.array_split(x, parts):
        moments.update(part)
    assert moments.count == x.size // C
    for got, expected in zip(moments.finalize(), whole(x, layout), strict=True):
        assert got.dtype == dtype
        assert_values_close(got, expected)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_halves_are_measured_in_float32(dtype):
    x = batch(dtype)
    moments = Moments(C)
    moments.update(x)
    for got, expected in zip(moments.finalize(), whole(x), strict=True):
        assert got.dtype == "float32"
        assert_values_close(got, expected)


def test_parts_far_apart():
    """The variance between parts counts, and one part of another size as much as it has values."""
    x = batch("float64")
    x[:10] += 100
    x[10:13] -= 1e4
    moments = Moments(C)
    for part in np.split(x, [10, 13]):
        moments.update(part)
    for got, expected in zip(moments.finalize(), whole(x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13)


def test_masks():
    x = batch()
    mask = np.random.default_rng(1).random((40, 6, 7)) < 0.5
    mask[10:20] = False
    spoiled = np.where(mask[:, None], x, np.float32(np.nan))
    moments = Moments(C)
    for part, counts in zip(np.split(spoiled, 4), np.split(mask, 4), strict=True):
        moments.update(part, mask=counts)
    assert moments.count == np.count_nonzero(mask)
    for got, expected in zip(moments.finalize(), whole(x, mask=mask), strict=True):
        assert_values_close(got, expected)


def test_merge_and_pickle():
    """Shares measured apart give what one object gives that sees them in turn."""
    x = batch()
    together, merged = Moments(C), Moments(C)
    for part in np.array_split(x, 5):
        together.update(part)
        share = Moments(C)
        share.update(part)
        assert merged.merge(pickle.loads(pickle.dumps(share))) is merged
    assert_same_bits(tuple(merged.finalize()), tuple(together.finalize()))


def test_the_wider_dtype_wins():
    moments, other = Moments(C), Moments(C)
    moments.update(batch("float16"))
    other.update(batch("float64"))
    assert moments.finalize().running_mean.dtype == "float32"
    assert moments.merge(other).finalize().running_mean.dtype == "float64"


def test_empty_parts_count_for_nothing():
    moments = Moments(C)
    moments.update(batch())
    before = moments.finalize()
    moments.update(np.empty((0, C, 6, 7), "float32"))
    moments.merge(Moments(C))
    assert_same_bits(tuple(moments.finalize()), tuple(before))
    assert_same_bits(tuple(Moments(C).merge(moments).finalize()), tuple(before))


def test_conventions():
    x = batch("float64", images=2)
    moments = Moments(C)
    moments.update(x)
    axes = (0, 2, 3)
    for convention, ddof in (("torch", 1), ("keras", 0), ("onnx", 0)):
        _, var = moments.finalize(convention)
        np.testing.assert_allclose(var, x.var(axis=axes, ddof=ddof), rtol=1e-13)


@pytest.mark.parametrize("convention", ["torch", "keras", "onnx"])
def test_calibrating_a_layer(convention):
    """The layer has then what a single training step on everything would have given it."""
    x = batch()
    layer = cpunorm.BatchNorm(C, convention=convention)
    trained = cpunorm.BatchNorm(C, momentum=None, convention=convention)
    trained(x)
    moments = Moments(C)
    for part in np.array_split(x, 3):
        moments.update(part)
    statistics = moments.finalize(convention)
    layer.load_state_dict(statistics._asdict(), strict=False)
    assert_close(layer.running_mean, trained.running_mean, 1e-6)
    assert_close(layer.running_var, trained.running_var, 1e-6)
    direct = cpunorm.batch_norm(x, *statistics, eps=layer.eps)
    assert_same_bits(layer.eval()(x), direct)


def test_larger_than_memory(tmp_path):
    """A file is read batch by batch, and the loop is shown to whoever shows progress."""
    x = batch()
    np.save(tmp_path / "x.npy", x)
    seen = []

    def progress(starts):
        for start in starts:
            seen.append(start)
            yield start

    moments, expected = Moments(C), Moments(C)
    moments.update_in_batches(np.load(tmp_path / "x.npy", mmap_mode="r"), 16, progress=progress)
    for start in (0, 16, 32):
        expected.update(x[start : start + 16])
    assert seen == [0, 16, 32]
    assert_same_bits(tuple(moments.finalize()), tuple(expected.finalize()))


def test_nan_stays_in_its_channel():
    x = batch()
    x[3, 1, 2, 2], x[7, 3, 1, 1] = np.nan, np.inf
    moments = Moments(C)
    for part in np.split(x, 4):
        moments.update(part)
    mean, var = moments.finalize()
    assert np.isfinite(mean).tolist() == [True, False, True, False, True]
    assert np.isnan(var).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m.update(np.ones((2, 6, 3), "f4")), ValueError, "x must have 5 channels"),
        (lambda m: m.update(np.ones((2, C, 3), "int8")), TypeError, "x must have dtype"),
        (lambda m: m.update([[1.0]]), TypeError, "x must be"),
        (
            lambda m: m.update(np.ones((2, C, 3), "f4"), mask=np.ones((2, 4), bool)),
            ValueError,
            "mask must have shape",
        ),
        (lambda m: m.merge(None), TypeError, "other must be Moments, got NoneType"),
        (lambda m: m.merge(Moments(4)), ValueError, "other must have 5 channels, got 4"),
        (lambda m: m.finalize("caffe"), ValueError, "convention must be one of"),
        (lambda m: m.update_in_batches(batch(), 0), ValueError, "batch_size"),
        (lambda m: m.update_in_batches(batch(), "1"), TypeError, "batch_size"),
        (lambda m: Moments("5"), TypeError, "num_features"),
        (lambda m: Moments(-1), ValueError, "num_features"),
        (lambda m: Moments(C, layout="NCWH"), ValueError, "layout"),
        (lambda m: Moments(C, backend="cuda"), ValueError, "backend"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    """Named, and nothing taken in."""
    moments = Moments(C)
    moments.update(batch())
    before = moments.count, *moments.finalize()
    with pytest.raises(error, match=text):
        call(moments)
    assert moments.count == before[0]
    assert_same_bits(tuple(moments.finalize()), before[1:])


def test_too_little():
    moments = Moments(C)
    with pytest.raises(ValueError, match="at least 2 values per channel, got 0"):
        moments.finalize()
    moments.update(np.full((1, C), 3.0, "float32"))
    with pytest.raises(ValueError, match="at least 2 values per channel, got 1"):
        moments.finalize()
    assert moments.finalize("keras").running_var.tolist() == [0.0] * C
