"""The layers: values, gradients and state against the oracle and torch; saving, loading, errors."""

import copy
import io
import pickle

import numpy as np
import pytest

import cpunorm
from cpunorm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, reference

from .support import (
    GRADIENT_TOLERANCE,
    HALF_DTYPES,
    VALUE_TOLERANCE,
    assert_close,
    assert_same_bits,
)

FLOAT32 = np.dtype("float32")
VALUES, GRADIENTS = VALUE_TOLERANCE[FLOAT32], GRADIENT_TOLERANCE[FLOAT32]
C = 6
SHAPE = (4, C, 5, 3)

# One of each, with an affine step and every array its class can have.
ALL = (
    lambda **options: BatchNorm(C, **options),
    lambda **options: InstanceNorm(C, affine=True, track_running_stats=True, **options),
    lambda **options: GroupNorm(3, C, **options),
    lambda **options: LayerNorm(C, axis=1, **options),
    lambda **options: RMSNorm(C, axis=1, **options),
)
each = pytest.mark.parametrize("make", ALL, ids=("batch", "instance", "group", "layer", "rms"))


def normal(*shape, seed=0, mean=1.0, dtype="float32"):
    return np.random.default_rng(seed).normal(mean, 2.0, shape).astype(dtype)


def randomised(layer, seed=3):
    """The layer, with parameters and running statistics other than zeros and ones."""
    rng = np.random.default_rng(seed)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if (a := getattr(layer, name, None)) is not None:
            a[...] = rng.uniform(0.5, 1.5, a.shape)
    return layer


def states_equal(one, other):
    assert list(one) == list(other)
    return all(np.array_equal(one[name], other[name]) for name in one)


def oracle_of(layer):
    """The oracle's forward and backward with the arguments of a layer that is in training mode."""
    w, b = {"weight": layer.weight}, {"bias": layer.bias}
    if isinstance(layer, (BatchNorm, InstanceNorm, GroupNorm)):
        common = {"eps": layer.eps, "layout": layer.layout, **w}
        if isinstance(layer, GroupNorm):
            common["num_groups"] = layer.num_groups
            return reference.group_norm, reference.group_norm_backward, common, b
        running = {"running_mean": layer.running_mean, "running_var": layer.running_var}
        if isinstance(layer, BatchNorm):
            forward = {**running, **b, "training": True, "momentum": layer.momentum}
            return reference.batch_norm, reference.batch_norm_backward, common, forward
        forward = {**running, **b, "momentum": layer.momentum}
        return reference.instance_norm, reference.instance_norm_backward, common, forward
    common = {"normalized_shape": layer.normalized_shape, "eps": layer.eps, "axis": layer.axis, **w}
    if isinstance(layer, LayerNorm):
        return reference.layer_norm, reference.layer_norm_backward, common, b
    return reference.rms_norm, reference.rms_norm_backward, common, {}


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BatchNorm(C, momentum=0.3), SHAPE),
        (BatchNorm(C, layout="NHWC"), (4, 5, 3, C)),
        (InstanceNorm(C, affine=True, track_running_stats=True), SHAPE),
        (InstanceNorm(C, affine=True, layout="channels_last"), (4, 7, C)),
        (GroupNorm(2, C, eps=1e-3), SHAPE),
        (GroupNorm(3, C, bias=False, layout="NHWC"), (4, 5, 3, C)),
        (LayerNorm((5, 3)), SHAPE),
        (LayerNorm(C, axis=1), SHAPE),
        (RMSNorm(3), SHAPE),
        (RMSNorm((C, 3), axis=(1, 3), eps=1e-3), SHAPE),
    ],
    ids=repr,
)
def test_training_against_the_oracle(layer, shape):
    randomised(layer)
    x, grad_y = normal(*shape), normal(*shape, seed=1)
    forward, backward, common, forward_only = oracle_of(layer)
    expected = forward(x, **common, **forward_only)
    assert_close(layer(x), expected.y, VALUES)
    if expected.running_mean is not None:
        assert_close(layer.running_mean, expected.running_mean, VALUES)
        assert_close(layer.running_var, expected.running_var, VALUES)
    grad_x, grad_weight, grad_bias = backward(grad_y, x, **common)
    assert_close(layer.backward(grad_y), grad_x, GRADIENTS)
    assert_close(layer.grad_weight, grad_weight, GRADIENTS)
    if layer.bias is None:
        assert layer.grad_bias is None
    else:
        assert_close(layer.grad_bias, grad_bias, GRADIENTS)


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    x = normal(*SHAPE)
    for layer in (BatchNorm(C), InstanceNorm(C, track_running_stats=True)):
        randomised(layer).eval()
        before = layer.state_dict()
        expected = reference.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias
        )
        assert_close(layer(x), expected.y, VALUES)
        assert states_equal(layer.state_dict(), before)


