"""Threads: how many, who may call at once, and what a fork leaves."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cpunorm
from cpunorm import _dispatch

from .cases import Case
from .support import assert_same_bits, run, run_backward, statistics

# Large enough for more than one thread, on each canonical problem.
CASES = (
    Case("batch_norm", (8, 16, 20, 21), {"training": True, "layout": "NCHW"}),
    Case("batch_norm", (8, 20, 21, 16), {"training": False, "layout": "NHWC"}),
    Case("group_norm", (8, 20, 21, 16), {"num_groups": 4, "layout": "NHWC"}),
    Case("instance_norm", (8, 16, 20, 21), {"layout": "NCHW"}),
    Case("layer_norm", (301, 200), {"normalized_shape": 200}),
    Case("add_rms_norm", (8, 16, 20, 21), {"normalized_shape": 16, "axis": 1}),
)


def script(text, **environment):
    """Run Python code in a process of its own; return what it printed, or fail if it hangs."""
    inherited = {name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"}
    with subprocess.Popen(
        [sys.executable, "-c", text],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, complaint = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the children that hang, too
            raise
    assert process.returncode == 0, complaint
    return printed.strip()


# --- How many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, np.int64(3), np.uint8(2)])
def test_set_and_get(n, restore_threads):
    cpunorm.set_num_threads(n)
    assert cpunorm.get_num_threads() == n
    assert type(cpunorm.get_num_threads()) is int


@pytest.mark.parametrize(
    ("n", "error"),
    [
        (0, ValueError), (-1, ValueError), (np.int64(0), ValueError), (1.0, TypeError),
        ("2", TypeError), (None, TypeError), (True, TypeError), ([2], TypeError),
    ],
)  # fmt: skip
def test_what_is_no_number_of_threads(n, error):
    before = cpunorm.get_num_threads()
    with pytest.raises(error, match=r"\bn\b"):
        cpunorm.set_num_threads(n)
    assert cpunorm.get_num_threads() == before


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", 1),
        ("3", 3),
        ("5,2", 5),
        (" 2 ", 2),
        ("0", None),
        ("many", None),
        ("-2", None),
        ("", None),
    ],
)
def test_omp_num_threads(value, expected):
    """Of the environment, at import; what is no number of threads leaves the default."""
    default = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    printed = script("import cpunorm; print(cpunorm.get_num_threads())", OMP_NUM_THREADS=value)
    assert int(printed) == (expected or default)


def test_omp_num_threads_is_honoured_by_every_backend(backend):
    """The process itself has no more threads than asked for, beside those it began with."""
    text = f"""
import os, numpy as np, cpunorm
x = np.ones((8, 64, 40, 40), "float32")
cpunorm.layer_norm(np.ones((2, 4), "float32"), 4, backend={backend!r})
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    cpunorm.batch_norm(x, None, None, training=True, backend={backend!r})
    cpunorm.layer_norm(x, 40, backend={backend!r})
print(len(os.listdir("/proc/self/task")) - before)
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in /proc")
    assert int(script(text, OMP_NUM_THREADS="1")) == 0


def test_more_threads_than_cpus(backend, restore_threads):
    case = CASES[0]
    arrays = case.arrays(running=False)
    expected = run(case, arrays, backend=backend)
    cpunorm.set_num_threads(os.cpu_count() * 4 + 1)
    assert_same_bits(run(case, arrays, backend=backend), expected)


# --- Who may call at once ------------------------------------------------------------------------


