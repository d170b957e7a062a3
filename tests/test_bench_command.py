"""`python -m bench`: it measures, goes on after an interrupt, compares, and rejects bad input."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("pytest_benchmark")

from bench import compare, plan, results, run, test_normalization
from bench.journal import Journal
from bench.results import Absent, Accuracy, ResultsError, Row
from bench.shapes import Case
from bench.suite import OUT_OF_TIME, Suite
from bench.suites import EXAMPLES, on, on_shape
from bench.workers import Result

from .support import AVAILABLE, heeding_interrupts

pytest.importorskip("pytest_benchmark")
pytest.importorskip("rich")

ROOT = Path(__file__).parent.parent
OURS = [name for name in ("cython", "numpy") if name in AVAILABLE]
TINY = ("--shape", "4,6", "--backend", ",".join(OURS), "--against", "", "--blocks", "2")

# Inside xdist, pytest-benchmark measures nothing.
ENVIRONMENT = {name: value for name, value in os.environ.items() if "XDIST" not in name}

ROW = Row(
    "batch_norm", "training", "NCHW", "float32", (8, 16, 7, 7), None, "grid", None, 2,
    "cython", "0.1.0", 50176, 10.0, 0.5, 1e-7, (1e-5, 1.1e-5, 1.05e-5, 1.02e-5, 1.03e-5),
)  # fmt: skip


def bench(*arguments):
    """Run the command from start to end."""
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


MACHINE = {
    "format": results.FORMAT, "date": "2026-01-02", "cpu": "Model", "cores": 2,
    "instruction set": "x86_64_v3", "versions": {}, "command": "python -m bench",
}  # fmt: skip


def document(*rows):
    """What a results file holds."""
    return {
        "machine_info": {"cpunorm": MACHINE},
        "benchmarks": [
            {"extra_info": results.plain(row), "stats": {"data": list(row.seconds)}} for row in rows
        ],
        "accuracy": [],
        "absent": [],
    }


# --- Measuring -----------------------------------------------------------------------------------


def test_a_run(tmp_path):
    file = tmp_path / "results.json"
    done = bench(*TINY, "--op", "layer_norm,batch_norm", "--threads", "1", "--json", file)
    assert done.returncode == 0, done.stderr
    assert "layer_norm" in done.stdout
    assert os.listdir(tmp_path) == ["results.json"]
    found = results.read(file)
    assert {row.implementation for row in found.rows} == {*OURS, "copy"}
    assert {row.pass_ for row in found.rows} == set(results.PASSES)
    for row in found.rows:
        assert len(row.seconds) == 2
        assert row.bytes == 4 * 6 * 4 * (3 if "backward" in row.pass_ else 2)
        assert row.gb_per_s == pytest.approx(row.bytes / row.median / 1e9)
        assert row.error is None if row.implementation == "copy" else row.error < 1e-5
    raw = json.loads(file.read_text())
    # As pytest-benchmark writes it.
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} <= set(raw)
    for entry in raw["benchmarks"]:
        assert entry["stats"]["median"] == pytest.approx(np.median(entry["stats"]["data"]))
    assert raw["machine_info"]["cpunorm"]["versions"]["cpunorm"]


def test_an_interrupted_run_goes_on(tmp_path):
    file, journal = tmp_path / "results.json", tmp_path / "results.json.journal"
    arguments = [*TINY, "--shape", "5,7", "--blocks", "20", "--json", str(file)]
    process = started(*arguments)
    while not journal.exists() or journal.read_text().count("\n") < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "goes on from there" in output
    assert os.listdir(tmp_path) == [journal.name]

    kept = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"going on after {len(kept)} of" in done.stdout
    assert os.listdir(tmp_path) == [file.name]
    rows = {(row.text, row.implementation): row for row in results.read(file).rows}
    for line in kept:
        for name, blocks in line["blocks"].items():
            implementation = name.rpartition("-")[0]
            assert rows[line["task"], implementation].seconds == pytest.approx(blocks)


def test_a_journal_that_was_cut_off(tmp_path):
    path, conditions = tmp_path / "journal", {"cpu": "x"}
    task = plan.Task(Case("layer_norm", "inference", "NCHW", (4, 6)), ("cython-1",))
    other = replace(task, case=replace(task.case, shape=(5, 6)))
    result = Result(task.case, {"cython-1": [1.0, 2.0]}, {"cython-1": 0.0})
    journal = Journal(path, conditions)
    journal.add(task, result)
    journal.add(other, result)
    path.write_bytes(path.read_bytes()[:-20])
    journal = Journal(path, conditions)
    assert journal.get(task) == result
    assert journal.get(other) is None
    assert journal.get(replace(task, names=("cython-1", "numpy-1"))) is None
    journal.add(other, result)
    assert Journal(path, conditions).get(other) == replace(result, case=other.case)
    with pytest.raises(ResultsError, match="--fresh"):
        Journal(path, {"cpu": "y"})
    assert Journal(path, {"cpu": "y"}, fresh=True).get(task) is None


@pytest.mark.parametrize("content", [b"a diary", b"a diary\nof two lines\n", b"[1]\n"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content, fresh):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match="no journal"):
        Journal(path, {}, fresh)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "1",
        "[" * 100_000,
        '{"task": "x"}',
        '{"task": "x", "names": [1], "blocks": {}, "errors": {}, "notes": {}}',
        '{"task": "x", "names": [], "blocks": {"a": 1}, "errors": {}, "notes": {}}',
        '{"task": "x", "names": [], "blocks": {"a": ["b"]}, "errors": {}, "notes": {}}',
    ],
    ids=lambda line: line[:70],
)
def test_a_damaged_journal(tmp_path, line):
    path = tmp_path / "journal"
    Journal(path, {})
    with open(path, "a") as file:
        file.write(line + "\n")
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="--fresh"):
        Journal(path, {})
    assert path.read_bytes() == before
    assert Journal(path, {}, fresh=True).known == {}


def started(*arguments):
    """Start the command in a group of its own, as a terminal does."""
    with heeding_interrupts():
        return subprocess.Popen(
            [sys.executable, "-m", "bench", *map(str, arguments)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_early_end_is_one_line(tmp_path, seconds, number):
    process = started(*TINY, "--blocks", "90", "--json", tmp_path / "x.json")
    time.sleep(seconds)
    os.killpg(process.pid, number)
    output, _ = process.communicate()
    # What an import was running inside may have Python end by the signal itself: 130 to a shell.
    assert process.returncode in (130, -signal.SIGINT), output
    assert len(output.strip().splitlines()) == 1, output
    assert "stopped" in output
    assert set(os.listdir(tmp_path)) <= {"x.json.journal"}


def test_out_of_time():
    made = plan.make(plan.Choice(shapes=[(4, 6)], against=()))
    suite = Suite(made, seconds=-1)
    (task, *_) = made.tasks
    assert suite.result(task).blocks == {}
    assert suite.why_absent(task, task.names[0]) == OUT_OF_TIME
    assert suite.skipped == [task]


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("bench.peers.missing", lambda name: "torch" if name == "torch" else None)
    made = plan.make(plan.Choice(shapes=[(4, 6)], against=["torch"]))
    assert made.left_out == {"torch": "torch is not installed"}
    assert not any("torch" in name for name in made.contestants)


def test_a_full_plan_has_what_the_maps_need():
    made = plan.make(plan.Choice())
    timed = [task.case for task in made.tasks if task.timed]
    assert {case.operation for case in timed} == set(results.OPERATIONS)
    assert {case.pass_ for case in timed} == set(results.PASSES)
    assert {case.dtype for case in timed} == set(results.DTYPES)
    assert {case.source for case in timed} == {"grid", "models", "odd"}
    accuracy = {task.case for task in made.tasks if not task.timed}
    assert {case.offset for case in accuracy} == {0, 10, 1e2, 1e3, 1e4, 1e5}


def test_accuracy_comes_before_what_may_run_out_of_time():
    """pytest runs tests in the order of their definition, whatever that of the plan is."""
    names = [name for name in vars(test_normalization) if name.startswith("test_")]
    assert names == ["test_accuracy", "test_speed"]


def test_every_run_takes_five_blocks_unless_told(monkeypatch):
    plans = []
    monkeypatch.setattr("bench.run._run", lambda plan, *rest: plans.append(plan) or 0)
    for argv in ([], ["--quick"], ["--shape", "4,6"], ["--blocks", "7"]):
        assert run.main(argv) == 0
    assert [made.blocks for made in plans] == [5, 5, 5, 7]


def _timed(**choice):
    return {task.case for task in plan.make(plan.Choice(**choice)).tasks if task.timed}


def test_the_full_plan_has_every_example_in_every_form():
    timed = _timed()
    for shape in EXAMPLES:
        wanted = {case for case in on_shape(shape) if case.pass_ != "backward_frozen"}
        assert wanted <= timed
    assert Case("group_norm", "inference", "NCHW", (1, 768), 32) in timed


def test_the_quick_plan_answers_for_what_is_asked_first():
    timed = _timed(quick=True)
    for layout in results.LAYOUTS:
        cases = on(EXAMPLES[0], layout)
        assert {case for case in cases if case.pass_ != "backward_frozen"} <= timed
    assert {case.dtype for case in timed} == set(results.DTYPES)
    assert len(timed) <= 60


def test_a_large_case_weighs_more_in_the_time_left():
    small = plan.Task(Case("layer_norm", "inference", "NCHW", (4, 6)), ("cython-1", "torch-1"))
    large = replace(small, case=replace(small.case, shape=(4096, 4096)))
    assert plan.weight(large) > 5 * plan.weight(small)
    assert plan.weight(small) > plan.weight(replace(small, names=("cython-1",)))


# --- Comparing -----------------------------------------------------------------------------------


def written(path, *rows):
    results.write(path, document(*rows))
    return path


def scaled(row, *factors):
    return replace(row, seconds=tuple(s * f for s, f in zip(row.seconds, factors, strict=True)))


@pytest.mark.parametrize(
    ("factors", "verdict", "code"),
    [
        ((1.02, 0.99, 1.01, 1.0, 0.98), compare.SAME, 0),
        ((1.5,) * 5, compare.SLOWER, 1),
        ((0.5,) * 5, compare.FASTER, 0),
        ((1.5, 0.6, 2.0, 0.8, 1.3), compare.SAME, 0),
    ],
)
def test_compare(tmp_path, capsys, factors, verdict, code):
    others = [replace(ROW, shape=(n, 16, 7, 7)) for n in range(1, 6)]
    old = written(tmp_path / "old.json", ROW, *others)
    new = written(tmp_path / "new.json", scaled(ROW, *factors), *others)
    assert compare.main([str(old), str(new)]) == code
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    changed, *_ = compare.changes(results.read(old), results.read(new))
    assert changed.verdict(1.0) == verdict
    assert any(verdict in line for line in lines)


def test_compare_says_what_only_one_file_has(tmp_path, capsys):
    others = [replace(ROW, shape=(n, 16, 7, 7)) for n in range(1, 4)]
    old = written(tmp_path / "old.json", ROW, replace(ROW, threads=1))
    new = written(tmp_path / "new.json", ROW, *others)
    assert compare.main([str(old), str(new)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1 time of 1 case" in text
    assert "3 times of 3 cases" in text


def test_compare_sees_the_noise_between_runs():
    rows = [replace(ROW, shape=(n, 16, 7, 7)) for n in range(1, 42)]
    rng = np.random.default_rng(0)
    new = [scaled(row, *[np.exp(rng.normal(0, 0.1))] * 5) for row in rows]
    found = [compare.change(a, b) for a, b in zip(rows, new, strict=True)]
    verdicts = [c.verdict(compare.noise(found)) for c in found]
    assert verdicts.count(compare.SAME) >= 40
    new[0] = scaled(rows[0], *[2.0] * 5)
    found = [compare.change(a, b) for a, b in zip(rows, new, strict=True)]
    assert found[0].verdict(compare.noise(found)) == compare.SLOWER


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--op", "batchnorm"], "batchnorm"),
        (["--layout", "NWHC"], "NWHC"),
        (["--against", "tensorflow"], "tensorflow"),
        (["--backend", "c"], "'c'"),
        (["--dtype", "int8"], "int8"),
        (["--pass", "forwards"], "forwards"),
        (["--shape", "32,256,x"], "32,256,x"),
        (["--shape", "32"], "'32'"),
        (["--shape", "32,0,7,7"], "32,0,7,7"),
        (["--threads", "0"], "'0'"),
        (["--threads", "two"], "two"),
        (["--minutes", "-1"], "-1"),
        (["--blocks", "1"], "1"),
        (["--json", "no/such/folder/x.json"], "no/such/folder"),
        (["--json", "docs"], "docs is a folder"),
        (["--shape", "999999,999999,999,999"], "GiB"),
        (["report", "--output", "/dev/null/x"], "/dev/null/x"),
        (["report", "--advice", "no/such/folder/x.json"], "no/such/folder"),
        (["--layout", "NHWC", "--shape", "4,6"], "nothing is defined"),
        (["--quik"], "--quik"),
        (["compare", "one.json"], "NEW.json"),
        (["compare", "none.json", "none.json"], "none.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(arguments, named):
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


def _without_a_key(text):
    raw = json.loads(text)
    del raw["benchmarks"][0]["extra_info"]["layout"]
    return json.dumps(raw)


def _with(name, value):
    def spoil(text):
        raw = json.loads(text)
        raw["benchmarks"][0]["extra_info"][name] = value
        return json.dumps(raw)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda text: text[: len(text) // 2], "no complete JSON"),
        (lambda text: "", "no complete JSON"),
        (lambda text: "[1, 2]", "no results"),
        (lambda text: '{"machine_info": {}}', "no results"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "format 99"),
        (lambda text: text.replace('"batch_norm"', '"norm"'), "'norm' is none of"),
        (lambda text: text.replace('"accuracy"', '"other"'), "accuracy"),
        (_without_a_key, "'layout' is missing"),
        (lambda text: text.replace("1.1e-05", "NaN"), "seconds"),
        (lambda text: text.replace("1.1e-05", "-1.0"), "not positive"),
        (lambda text: "[" * 100_000, "no complete JSON"),
        (lambda text: text.replace('"date"', '"day"'), "'date' is missing"),
        (_with("shape", "abc"), "shape is 'abc'"),
        (_with("shape", [8, 0]), "positive sizes"),
        (_with("threads", "x"), "threads is 'x', not int"),
        (_with("share_of_copy", [1]), "share_of_copy"),
    ],
)
def test_bad_files(tmp_path, spoil, named):
    good = written(tmp_path / "good.json", ROW)
    bad = tmp_path / "bad.json"
    bad.write_text(spoil(good.read_text()))
    before = bad.read_bytes()
    with pytest.raises(ResultsError) as caught:
        results.read(bad)
    assert str(bad) in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert bad.read_bytes() == before


def test_gzip(tmp_path):
    zipped = written(tmp_path / "good.json.gz", ROW)
    assert zipped.read_bytes()[:2] == b"\x1f\x8b"
    assert results.read(zipped).rows == (ROW,)
    whole = zipped.read_bytes()
    for content in (whole[:-30], b"no gzip", whole[:20] + b"damaged" + whole[27:]):
        zipped.write_bytes(content)
        with pytest.raises(ResultsError, match=r"good\.json\.gz"):
            results.read(zipped)


def test_a_bad_file_on_the_command_line(tmp_path):
    good = written(tmp_path / "good.json", ROW)
    bad = tmp_path / "bad.json"
    bad.write_text(good.read_text()[:-30])
    done = bench("compare", good, bad)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "bad.json" in done.stderr


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch, failure):
    path = written(tmp_path / "results.json", ROW)
    before = path.read_bytes()

    def fail(descriptor):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure)):
        written(path, ROW, replace(ROW, threads=1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_rows_accuracies_and_absences_come_back(tmp_path):
    accuracy = Accuracy("rms_norm", "inference", "float32", "torch", "2", 1e3, (64, 768), None)
    absent = Absent("a case", "jax", "a reason")
    whole = document(ROW, replace(ROW, shape=(4, 6), model="sd", share_of_copy=None))
    whole |= {"accuracy": [results.plain(accuracy)], "absent": [results.plain(absent)]}
    results.write(tmp_path / "x.json", whole)
    found = results.read(tmp_path / "x.json")
    assert found.rows[0] == ROW
    assert found.accuracy == (accuracy,)
    assert found.absent == (absent,)
    assert ROW.serves("training")
    assert not ROW.serves("inference")
    forward = replace(ROW, operation="layer_norm", pass_="inference")
    assert forward.serves("training")
    assert forward.serves("inference")
    assert not forward.serves("backward")
