"""Every numba option of the package, and the rules by which a kernel is launched.

numba caches a kernel under the file that defines it and looks at no other: after editing `sweeps.py`
or `activations.py`, delete the `.nbi` files in `__pycache__`.
"""

import threading
from types import FunctionType

import numba
import numpy as np

_OPTIONS = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    # Never `nnan` or `ninf`: NaN and Inf must survive, and stay in the statistic they belong to.
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "boundscheck": False,
}

# numba's `workqueue` layer dies when two Python threads launch at once; `omp` and `tbb` do not.
_one_launch = threading.Lock()

jit = numba.njit(**_OPTIONS)


def twins(body):
    """Compile `body(tasks, ...)`, one prange loop, serially and in parallel.

    The function returned takes the largest number of threads first. One thread runs the serial twin
    and touches no thread pool, which is what makes it safe in a forked child.
    """
    # Without parallel=True, prange is range. The cache tells functions apart by name: the twin has its own.
    namesake = FunctionType(body.__code__, body.__globals__, body.__name__)
    namesake.__qualname__ = f"{body.__qualname__}_parallel"
    serial = jit(body)
    parallel = numba.njit(parallel=True, **_OPTIONS)(namesake)

    def launch(threads, tasks, *arguments):
        threads = min(threads, tasks, numba.config.NUMBA_NUM_THREADS)
        if threads == 1:
            serial(tasks, *arguments)
            return
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            if numba.threading_layer() == "workqueue":
                with _one_launch:
                    parallel(tasks, *arguments)
            else:
                parallel(tasks, *arguments)
        finally:
            numba.set_num_threads(before)

    return launch


def flat(array, like):
    """`array` as one dimension; None becomes an empty array, so that it needs no specialisation."""
    return np.empty(0, like.dtype) if array is None else array.reshape(-1)
