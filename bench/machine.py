"""What figures depend on: the processor and its caches, and the versions of everyone."""

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from cpunorm._dispatch import config
from cpunorm.backends.caches import cache_bytes

from .results import PEERS

PACKAGES = ("numpy", "numba", *PEERS)


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {"cpunorm": config()["cpunorm"]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "l1d": cache_bytes(1),
        "l2": cache_bytes(2),
        "l3": cache_bytes(3),
        "instruction set": config()["instruction set"],
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
    }


def physical_memory() -> int:
    """Return the bytes of memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.processor()