def test_without_running_statistics_evaluation_uses_those_of_x():
    layer = BatchNorm(C, track_running_stats=False)
    x = normal(*SHAPE)
    assert np.array_equal(layer(x), layer.eval()(x))
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None


def test_momentum_none_is_the_average_over_batches():
    layer = BatchNorm(C, momentum=None)
    batches = [normal(*SHAPE, seed=seed) for seed in range(5)]
    for x in batches:
        layer(x)
    means = [x.mean(axis=(0, 2, 3), dtype=np.float64) for x in batches]
    variances = [x.var(axis=(0, 2, 3), dtype=np.float64, ddof=1) for x in batches]
    assert_close(layer.running_mean, np.mean(means, axis=0), VALUES)
    assert_close(layer.running_var, np.mean(variances, axis=0), VALUES)
    assert layer.num_batches_tracked == len(batches)


def test_an_empty_batch_is_not_tracked():
    layer = BatchNorm(C, momentum=None)
    before = layer.state_dict()
    assert layer(np.empty((0, C, 2, 2), np.float32)).shape == (0, C, 2, 2)
    assert states_equal(layer.state_dict(), before)


@pytest.mark.parametrize("make", ALL[:3])
def test_activation_and_residual(make):
    x, residual = normal(*SHAPE), normal(*SHAPE, seed=2)
    plain, fused = make(), make(activation="relu")
    assert_close(fused(x, residual), np.maximum(plain(x) + residual, 0), VALUES)


@each
def test_out_and_dtype(make):
    layer = make(dtype="float64")
    x, out = normal(*SHAPE, dtype="float64"), np.empty(SHAPE)
    assert {a.dtype.name for a in layer.state_dict().values()} <= {"float64", "int64"}
    assert layer(x, out=out) is out
    assert np.array_equal(out, make(dtype=float)(x))


