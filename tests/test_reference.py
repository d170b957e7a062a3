"""The oracle is right: finite differences, identities, numbers worked out by hand."""

import ast
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from cpunorm import reference

from .cases import CHANNEL_OPS, LAYOUTS, TINY_CASES
from .support import copies, numeric_gradient, pick, run_oracle, run_oracle_backward

SOURCE = Path(reference.__file__)


def assert_equal(got, expected, tolerance=1e-12):
    """Equal up to the rounding of float64."""
    assert np.shape(got) == np.shape(expected)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def rng():
    return np.random.default_rng(20240101)


# --- It stands alone -----------------------------------------------------------------------------


def test_imports_only_numpy_and_the_standard_library():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    assert imported == {"math", "typing", "numpy", "numpy.typing"}


def test_runs_outside_the_package(monkeypatch):
    spec = importlib.util.spec_from_file_location("oracle_alone", SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "oracle_alone", module)
    spec.loader.exec_module(module)
    assert_equal(module.rms_norm(np.array([1.0, 7.0]), 2, eps=0.0).y, [0.2, 1.4])


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_never_writes_its_arguments_and_answers_in_float64(case):
    arrays, grad_y = case.arrays("float32"), case.grad_y("float32")
    before = copies(arrays)
    for array in (*arrays.values(), grad_y):
        array.flags.writeable = False
    forward, gradients = run_oracle(case, arrays), run_oracle_backward(case, arrays, grad_y)
    for name, array in arrays.items():
        assert array.tobytes() == before[name].tobytes()
    for result in (*forward, *gradients):
        assert result is None or result.dtype == np.float64


# --- Finite differences --------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 0.7])
@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_gradients_are_finite_differences(case, eps):
    arrays, grad_y = case.arrays("float64"), case.grad_y("float64")

    def loss():
        return float((run_oracle(case, arrays, eps=eps).y * grad_y).sum())

    gradients = run_oracle_backward(case, arrays, grad_y, eps=eps)
    checked = pick(arrays, "x", "weight", "bias")
    assert len(checked) == 2 if case.is_rms else 3
    for array, gradient in zip(checked.values(), gradients, strict=False):
        # h² times the third derivative, and rounding over h
        assert_equal(gradient, numeric_gradient(loss, array), 1e-7)


@pytest.mark.parametrize("case", [c for c in TINY_CASES if c.adds], ids=str)
def test_the_gradient_of_a_sum_is_that_of_both_summands(case):
    arrays, grad_y = case.arrays("float64"), case.grad_y("float64")
    grad_sum = np.random.default_rng(1).standard_normal(case.shape)

    def loss():
        result = run_oracle(case, arrays)
        return float((result.y * grad_y).sum() + (result.total * grad_sum).sum())

    gradient, *_ = run_oracle_backward(case, arrays, grad_y, grad_sum=grad_sum)
    for name in ("x", "residual"):
        assert_equal(gradient, numeric_gradient(loss, arrays[name]), 1e-7)


# --- Identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_instance_norm_is_group_norm_with_a_group_per_channel(rng, layout):
    x, grad_y = rng.normal(3, 2, (2, 3, 4, 5, 4))
    weight, bias = rng.normal(size=(2, 4))
    instance = reference.instance_norm(x, None, None, weight, bias, layout=layout)
    group = reference.group_norm(x, 4, weight, bias, layout=layout)
    for one, other in zip(instance[:3], group[:3], strict=True):
        assert_equal(one, other)
    for one, other in zip(
        reference.instance_norm_backward(grad_y, x, weight, layout=layout),
        reference.group_norm_backward(grad_y, x, 4, weight, layout=layout),
        strict=True,
    ):
        assert_equal(one, other)


