"""Layer norm inside compiled code, by hand and by cpunorm: python -m bench.embedded

What a user would write in Numba and in Cython, against one call of cpunorm.numba or of the C API:
float32, one thread, microseconds, medians of blocks in turn.
"""

import importlib.util
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from cpunorm import numba as norm

from .turns import compared, header, row, seconds

BLOCKS, CALLS = 15, 200

CYTHON = """
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
from libc.math cimport sqrt
from cpunorm cimport layer_norm

def by_hand(float[:, ::1] x, float[::1] weight, float[::1] bias, float[:, ::1] y):
    cdef Py_ssize_t i, j
    cdef float mean, var, d
    with nogil:
        for i in range(x.shape[0]):
            mean = var = 0
            for j in range(x.shape[1]):
                mean += x[i, j]
            mean /= x.shape[1]
            for j in range(x.shape[1]):
                d = x[i, j] - mean
                var += d * d
            d = 1 / sqrt(var / x.shape[1] + 1e-5)
            for j in range(x.shape[1]):
                y[i, j] = (x[i, j] - mean) * d * weight[j] + bias[j]

def by_cpunorm(float[:, ::1] x, float[::1] weight, float[::1] bias, float[:, ::1] y):
    with nogil:
        layer_norm(&x[0, 0], &weight[0], &bias[0], &y[0, 0], NULL, NULL, x.shape[0], x.shape[1],
                   1e-5, 1)
"""


@numba.njit(fastmath=True)
def by_hand(x, weight, bias, y):
    for i in range(len(x)):
        mean = x[i].mean()
        d = x[i] - mean
        y[i] = d / np.sqrt((d * d).mean() + np.float32(1e-5)) * weight + bias


@numba.njit
def by_cpunorm(x, weight, bias, y):
    norm.layer_norm(x, weight, bias, 1e-5, y)


def built(folder: Path) -> Any:
    """Return the Cython module."""
    (folder / "embedded.pyx").write_text(CYTHON)
    root = str(Path(__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from Cython.Build.Cythonize import main; main()"
    )
    command = [sys.executable, "-c", code, "-i", "-q", "embedded.pyx"]
    subprocess.run(command, cwd=folder, check=True)
    (path,) = folder.glob("embedded*.so")
    spec = importlib.util.spec_from_file_location("embedded", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Print a line per language and shape."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        module = built(Path(folder))
        languages = {
            "Numba": [by_hand, by_cpunorm],
            "Cython": [module.by_hand, module.by_cpunorm],
        }
        print(header("", "shape", "by hand", "cpunorm", "ratio"))
        for language, functions in languages.items():
            for shape in ((1, 768), (64, 128), (512, 768)):
                x = rng.normal(size=shape).astype(np.float32)
                weight, bias = rng.normal(size=(2, shape[1])).astype(np.float32)
                results = [np.empty_like(x) for _ in functions]
                for function, y in zip(functions, results, strict=True):
                    function(x, weight, bias, y)
                np.testing.assert_allclose(*results, rtol=1e-3, atol=1e-3)
                calls = [partial(function, x, weight, bias, results[0]) for function in functions]
                before, after = seconds(calls, BLOCKS, CALLS)
                print(row(language, shape, *compared(before, after, 1e6)))


if __name__ == "__main__":
    main()
