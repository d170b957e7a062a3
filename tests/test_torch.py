"""What torch tests its own normalizations with, given to ours: values, gradients, errors."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import cpunorm

from .support import (
    AVAILABLE,
    DTYPES,
    HALF_DTYPES,
    assert_gradients_close,
    assert_values_close,
)

with warnings.catch_warnings():  # torch's affair
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("expecttest", reason="torch.testing's samples need it")
    from torch.testing._internal.common_methods_invocations import op_db

OPS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
ENTRIES = {
    op.name.removeprefix("nn.functional."): op
    for op in op_db
    if op.name.removeprefix("nn.functional.") in OPS and not op.variant_test_name
}
# The positional arguments of each function after x, by name.
POSITIONAL = {
    "batch_norm": ("running_mean", "running_var", "weight", "bias"),
    "instance_norm": ("running_mean", "running_var", "weight", "bias"),
    "group_norm": ("num_groups",),
    "layer_norm": ("normalized_shape", "weight", "bias"),
    "rms_norm": ("normalized_shape", "weight", "eps"),
}


def named(op, sample):
    """A sample's arguments by name."""
    positional = dict(zip(POSITIONAL[op], sample.args, strict=False))
    return {"x": sample.input, **positional, **sample.kwargs}


def samples():
    for op, entry in ENTRIES.items():
        for i, sample in enumerate(entry.sample_inputs("cpu", torch.float64)):
            yield pytest.param(op, named(op, sample), id=f"{op}-{i}")


def errors():
    for op, entry in ENTRIES.items():
        if entry.error_inputs_func is not None:
            for i, error in enumerate(entry.error_inputs("cpu")):
                yield pytest.param(op, named(op, error.sample_input), id=f"{op}-{i}")


def to_numpy(arguments, dtype):
    return {
        name: value.detach().numpy().astype(dtype) if torch.is_tensor(value) else value
        for name, value in arguments.items()
    }


