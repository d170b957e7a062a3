"""Every numba option of the package, and the rules by which a kernel is launched.

numba caches a kernel under the file that defines it and looks at no other: after editing `sweeps.py`,
delete the `.nbi` files in `__pycache__`.
"""

import threading
from types import FunctionType

import numba
import numpy as np

OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    # Never `nnan` or `ninf`: NaN and Inf must survive, and stay in the statistic they belong to.
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "boundscheck": False,
}

# numba's `workqueue` layer dies when two Python threads launch at once; `omp` and `tbb` do not.
_one_launch = threading.Lock()

# What only kernels call needs neither a wrapper for Python nor a place in the cache: it is linked
# into them. That halves the time to compile.
jit = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)
kernel = numba.njit(cache=True, **OPTIONS)
_parallel_kernel = numba.njit(cache=True, parallel=True, **OPTIONS)


def twins(body):
    """Compile `body(tasks, ...)`, one prange loop, serially and in parallel.

    The function returned takes the largest number of threads first. One thread runs the serial twin
    and touches no thread pool, which is what makes it safe in a forked child.
    """
    # The same body serves both: without parallel=True, prange is range. But the cache goes by names.
    namesake = FunctionType(body.__code__, body.__globals__, body.__name__)
    namesake.__qualname__ = f"{body.__qualname__}_parallel"
    serial = kernel(body)
    parallel = _parallel_kernel(namesake)

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


class _Unlocked:
    def __init__(self, array):
        self.base = array
        self.__array_interface__ = {
            **array.__array_interface__,
            "data": (array.ctypes.data, False),
        }


def flat(array, like):
    """`array` in one dimension; None becomes an empty array of the dtype of `like`.

    So that no argument asks for a compilation of its own: neither None nor a read-only array, which
    numba takes for a type apart.
    """
    if array is None:
        return np.empty(0, like.dtype)
    if not array.flags.writeable:
        array = np.asarray(_Unlocked(array))
    return array.reshape(-1)
