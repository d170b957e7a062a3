"""The sizes of this machine's caches, who fills them best, and what follows from that.

CPUNORM_L2 and CPUNORM_L3, in bytes, and CPUNORM_FETCH, 0 or 1, stand in for what the system says.
"""

import os
import sys

_CPU = "/sys/devices/system/cpu/cpu0/cache"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# Where the system does not say.
_USUAL = {1: 32 << 10, 2: 1 << 20, 3: 32 << 20}

# Of the last cache, for each CPU: a virtual machine is told of all that its host has.
_SHARE = 24 << 20

# Whose processors foresee what a plane needs next: what they are told to fetch as well only takes
# the buffers that other loads wait for.
_FORESEEING = "GenuineIntel"


def cache_bytes(level: int) -> int:
    """Return the size of the data cache of a level, 1 to 3."""
    return _given(level) or _told(level)


def _given(level: int) -> int:
    given = os.environ.get(f"CPUNORM_L{level}", "")
    return min(int(given), sys.maxsize) if given.isdecimal() else 0


def _told(level: int) -> int:
    for index in range(8):
        try:
            found, kind, size = (_read(index, name) for name in ("level", "type", "size"))
            if found == str(level) and kind != "Instruction":
                return int(size.rstrip("KMG")) * _UNITS.get(size[-1], 1)
        except (OSError, ValueError):
            continue
    return _USUAL[level]


def _read(index: int, name: str) -> str:
    with open(f"{_CPU}/index{index}/{name}") as file:
        return file.read().strip()


def slab_bytes() -> int:
    """Return how much stays in a core's cache between two sweeps that also write as much."""
    return cache_bytes(2) // 2


def stream_bytes() -> tuple[int, int]:
    """Return the sizes of a result, forward and backward, from which on it bypasses the caches.

    Forward, where x and y exceed the last cache by less than an eighth, much of y is still there.
    Backward, what grad_x would push out of it is worth more: x and grad_y, of which much is there.
    """
    return _last() * 9 // 16, _last() * 2 // 9


def far_bytes() -> int:
    """Return the size of x from which on it, with y or grad_y, is in part not in the caches."""
    return _last() // 3


def fetching() -> bool:
    """Return whether planes are fetched before they are needed."""
    given = os.environ.get("CPUNORM_FETCH", "")
    return given == "1" if given in ("0", "1") else _vendor() != _FORESEEING


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = (line.partition(":")[2].strip() for line in file if "vendor_id" in line)
            return next(found, "")
    except OSError:
        return ""


def _last() -> int:
    return _given(3) or min(_told(3), _SHARE * (os.cpu_count() or 1))
