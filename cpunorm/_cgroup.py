"""How many CPUs the control groups of Linux leave to this process: the quota of a container."""

import math
from collections.abc import Iterator


def quota(root: str = "") -> int | None:
    """Return how many CPUs' time this process may use, rounded up, or None if there is no limit.

    Parameters
    ----------
    root : str
        Where `/proc` and what is mounted lie, for tests.
    """
    try:
        limits = [limit for group in _groups(root) for limit in _limits(root, *group)]
    except (OSError, ValueError):
        return None
    return max(1, math.ceil(min(limits))) if limits else None


def _groups(root: str) -> Iterator[tuple[bool, str, list[str]]]:
    """Yield of each hierarchy of CPUs: whether it is version 2, its mount, our path below that."""
    memberships = [line.split(":", 2) for line in _lines(f"{root}/proc/self/cgroup")]
    for line in _lines(f"{root}/proc/self/mountinfo"):
        _, _, _, top, mount, *_, kind, _, options = line.split(" ")
        second = kind == "cgroup2"
        if not second and not (kind == "cgroup" and "cpu" in options.split(",")):
            continue
        for number, controllers, path in memberships:
            if number == "0" if second else "cpu" in controllers.split(","):
                # A container may see its own group mounted at the top, and the path from outside.
                inside = f"{path}/".startswith(f"{top.rstrip('/')}/")
                below = path[len(top.rstrip("/")) :] if inside else ""
                yield second, mount, [name for name in below.split("/") if name]


def _limits(root: str, second: bool, mount: str, below: list[str]) -> Iterator[float]:
    """Yield the limit of our group and of every one above it."""
    for depth in range(len(below), -1, -1):
        group = "/".join((f"{root}{mount}", *below[:depth]))
        try:
            if second:
                (line,) = _lines(f"{group}/cpu.max")
                allowed, period = line.split()
            else:
                (allowed,) = _lines(f"{group}/cpu.cfs_quota_us")
                (period,) = _lines(f"{group}/cpu.cfs_period_us")
        except OSError:
            continue  # the root has none, nor has a group whose parent does not share out CPUs
        if allowed not in ("max", "-1"):
            yield int(allowed) / int(period)


def _lines(path: str) -> list[str]:
    with open(path) as file:
        return file.read().splitlines()
