"""What docs/migration.md says of other libraries, against those libraries."""

import inspect

import numpy as np
import pytest

import cpunorm

RNG = np.random.default_rng(0)
X = RNG.normal(5, 2, (4, 5, 3, 6)).astype("float32")
WEIGHT, BIAS = RNG.normal(1, 0.2, (2, 6)).astype("float32")
LAST = {"layout": "NHWC"}


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=1e-5)


def biased(updated, before, n):
    """The running variance as libraries have it that average biased ones, from ours."""
    return before + (updated - before) * (n - 1) / n


def running(old_weight, eps):
    """y, running mean and biased running variance after one batch, from 0 and 1."""
    mean, var = np.zeros(6, "float32"), np.ones(6, "float32")
    y = cpunorm.batch_norm(X, mean, var, WEIGHT, BIAS, True, 1 - old_weight, eps, layout="NHWC")
    n = X.size // 6
    return y, mean, biased(var, old_weight, n)


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    pytest.importorskip("keras")
    import keras

    return keras.layers


@pytest.fixture
def node():
    onnx = pytest.importorskip("onnx")
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    def run(operation, arrays, outputs=1, **attributes):
        """Run one node on arrays."""
        ends = [
            [f"{end}{i}" for i in range(n)] for end, n in (("in", len(arrays)), ("out", outputs))
        ]
        infos = [
            [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names]
            for names in ends
        ]
        made = helper.make_node(operation, *ends, **attributes)
        graph = helper.make_graph([made], operation, *infos)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
        return ReferenceEvaluator(model).run(None, dict(zip(ends[0], arrays, strict=True)))

    return run


def first(x):
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def made(layer, **state):
    """The layer with parameters and state of ours."""
    layer.build(X.shape)
    for name, value in state.items():
        getattr(layer, name).assign(value)
    return layer


def test_keras_batch_norm(keras):
    layer = made(keras.BatchNormalization(), gamma=WEIGHT, beta=BIAS)
    y, mean, var = running(0.99, 1e-3)
    close(layer(X, training=True), y)
    close(layer.moving_mean, mean)
    close(layer.moving_variance, var)


def test_keras_others(keras):
    both, eps = {"gamma": WEIGHT, "beta": BIAS}, 1e-3
    close(
        made(keras.GroupNormalization(groups=3), **both)(X),
        cpunorm.group_norm(X, 3, WEIGHT, BIAS, eps, **LAST),
    )
    close(
        made(keras.GroupNormalization(groups=-1), **both)(X),
        cpunorm.instance_norm(X, None, None, WEIGHT, BIAS, eps=eps, **LAST),
    )
    close(made(keras.LayerNormalization(), **both)(X), cpunorm.layer_norm(X, 6, WEIGHT, BIAS, eps))
    close(made(keras.RMSNormalization(), scale=WEIGHT)(X), cpunorm.rms_norm(X, 6, WEIGHT, 1e-6))


def test_onnx_batch_norm(node):
    zero, one = np.zeros(6, "float32"), np.ones(6, "float32")
    got = node("BatchNormalization", [first(X), WEIGHT, BIAS, zero, one], 3, training_mode=1)
    y, mean, var = running(0.9, 1e-5)
    close(got[0], first(y))
    close(got[1], mean)
    close(got[2], var)


def test_onnx_others(node):
    x = first(X)
    parameters = [x, WEIGHT, BIAS]
    close(
        node("InstanceNormalization", parameters)[0],
        cpunorm.instance_norm(x, None, None, WEIGHT, BIAS),
    )
    close(
        node("GroupNormalization", parameters, num_groups=3)[0],
        cpunorm.group_norm(x, 3, WEIGHT, BIAS),
    )
    y, stats = cpunorm.layer_norm(X, 6, WEIGHT, BIAS, return_stats=True)
    got = node("LayerNormalization", [X, WEIGHT, BIAS], 3)
    for one, expected in zip(got, (y, *(s[..., None] for s in stats)), strict=True):
        close(one, expected)
    close(node("RMSNormalization", [X, WEIGHT])[0], cpunorm.rms_norm(X, 6, WEIGHT, 1e-5))


@pytest.mark.parametrize(
    "name", ["batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"]
)
def test_torch_has_our_names_order_and_defaults(name):
    functional = pytest.importorskip("torch.nn.functional")
    theirs = inspect.signature(getattr(functional, name)).parameters
    ours = inspect.signature(getattr(cpunorm, name)).parameters
    shared = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    expected = [("x" if p.name == "input" else p.name, p.default) for p in theirs.values()]
    assert [(p.name, p.default) for p in shared] == expected


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_torch_epsilon_of_rms_norm(dtype):
    torch = pytest.importorskip("torch")
    x = np.full((1, 4), 1e-4, dtype)
    theirs = torch.nn.functional.rms_norm(torch.from_numpy(x), (4,)).numpy()
    np.testing.assert_allclose(cpunorm.rms_norm(x, 4), theirs, rtol=1e-3)
