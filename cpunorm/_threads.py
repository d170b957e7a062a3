"""How many threads a call may use. This module answers, and nothing else keeps a count."""

import operator
import os
import sys
from _thread import get_ident

from ._cgroup import quota

try:
    from ._openmp import max_threads as _openmp_max_threads
except ImportError:

    def _openmp_max_threads() -> int:
        return sys.maxsize


# Below this many bytes to read, waking a second thread costs more than it brings.
SERIAL_BYTES = 128 * 1024
# An image, however small, whose statistics are its own takes as long as so many.
IMAGE_BYTES = 1024
# What a thread should have to do at the least, and how many of them any call may start.
BYTES_PER_THREAD = 64 * 1024
MOST_THREADS = 512


def work_of(nbytes: int, backward: bool, images: int) -> int:
    """Return what there is to do, in bytes: to read x, and as much of grad_y; and the images."""
    return (2 * nbytes if backward else nbytes) + IMAGE_BYTES * images


def _requested() -> int | None:
    # OMP_NUM_THREADS may be a list, one entry per nesting level; ours is the outermost.
    requested = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(requested) if requested.isdecimal() and int(requested) > 0 else None


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _default_num_threads() -> int:
    return _requested() or min(_cpus(), quota() or sys.maxsize)


# What OpenMP starts from. A lower number has been asked for, by threadpoolctl for instance, and
# holds for the Python thread that asked; any other leaves us ours.
_openmp_default = max(_openmp_max_threads(), _requested() or _cpus())

_num_threads = _default_num_threads()
_forked = False


def _after_fork_in_child() -> None:
    global _forked
    _forked = True
    _at_work.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def get_num_threads() -> int:
    """Return the largest number of threads a call may use.

    In a forked child this is always 1: the threads of the parent's pool do not survive a
    fork, and neither OpenMP nor Numba can start a second pool in its place.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import cpunorm
    >>> cpunorm.get_num_threads() >= 1
    True
    """
    return 1 if _forked else _num_threads


def set_num_threads(n: int) -> None:
    """Set the largest number of threads a call may use, for every backend.

    At import it is `OMP_NUM_THREADS` where that is set, else the number of CPUs this process
    may run on, within the quota of its control group (of its container, that is). Python threads
    that call at once share it, each call having one thread at least. The number of threads never
    changes the bits of a result.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is less than 1.

    Examples
    --------
    >>> import cpunorm
    >>> before = cpunorm.get_num_threads()
    >>> cpunorm.set_num_threads(1)
    >>> cpunorm.get_num_threads()
    1
    >>> cpunorm.set_num_threads(before)
    """
    global _num_threads
    if isinstance(n, bool):
        raise TypeError("n must be an integer, got bool")
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be an integer, got {type(n).__name__}") from None
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    _num_threads = n


# Of each Python thread in a call, how many threads that has. What an interrupt leaves behind goes
# with the thread's next call, which a mere sum would never forget.
_at_work: dict[int, int] = {}


def take_threads(nbytes: int) -> int:
    """Return the number of threads for a work of `nbytes` bytes, taken until `give_back`."""
    # In plain steps: this is done for every call that is not tiny.
    me = get_ident()
    threads = 1
    if nbytes >= SERIAL_BYTES and not _forked:
        threads = _num_threads
        if _at_work:
            _at_work.pop(me, None)
            threads -= sum(_at_work.values())
        asked = _openmp_max_threads()
        if asked < _openmp_default and asked < threads:
            threads = asked
        enough = nbytes // BYTES_PER_THREAD
        if enough < threads:
            threads = enough
        if threads > MOST_THREADS:
            threads = MOST_THREADS
        elif threads < 1:
            threads = 1
    _at_work[me] = threads
    return threads


def give_back() -> None:
    """Let others have the threads of this Python thread's call."""
    _at_work.pop(get_ident(), None)