def to_torch(arguments):
    """The very values ours gets, in float64, x and the parameters asking for gradients."""
    tensors = {
        name: torch.tensor(value.astype("float64")) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    for name in ("x", "weight", "bias"):
        if torch.is_tensor(tensors.get(name)):
            tensors[name].requires_grad_()
    return tensors


def call_torch(op, tensors):
    arguments = dict(tensors)
    return getattr(torch.nn.functional, op)(arguments.pop("x"), **arguments)


def test_every_operation_has_samples():
    assert set(ENTRIES) == set(OPS)
    assert {parameters.values[0] for parameters in samples()} == set(OPS)


@pytest.mark.parametrize("dtype", (*DTYPES, *HALF_DTYPES))
@pytest.mark.parametrize(("op", "sample"), list(samples()))
def test_sample(op, sample, dtype, backend):
    arguments = to_numpy(sample, dtype)
    function = getattr(cpunorm, op)
    if arguments.get("eps") is not None and arguments["eps"] < 0:
        # torch takes the root of what is left; here it is an error, by contract
        with pytest.raises(ValueError, match="eps"):
            function(**arguments, backend=backend)
        return
    tensors = to_torch(arguments)
    if op == "rms_norm" and tensors.get("eps") is None:
        tensors["eps"] = float(np.finfo("float64" if dtype == "float64" else "float32").eps)
    expected = call_torch(op, tensors)
    y, stats = function(**arguments, return_stats=True, backend=backend)
    assert_values_close(y, expected.detach().numpy())
    for name in ("running_mean", "running_var"):
        if arguments.get(name) is not None:
            assert_values_close(arguments[name], tensors[name].numpy())

    grad_y = np.random.default_rng(0).normal(0.5, 1, y.shape).astype(dtype)
    expected.backward(torch.tensor(grad_y.astype("float64")))
    wanted = [
        tensors[name].grad.numpy() if torch.is_tensor(tensors.get(name)) else None
        for name in ("x", "weight", "bias")
    ]
    passed = ("num_groups", "normalized_shape", "weight", "training", "use_input_stats")
    taken = {name: arguments[name] for name in passed if name in arguments}
    taken = {"training": False, **taken} if op == "batch_norm" else taken
    gradients = getattr(cpunorm, f"{op}_backward")(
        grad_y, arguments["x"], stats=stats, **taken, backend=backend
    )
    # ours are there without a parameter too
    ours = [g if w is not None else None for g, w in zip(gradients, wanted, strict=True)]
    assert_gradients_close(ours, wanted)


def to_half_torch(array):
    """A tensor of the same dtype: torch reads NumPy's arrays, but none of bfloat16."""
    if array.dtype.name != "bfloat16":
        return torch.tensor(array)
    return torch.tensor(array.view("int16")).view(torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_16_bits(op, dtype, mixed, backend):
    """Every result has the dtype torch gives it, and is no further off than torch's own kernels.

    It is often nearer: they round statistics, or sums over rows, to 16 bits on the way.
    """
    rng = np.random.default_rng(0)
    parameters = "float32" if mixed else dtype
    x, grad_y = rng.normal(1, 2, (2, 8, 6, 33)).astype(dtype)
    extra = {"group_norm": {"num_groups": 3}, "batch_norm": {"training": True}}.get(op, {})
    size = 33 if op in ("layer_norm", "rms_norm") else 6
    extra |= {"normalized_shape": (33,)} if size == 33 else {}
    names = ("weight",) if op == "rms_norm" else ("weight", "bias")
    affine = {name: rng.normal(1, 0.5, size).astype(parameters) for name in names}
    running = {}
    if op == "batch_norm":
        running = {f"running_{s}": np.ones(size, parameters) for s in ("mean", "var")}

    arrays = {"x": x} | affine | running
    tensors = {name: to_half_torch(a) for name, a in arrays.items()}
    for name in ("x", *affine):
        tensors[name].requires_grad_()
    theirs = call_torch(op, tensors | extra)
    theirs.backward(to_half_torch(grad_y))
    exact = to_torch(arrays)
    wanted = call_torch(op, exact | extra)
    wanted.backward(torch.tensor(grad_y.astype("float64")))

    y, stats = getattr(cpunorm, op)(
        x, **affine, **running, **extra, return_stats=True, backend=backend
    )
    gradients = getattr(cpunorm, f"{op}_backward")(
        grad_y, x, stats=stats, weight=affine["weight"], **extra, backend=backend
    )
    results = [(y, theirs, wanted)]
    results += [(running[name], tensors[name], exact[name]) for name in running]
    results += [
        (gradient, tensors[name].grad, exact[name].grad)
        for gradient, name in zip(gradients, ("x", *affine), strict=False)
    ]
    for ours, theirs, wanted in results:
        assert str(theirs.dtype) == f"torch.{ours.dtype}"
        wanted = wanted.detach().numpy()
        error, their_error = (
            np.abs(a - wanted).max() for a in (ours, theirs.detach().double().numpy())
        )
        # And a few roundings of float32, of results as large as these.
        few = 4 * np.finfo("float32").eps * np.abs(wanted).max()
        assert error <= 1.01 * their_error + 3e-6 + few


@pytest.mark.parametrize(("op", "sample"), list(errors()))
def test_error_input(op, sample, backend):
    """What is an error there is one here, and nothing is computed."""
    arguments = to_numpy(sample, "float32")
    with pytest.raises((ValueError, TypeError)):
        getattr(cpunorm, op)(**arguments, backend=backend)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm", "group_norm"])
def test_channels_last_memory(op, backend):
    """A tensor in torch's channels_last format is an NCHW array here, and keeps its strides."""
    x = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0)) + 3
    x = x.contiguous(memory_format=torch.channels_last)
    extra = {"batch_norm": {"running_mean": None, "running_var": None, "training": True},
             "group_norm": {"num_groups": 3}}.get(op, {})  # fmt: skip
    y = getattr(cpunorm, op)(x.numpy(), **extra, backend=backend)
    assert y.strides == x.numpy().strides
    assert_values_close(y, getattr(torch.nn.functional, op)(x.double(), **extra).numpy())


def test_gelu_is_the_exact_one(backend):
    x = torch.linspace(-6, 6, 1001)
    zeros, ones = np.zeros(1, "float32"), np.ones(1, "float32")
    y = cpunorm.batch_norm(
        x.numpy()[:, None], zeros, ones, eps=0.0, activation="gelu", backend=backend
    )
    assert_values_close(y[:, 0], torch.nn.functional.gelu(x.double()).numpy())


@pytest.mark.parametrize("threads", [1, 2])
def test_both_in_one_process_in_turn(threads, backend, restore_threads):
    """Neither hangs the other, and the numbers stay."""
    cpunorm.set_num_threads(threads)
    x = np.random.default_rng(0).normal(1, 2, (64, 1024)).astype("float32")
    expected = torch.nn.functional.layer_norm(torch.tensor(x).double(), (1024,)).numpy()
    for _ in range(5):
        assert_values_close(cpunorm.layer_norm(x, 1024, backend=backend), expected)
        torch.nn.functional.layer_norm(torch.tensor(x), (1024,))


@pytest.mark.skipif("cython" not in AVAILABLE, reason="the compiled backend was not built")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="libraries are listed in /proc")
@pytest.mark.parametrize("order", ["torch, cpunorm", "cpunorm, torch"])
def test_both_share_one_openmp_runtime(order):
    """Whichever comes first brings it; two would fight for the cores."""
    text = f"""
import re, warnings
warnings.simplefilter("ignore")
import {order}, numpy
cpunorm.layer_norm(numpy.ones((64, 1024), "float32"), 1024, backend="cython")
torch.nn.functional.layer_norm(torch.ones(64, 1024), (1024,))
print(len(set(re.findall(r"/.*/lib[gi]?omp.*", open("/proc/self/maps").read()))))
"""
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "1"
