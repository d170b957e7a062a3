"""What 'auto' means: the compiled backend, but Numba where a table has it faster and it is warm.

The table is `auto.json` beside this file, or one of the user's own; `python -m bench.calibrate`
measures and writes either. It is read when Numba is first used: before that it cannot matter.
"""

import os
import sys
import warnings
from bisect import bisect_right
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .backends import KERNELS

CHOICES = ("cython", "numba")
SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "auto.json")

# Calls that Numba has compiled everything for, in this process. One that needs other kernels than
# these would have to wait for them, so a call is known by all that decides which kernels it needs.
_warm: set[tuple[Any, ...]] = set()
MOST_WARM = 1024

# An x of fewer bytes is the compiled backend's without a look at the table.
first_bytes = sys.maxsize


class Table(NamedTuple):
    """The fastest backend per kernel and class of size."""

    path: str
    log2_bytes: tuple[int, ...]  # of x, where each class begins
    fastest: dict[str, tuple[str, ...]]  # "problem verb" -> one backend per class

    def is_numbas(self, problem: str, verb: str, nbytes: int) -> bool:
        """Whether Numba is the fastest for an x of so many bytes."""
        size = bisect_right(self.log2_bytes, nbytes.bit_length() - 1)
        backends = self.fastest.get(f"{problem} {verb}", ())
        return 0 < size <= len(backends) and backends[size - 1] == "numba"


def own_path() -> str:
    """Return where the user's own table lies, if there is one."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(folder, "cpunorm", "auto.json")


@cache
def table() -> Table:
    """Return the table in use: the user's own if it is sound, else the one that is shipped."""
    own = own_path()
    if os.path.exists(own):
        try:
            return read(own)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"cpunorm ignores {own}: {error}. Write it anew with "
                "`python -m bench.calibrate --write`, or delete it.",
                RuntimeWarning,
                stacklevel=2,
            )
    return read(SHIPPED)


def read(path: str) -> Table:
    """Read a table; ValueError if it is not sound."""
    import json  # takes longer than the rest of this module

    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict):
        raise ValueError("it must hold an object")
    sizes, fastest = content.get("log2_bytes"), content.get("fastest")
    if not isinstance(sizes, list) or any(type(n) is not int or not 0 <= n < 63 for n in sizes):
        raise ValueError("log2_bytes must be a list of integers from 0 to 62")
    if sizes != sorted(set(sizes)):
        raise ValueError("log2_bytes must ascend")
    if not isinstance(fastest, dict):
        raise ValueError("fastest must be an object")
    for name, backends in fastest.items():
        if tuple(name.split(" ")) not in KERNELS:
            raise ValueError(f"fastest names {name!r}, which is no kernel")
        if not isinstance(backends, list) or len(backends) != len(sizes):
            raise ValueError(f"{name!r} must have {len(sizes)} backends, one per class of size")
        if any(backend not in CHOICES for backend in backends):
            raise ValueError(f"{name!r} must have backends out of {', '.join(CHOICES)}")
    return Table(path, tuple(sizes), {name: tuple(some) for name, some in fastest.items()})


def _key(problem: str, verb: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return problem, verb, *(getattr(argument, "shape", argument) for argument in arguments)


def is_numbas(problem: str, verb: str, nbytes: int, arguments: tuple[Any, ...]) -> bool:
    """Whether 'auto' gives this call to Numba: on any number of threads or on none."""
    return (
        nbytes >= first_bytes
        and arguments[0].dtype == np.float32
        and _key(problem, verb, arguments) in _warm
    )


def remember(
    problem: str, verb: str, nbytes: int, arguments: tuple[Any, ...], threads: int
) -> None:
    """Take note of a call that Numba has just done; what the table has faster is warm from now on.

    The table was measured on float32, and on several threads. Of anything else it says nothing.
    """
    global first_bytes
    if threads == 1 or not table().is_numbas(problem, verb, nbytes):
        return
    if arguments[0].dtype == np.float32 and len(_warm) < MOST_WARM:
        _warm.add(_key(problem, verb, arguments))
        first_bytes = min(first_bytes, nbytes)
