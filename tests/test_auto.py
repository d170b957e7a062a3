"""The table behind 'auto', and that it never waits for a compilation."""

import json
import subprocess
import sys

import numpy as np
import pytest

import cpunorm
from bench import calibrate
from cpunorm import _auto, _dispatch
from cpunorm.backends import KERNELS

from .support import AVAILABLE, assert_same_bits

if "numba" in AVAILABLE:
    from cpunorm.backends.numba import _jit

NAMES = [f"{problem} {verb}" for problem, verb in KERNELS]
LARGE = np.random.default_rng(0).normal(size=(2048, 128)).astype("float32")
SMALL = LARGE[:8]

SOUND = {"log2_bytes": [16, 20], "fastest": {"rows normalize": ["numba", "cython"]}}


# --- The table -----------------------------------------------------------------------------------


def test_what_is_shipped_is_sound_and_fits_a_screen():
    shipped = _auto.read(_auto.SHIPPED)
    assert set(shipped.fastest) <= set(NAMES)
    with open(_auto.SHIPPED, encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, False), (2**16 - 1, False), (2**16, True), (2**20 - 1, True), (2**20, False)],
)
def test_classes_of_size(nbytes, expected, tmp_path):
    (tmp_path / "auto.json").write_text(json.dumps(SOUND))
    table = _auto.read(str(tmp_path / "auto.json"))
    assert table.is_numbas("rows", "normalize", nbytes) is expected
    assert not table.is_numbas("rows", "backward", nbytes)


BROKEN = [
    "",
    "[]",
    "{}",
    json.dumps(SOUND)[:-3],
    json.dumps(SOUND | {"log2_bytes": [20, 16]}),
    json.dumps(SOUND | {"log2_bytes": [16, True]}),
    json.dumps(SOUND | {"log2_bytes": [16, 99]}),
    json.dumps(SOUND | {"log2_bytes": [16]}),
    json.dumps(SOUND | {"fastest": []}),
    json.dumps(SOUND | {"fastest": {"rows dance": ["cython", "cython"]}}),
    json.dumps(SOUND | {"fastest": {"rows normalize": ["cython", "cuda"]}}),
    json.dumps(SOUND | {"fastest": {"rows normalize": ["cython", ["numba"]]}}),
    json.dumps(SOUND | {"fastest": {"rows normalize": "numba"}}),
]


