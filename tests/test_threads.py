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
from cpunorm import _cgroup, _dispatch, _no_front, _threads, functional

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
    default = min(_threads._cpus(), _cgroup.quota() or 2**30)
    printed = script("import cpunorm; print(cpunorm.get_num_threads())", OMP_NUM_THREADS=value)
    assert int(printed) == (expected or default)


@pytest.mark.parametrize(
    ("cpus", "limit", "expected"), [(8, None, 8), (8, 3, 3), (2, 3, 2), (1, 1, 1)]
)
def test_the_default_is_what_the_system_gives(cpus, limit, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(_threads, "_cpus", lambda: cpus)
    monkeypatch.setattr(_threads, "quota", lambda: limit)
    assert _threads._default_num_threads() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _threads._default_num_threads() == 5


V2 = "40 31 0:39 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 24 0:28 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
OTHER = "30 24 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


@pytest.mark.parametrize(
    ("mounts", "membership", "files", "expected"),
    [
        ([V2], "0::/", {}, None),
        ([V2], "0::/", {"cpu.max": "max 100000"}, None),
        ([V2], "0::/", {"cpu.max": "150000 100000"}, 2),
        ([V2], "0::/", {"cpu.max": "1000 100000"}, 1),
        ([V2], "0::/a/b", {"a/b/cpu.max": "400000 100000"}, 4),
        ([V2], "0::/a/b", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ([V2], "0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "900000 100000"}, 2),
        ([V2], "0::/a", {"cpu.max": "nonsense"}, None),
        ([V2], "0::/../outside", {"cpu.max": "300000 100000"}, 3),
        ([OTHER, V1.format(top="/")], "3:cpu,cpuacct:/a\n2:memory:/m", {"a": (-1, 100000)}, None),
        ([OTHER, V1.format(top="/")], "3:cpu,cpuacct:/a\n2:memory:/m", {"a": (50000, 20000)}, 3),
        ([OTHER, V1.format(top="/")], "3:cpu,cpuacct:/a/b", {"a": (2, 1), "a/b": (-1, 1)}, 2),
        # as a container sees it: its own group is the top
        ([V1.format(top="/docker/7")], "3:cpu,cpuacct:/docker/7", {".": (7, 2)}, 4),
        ([V1.format(top="/docker/7")], "3:cpu,cpuacct:/docker/7/x", {"x": (1, 2), ".": (9, 1)}, 1),
        # both versions side by side; the process is in the second without a limit there
        ([V1.format(top="/"), V2.replace("cgroup rw", "cgroup/unified rw")],
         "0::/\n3:cpu,cpuacct:/a", {"a": (2, 1)}, 2),
        ([OTHER], "2:memory:/m", {}, None),
    ],
)  # fmt: skip
def test_the_quota_of_the_control_group(mounts, membership, files, expected, tmp_path):
    proc = tmp_path / "proc/self"
    proc.mkdir(parents=True)
    (proc / "mountinfo").write_text("\n".join(mounts) + "\n")
    (proc / "cgroup").write_text(membership + "\n")
    for name, content in files.items():
        if isinstance(content, str):
            file = tmp_path / "sys/fs/cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content + "\n")
        else:
            group = tmp_path / "sys/fs/cgroup/cpu,cpuacct" / name
            group.mkdir(parents=True, exist_ok=True)
            for word, number in zip(("quota", "period"), content, strict=True):
                (group / f"cpu.cfs_{word}_us").write_text(f"{number}\n")
    assert _cgroup.quota(str(tmp_path)) == expected


def test_where_there_are_no_control_groups(tmp_path):
    assert _cgroup.quota(str(tmp_path)) is None


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


@pytest.fixture
def asked_for(monkeypatch):
    """The numbers of threads that kernels were given; nothing goes through the front door."""
    seen, original = [], _dispatch.kernel
    monkeypatch.setattr(functional, "_front", _no_front)

    def watched(problem, verb, backend):
        function = original(problem, verb, backend)

        def kernel(*arguments):
            seen.append(arguments[-1])
            assert _threads._at_work[threading.get_ident()] == arguments[-1]
            function(*arguments)

        return kernel

    monkeypatch.setattr(_dispatch, "kernel", watched)
    return seen


LARGE = np.random.default_rng(0).normal(size=(512, 1024)).astype("float32")
ANOTHER = -1  # no identifier of a Python thread


@pytest.mark.parametrize(("others", "left"), [(0, 4), (1, 3), (3, 1), (4, 1), (9, 1)])
def test_calls_at_once_share_the_threads(others, left, asked_for, monkeypatch, restore_threads):
    cpunorm.set_num_threads(4)
    monkeypatch.setattr(_threads, "_openmp_max_threads", lambda: 2**30)
    monkeypatch.setitem(_threads._at_work, ANOTHER, others)
    cpunorm.layer_norm(LARGE, 1024, backend="numpy")
    cpunorm.layer_norm(LARGE[:2], 1024, backend="numpy")
    assert asked_for == [left, 1]
    assert _threads._at_work == {ANOTHER: others}


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_call_that_fails_gives_its_threads_back(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(functional, "_front", _no_front)
    monkeypatch.setattr(_dispatch, "kernel", lambda *_: fail)
    with pytest.raises(error):
        cpunorm.layer_norm(LARGE, 1024)
    assert _threads._at_work == {}


def test_what_an_interrupt_left_behind_is_forgotten(asked_for, monkeypatch, restore_threads):
    cpunorm.set_num_threads(4)
    monkeypatch.setattr(_threads, "_openmp_max_threads", lambda: 2**30)
    monkeypatch.setitem(_threads._at_work, threading.get_ident(), 4)
    cpunorm.layer_norm(LARGE, 1024, backend="numpy")
    assert asked_for == [4]


started = """
import os, numpy as np, cpunorm
from cpunorm import _threads
x = np.ones((512, 1024), "float32")

def started(call=lambda: cpunorm.layer_norm(x, 1024, backend="cython")):
    before = len(os.listdir("/proc/self/task"))
    call()
    return len(os.listdir("/proc/self/task")) - before

turned = x.T  # no common case: it takes the general way
ways = started, lambda: started(lambda: cpunorm.layer_norm(turned, 1024, axis=0, backend="cython"))
"""
counted = pytest.mark.skipif(
    "cython" not in cpunorm.available_backends() or not os.path.isdir("/proc/self/task"),
    reason="threads of the compiled backend are counted in /proc",
)


@counted
def test_threads_that_are_at_work_are_not_started_again():
    text = f"""{started}
cpunorm.set_num_threads(5)
_threads._at_work[-1] = 4
print([way() for way in ways], _threads._at_work)
_threads._at_work[-1] = 2
print([way() for way in ways], _threads._at_work)
"""
    assert script(text) == "[0, 0] {-1: 4}\n[2, 0] {-1: 2}"


@counted
def test_threadpoolctl_limits_us():
    """And it lets go: more than it ever allowed may be asked for in `set_num_threads`."""
    pytest.importorskip("threadpoolctl")
    text = f"""{started}
from threadpoolctl import threadpool_limits
cpunorm.set_num_threads(5)
with threadpool_limits(limits=1):
    print([way() for way in ways])
print([way() for way in ways])
"""
    assert script(text) == "[0, 0]\n[4, 0]"


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
