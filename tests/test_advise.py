"""advise: the cheapest by measured times, how sure, and a plain "I do not know"."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import cpunorm
from bench import results
from cpunorm import _advice

from .synthetic import document, seconds_of

SHAPE = (8, 512, 7, 7)


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("matplotlib")  # of bench.maps
    from bench.maps import advice
    from bench.maps.table import Measured

    return advice.data(Measured(results.check(document(), "synthetic")))


def ask(data, shape, layout=None, training=False, normalization=None, dtype="float32", threads=2):
    return _advice.answer(data, shape, layout, training, normalization, dtype, threads)


def test_a_measured_shape_has_its_measured_time(data):
    advice = ask(data, SHAPE, "NCHW")
    best = advice.best
    assert (best.normalization, best.backend, best.sure) == ("batch_norm", "cython", "measured")
    wanted = seconds_of("batch_norm", "inference", "NCHW", "float32", SHAPE, 2, "cython")
    assert best.seconds == pytest.approx(wanted, rel=0.06)
    assert best.low <= best.seconds <= best.high
    copy = seconds_of("batch_norm", "inference", "NCHW", "float32", SHAPE, 2, "copy")
    assert best.times_copy == pytest.approx(wanted / copy, rel=0.1)
    assert [e.normalization for e in advice.ranking[:2]] == ["batch_norm", "rms_norm"]


def test_training_is_forward_and_backward(data):
    best = ask(data, SHAPE, "NCHW", training=True, normalization="batch_norm").best
    passes = ("training", "backward")
    each = (seconds_of("batch_norm", p, "NCHW", "float32", SHAPE, 2, "cython") for p in passes)
    assert best.seconds == pytest.approx(sum(each), rel=0.06)


@pytest.mark.parametrize("shape", [(8, 400, 20, 20), (3, 100, 14, 14), (6, 300, 26, 26)])
@pytest.mark.parametrize("normalization", ["batch_norm", "group_norm", "rms_norm"])
def test_between_measured_shapes_the_time_is_within_the_spread(data, shape, normalization):
    best = ask(data, shape, "NCHW", normalization=normalization).best
    wanted = seconds_of(normalization, "inference", "NCHW", "float32", shape, 2, "cython")
    assert best.sure == "inside"
    assert best.low <= wanted <= best.high


def test_outside_it_guesses_and_far_away_it_does_not_know(data):
    outside = ask(data, (8, 2048, 200, 200), "NCHW")
    assert outside.sure == "outside"
    assert "a guess" in str(outside)
    assert outside.best.high / outside.best.low > 1.5
    far = ask(data, (8, 2048, 5000, 5000), "NCHW")
    assert (far.best, far.sure, far.ranking) == (None, "unknown", ())
    assert "I do not know" in str(far)
    assert ask(data, SHAPE, dtype="float64").sure == "unknown"


def test_a_guess_comes_after_what_is_known(data):
    estimates = ask(data, (1, 4), training=True).estimates + ask(data, (8, 2048, 60, 60)).estimates
    for shape in ((1, 4), (8, 2048, 60, 60), (2, 2**17)):
        guesses = [e.sure == "outside" for e in ask(data, shape).estimates]
        assert guesses == sorted(guesses)
    assert estimates


def test_words_say_when_this_is_another_machine(data, monkeypatch):
    machines = ("x86_64_v4", "x86_64_v4_bf16", "x86_64_v2", None)
    for here, other in zip(machines, (False, False, True, False), strict=True):
        monkeypatch.setattr(_advice, "instruction_set", lambda here=here: here)
        assert ("This machine is another" in str(ask(data, SHAPE))) == other


def test_channels_last_rows_and_images_are_one_problem():
    for name in ("batch_norm", "layer_norm", "rms_norm"):
        assert _advice.place(name, "NHWC", (2, 8, 3, 5)) == ("NHWC", (30, 8, 1))
        assert _advice.place(name, None, (30, 8)) == ("NHWC", (30, 8, 1))
    assert _advice.place("group_norm", "NHWC", (2, 8, 3, 5)) == ("NHWC", (2, 8, 15))
    assert _advice.place("layer_norm", "NCHW", (2, 8, 3, 5)) == ("NCHW", (2, 8, 15))


def test_what_has_one_value_to_a_statistic_is_not_advised(data):
    names = {e.normalization for e in ask(data, (4096, 768)).estimates}
    assert "instance_norm" not in names
    assert "layer_norm" in names


def test_threads_are_those_of_the_measurement(data):
    one, two, many = (ask(data, SHAPE, "NCHW", threads=n) for n in (1, 2, 64))
    assert (one.threads, two.threads, many.threads) == (1, 2, 2)
    assert one.best.seconds > 1.5 * two.best.seconds


def test_words_say_what_the_fields_say(data):
    text = str(ask(data, SHAPE))
    for part in ("(8, 512, 7, 7), float32, inference, 2 threads", "batch norm", "Layout:"):
        assert part in text
    for part in ("Backend: cython; numba takes", "measured at this very shape", "Model CPU"):
        assert part in text
    assert max(map(len, text.splitlines())) < 200


def test_regression_is_exact_on_planes():
    points = np.random.default_rng(0).normal(size=(30, 3))
    values = points @ [1.0, -2.0, 0.5] + 3
    target = np.array([0.1, 0.2, -0.3])
    assert _advice.interpolate(points, values, target) == pytest.approx(target @ [1, -2, 0.5] + 3)


def test_shipped_data_answer():
    assert all(path.stat().st_size < 200_000 for path in _advice.SHIPPED.iterdir())
    advice = cpunorm.advise(SHAPE)
    assert advice.sure in ("measured", "inside")
    assert {e.normalization for e in advice.ranking} == set(_advice.NORMALIZATIONS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        advice.shape = ()
    same = cpunorm.advise(list(SHAPE), "channels_last", dtype=np.float32)
    assert same == cpunorm.advise(SHAPE, "NHWC")


def test_data_of_this_instruction_set_come_first(monkeypatch):
    shipped = {path.stem for path in _advice.SHIPPED.glob("*.json")}
    for here in (*shipped, "neon", None):
        monkeypatch.setattr(_advice, "instruction_set", lambda here=here: here)
        found = _advice.shipped.__wrapped__()
        assert (here if here in shipped else max(shipped)) in found.machine
        words = str(ask(found, SHAPE))
        assert ("This machine is another" in words) == (here == "neon")


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (((8,),), ValueError, "shape"),
        (((8, 0, 7),), ValueError, "shape"),
        (("8,8",), TypeError, "shape"),
        (((8, 2.5),), TypeError, "shape"),
        (((8, 2**63),), ValueError, "shape"),
        (((8, 8, 2**40, 2**40),), ValueError, "shape"),
        ((SHAPE, "NCWH"), ValueError, "layout"),
        ((SHAPE, 1), TypeError, "layout"),
        ((SHAPE, None, 1), TypeError, "training"),
        ((SHAPE, None, False, {"dtype": "int8"}), TypeError, "dtype"),
        ((SHAPE, None, False, {"dtype": "no type"}), TypeError, "dtype"),
        ((SHAPE, None, False, {"threads": 0}), ValueError, "threads"),
        ((SHAPE, None, False, {"normalization": "norm"}), ValueError, "normalization"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, names):
    options = arguments[3] if len(arguments) > 3 else {}
    with pytest.raises(error, match=f"^{names} must"):
        cpunorm.advise(*arguments[:3], **options)


def run(*arguments):
    command = [sys.executable, "-m", "cpunorm", "advise", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_command():
    done = run("8,512,7,7", "--layout", "NHWC", "--training", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert content["shape"] == list(SHAPE)
    assert content["training"] is True
    assert content["sure"] in ("measured", "inside")
    assert all(e["layout"] == "NHWC" for e in content["estimates"])
    assert "NHWC, inference" in run("8,512,7,7", "--layout", "NHWC").stdout


@pytest.mark.parametrize(
    "arguments", [("8,x",), (f"8,{2**63}",), ("8,8", "--layout", "CNHW"), ("8,8", "--dtype", "f")]
)
def test_command_with_a_wrong_argument_says_one_line(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_importing_cpunorm_does_not_read_the_data():
    code = "import sys, cpunorm; sys.exit('cpunorm._advice' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
