"""The compiled backend.

    verbs.pyx                                         arrays in, pointers and sizes down
    x86_64_v4/float32/kernels, ...                    kernels.pyx, once per instruction set and type
        rows  columns  channels_first  channels_last  the problems (.pxd)
        stretches.pxd  groups.pxd  strips.pxd         cutting and merging that they share
        sweeps.h    vectors.h                         the innermost loops; registers, half types

The instruction set is the best the CPU has, or CPUNORM_ISA where that names one.
"""

import importlib
import os
import platform
from functools import partial
from types import SimpleNamespace

from ..caches import far_bytes, fetching, slab_bytes, stream_bytes
from . import verbs

# Of each level, what it adds to the one before; Linux and NumPy spell these features alike.
_FEATURES = {
    "x86_64_v4_bf16": ("AVX512BF16",),
    "x86_64_v4": ("AVX512F", "AVX512BW", "AVX512CD", "AVX512DQ", "AVX512VL"),
    "x86_64_v3": ("AVX2", "FMA3", "F16C", "BMI2"),
    "x86_64_v2": ("SSE42", "POPCNT"),
}

# In the order of `Element` in verbs.pxd.
_TYPES = ("float32", "float64", "float16", "bfloat16")

# What a level adds is of use to one type only; the others are those of the level before.
_OF_ONE_TYPE = {"x86_64_v4_bf16": ("bfloat16", "x86_64_v4")}


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


def install(level: str) -> None:
    """Run the kernels of one instruction set from now on."""
    only, before = _OF_ONE_TYPE.get(level, (None, None))
    homes = [level if only in (None, t) else before for t in _TYPES]
    modules = [
        importlib.import_module(f".{home}.{t}.kernels", __name__)
        for home, t in zip(homes, _TYPES, strict=True)
    ]
    tables = [module.TABLE for module in modules]
    verbs.install(tables, slab_bytes(), far_bytes(), stream_bytes(), fetching())


def _install_best() -> str:
    """Install the level that CPUNORM_ISA names, or the best that was built, and return it."""
    levels = LEVELS
    if wanted := os.environ.get("CPUNORM_ISA"):
        if wanted not in levels:
            known = ", ".join(levels)
            raise ImportError(f"CPUNORM_ISA must be one of {known} on this CPU, got {wanted!r}")
        levels = [wanted]
    for level in levels:
        try:
            install(level)
        except ModuleNotFoundError:
            continue  # this compiler could not build that level
        return level
    raise ImportError(f"no compiled kernels for {', '.join(levels)}")


LEVELS = _levels()
ISA = _install_best()


def _problem(prefix: str, *given: bool) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            name.removeprefix(prefix): partial(verb, *given)
            for name, verb in vars(verbs).items()
            if name.startswith(prefix)
        }
    )


rows = _problem("rows_")
columns = _problem("columns_")
channels_first = _problem("channels_", False)
channels_last = _problem("channels_", True)
