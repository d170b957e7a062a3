"""``python -m cpunorm`` as a user starts it: what it prints, and how it ends."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cpunorm import _dispatch
from cpunorm._demo import checks, cli, neighbours, report, timing

from .support import heeding_interrupts

QUICK = ("--backend", "numpy", "--repeat", "1", "--shape", "2,4,5,6")


def start(*arguments, **options):
    command = [sys.executable, "-W", "ignore", "-m", "cpunorm", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, **pipes)


def run(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def as_json():
    code, out, err = run(*QUICK, "--shape", "3,16", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_has_every_part(as_json):
    assert as_json["ok"]
    assert as_json["config"]["backends"]
    assert {check["backend"] for check in as_json["checks"]} == {"numpy"}
    assert all(check["ok"] and check["error"] <= check["tolerance"] for check in as_json["checks"])
    assert [run["images"].split()[0] for run in as_json["pipeline"]] == ["12", "256"]
    for run_ in as_json["pipeline"]:
        for layer in run_["layers"]:
            assert layer["numpy"] > 0
            assert layer["difference"] < 1e-4


def test_json_checks_every_operation(as_json):
    checked = {check["operation"].split(",")[0] for check in as_json["checks"]}
    assert checked == {
        *("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"),
        *("add_layer_norm", "add_rms_norm"),
        *("batch_norm_backward", "instance_norm_backward", "group_norm_backward"),
        *("layer_norm_backward", "rms_norm_backward"),
    }


def test_json_times_the_shapes_asked_for(as_json):
    assert [table["shape"] for table in as_json["timing"]] == [[2, 4, 5, 6], [3, 16]]
    images, rows = as_json["timing"]
    assert len(images["rows"]) == 12
    assert {row["layout"] for row in images["rows"]} == {"NCHW", "NHWC"}
    assert len(rows["rows"]) == 4
    for row in images["rows"] + rows["rows"]:
        assert set(row["times"]) == {"numpy", "plain NumPy"}
        assert min(row["times"].values()) > 0


def test_text_in_a_pipe_is_plain_and_fits():
    code, out, err = run(*QUICK)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "\r" not in out
    for part in ("backends", "batch_norm_backward", "china", "(2, 4, 5, 6)", "In short"):
        assert part in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("location")) <= 100


def test_a_terminal_gets_progress_and_bold():
    ours, theirs = pty.openpty()
    process = start(*QUICK, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # how a terminal says on Linux that its other end was closed
        pass
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert b"\x1b[1m" in shown
    assert b"checking against the oracle" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shape", "8,x,3"),
        ("--shape", "8"),
        ("--shape", "8,0,3"),
        ("--shape", "8,-1"),
        ("--shape", ""),
        ("--backend", "cuda"),
        ("--repeat", "0"),
        ("--repeat", "many"),
        ("surprise",),
    ],
)
def test_wrong_arguments_exit_with_2_and_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m cpunorm: error: ")
    assert err.count("\n") == 1
    assert arguments[-1] in err


def test_a_backend_that_cannot_be_loaded_is_left_out_and_named(monkeypatch, capsys):
    load = _dispatch._load
    monkeypatch.setattr(
        _dispatch, "_load", lambda name: load(name) if name == "numpy" else f"{name} is too old"
    )
    assert cli.main(["--repeat", "1", "--shape", "3,16", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "numba is too old" in shown["broken_backends"]["numba"]
    assert shown["config"]["backends"] == ["numpy"]
    assert {check["backend"] for check in shown["checks"]} == {"numpy"}
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--backend", "numba"])
    assert "too old" in capsys.readouterr().err


def test_interrupt_exits_with_130():
    with heeding_interrupts():
        process = start("--backend", "numpy", "--repeat", "1000")
    with process:
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == "interrupted\n"


def test_a_wrong_kernel_fails_the_checks(monkeypatch, capsys):
    def off(*arguments, **options):
        return layer_norm(*arguments, **options) + np.float32(1e-3)

    layer_norm = checks.functional.layer_norm
    monkeypatch.setattr(checks.functional, "layer_norm", off)
    found, seconds = checks.run(["numpy"])
    wrong = {check.operation for check in found if not check.ok}
    assert "layer_norm" in wrong
    assert "rms_norm" not in wrong
    lines = list(report.checks(found, seconds, report.Text(ansi=False)))
    assert any(line.startswith("layer_norm ") and line.endswith("FAIL") for line in lines)
    assert cli.main([*QUICK, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_what_numba_is_warmed_up_with_works():
    for case in checks.cases():
        checks.compute(case, "numpy")
    for shape in ((2, 4, 5, 6), (3, 16)):
        for layout in timing.layouts(shape):
            timing.call_once(shape, layout, "numpy")


def test_a_busy_machine_is_noticed():
    cpus = os.cpu_count()
    if (start := neighbours.mark()) is not None:
        time.sleep(0.2)
        assert 0 <= neighbours.busy_since(start) <= cpus + 1
    assert neighbours.disturb(0.5, threads=cpus)
    assert not neighbours.disturb(0.1, threads=cpus)
    assert not neighbours.disturb(0.5, threads=cpus - 1)


def test_nan_fails_the_checks(monkeypatch):
    monkeypatch.setattr(
        checks.functional, "rms_norm", lambda x, *arguments, **options: np.full_like(x, np.nan)
    )
    found, _ = checks.run(["numpy"])
    assert not {check.operation: check for check in found}["rms_norm"].ok
