"""The compiled backend: the same kernels once per instruction set, of which one is loaded.

    rows  columns  channels_first  channels_last      the problems: arrays in, pointers down
        stretches.pxd    strips.pxd                   cutting and merging that they share
            sweeps.h                                  the innermost loops

The level is the best the CPU has, or CPUNORM_ISA where that names one.
"""

import importlib
import os
import platform
from types import ModuleType

# Of each level, what it adds to the one before; Linux and NumPy spell these features alike.
_FEATURES = {
    "x86_64_v4": ("AVX512F", "AVX512BW", "AVX512CD", "AVX512DQ", "AVX512VL"),
    "x86_64_v3": ("AVX2", "FMA3", "F16C", "BMI2"),
    "x86_64_v2": ("SSE42", "POPCNT"),
}


def _levels() -> list[str]:
    """Return the levels this CPU has, best first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    from numpy._core._multiarray_umath import __cpu_baseline__ as assumed
    from numpy._core._multiarray_umath import __cpu_features__ as features

    levels = []
    for level in reversed(_FEATURES):
        if not all(features.get(f, f in assumed) for f in _FEATURES[level]):
            break
        levels.insert(0, level)
    return levels


def _load() -> tuple[str, dict[str, ModuleType]]:
    levels = LEVELS
    if wanted := os.environ.get("CPUNORM_ISA"):
        if wanted not in levels:
            known = ", ".join(levels)
            raise ImportError(f"CPUNORM_ISA must be one of {known} on this CPU, got {wanted!r}")
        levels = [wanted]
    problems = ("rows", "columns", "channels_first", "channels_last")
    for level in levels:
        try:
            modules = {p: importlib.import_module(f".{level}.{p}", __name__) for p in problems}
        except ModuleNotFoundError:
            continue  # this compiler could not build that level
        return level, modules
    raise ImportError(f"no compiled kernels for {', '.join(levels)}")


LEVELS = _levels()
ISA, _modules = _load()
rows = _modules["rows"]
columns = _modules["columns"]
channels_first = _modules["channels_first"]
channels_last = _modules["channels_last"]
