"""Compile what Numba has not yet compiled, before anything is measured.

Its kernels take a CPU most of a minute the first time. Two processes share them where there are two
CPUs: one works from the front of the list and the other from its end, and what either has compiled
the other finds in Numba's cache on disk, so that they need not agree on anything else.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from . import checks, timing
from .progress import stage


def run(shapes: Sequence[tuple[int, ...]]) -> float:
    """Call every kernel that the checks, the network and these shapes need; return the seconds."""
    start = time.perf_counter()
    helper = _helper(shapes) if (os.cpu_count() or 1) > 1 else None
    try:
        jobs = _jobs(shapes)
        with stage("compiling Numba's kernels", len(jobs)) as advance:
            for job in jobs:
                job()
                advance()
    finally:
        if helper is not None:
            helper.kill()
            helper.wait()
    return time.perf_counter() - start


def _helper(shapes: Sequence[tuple[int, ...]]) -> subprocess.Popen[bytes]:
    arguments = [",".join(map(str, shape)) for shape in shapes]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _jobs(shapes: Sequence[tuple[int, ...]]) -> list[Callable[[], None]]:
    """Return the list, with the kernels of one layout at either end."""
    # Other ways to lie in memory come down to the same kernels.
    cases = [case for case in checks.cases() if case.x.flags.c_contiguous]
    last = [case for case in cases if _is_channels_last(case)]
    return [
        *(partial(_try, checks.compute, case, "numba") for case in cases if case not in last),
        *(
            partial(_try, timing.call_once, shape, layout, "numba")
            for layout in timing.LAYOUTS
            for shape in shapes
            if layout in timing.layouts(shape)
        ),
        *(partial(_try, checks.compute, case, "numba") for case in last),
    ]


def _is_channels_last(case: checks.Case) -> bool:
    return case.options.get("layout") == "NHWC" or case.options.get("axis", 1) != 1


def _try(function: Callable[..., object], *arguments: object) -> None:
    # What does not work is for the checks to report.
    with suppress(Exception):
        function(*arguments)


if __name__ == "__main__":
    for job in reversed(_jobs([tuple(map(int, shape.split(","))) for shape in sys.argv[1:]])):
        job()
