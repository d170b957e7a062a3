"""From a canonical problem to the function of a backend that solves it."""

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

from . import _auto, _threads
from ._version import __version__
from .backends import ARGUMENTS, BACKENDS

_current: ContextVar[str] = ContextVar("cpunorm_backend", default="auto")


@cache
def _load(name: str) -> ModuleType | str:
    """Return the backend's module, or why it cannot be had."""
    try:
        return importlib.import_module(f".backends.{name}", __package__)
    # What an extension lacks, a library for instance, comes as an OSError.
    except (ImportError, OSError) as error:
        return str(error)


def is_available(name: str) -> bool:
    """Whether a backend can be used here; the first time, by loading it."""
    return not isinstance(_load(name), str)


def check_backend(name: str) -> None:
    """Raise if `name` is neither 'auto' nor a backend that is available here."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string or None, got {type(name).__name__}")
    if name != "auto" and name not in BACKENDS:
        known = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend must be one of {known}, got {name!r}")
    if name != "auto" and isinstance(reason := _load(name), str):
        raise RuntimeError(f"backend {name!r} is not available here: {reason}")


def resolve(name: str | None) -> str:
    """Return what `backend=name` stands for, checked: a backend, or 'auto'."""
    name = _current.get() if name is None else name
    check_backend(name)
    return name


def auto() -> str:
    """Return the backend that 'auto' is in general.

    That is the compiled one, and NumPy where it could not be built: Numba would have to compile
    before it answers.
    """
    return "cython" if is_available("cython") else "numpy"


def kernel(problem: str, verb: str, backend: str) -> Callable[..., None]:
    """Return the function of a backend for one verb of a canonical problem."""
    function: Callable[..., None] = getattr(getattr(_load(backend), problem), verb)
    return function


def images_of(problem: str, verb: str, arguments: tuple[Any, ...]) -> int:
    """Return how many images are normalised one by one."""
    if problem == "rows":
        return 0
    having = "rstd" if problem == "columns" else "mean"
    images: int = arguments[ARGUMENTS[problem, verb].index(having)].shape[0]
    return images


def solve(problem: str, verb: str, backend: str, nbytes: int, *arguments: Any) -> None:
    """Run a kernel of what was resolved, x having `nbytes` bytes, on the threads that are free."""
    images = images_of(problem, verb, arguments)
    work = _threads.work_of(nbytes, verb.startswith("backward"), images)
    threads = _threads.take_threads(work)
    call = problem, verb, nbytes, arguments
    try:
        if backend == "auto":
            backend = "numba" if _auto.is_numbas(*call) else auto()
        kernel(problem, verb, backend)(*arguments, threads)
        if backend == "numba":
            _auto.remember(*call, threads)
    finally:
        _threads.give_back()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make `name` the default backend inside a ``with`` block.

    The choice belongs to the current thread (or asynchronous task) alone, and nests.

    Parameters
    ----------
    name : {"auto", "cython", "numba", "numpy"}
        What ``backend=None`` stands for inside the block.

    Raises
    ------
    ValueError
        If there is no backend of that name.
    RuntimeError
        If the backend is not available here.

    Examples
    --------
    >>> import cpunorm, numpy as np
    >>> with cpunorm.use_backend("numpy"):
    ...     y = cpunorm.rms_norm(np.ones((2, 4)), 4)
    """
    if name is None:
        raise TypeError("name must be a string, got None")
    check_backend(name)
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def available_backends() -> tuple[str, ...]:
    """Return the backends that can be used here.

    The first call imports Numba to find out, which takes a moment.

    Returns
    -------
    tuple of str
        Their names, best first.

    Examples
    --------
    >>> import cpunorm
    >>> "numpy" in cpunorm.available_backends()
    True
    """
    return tuple(filter(is_available, BACKENDS))


def instruction_set() -> str | None:
    """Return the one that the compiled kernels run on, None without them."""
    compiled = _load("cython")
    return None if isinstance(compiled, str) else compiled.ISA


def config() -> dict[str, Any]:
    """Return what `show_config` prints."""
    # Here and below, what would take longer to import than all of cpunorm.
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    compiled = _load("cython")

    def version(package: str) -> str:
        try:
            return installed(package)
        except PackageNotFoundError:
            return "not installed"

    return {
        "cpunorm": __version__,
        "location": os.path.dirname(os.path.abspath(__file__)),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "machine": f"{platform.system()} {platform.machine()}",
        "backends": list(available_backends()),
        "default backend": resolve(None),
        "auto": f"{auto()}, Numba where it is warm and faster by {_auto.table().path}",
        "compiled backend": f"missing: {compiled}" if isinstance(compiled, str) else "available",
        "instruction set": instruction_set(),
        "threads": _threads.get_num_threads(),
    }


def show_config() -> None:
    """Print versions, backends, instruction set and threads.

    Examples
    --------
    >>> import cpunorm
    >>> cpunorm.show_config()  # doctest: +ELLIPSIS
    cpunorm ...
    """
    for key, value in config().items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{key:<17} {text}")


def warn_if_not_compiled() -> None:
    """Warn when the compiled backend is missing on a machine that could have built it."""
    reason = _load("cython")
    if not isinstance(reason, str):
        return
    if "CPUNORM_ISA" in reason:  # a wrong choice, not a missing build
        advice = "Set CPUNORM_ISA to one of them, or leave it out for the best."
    elif compiler := _compiler():
        advice = (
            f"There is a C compiler ({compiler}): build it with `pip install -e .` in the "
            "checkout, or reinstall cpunorm."
        )
    else:
        return
    warnings.warn(
        f"cpunorm runs on NumPy because its compiled backend is missing: {reason}. {advice}",
        RuntimeWarning,
        stacklevel=3,
    )


def _compiler() -> str | None:
    import shutil
    import sysconfig

    candidates = ((sysconfig.get_config_var("CC") or "").split(" ")[0], "cc", "gcc", "clang")
    return next(filter(None, (shutil.which(c) for c in candidates if c)), None)