@pytest.fixture
def own(monkeypatch, tmp_path):
    """The path of a table of the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _auto.table.cache_clear()
    (tmp_path / "cpunorm").mkdir()
    yield tmp_path / "cpunorm" / "auto.json"
    _auto.table.cache_clear()


def test_where_the_users_own_lies(own, monkeypatch):
    assert _auto.own_path() == str(own)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert _auto.own_path() == "/home/someone/.cache/cpunorm/auto.json"


def test_the_users_own_comes_first(own):
    assert _auto.table().path == _auto.SHIPPED
    _auto.table.cache_clear()
    own.write_text(json.dumps(SOUND))
    assert _auto.table().path == str(own)
    assert _auto.table().is_numbas("rows", "normalize", 2**16)
    assert str(own) in _dispatch.config()["auto"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_one_is_named_and_ignored(content, own):
    own.write_text(content)
    with pytest.warns(RuntimeWarning, match="ignores .*auto.json"):
        assert _auto.table() == _auto.read(_auto.SHIPPED)


# --- The choice ----------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch, restore_threads):
    """The backends that ran, not counting the front door; to the table Numba is always faster."""
    cpunorm.set_num_threads(2)
    found, original = [], _dispatch.kernel

    def watched(problem, verb, backend):
        found.append(backend)
        return original(problem, verb, backend)

    table = _auto.Table("", (16,), dict.fromkeys(NAMES, ("numba",)))
    monkeypatch.setattr(_dispatch, "kernel", watched)
    monkeypatch.setattr(_auto, "table", lambda: table)
    monkeypatch.setattr(_auto, "_warm", set())
    monkeypatch.setattr(_auto, "first_bytes", sys.maxsize)
    return found


needs_both = pytest.mark.skipif(
    not {"cython", "numba"} <= set(AVAILABLE), reason="there is nothing to choose from"
)


@needs_both
def test_numba_only_where_it_is_warm(seen):
    def backends(x, **kwargs):
        seen.clear()
        cpunorm.layer_norm(x, x.shape[-1], **kwargs)
        return list(seen)

    assert backends(LARGE) == []
    assert backends(LARGE, backend="numba") == ["numba"]
    assert backends(LARGE) == ["numba"]
    assert backends(LARGE, backend="auto") == ["numba"]
    assert backends(LARGE, backend="cython") == []
    # another call may need what was not compiled yet
    assert backends(LARGE, return_stats=True) == ["numba"]
    assert backends(LARGE, weight=np.ones(128, "float32")) == ["cython"]
    assert backends(LARGE.reshape(1024, 256)) == ["cython"]
    assert backends(LARGE.astype("float64")) == ["cython"]
    assert backends(SMALL, backend="numba") == ["numba"]
    assert backends(SMALL) == []


@needs_both
def test_the_choice_does_not_depend_on_threads(seen):
    """Nor do the bits: what is warm is warm on one thread, too."""
    expected = cpunorm.layer_norm(LARGE, 128, backend="numba")
    compiled = dict(_jit._callbacks)
    cpunorm.set_num_threads(1)
    assert_same_bits(cpunorm.layer_norm(LARGE, 128), expected)
    assert seen == ["numba", "numba"]
    assert _jit._callbacks == compiled


@needs_both
def test_a_call_on_one_thread_makes_nothing_warm(seen):
    cpunorm.set_num_threads(1)
    cpunorm.layer_norm(LARGE, 128, backend="numba")
    cpunorm.set_num_threads(2)
    cpunorm.layer_norm(LARGE, 128)
    assert seen == ["numba"]


@needs_both
def test_what_is_warm_is_bounded(seen, monkeypatch):
    monkeypatch.setattr(_auto, "MOST_WARM", 1)
    for rows in (2047, 2048):
        cpunorm.layer_norm(LARGE[:rows], 128, backend="numba")
        cpunorm.layer_norm(LARGE[:rows], 128)
    assert seen == ["numba", "numba", "numba", "cython"]


def test_other_types_are_the_compiled_backends(seen):
    if "numba" in AVAILABLE:
        double = LARGE.astype("float64")
        cpunorm.layer_norm(double, 128, backend="numba")
        cpunorm.layer_norm(double, 128)
        assert "numba" not in seen[1:]


def test_the_table_is_not_read_before_it_can_matter():
    code = """
import sys, numpy, cpunorm
cpunorm.layer_norm(numpy.ones((4096, 1024), "float32"), 1024)
print("json" in sys.modules, cpunorm._auto.table.cache_info().currsize)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False 0"


# --- Measuring -----------------------------------------------------------------------------------


def test_every_kernel_is_measured_in_every_class():
    starts = [*calibrate.CLASSES, 63]
    for (start, nbytes), end in zip(calibrate.CLASSES.items(), starts[1:], strict=True):
        found = list(calibrate.cases(nbytes))
        assert {name for name, _ in found} == {n for n in NAMES if not n.endswith("moments")}
        for _, case in found:
            assert 2**start <= case.nbytes < 2**end


def test_only_what_is_clear_changes_hands():
    ratios = {
        "rows normalize": {20: [1.2, 1.06], 23: [1.5, 1.04], 26: [0.9, 0.8]},
        "rows backward": {20: [1.0], 23: [0.5], 26: [3.0]},
    }
    assert calibrate.fastest(ratios) == {
        "rows normalize": ["numba", "cython", "cython"],
        "rows backward": ["cython", "cython", "numba"],
    }


def test_what_is_written_can_be_read(tmp_path):
    path = tmp_path / "auto.json"
    fastest = {name: ["cython", "numba", "cython"] for name in NAMES}
    path.write_text(calibrate.text("today", 'a "fast" one', fastest))
    table = _auto.read(str(path))
    assert table.log2_bytes == tuple(calibrate.CLASSES)
    assert table.fastest == {name: tuple(row) for name, row in fastest.items()}