def test_group_norm_with_one_group_is_layer_norm_over_everything_but_the_batch(rng):
    x, grad_y = rng.normal(3, 2, (2, 4, 3, 5, 2))
    weight, bias = rng.normal(size=(2, 3))
    full_weight, full_bias = (np.broadcast_to(p[:, None, None], (3, 5, 2)) for p in (weight, bias))
    group = reference.group_norm(x, 1, weight, bias)
    layer = reference.layer_norm(x, (3, 5, 2), full_weight, full_bias)
    assert_equal(group.y, layer.y)
    assert_equal(group.mean[:, 0], layer.mean)
    assert_equal(group.rstd[:, 0], layer.rstd)
    of_group = reference.group_norm_backward(grad_y, x, 1, weight)
    of_layer = reference.layer_norm_backward(grad_y, x, (3, 5, 2), full_weight)
    assert_equal(of_group[0], of_layer[0])
    for one, other in zip(of_group[1:], of_layer[1:], strict=True):
        assert_equal(one, other.sum(axis=(1, 2)))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_an_interior_axis_is_a_transposed_trailing_one(rng, op):
    x, grad_y = rng.normal(3, 2, (2, 2, 5, 3, 4))
    parameters = {"weight": rng.normal(size=5)}
    forward, backward = getattr(reference, op), getattr(reference, f"{op}_backward")
    interior = forward(x, 5, **parameters, axis=1)
    trailing = forward(np.moveaxis(x, 1, -1), 5, **parameters)
    assert_equal(interior.y, np.moveaxis(trailing.y, -1, 1))
    assert_equal(interior.rstd, trailing.rstd)
    of_interior = backward(grad_y, x, 5, **parameters, axis=1)
    of_trailing = backward(np.moveaxis(grad_y, 1, -1), np.moveaxis(x, 1, -1), 5, **parameters)
    assert_equal(of_interior[0], np.moveaxis(of_trailing[0], -1, 1))
    assert_equal(of_interior[1], of_trailing[1])


def test_the_axes_of_the_weight_follow_the_order_of_axis(rng):
    x, grad_y = rng.normal(3, 2, (2, 2, 5, 3, 4))
    weight, bias = rng.normal(size=(2, 5, 4))
    forward = reference.layer_norm(x, (5, 4), weight, bias, axis=(1, 3))
    swapped = reference.layer_norm(x, (4, 5), weight.T, bias.T, axis=(-1, 1))
    assert_equal(forward.y, swapped.y)
    assert_equal(forward.mean, x.mean(axis=(1, 3)))
    gradients = reference.layer_norm_backward(grad_y, x, (5, 4), weight, axis=(1, 3))
    of_swapped = reference.layer_norm_backward(grad_y, x, (4, 5), weight.T, axis=(3, 1))
    assert_equal(gradients[0], of_swapped[0])
    assert_equal(gradients[1], of_swapped[1].T)
    assert_equal(gradients[2], of_swapped[2].T)


@pytest.mark.parametrize("op", CHANNEL_OPS)
def test_channels_last_is_channels_first_transposed(rng, op):
    x, grad_y = rng.normal(3, 2, (2, 4, 6, 3, 5))
    last = {"layout": "NHWC"}
    options = {"batch_norm": {"running_mean": None, "running_var": None, "training": True},
               "group_norm": {"num_groups": 3}}.get(op, {})  # fmt: skip
    parameters = {"weight": rng.normal(size=6)}
    forward, backward = getattr(reference, op), getattr(reference, f"{op}_backward")
    first = forward(x, **parameters, **options)
    transposed = forward(np.moveaxis(x, 1, -1), **parameters, **options, **last)
    assert_equal(first.y, np.moveaxis(transposed.y, -1, 1))
    assert_equal(first.mean, transposed.mean)
    options = pick(options, "training", "num_groups")
    of_first = backward(grad_y, x, **parameters, **options)
    of_last = backward(
        np.moveaxis(grad_y, 1, -1), np.moveaxis(x, 1, -1), **parameters, **options, **last
    )
    assert_equal(of_first[0], np.moveaxis(of_last[0], -1, 1))
    assert_equal(of_first[1], of_last[1])


