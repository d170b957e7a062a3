"""cpunorm.numba: inside compiled functions the same results as outside, bit by bit."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import cpunorm
from cpunorm import Stats

from .support import AVAILABLE

if not {"cython", "numba"} <= set(AVAILABLE):
    pytest.skip("needs the compiled backend and Numba", allow_module_level=True)

import numba

from cpunorm import numba as norm

RNG = np.random.default_rng(0)
DTYPES = [np.float32, np.float64]


def normal(shape, dtype):
    return RNG.normal(size=shape).astype(dtype)


@numba.njit(nogil=True)
def layer(x, weight, bias, out, mean, rstd, threads):
    return norm.layer_norm(x, weight, bias, 1e-5, out, mean, rstd, threads)


@numba.njit(nogil=True)
def layer_backward(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias):
    norm.layer_norm_backward(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias)


@numba.njit(nogil=True)
def rms(x, weight, rstd, grad_y, grad_x, grad_weight):
    y = norm.rms_norm(x, weight, 1e-5, None, rstd)
    norm.rms_norm_backward(grad_y, x, rstd, weight, grad_x, grad_weight)
    return y


@numba.njit(nogil=True)
def group(x, groups, weight, bias, last, mean, rstd, grad_y, grad_x, grad_weight, grad_bias):
    y = norm.group_norm(x, groups, weight, bias, channels_last=last, mean=mean, rstd=rstd)
    norm.group_norm_backward(
        grad_y, x, groups, mean, rstd, weight, grad_x, grad_weight, grad_bias, last
    )
    return y


@numba.njit(nogil=True)
def instance(x, weight, bias, last, mean, rstd, grad_y, grad_x, grad_weight, grad_bias):
    y = norm.instance_norm(x, weight, bias, channels_last=last, mean=mean, rstd=rstd)
    norm.instance_norm_backward(grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, last)
    return y


@numba.njit(nogil=True)
def batch(x, means, variances, weight, bias, training, last, mean, rstd, grads):
    y = norm.batch_norm(
        x, means, variances, weight, bias, training, channels_last=last, mean=mean, rstd=rstd
    )
    grad_y, grad_x, grad_weight, grad_bias = grads
    norm.batch_norm_backward(
        grad_y, x, mean, rstd, weight, grad_x, grad_weight, grad_bias, training, last
    )
    return y


def check(y, y_, stats, stats_, gradients, gradients_):
    np.testing.assert_array_equal(y, y_)
    for ours, theirs in ((stats, stats_), (gradients, gradients_)):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8,), (5, 33), (2, 3, 7), (300, 512)])
def test_layer_norm(shape, dtype):
    x, grad_y = normal(shape, dtype), normal(shape, dtype)
    weight, bias = normal(shape[-1:], dtype), normal(shape[-1:], dtype)
    expected, stats = cpunorm.layer_norm(x, shape[-1], weight, bias, return_stats=True)
    out, mean, rstd = np.empty_like(x), np.empty(shape[:-1], dtype), np.empty(shape[:-1], dtype)
    assert layer(x, weight, bias, out, mean, rstd, 2) is not None
    grads = np.empty_like(x), np.empty_like(weight), np.empty_like(bias)
    layer_backward(grad_y, x, mean, rstd, weight, *grads)
    wanted = cpunorm.layer_norm_backward(grad_y, x, shape[-1], stats, weight)
    check(out, expected, (mean, rstd), stats, grads, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_may_be_absent(dtype):
    x = normal((5, 33), dtype)
    np.testing.assert_array_equal(
        layer(x, None, None, None, None, None, 1), cpunorm.layer_norm(x, 33)
    )
    expected = cpunorm.layer_norm(x, 33)
    assert layer(x, None, None, x, None, None, 1).ctypes.data == x.ctypes.data
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    x, grad_y, weight = normal((5, 33), dtype), normal((5, 33), dtype), normal(33, dtype)
    expected, stats = cpunorm.rms_norm(x, 33, weight, 1e-5, return_stats=True)
    rstd, grad_x, grad_weight = np.empty(5, dtype), np.empty_like(x), np.empty_like(weight)
    y = rms(x, weight, rstd, grad_y, grad_x, grad_weight)
    wanted = cpunorm.rms_norm_backward(grad_y, x, 33, stats, weight)
    check(y, expected, (rstd,), stats[1:], (grad_x, grad_weight), wanted[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (2, 6, 700), (1, 6, 9)])
def test_channels(shape, last, dtype):
    layout = "NHWC" if last else "NCHW"
    if last:
        shape = (shape[0], *shape[2:], shape[1])
    x, grad_y = normal(shape, dtype), normal(shape, dtype)
    weight, bias = normal(6, dtype), normal(6, dtype)

    def outputs(*stats_shape):
        return (
            (np.empty(stats_shape, dtype), np.empty(stats_shape, dtype)),
            (np.empty_like(x), np.empty_like(weight), np.empty_like(bias)),
        )

    expected, stats = cpunorm.group_norm(x, 3, weight, bias, layout=layout, return_stats=True)
    ours, grads = outputs(shape[0], 3)
    y = group(x, 3, weight, bias, last, *ours, grad_y, *grads)
    wanted = cpunorm.group_norm_backward(grad_y, x, 3, stats, weight, layout=layout)
    check(y, expected, ours, stats, grads, wanted)

    expected, stats = cpunorm.instance_norm(
        x, None, None, weight, bias, layout=layout, return_stats=True
    )
    ours, grads = outputs(shape[0], 6)
    y = instance(x, weight, bias, last, *ours, grad_y, *grads)
    wanted = cpunorm.instance_norm_backward(grad_y, x, stats, weight, layout=layout)
    check(y, expected, ours, stats, grads, wanted)

    for training in (True, False):
        running = normal(6, dtype), normal(6, dtype) ** 2 + 1
        running_ = running[0].copy(), running[1].copy()
        expected, stats = cpunorm.batch_norm(
            x, *running, weight, bias, training, layout=layout, return_stats=True
        )
        ours, grads = outputs(6)
        y = batch(x, *running_, weight, bias, training, last, *ours, (grad_y, *grads))
        wanted = cpunorm.batch_norm_backward(grad_y, x, stats, weight, training, layout=layout)
        check(y, expected, ours, stats, grads, wanted)
        check(y, expected, running_, running, (), ())


def test_in_the_body_of_a_prange():
    @numba.njit(parallel=True)
    def by_images(x, weight, bias, out):
        for i in numba.prange(len(x)):
            norm.layer_norm(x[i], weight, bias, 1e-5, out[i])

    x, weight, bias = normal((20, 9, 64), "f4"), normal(64, "f4"), normal(64, "f4")
    out = np.empty_like(x)
    by_images(x, weight, bias, out)
    np.testing.assert_array_equal(out, cpunorm.layer_norm(x, 64, weight, bias))


def test_from_a_cache(tmp_path):
    """Compiled in one process, loaded in another."""
    (tmp_path / "user.py").write_text(
        textwrap.dedent("""
        import numba, numpy as np, cpunorm, cpunorm.numba as norm
        @numba.njit(cache=True)
        def f(x):
            return norm.layer_norm(x)
        x = np.arange(12, dtype=np.float32).reshape(3, 4)
        assert (f(x) == cpunorm.layer_norm(x, 4)).all()
        print(sum(f.stats.cache_hits.values()))
        """)
    )
    folder = os.path.dirname(os.path.dirname(cpunorm.__file__))
    environ = {**os.environ, "PYTHONPATH": folder, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for hits in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "user.py"], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert run.stdout.strip() == hits, run.stderr


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((np.ones(5, "f4"), None, None), "weight"),
        ((np.ones((2, 4), "f4"), None, None), "weight"),
        ((None, np.ones(5, "f4"), None), "bias"),
        ((None, None, np.full((4, 3), 7, "f4")), "out"),
    ],
)
def test_wrong_shapes(arguments, name):
    x = normal((3, 4), "f4")
    with pytest.raises(ValueError, match=name):
        layer(x, *arguments, None, None, 1)
    if arguments[2] is not None:
        assert (arguments[2] == 7).all()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((np.ones((3, 4), "f4"), np.ones(4), None, None), "weight"),
        ((np.ones((3, 8), "f4")[:, ::2], None, None, None), "x"),
        ((np.ones((3, 4), "i4"), None, None, None), "x"),
        ((np.ones((3, 4), "f4"), None, None, np.broadcast_to(np.float32(0), (3, 4))), "out"),
    ],
)
def test_wrong_types(arguments, name):
    with pytest.raises(numba.TypingError, match=f"{name} must be"):
        layer(*arguments, None, None, 1)


@pytest.mark.parametrize("x", [np.float32(1).reshape(()), np.ones(4, "f4")])
@pytest.mark.parametrize(
    "name", ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"]
)
def test_too_few_axes(name, x):
    function, more = getattr(norm, name), {"group_norm": (1,), "batch_norm": (None, None)}
    least = 1 if name in ("layer_norm", "rms_norm") else 2
    if x.ndim >= least:
        assert function(x).shape == x.shape
        return
    with pytest.raises(numba.TypingError, match=f"x must be an array of {least} axes at least"):
        function(x, *more.get(name, ()))
    with pytest.raises(numba.TypingError, match="x must be an array"):
        function((1.0,), *more.get(name, ()))


@pytest.mark.parametrize("shift", [1, 5, 14, -1, -14])
def test_out_is_x_or_elsewhere(shift):
    memory = normal(48, "f4")
    before, x = memory.copy(), memory[16:31].reshape(3, 5)
    with pytest.raises(ValueError, match="out must be x itself, or not overlap it"):
        layer(x, None, None, memory[16 + shift : 31 + shift].reshape(3, 5), None, None, 1)
    np.testing.assert_array_equal(memory, before)
    expected = layer(x, None, None, None, None, None, 1)
    for start in (31, 1, 16):  # just behind, just before, x itself
        out = memory[start : start + 15].reshape(3, 5)
        np.testing.assert_array_equal(layer(x, None, None, out, None, None, 1), expected)


def test_wrong_values():
    x = normal((3, 4), "f4")

    @numba.njit
    def with_eps(x, eps):
        return norm.layer_norm(x, None, None, eps)

    for eps in (-1.0, np.nan):
        with pytest.raises(ValueError, match="eps"):
            with_eps(x, eps)
    with pytest.raises(ValueError, match="threads"):
        layer(x, None, None, None, None, None, 0)
    with pytest.raises(ValueError, match="num_groups"):
        norm.group_norm(x, 3)
    with pytest.raises(ValueError, match="running_mean"):
        norm.batch_norm(x, None, None)
    with pytest.raises(ValueError, match="more than one value"):
        norm.instance_norm(x)


def test_nothing_of_nothing():
    x = np.empty((0, 4), np.float32)
    assert layer(x, None, None, None, None, None, 1).shape == (0, 4)
    grads = np.empty_like(x), np.ones(4, "f4"), np.ones(4, "f4")
    none = np.empty(0, np.float32)
    layer_backward(x, x, *Stats(none, none), None, *grads)
    assert not grads[1].any()
    assert not grads[2].any()


def test_running_statistics_are_each_for_itself_and_writeable_where_they_are_moved():
    x, a, b = normal((4, 3, 5), "f4"), np.zeros(3, "f4"), np.ones(3, "f4")
    with pytest.raises(ValueError, match="running_mean must not overlap running_var"):
        norm.batch_norm(x, a, a, None, None, True)
    memory = np.zeros(5, "f4")
    with pytest.raises(ValueError, match="running_mean must not overlap running_var"):
        norm.batch_norm(x, memory[2:], memory[:3], None, None, True)
    given = a.copy(), b.copy()
    for array in given:
        array.flags.writeable = False
    np.testing.assert_array_equal(
        norm.batch_norm(x, *given), cpunorm.batch_norm(x, a, b, training=False)
    )
    for pair, name in (((given[0], b), "running_mean"), ((a, given[1]), "running_var")):
        with pytest.raises(ValueError, match=f"{name} must be writeable"):
            norm.batch_norm(x, *pair, None, None, True)
    assert not a.any()
    assert not memory.any()


def test_training_has_a_variance():
    x, a, b = normal((4, 3, 5), "f4"), np.zeros(3, "f4"), np.ones(3, "f4")
    with pytest.raises(ValueError, match="eps must be > 0"):
        norm.batch_norm(x, a, b, None, None, True, 0.1, 0.0)
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm.batch_norm(x[:1, :, :1].copy(), a, b, None, None, True)
    assert not a.any()