@pytest.mark.parametrize("parameters", ["same", "float32"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@each
def test_16_bits(make, dtype, parameters):
    """x of 16 bits, with parameters like it or in float32, which training needs."""
    layer = make(dtype=dtype if parameters == "same" else parameters)
    x = normal(*SHAPE, dtype=dtype)
    y = layer(x)
    assert y.dtype == x.dtype
    assert_close(y, make(dtype="float64")(x.astype("float64")), VALUES)
    assert layer.backward(y).dtype == x.dtype
    assert layer.grad_weight.dtype == layer.weight.dtype
    other = make(dtype=layer.dtype)
    other.load_state_dict(layer.state_dict())
    assert states_equal(other.state_dict(), layer.state_dict())
    assert repr(layer) == repr(other)


@each
def test_backend(make, backend):
    x = normal(*SHAPE)
    layer = make(backend=backend)
    y = layer(x)
    with cpunorm.use_backend(backend):
        assert np.array_equal(y, make()(x))
    assert f"backend={backend!r}" in repr(layer)


# --- Against torch -------------------------------------------------------------------------------

TORCH = (
    ("BatchNorm1d", BatchNorm, (C,), {}, (8, C)),
    ("BatchNorm1d", BatchNorm, (C,), {"eps": 1e-3}, (4, C, 7)),
    ("BatchNorm2d", BatchNorm, (C,), {"momentum": 0.3}, SHAPE),
    ("BatchNorm2d", BatchNorm, (C,), {"momentum": None}, SHAPE),
    ("BatchNorm2d", BatchNorm, (C,), {"affine": False}, SHAPE),
    ("BatchNorm2d", BatchNorm, (C,), {"track_running_stats": False}, SHAPE),
    ("BatchNorm3d", BatchNorm, (C,), {}, (2, C, 3, 4, 2)),
    ("InstanceNorm2d", InstanceNorm, (C,), {}, SHAPE),
    ("InstanceNorm2d", InstanceNorm, (C,), {"affine": True, "track_running_stats": True}, SHAPE),
    ("GroupNorm", GroupNorm, (3, C), {"eps": 1e-3}, SHAPE),
    ("GroupNorm", GroupNorm, (3, C), {"affine": False}, SHAPE),
    ("LayerNorm", LayerNorm, ((5, 3),), {}, SHAPE),
    ("LayerNorm", LayerNorm, (3,), {"bias": False}, SHAPE),
    ("LayerNorm", LayerNorm, (3,), {"elementwise_affine": False}, SHAPE),
    ("RMSNorm", RMSNorm, (3,), {}, SHAPE),
    ("RMSNorm", RMSNorm, ([5, 3],), {"eps": 1e-3}, SHAPE),
)


@pytest.mark.parametrize(("name", "ours", "arguments", "options", "shape"), TORCH)
def test_against_torch(name, ours, arguments, options, shape):
    torch = pytest.importorskip("torch")
    module = getattr(torch.nn, name)(*arguments, **options)
    layer = randomised(ours(*arguments, **options))
    module.load_state_dict({k: torch.from_numpy(a) for k, a in layer.state_dict().items()})

    for seed in range(3):
        x, grad_y = normal(*shape, seed=seed), normal(*shape, seed=seed + 10)
        tensor = torch.from_numpy(x).requires_grad_()
        y = module(tensor)
        assert_close(layer(x), y.detach().numpy(), 1e-5)
        module.zero_grad()
        y.backward(torch.from_numpy(grad_y))
        assert_close(layer.backward(grad_y), tensor.grad.numpy(), GRADIENTS)
        for parameter, value in module.named_parameters():
            gradient = getattr(layer, f"grad_{parameter}")
            assert_close(gradient, value.grad.numpy(), GRADIENTS)
    state = layer.state_dict()
    assert list(state) == list(module.state_dict())
    for key, value in module.state_dict().items():
        assert_close(state[key], value.numpy(), 1e-5)

    module.eval()
    layer.eval()
    assert_close(layer(x), module(torch.from_numpy(x)).detach().numpy(), 1e-5)

    # And the checkpoint back again, as tensors and as a file of arrays.
    for checkpoint in (module.state_dict(), dict(module.named_parameters())):
        fresh = ours(*arguments, **options)
        fresh.load_state_dict(checkpoint, strict=len(checkpoint) == len(state))
        for key, value in checkpoint.items():
            assert np.array_equal(getattr(fresh, key), value.detach().numpy())


# --- State ---------------------------------------------------------------------------------------


@each
def test_state_survives_every_way_of_saving(make):
    layer = randomised(make())
    layer(normal(*SHAPE))
    file = io.BytesIO()
    np.savez(file, **layer.state_dict())
    file.seek(0)
    loaded = make()
    assert loaded.load_state_dict(np.load(file)) == ([], [])
    copies = (loaded, copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))
    for other in copies:
        assert repr(other) == repr(layer)
        assert states_equal(other.state_dict(), layer.state_dict())
        assert np.array_equal(other.eval()(normal(*SHAPE)), layer.eval()(normal(*SHAPE)))
        layer.train()


def test_what_backward_needs_is_not_pickled():
    layer = LayerNorm(3)
    layer(normal(1000, 3))
    assert len(pickle.dumps(layer)) < 2000
    restored = pickle.loads(pickle.dumps(layer))
    with pytest.raises(RuntimeError, match="has not been called"):
        restored.backward(normal(1000, 3))


def test_state_dict_is_a_copy_and_loading_keeps_the_arrays():
    layer = BatchNorm(C)
    weight, state = layer.weight, layer.state_dict()
    layer.weight[...] = 5
    assert np.array_equal(state["weight"], np.ones(C))
    layer.load_state_dict(state)
    assert layer.weight is weight
    assert np.array_equal(weight, np.ones(C))


def test_loading_converts_dtypes():
    layer = BatchNorm(2)
    layer.load_state_dict(
        {
            "weight": [1, 2],
            "bias": np.array([3.0, 4.0]),
            "running_mean": np.zeros(2, np.float16),
            "running_var": (1.5, 2.5),
            "num_batches_tracked": 7,
        }
    )
    assert layer.weight.dtype == layer.running_var.dtype == FLOAT32
    assert layer.running_var.tolist() == [1.5, 2.5]
    assert layer.num_batches_tracked == 7


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"bias": None}, ValueError, r"missing: 'bias'"),
        ({"scale": np.ones(C)}, ValueError, r"unexpected: 'scale'"),
        ({"bias": None, "scale": 1}, ValueError, r"missing: 'bias'; unexpected: 'scale'"),
        ({"running_var": np.ones(C + 1)}, ValueError, r"running_var.*\(6,\).*\(7,\)"),
        ({"num_batches_tracked": [1]}, ValueError, r"num_batches_tracked.*\(\).*\(1,\)"),
        ({"num_batches_tracked": 1.5}, TypeError, "num_batches_tracked"),
        ({"bias": np.ones(C, complex)}, TypeError, "bias"),
        ({"bias": ["a"] * C}, TypeError, "bias"),
        ({"bias": [[1], [1, 2]]}, TypeError, "bias"),
    ],
)
def test_a_state_that_does_not_fit_loads_nothing(changes, error, match):
    layer = randomised(BatchNorm(C))
    before = layer.state_dict()
    state = {name: np.full_like(a, 9) for name, a in before.items()} | changes
    state = {name: a for name, a in state.items() if a is not None}
    with pytest.raises(error, match=match):
        layer.load_state_dict(state)
    assert states_equal(layer.state_dict(), before)


