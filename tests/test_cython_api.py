"""The C API: a module that cimports cpunorm is built, and computes what cpunorm does."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import cpunorm

from .support import AVAILABLE

if "cython" not in AVAILABLE:
    pytest.skip("the compiled backend was not built", allow_module_level=True)
pytest.importorskip("Cython")

ROOT = Path(cpunorm.__file__).parents[1]
PAGE = ROOT / "docs" / "cython.md"

SOURCE = """
# cython: language_level=3
cimport cpunorm
from cpunorm cimport BAD_ARGUMENT, real

def rms(real[:, ::1] x, real[::1] weight, real[:, ::1] y, int threads):
    cdef real* none = NULL
    return cpunorm.rms_norm(&x[0, 0], &weight[0], &y[0, 0], none, x.shape[0], x.shape[1], 1e-5,
                            threads)

def group(real[:, :, ::1] x, Py_ssize_t groups, real[:, :, ::1] y, real[:, ::1] mean,
          real[:, ::1] rstd, real[:, :, ::1] grad_y, real[:, :, ::1] grad_x,
          real[::1] grad_weight, real[::1] grad_bias, int threads):
    cdef real* none = NULL
    cdef int failed
    with nogil:
        failed = cpunorm.group_norm(
            &x[0, 0, 0], none, none, &y[0, 0, 0], &mean[0, 0], &rstd[0, 0], x.shape[0], x.shape[1],
            x.shape[2], groups, 1e-5, False, threads)
        if not failed:
            failed = cpunorm.group_norm_backward(
                &grad_y[0, 0, 0], &x[0, 0, 0], &mean[0, 0], &rstd[0, 0], none, &grad_x[0, 0, 0],
                &grad_weight[0], &grad_bias[0], x.shape[0], x.shape[1], x.shape[2], groups, False,
                threads)
    return failed

def batch(real[:, :, ::1] x, real[::1] running_mean, real[::1] running_var, real[:, :, ::1] y,
          bint training):
    cdef real* none = NULL
    return cpunorm.batch_norm(
        &x[0, 0, 0], &running_mean[0], &running_var[0], none, none, &y[0, 0, 0], none, none,
        x.shape[0], x.shape[1], x.shape[2], training, 0.1, 1e-5, False, 2)

bad = BAD_ARGUMENT
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Build a module from Cython, as a user of the installed package would."""

    def built(name, source):
        folder = tmp_path_factory.mktemp(name)
        (folder / f"{name}.pyx").write_text(textwrap.dedent(source))
        # An editable install is found by an import hook, which Cython does not ask.
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "CFLAGS": "-O0"}
        command = [sys.executable, "-m", "Cython.Build.Cythonize", "-i", "-q", f"{name}.pyx"]
        run = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        (path,) = [p for p in folder.iterdir() if p.suffix in (".so", ".pyd")]
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return built


@pytest.fixture(scope="module")
def user(build):
    return build("user", SOURCE)


def normal(shape, dtype):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def test_the_example_of_the_page(build):
    source = re.search("```cython\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    x, weight = normal((5, 40), "f4"), np.linspace(1, 2, 40, dtype="f4")
    y = np.empty_like(x)
    build("page", source).normalized(x, weight, y)
    np.testing.assert_array_equal(y, cpunorm.layer_norm(x, 40, weight))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shape", [(3, 5), (300, 257)])
def test_rms_norm(user, shape, dtype, threads):
    x, weight = normal(shape, dtype), normal(shape[1:], dtype)
    y = np.empty_like(x)
    assert user.rms(x, weight, y, threads) == 0
    np.testing.assert_array_equal(y, cpunorm.rms_norm(x, shape[1], weight, 1e-5))
    assert user.rms(x, weight, x, threads) == 0
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shape", [(2, 6, 7), (4, 12, 900), (3, 4, 1)])
def test_group_norm(user, shape, dtype):
    x, grad_y = normal(shape, dtype), normal(shape, dtype)[::-1].copy()
    N, C, _ = shape
    y, grad_x = np.empty_like(x), np.empty_like(x)
    mean, rstd, grad_weight, grad_bias = (np.empty(s, dtype) for s in ((N, 2), (N, 2), (C,), (C,)))
    assert user.group(x, 2, y, mean, rstd, grad_y, grad_x, grad_weight, grad_bias, 2) == 0
    expected, stats = cpunorm.group_norm(x, 2, return_stats=True)
    gradients = cpunorm.group_norm_backward(grad_y, x, 2, stats)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(mean, stats.mean)
    np.testing.assert_array_equal(rstd, stats.rstd)
    np.testing.assert_array_equal(grad_x, gradients.x)
    np.testing.assert_array_equal(grad_weight, gradients.weight)
    np.testing.assert_array_equal(grad_bias, gradients.bias)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(user, training):
    x = normal((4, 6, 50), "f4")
    ours, theirs = ([np.zeros(6, "f4"), np.full(6, 2, "f4")] for _ in range(2))
    y = np.empty_like(x)
    assert user.batch(x, *ours, y, training) == 0
    np.testing.assert_array_equal(y, cpunorm.batch_norm(x, *theirs, training=training))
    np.testing.assert_array_equal(ours, theirs)


def test_bad_arguments_write_nothing(user):
    x = normal((2, 6, 7), "f4")
    y = np.full_like(x, 7)
    statistics = [np.ones((2, 4), "f4") for _ in range(2)]
    rest = x, np.empty_like(x), np.empty(6, "f4"), np.empty(6, "f4")
    assert user.group(x, 4, y, *statistics, *rest, 1) == user.bad
    assert user.group(x, 3, y, *statistics, *rest, 0) == user.bad
    one = normal((1, 6, 1), "f4")
    assert user.batch(one, np.ones(6, "f4"), np.ones(6, "f4"), y, True) == user.bad
    assert (y == 7).all()
