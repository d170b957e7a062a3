"""The public names and signatures are the contract, to the letter."""

import inspect

import pytest

import cpunorm

OUT = "out=None, return_stats=False, backend=None"
GROUP = f'layout="NCHW", activation=None, residual=None, mask=None, {OUT}'
RUNNING = f'layout="NCHW", activation=None, residual=None, mask=None, convention="torch", {OUT}'
BACKWARD = 'layout="NCHW", mask=None, need=(True, True, True), backend=None'
AXIS_BACKWARD = "axis=None, grad_sum=None, mask=None, need=(True, True, True), backend=None"
AXIS = f"axis=None, mask=None, {OUT}"
ADD = "axis=None, out=None, sum_out=None, return_stats=False, backend=None"

SIGNATURES = {
    "batch_norm": "x, running_mean, running_var, weight=None, bias=None, training=False, "
    f"momentum=0.1, eps=1e-5, *, {RUNNING}",
    "instance_norm": "x, running_mean=None, running_var=None, weight=None, bias=None, "
    f"use_input_stats=True, momentum=0.1, eps=1e-5, *, {RUNNING}",
    "group_norm": f"x, num_groups, weight=None, bias=None, eps=1e-5, *, {GROUP}",
    "layer_norm": f"x, normalized_shape, weight=None, bias=None, eps=1e-5, *, {AXIS}",
    "rms_norm": f"x, normalized_shape, weight=None, eps=None, *, {AXIS}",
    "add_layer_norm": f"x, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, {ADD}",
    "add_rms_norm": f"x, residual, normalized_shape, weight=None, eps=None, *, {ADD}",
    "batch_norm_backward": f"grad_y, x, stats, weight=None, training=True, *, {BACKWARD}",
    "instance_norm_backward": f"grad_y, x, stats, weight=None, use_input_stats=True, *, {BACKWARD}",
    "group_norm_backward": f"grad_y, x, num_groups, stats, weight=None, *, {BACKWARD}",
    "layer_norm_backward": f"grad_y, x, normalized_shape, stats, weight=None, *, {AXIS_BACKWARD}",
    "rms_norm_backward": f"grad_y, x, normalized_shape, stats, weight=None, *, {AXIS_BACKWARD}",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """Names, order, defaults, and which come by name only."""
    wanted = {}
    exec(f"def wanted({SIGNATURES[name]}): ...", wanted)
    assert inspect.signature(getattr(cpunorm, name)) == inspect.signature(wanted["wanted"])


def test_public_names():
    functions = set(SIGNATURES)
    around = {"Stats", "Gradients", "use_backend", "set_num_threads", "get_num_threads"}
    around |= {"show_config", "available_backends", "advise", "Advice"}
    around |= {"Moments", "RunningStatistics"}
    assert functions | around <= set(cpunorm.__all__)
    assert len(cpunorm.__all__) == len(set(cpunorm.__all__))
    for name in cpunorm.__all__:
        assert hasattr(cpunorm, name)


@pytest.mark.parametrize(
    "name", [*SIGNATURES, "set_num_threads", "get_num_threads", "use_backend", "advise", "Moments"]
)
def test_documented(name):
    """Every function says what it takes, what it gives, and shows an example."""
    doc = inspect.getdoc(getattr(cpunorm, name))
    assert "Examples\n--------" in doc
    for parameter in inspect.signature(getattr(cpunorm, name)).parameters:
        assert parameter in doc


def test_results_are_named_tuples():
    assert cpunorm.Stats._fields == ("mean", "rstd")
    assert cpunorm.RunningStatistics._fields == ("running_mean", "running_var")
    assert cpunorm.Gradients._fields == ("x", "weight", "bias")