def test_nothing_is_loaded_where_an_array_cannot_be_written():
    layer = BatchNorm(C)
    layer.running_var.flags.writeable = False
    with pytest.raises(ValueError, match="running_var"):
        layer.load_state_dict({name: a + 1 for name, a in layer.state_dict().items()})
    assert states_equal(layer.state_dict(), BatchNorm(C).state_dict())


def test_a_state_must_be_a_mapping():
    with pytest.raises(TypeError, match="list"):
        BatchNorm(C).load_state_dict([1])


def test_loading_without_strict_reports_what_it_left():
    layer = BatchNorm(C)
    left = layer.load_state_dict({"weight": np.full(C, 2.0), "scale": 1}, strict=False)
    assert left.missing_keys == ["bias", "running_mean", "running_var"]
    assert left.unexpected_keys == ["scale"]
    assert layer.weight.tolist() == [2.0] * C


def test_early_checkpoints_have_no_count():
    layer = BatchNorm(C)
    state = layer.state_dict()
    del state["num_batches_tracked"]
    layer(normal(*SHAPE))
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 1


# --- Modes and errors ----------------------------------------------------------------------------


@each
def test_modes(make):
    layer = make()
    assert layer.training
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    assert layer.training
    assert not layer.train(False).training


@each
def test_backward_needs_a_call_in_training_mode(make):
    layer, x = make(), normal(*SHAPE)
    with pytest.raises(RuntimeError, match="has not been called"):
        layer.backward(x)
    layer(x)
    layer.eval()(x)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        layer.backward(x)
    layer.train()(x, out=x)
    with pytest.raises(RuntimeError, match="over x"):
        layer.backward(x)


def test_backward_has_no_activation():
    layer = BatchNorm(C, activation="relu")
    layer(normal(*SHAPE))
    with pytest.raises(ValueError, match="'relu'"):
        layer.backward(normal(*SHAPE))