def test_batch_norm_of_a_batch_is_instance_norm_of_the_images_joined(rng):
    x = rng.normal(3, 2, (4, 3, 2, 5))
    joined = np.concatenate(list(x), axis=1)[None]
    batch = reference.batch_norm(x, np.zeros(3), np.ones(3), training=True)
    instance = reference.instance_norm(joined, np.zeros(3), np.ones(3))
    assert_equal(np.concatenate(list(batch.y), axis=1)[None], instance.y)
    assert_equal(batch.running_mean, instance.running_mean)
    assert_equal(batch.running_var, instance.running_var)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_frozen_statistics_that_are_those_of_x_give_the_same_values(rng, op):
    flag = {"batch_norm": "training", "instance_norm": "use_input_stats"}[op]
    x = rng.normal(3, 2, (1, 3, 4, 5))
    grad_y, weight = rng.normal(size=x.shape), rng.normal(size=3)
    running = {"running_mean": x.mean(axis=(0, 2, 3)), "running_var": x.var(axis=(0, 2, 3))}
    forward, backward = getattr(reference, op), getattr(reference, f"{op}_backward")
    own = forward(x, None, None, weight, **{flag: True})
    frozen = forward(x, **running, weight=weight, **{flag: False})
    assert_equal(own.y, frozen.y)
    assert_equal(own.rstd.ravel(), frozen.rstd)
    assert_equal(frozen.running_mean, running["running_mean"])
    of_own = backward(grad_y, x, weight, **{flag: True})
    of_frozen = backward(grad_y, x, weight, **{flag: False}, **running)
    for one, other in zip(of_own[1:], of_frozen[1:], strict=True):
        assert_equal(one, other)
    assert_equal(of_frozen[0], grad_y * (weight * frozen.rstd)[:, None, None])
    assert np.abs(of_own[0] - of_frozen[0]).max() > 1e-3


@pytest.mark.parametrize("activation", [a for a in reference.ACTIVATIONS if a])
def test_residual_comes_after_the_affine_step_and_before_the_activation(rng, activation):
    x, residual = rng.normal(1, 2, (2, 2, 6, 5))
    plain = reference.group_norm(x, 2).y
    both = reference.group_norm(x, 2, activation=activation, residual=residual).y
    assert_equal(both, reference.ACTIVATIONS[activation](plain + residual))


def test_the_sum_is_normalised_after_the_addition(rng):
    x, residual = rng.normal(1, 2, (2, 4, 6))
    for op in ("layer_norm", "rms_norm"):
        added = getattr(reference, f"add_{op}")(x, residual, 6)
        assert_equal(added.total, x + residual)
        assert_equal(added.y, getattr(reference, op)(x + residual, 6).y)


# --- Numbers worked out by hand ------------------------------------------------------------------


def test_layer_norm_by_hand():
    # mean 2, var 1, rstd 1/√(1 + 3) = 1/2
    result = reference.layer_norm([[1.0, 3.0]], 2, [2.0, 4.0], [1.0, 0.0], 3.0)
    assert_equal(result.y, [[0.0, 2.0]])
    assert_equal(result.mean, [2.0])
    assert_equal(result.rstd, [0.5])


def test_layer_norm_backward_by_hand():
    # x̂ = (-1/2, 1/2), mean(ĝ) = 1/2, mean(ĝ·x̂) = -1/4
    grad_x, grad_weight, grad_bias = reference.layer_norm_backward(
        [[1.0, 0.0]], [[1.0, 3.0]], 2, eps=3.0
    )
    assert_equal(grad_x, [[0.1875, -0.1875]])
    assert_equal(grad_weight, [-0.5, 0.0])
    assert_equal(grad_bias, [1.0, 0.0])