def test_python_threads_may_call_at_once(backend):
    """Four threads, each with its own data and all operations in turn, get what one thread gets."""

    def work(seed):
        results = []
        for case in CASES[seed % 3 :] + CASES[: seed % 3]:
            arrays, grad_y = case.arrays(running=False), case.grad_y()
            arrays["x"] += np.float32(seed)
            stats = statistics(case, arrays, backend=backend)
            gradients = run_backward(case, arrays, grad_y, stats, backend=backend)
            results.append((run(case, arrays, backend=backend), stats, gradients))
        return tuple(results)

    expected = [work(seed) for seed in range(4)]
    start = threading.Barrier(4)

    def wait_and_work(seed):
        start.wait(timeout=60)
        return [work(seed) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for results, wanted in zip(pool.map(wait_and_work, range(4)), expected, strict=True):
            for result in results:
                assert_same_bits(result, wanted)


def test_the_interpreter_is_free_during_a_call(backend, restore_threads):
    """Another Python thread goes on: its longest wait is a small part of a long call."""
    cpunorm.set_num_threads(1)
    x = np.random.default_rng(0).normal(size=(16, 32, 96, 96)).astype("float32")
    zeros, ones, out = np.zeros(32, "float32"), np.ones(32, "float32"), np.empty_like(x)

    def call():
        began = time.perf_counter()
        cpunorm.batch_norm(x, zeros, ones, activation="gelu", out=out, backend=backend)
        return time.perf_counter() - began

    def longest_wait():
        """Relative to the call, while it runs."""
        waits, last = 0.0, time.perf_counter()
        worker = pool.submit(call)
        while not worker.done():
            now = time.perf_counter()
            waits, last = max(waits, now - last), now
        return waits / worker.result()

    if backend == "numpy":
        pytest.skip("NumPy's own functions decide, one by one")
    with ThreadPoolExecutor(1) as pool:
        call()
        # the machine may be busy: once in five is proof, for a held lock never lets go
        assert min(longest_wait() for _ in range(5)) < 0.6


def test_threads_do_not_share_the_choice_of_a_backend():
    """`use_backend` holds for the thread that said it."""
    seen = []
    with cpunorm.use_backend("numpy"):
        thread = threading.Thread(target=lambda: seen.append(default_backend()))
        thread.start()
        thread.join()
        assert default_backend() == "numpy"
    assert seen == [default_backend()]


def default_backend():
    return _dispatch.resolve(None)


# --- Fork ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_keeps_working(backend):
    """After the parent has used its threads: children, and a child's child, get the same bits."""
    text = f"""
import os, sys, warnings
import numpy as np, cpunorm
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
backend = {backend!r}
rng = np.random.default_rng(0)
x, grad_y = rng.normal(size=(2, 8, 32, 32, 32)).astype("float32")
cpunorm.set_num_threads(2)

def work():
    y, stats = cpunorm.group_norm(x, 4, return_stats=True, backend=backend)
    gradients = cpunorm.group_norm_backward(grad_y, x, 4, stats, backend=backend)
    z = cpunorm.layer_norm(x, 32, axis=1, backend=backend)
    b = cpunorm.batch_norm(x, None, None, training=True, layout="NHWC", backend=backend)
    return b"".join(a.tobytes() for a in (y, *stats, *gradients, z, b))

def in_child(call):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = call()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

expected = work()
same = lambda: 0 if work() == expected else 2
codes = [in_child(same), in_child(lambda: same() or in_child(same)), same(), in_child(same)]
print(codes)
"""
    assert script(text) == "[0, 0, 0, 0]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_pool_of_processes(backend):
    """What data loaders do: multiprocessing with the fork method, from a parent that has worked."""
    text = f"""
import multiprocessing, warnings
import numpy as np, cpunorm
warnings.simplefilter("ignore", DeprecationWarning)

def work(seed):
    x = np.random.default_rng(seed).normal(size=(64, 1024)).astype("float32")
    return cpunorm.layer_norm(x, 1024, backend={backend!r}).tobytes()

if __name__ == "__main__":
    expected = [work(seed) for seed in range(4)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(work, range(4)) == expected)
"""
    assert script(text) == "True"


@pytest.mark.parametrize("n", [100_000, 2**40])
def test_absurdly_many_threads_are_only_a_limit(n, backend, restore_threads):
    x = np.random.default_rng(0).normal(size=(64, 1024)).astype("float32")
    expected = cpunorm.layer_norm(x, 1024, backend=backend)
    cpunorm.set_num_threads(n)
    assert cpunorm.get_num_threads() == n
    assert_same_bits(cpunorm.layer_norm(x, 1024, backend=backend), expected)