@each
def test_a_failed_call_changes_nothing(make):
    layer, x = randomised(make()), normal(*SHAPE)
    layer(x)
    before = layer.state_dict()
    grad_y = normal(*SHAPE, seed=1)
    expected = layer.backward(grad_y)
    for wrong, error in (
        (x.astype(np.float64), TypeError),
        (x.tolist(), TypeError),
        (np.ones((2, C + 1, 3), np.float32), ValueError),
        (np.ones(C, np.float32), ValueError),
    ):
        with pytest.raises(error):
            layer(wrong)
    with pytest.raises(ValueError, match="out"):
        layer(x, out=np.empty((1, *SHAPE), np.float32))
    assert states_equal(layer.state_dict(), before)
    assert np.array_equal(layer.backward(grad_y), expected)
    with pytest.raises(ValueError, match="grad_y"):
        layer.backward(grad_y[:1])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: BatchNorm(1.5), TypeError, "num_features"),
        (lambda: BatchNorm("6"), TypeError, "num_features"),
        (lambda: BatchNorm((6, 6)), TypeError, "num_features"),
        (lambda: BatchNorm(-1), ValueError, "-1"),
        (lambda: BatchNorm(C, eps=-1.0), ValueError, "eps"),
        (lambda: BatchNorm(C, eps="1"), TypeError, "eps"),
        (lambda: BatchNorm(C, momentum="1"), TypeError, "momentum"),
        (lambda: BatchNorm(C, layout="NWHC"), ValueError, "layout"),
        (lambda: BatchNorm(C, activation="swish"), ValueError, "activation"),
        (lambda: BatchNorm(C, dtype=np.int32), TypeError, "dtype"),
        (lambda: BatchNorm(C, backend="cuda"), ValueError, "backend"),
        (lambda: InstanceNorm(C, momentum=None), TypeError, "momentum"),
        (lambda: GroupNorm(4, C), ValueError, "num_groups"),
        (lambda: GroupNorm(0, C), ValueError, "num_groups"),
        (lambda: GroupNorm(2.0, C), TypeError, "num_groups"),
        (lambda: LayerNorm(()), ValueError, "normalized_shape"),
        (lambda: LayerNorm(2.5), TypeError, "normalized_shape"),
        (lambda: LayerNorm((2, -3)), ValueError, "-3"),
        (lambda: LayerNorm(3, eps=None), TypeError, "eps"),
        (lambda: RMSNorm(3, eps=-1e-6), ValueError, "eps"),
    ],
)
def test_wrong_arguments_are_caught_by_the_constructor(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    "text",
    [
        "BatchNorm(64, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "BatchNorm(64, eps=0.1, momentum=None, affine=False, track_running_stats=False, "
        "bias=False, layout='NHWC', activation='relu', dtype='float64')",
        "InstanceNorm(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=False)",
        "GroupNorm(2, 8, eps=1e-05, affine=True, backend='numpy')",
        "LayerNorm((3, 4), eps=1e-05, elementwise_affine=True, bias=False, axis=(1, 2))",
        "RMSNorm((768,), eps=None, elementwise_affine=True)",
    ],
)
def test_repr_is_the_call_that_makes_it(text):
    assert repr(eval(text)) == text


@pytest.mark.parametrize("counting", [0, 1])
def test_a_batch_that_moves_nothing_is_not_counted(counting):
    layer, x = BatchNorm(C, momentum=None), normal(*SHAPE)
    mask = np.zeros((SHAPE[0], *SHAPE[2:]), bool)
    mask.flat[:counting] = True
    layer(x, mask=mask)
    assert layer.num_batches_tracked == 0
    layer(x)
    assert layer.num_batches_tracked == 1
    np.testing.assert_allclose(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-5)


def test_a_counter_that_cannot_be_written_is_an_error_before_anything_is():
    layer = BatchNorm(C)
    layer.num_batches_tracked.flags.writeable = False
    with pytest.raises(ValueError, match="num_batches_tracked must be writeable"):
        layer(normal(*SHAPE))
    assert not layer.running_mean.any()
    layer.eval()(normal(*SHAPE))


def test_bfloat16_state_comes_back_from_a_file_and_from_torch():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    layer = randomised(BatchNorm(C, dtype=bfloat16))
    file = io.BytesIO()
    np.savez(file, **layer.state_dict())
    for dtype in (bfloat16, np.float32):
        file.seek(0)
        other = BatchNorm(C, dtype=dtype)
        other.load_state_dict(np.load(file))
        assert_same_bits(other.running_var, layer.running_var.astype(dtype))
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm2d(C)
    theirs.running_mean.uniform_()
    layer.load_state_dict(theirs.bfloat16().state_dict())
    expected = theirs.running_mean.float().numpy().astype(bfloat16)
    assert_same_bits(layer.running_mean, expected)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LayerNorm(C, bias="no"), "bias"),
        (lambda: LayerNorm(C, elementwise_affine="no"), "elementwise_affine"),
        (lambda: LayerNorm(C, 1e-5, np.ones(C), np.zeros(C)), "elementwise_affine"),
        (lambda: RMSNorm(C, elementwise_affine=1), "elementwise_affine"),
        (lambda: BatchNorm(C, track_running_stats="no"), "track_running_stats"),
        (lambda: BatchNorm(C).train("no"), "mode"),
        (lambda: BatchNorm(C, dtype="bogus"), "dtype"),
    ],
)
def test_a_wrong_kind_of_argument_is_named(make, name):
    with pytest.raises(TypeError, match=f"^{name} must be"):
        make()