def test_rms_norm_by_hand():
    # mean(x²) = 25
    result = reference.rms_norm([[1.0, 7.0]], 2, [10.0, 1.0], 0.0)
    assert_equal(result.y, [[2.0, 1.4]])
    assert result.mean is None
    assert_equal(result.rstd, [0.2])
    # mean(ĝ·x̂) = 0.1, grad_x = 0.2·((1, 0) - 0.1·(0.2, 1.4))
    gradients = reference.rms_norm_backward([[1.0, 0.0]], [[1.0, 7.0]], 2, eps=0.0)
    assert_equal(gradients[0], [[0.196, -0.028]])
    assert_equal(gradients[1], [0.2, 0.0])
    assert gradients[2] is None


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 2.0**-23), ("float64", 2.0**-52)])
def test_rms_norm_eps_none_is_the_machine_epsilon(dtype, eps):
    x = np.array([[1e-4, -2e-4, 3e-5]], dtype)
    assert_equal(reference.rms_norm(x, 3).y, reference.rms_norm(x, 3, eps=eps).y)
    added = reference.add_rms_norm(x, np.zeros_like(x), 3)
    assert_equal(added.y, reference.rms_norm(x, 3, eps=eps).y)


def test_batch_norm_by_hand():
    # mean 2, var 1, unbiased var 2
    x = np.array([[1.0], [3.0]])
    result = reference.batch_norm(x, [0.0], [1.0], [3.0], [1.0], True, 0.25, 8.0)
    assert_equal(result.y, [[0.0], [2.0]])
    assert_equal(result.running_mean, [0.5])
    assert_equal(result.running_var, [1.25])
    frozen = reference.batch_norm(x, [5.0], [1.0], eps=3.0)
    assert_equal(frozen.y, [[-2.0], [-1.0]])


def test_instance_norm_by_hand():
    # means 1 and 7, variances 1 and 9, unbiased 2 and 18
    x = np.array([[[0.0, 2.0]], [[4.0, 10.0]]])
    result = reference.instance_norm(x, [0.0], [0.0], momentum=0.5, eps=0.0)
    assert_equal(result.y, [[[-1.0, 1.0]], [[-1.0, 1.0]]])
    assert_equal(result.mean, [[1.0], [7.0]])
    assert_equal(result.running_mean, [2.0])
    assert_equal(result.running_var, [5.0])


def test_group_norm_by_hand():
    # channels (1, 3) and (10, 10)
    result = reference.group_norm([[1.0, 3.0, 10.0, 10.0]], 2, [1, 1, 1, 2], [0, 0, 5, 6], eps=0.25)
    half = 1.25**-0.5
    assert_equal(result.y, [[-half, half, 5.0, 6.0]])
    assert_equal(result.mean, [[2.0, 10.0]])
    assert_equal(result.rstd, [[half, 2.0]])


@pytest.mark.parametrize(
    ("activation", "values"),
    [
        ("relu", {-1.0: 0.0, 2.0: 2.0}),
        ("sigmoid", {0.0: 0.5, 1.0: 0.7310585786300049, -800.0: 0.0}),
        ("silu", {1.0: 0.7310585786300049, -1.0: -0.2689414213699951}),
        (
            "gelu",
            {1.0: 0.8413447460685429, -1.0: -0.15865525393145707, -10.0: -7.619853024160526e-23},
        ),
        ("tanh", {1.0: 0.7615941559557649, 50.0: 1.0}),
    ],
)
def test_activations_by_hand(activation, values):
    got = reference.ACTIVATIONS[activation](np.array(list(values)))
    np.testing.assert_allclose(got, list(values.values()), rtol=1e-13, atol=1e-300)


def test_a_large_offset_costs_the_oracle_nothing():
    x = np.array([[1e8 + 1, 1e8 + 3]])
    result = reference.layer_norm(x, 2, eps=0.0)
    assert_equal(result.y, [[-1.0, 1.0]], 0.0)
    constant = np.full((1, 1000), 0.1)
    assert np.abs(reference.layer_norm(constant, 1000).y).max() < 1e-12
