"""Backends: which there are, how one is chosen, and what happens without it."""

import subprocess
import sys

import numpy as np
import pytest

import cpunorm
from cpunorm import _dispatch, _no_front, functional
from cpunorm.backends import BACKENDS

from .support import AVAILABLE, assert_same_bits

X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")


def script(*lines):
    """Run lines of Python in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- Which there are -----------------------------------------------------------------------------


def test_numpy_is_always_there():
    assert "numpy" in AVAILABLE
    assert set(AVAILABLE) <= set(BACKENDS)


def test_auto_is_the_compiled_one_where_it_was_built():
    assert _dispatch.auto() == ("cython" if "cython" in AVAILABLE else "numpy")


def test_numba_is_imported_only_when_used():
    lines = [
        "import sys, numpy, cpunorm",
        "cpunorm.layer_norm(numpy.ones((2, 3)), 3)",
        "print('numba' in sys.modules)",
    ]
    assert script(*lines) == "False"


def test_only_numpy_and_the_library_are_imported():
    """No framework, no scipy: what is imported beside the standard library is NumPy and us."""
    lines = [
        "import sys, numpy",
        "before = set(sys.modules)",
        "import cpunorm",
        "new = {name.split('.')[0] for name in set(sys.modules) - before}",
        "print(sorted(new - set(sys.stdlib_module_names)))",
    ]
    imported = script(*lines)
    assert "'cpunorm'" in imported
    for other in ("numba", "scipy", "torch", "rich", "tqdm"):
        assert f"'{other}'" not in imported


def test_importing_it_brings_nothing_heavy():
    """Each of these takes longer to import than all of cpunorm."""
    lines = [
        "import sys, numpy",
        "before = set(sys.modules)",
        "import cpunorm",
        "heavy = {'importlib.metadata', 'json', 'numpy.typing', 'pathlib', 'shutil', 'sysconfig'}",
        "print(heavy & (set(sys.modules) - before))",
    ]
    assert script(*lines) == "set()"


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_one_that_cannot_be_imported_is_not_available(error, monkeypatch):
    """Installed is not enough: numba, say, may not take the NumPy that is here."""

    def fail(*_):
        raise error("needs another NumPy")

    _dispatch._load.cache_clear()
    monkeypatch.setattr(_dispatch.importlib, "import_module", fail)
    try:
        assert cpunorm.available_backends() == ()
        with pytest.raises(RuntimeError, match=r"numba.*not available.*needs another NumPy"):
            cpunorm.layer_norm(X, 6, backend="numba")
    finally:
        _dispatch._load.cache_clear()


def test_without_numba():
    lines = [
        "import sys; sys.modules['numba'] = None",
        "import numpy, cpunorm",
        "print(cpunorm.available_backends())",
        "print(cpunorm.layer_norm(numpy.eye(2), 2).shape)",
        "try: cpunorm.layer_norm(numpy.eye(2), 2, backend='numba')",
        "except RuntimeError as error: print(error)",
    ]
    available, shape, error = script(*lines).splitlines()
    assert "numba" not in available
    assert shape == "(2, 2)"
    assert "numba" in error
    assert "not available" in error


# --- How one is chosen ---------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch):
    """The backends whose kernels ran, in order; nothing goes through the front door."""
    seen, original = [], _dispatch.kernel
    monkeypatch.setattr(functional, "_front", _no_front)

    def watched(problem, verb, backend):
        seen.append(backend)
        return original(problem, verb, backend)

    monkeypatch.setattr(_dispatch, "kernel", watched)
    return seen


def test_by_argument(backend, chosen):
    cpunorm.layer_norm(X, 6, backend=backend)
    assert chosen == [backend]


def test_by_context(backend, chosen):
    with cpunorm.use_backend(backend):
        cpunorm.layer_norm(X, 6)
        cpunorm.layer_norm(X, 6, backend="numpy")
    assert chosen == [backend, "numpy"]


def test_auto_inside_a_context_is_auto(chosen):
    with cpunorm.use_backend("numpy"):
        cpunorm.group_norm(X, 2, backend="auto")
    assert chosen == [_dispatch.auto()]


def test_contexts_nest_and_restore(backend):
    outside = _dispatch.resolve(None)
    with cpunorm.use_backend("numpy"):
        with cpunorm.use_backend(backend):
            assert _dispatch.resolve(None) == backend
            with cpunorm.use_backend("auto"):
                assert _dispatch.resolve(None) == "auto"
            assert _dispatch.resolve(None) == backend
        assert _dispatch.resolve(None) == "numpy"
    assert _dispatch.resolve(None) == outside


def test_a_context_is_left_by_an_exception_too():
    outside = _dispatch.resolve(None)
    with pytest.raises(KeyError), cpunorm.use_backend("numpy"):
        raise KeyError
    assert _dispatch.resolve(None) == outside


def test_backends_agree(backend):
    """To within the tolerance each keeps of the oracle."""
    expected = cpunorm.layer_norm(X, 6, backend="numpy")
    np.testing.assert_allclose(
        cpunorm.layer_norm(X, 6, backend=backend), expected, rtol=6e-6, atol=6e-6
    )


# --- What happens without it ---------------------------------------------------------------------


def use(name):
    with cpunorm.use_backend(name):
        raise AssertionError("the block of a wrong backend was entered")


@pytest.mark.parametrize("call", [use, lambda name: cpunorm.layer_norm(X, 6, backend=name)])
def test_an_unknown_name_lists_the_known_ones(call):
    with pytest.raises(
        ValueError, match=r"backend must be .*'auto'.*'numpy'.*got 'cuda'"
    ) as raised:
        call("cuda")
    for name in BACKENDS:
        assert repr(name) in str(raised.value)
    with pytest.raises(TypeError, match=r"backend must be .*got int"):
        call(1)


@pytest.mark.parametrize("missing", [b for b in BACKENDS if b != "numpy"])
def test_one_that_is_not_available_raises(missing, monkeypatch):
    """It never falls back to another in silence; the default does, and works."""
    original = _dispatch._load
    monkeypatch.setattr(
        _dispatch, "_load", lambda name: "no such thing here" if name == missing else original(name)
    )
    monkeypatch.setattr(functional, "_front", _no_front)
    for call in (use, lambda name: cpunorm.layer_norm(X, 6, backend=name)):
        with pytest.raises(RuntimeError, match=f"{missing}.*not available.*no such thing here"):
            call(missing)
    if missing == "cython":
        expected = cpunorm.layer_norm(X, 6, backend="numpy")
        assert_same_bits(cpunorm.layer_norm(X, 6), expected)
        assert missing not in cpunorm.available_backends()


# --- What it says of itself ----------------------------------------------------------------------


def test_show_config(capsys):
    cpunorm.show_config()
    printed = capsys.readouterr().out
    for text in (*AVAILABLE, np.__version__, str(cpunorm.get_num_threads())):
        assert text in printed
    for word in ("instruction set", "backend", "threads"):
        assert word in printed


def test_show_config_says_what_is_missing(capsys, monkeypatch):
    original = _dispatch._load
    monkeypatch.setattr(
        _dispatch, "_load", lambda name: "was not built" if name == "cython" else original(name)
    )
    cpunorm.show_config()
    assert "missing: was not built" in capsys.readouterr().out
