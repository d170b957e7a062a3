"""Momentum, epsilon and variance by the name of a library, against the libraries themselves."""

import os
import pickle

import numpy as np
import pytest

import cpunorm
from cpunorm import BatchNorm, InstanceNorm

from .support import AVAILABLE, assert_same_bits

C = 4
SHAPE = (3, C, 2, 5)
# momentum and eps by default; the weight of the new value for a momentum of 0.75; ddof
BY_HAND = {
    "torch": (0.1, 1e-5, 0.75, 1),
    "keras": (0.99, 1e-3, 0.25, 0),
    "onnx": (0.9, 1e-5, 0.25, 0),
}
conventions = pytest.mark.parametrize("convention", BY_HAND)


def batch(dtype="float64"):
    return np.random.default_rng(0).normal(3, 2, SHAPE).astype(dtype)


def running(dtype="float64"):
    rng = np.random.default_rng(1)
    return rng.normal(size=C).astype(dtype), rng.uniform(1, 2, C).astype(dtype)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
@conventions
def test_by_hand(op, convention, backend_or_auto):
    _, _, weight_of_new, ddof = BY_HAND[convention]
    x, (mean, var) = batch(), running()
    axes = (0, 2, 3) if op == "batch_norm" else (2, 3)
    new_mean, new_var = x.mean(axes), x.var(axes, ddof=ddof)
    if op == "instance_norm":
        new_mean, new_var = new_mean.mean(0), new_var.mean(0)
    expected = [
        (1 - weight_of_new) * old + weight_of_new * new
        for old, new in ((mean, new_mean), (var, new_var))
    ]
    mode = {"training": True} if op == "batch_norm" else {}
    options = {"convention": convention, "momentum": 0.75, "backend": backend_or_auto, **mode}
    getattr(cpunorm, op)(x, mean, var, **options)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-13)
    np.testing.assert_allclose(var, expected[1], rtol=1e-13)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
@conventions
def test_defaults(op, convention):
    """What is not given is the convention's; what is given counts, torch's own numbers too."""
    momentum, eps, *_ = BY_HAND[convention]
    mode = {"training": True} if op == "batch_norm" else {}

    def call(**options):
        statistics = running()
        y = getattr(cpunorm, op)(batch(), *statistics, convention=convention, **mode, **options)
        return y, *statistics

    default = call()
    assert_same_bits(call(momentum=momentum, eps=eps), default)
    given = call(momentum=float("0.1"), eps=float("1e-5"))
    if convention != "torch":
        assert not np.array_equal(given[1], default[1])
    assert np.array_equal(given[0], default[0]) == (eps == 1e-5)


@conventions
def test_frozen_takes_the_epsilon(convention):
    eps = BY_HAND[convention][1]
    statistics = np.zeros(C), np.full(C, 1e-4)
    y = cpunorm.batch_norm(batch(), *statistics, convention=convention)
    np.testing.assert_allclose(y, batch() / np.sqrt(1e-4 + eps), rtol=1e-13)


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm])
@conventions
def test_layers(layer, convention):
    momentum, eps, *_ = BY_HAND[convention]
    made = layer(C, track_running_stats=True, convention=convention, dtype="float64")
    assert (made.momentum, made.eps) == (momentum, eps)
    function = cpunorm.batch_norm if layer is BatchNorm else cpunorm.instance_norm
    mode = {"training": True} if layer is BatchNorm else {}
    expected = np.zeros(C), np.ones(C)
    for copy in (made, pickle.loads(pickle.dumps(made))):
        function(batch(), *expected, convention=convention, **mode)
        copy(batch())
        if copy is made:
            assert_same_bits(made.running_var, expected[1])
            expected = np.zeros(C), np.ones(C)
        else:
            assert_same_bits(copy.running_var, expected[1])
    shown = f"convention={convention!r}" in repr(made)
    assert shown == (convention != "torch")
    assert repr(eval(repr(made))) == repr(made)


@conventions
def test_average_over_all_batches(convention):
    """momentum=None has one meaning in all of them."""
    layer = BatchNorm(C, momentum=None, convention=convention, dtype="float64")
    parts = batch(), batch() * 2
    for part in parts:
        layer(part)
    means = [part.mean(axis=(0, 2, 3)) for part in parts]
    np.testing.assert_allclose(layer.running_mean, np.mean(means, axis=0), rtol=1e-13)


# --- The libraries -------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"momentum": 0.3}])
def test_torch(given):
    torch = pytest.importorskip("torch")
    x, ours = batch("float32"), BatchNorm(C, convention="torch", **given)
    theirs = torch.nn.BatchNorm2d(C, **given)
    assert (ours.momentum, ours.eps) == (theirs.momentum, theirs.eps)
    y = theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(ours(x), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("given", [{}, {"momentum": 0.3}])
def test_keras(given):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    pytest.importorskip("torch")
    keras = pytest.importorskip("keras")
    x = np.ascontiguousarray(np.moveaxis(batch("float32"), 1, -1))
    ours = BatchNorm(C, convention="keras", layout="NHWC", **given)
    theirs = keras.layers.BatchNormalization(**given)
    y = keras.ops.convert_to_numpy(theirs(x, training=True))
    assert (ours.momentum, ours.eps) == (theirs.momentum, theirs.epsilon)
    np.testing.assert_allclose(ours(x), y, rtol=1e-5, atol=1e-6)
    for mine, theirs_ in (
        (ours.running_mean, theirs.moving_mean),
        (ours.running_var, theirs.moving_variance),
    ):
        np.testing.assert_allclose(mine, keras.ops.convert_to_numpy(theirs_), rtol=1e-5)


@pytest.mark.parametrize("given", [{}, {"momentum": 0.3}])
def test_onnx(given):
    onnx = pytest.importorskip("onnx")
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    inputs, outputs = ["x", "w", "b", "m", "v"], ["y", "rm", "rv"]
    node = helper.make_node("BatchNormalization", inputs, outputs, training_mode=1, **given)
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "one node",
        [helper.make_tensor_value_info(name, float32, None) for name in inputs],
        [helper.make_tensor_value_info(name, float32, None) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    x, (mean, var) = batch("float32"), running("float32")
    weight, bias = np.ones(C, "float32"), np.zeros(C, "float32")
    feeds = dict(zip(inputs, (x, weight, bias, mean.copy(), var.copy()), strict=True))
    expected = ReferenceEvaluator(model).run(None, feeds)
    y = cpunorm.batch_norm(x, mean, var, weight, bias, training=True, convention="onnx", **given)
    for got, wanted in zip((y, mean, var), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_front_door_keeps_to_torch():
    """The compiled short way has one convention, and leaves the others to the long way."""
    if "cython" not in AVAILABLE:
        pytest.skip("no compiled front door")
    from cpunorm import _front

    def answers(convention):
        return _front.batch_norm(
            batch(), *running(), None, None, True, 0.1, 1e-5, "NCHW", None, None, None, convention,
            None, False, None,
        ) is not None  # fmt: skip

    assert [answers(name) for name in BY_HAND] == [True, False, False]
