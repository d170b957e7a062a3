"""The report: every figure with its numbers, the page, the interactive page in a browser."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from bench import report
from bench.maps import explore, libraries, normalizations, page, style
from bench.maps.table import Measured
from bench.results import ResultsError, check, read
from cpunorm import _advice

from .synthetic import document, write_results

FIGURES = {
    *(
        f"normalization-{p}-{layout}"
        for p in ("training", "inference", "backward")
        for layout in ("nchw", "nhwc")
    ),
    *(
        f"{what}-{p}"
        for what in ("backend", "library")
        for p in ("training", "inference", "backward")
    ),
    *("library-all", "rows", "layout", "threads", "dtypes", "groups", "roofline"),
    *("accuracy-forward", "accuracy-backward", "accuracy-speed"),
}


def make(folder, change=None, name="docs"):
    source = write_results(folder / f"{name}-results.json", change)
    output = folder / name
    assert (
        report.main([str(source), "--output", str(output), "--advice", str(folder / "a.json")]) == 0
    )
    return output


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return make(tmp_path_factory.mktemp("report"))


def test_every_figure_has_its_numbers(docs):
    assert {path.stem for path in docs.glob("*.png")} == FIGURES
    for name in FIGURES:
        with Image.open(docs / f"{name}.png") as image:
            assert min(image.size) > 300
        with open(docs / f"{name}.csv", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        content = json.loads((docs / f"{name}.json").read_text(encoding="utf-8"))
        assert content["columns"] == columns
        assert len(content["rows"]) == len(rows) > 0
        assert content["machine"] == "Model CPU, 2 cores, x86_64_v4"
        assert content["date"] == "2026-01-02"
        assert content["drawn with"] == "python -m bench report"


def test_the_page_answers_first_and_links_what_is_there(docs):
    text = (docs / "index.md").read_text(encoding="utf-8")
    assert "For (8, 512, 7, 7) in inference take batch norm" in "\n".join(text.splitlines()[:4])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {f"{name}.{end}" for name in FIGURES for end in ("png", "csv", "json")} <= set(links)
    for link in links:
        assert (docs / link).exists()


def test_lost_shapes_are_named(docs):
    text = (docs / "index.md").read_text(encoding="utf-8")
    lost = text[text.index("## Where cpunorm loses") :]
    assert re.search(
        r"\| 0\.\d\d \| group norm \| forward \| NCHW .*8, 512, 7, 7.* torch 1\.0", lost
    )
    assert "batch norm" not in lost
    found = libraries.lost(Measured(check(document(), "synthetic")))
    assert f"A peer is faster on {len(found)} of them" in lost
    assert all(ratio < 1 for ratio, *_ in found)


def test_the_winner_is_the_fastest_and_its_lead_the_next_one_over_it():
    measured = Measured(check(document(), "synthetic"))
    plane, _ = measured.planes
    assert (plane.x, plane.y, plane.fixed, plane.value) == ("HW", "C", "N", 8)
    rows = {
        operation: measured.on(plane, measured.select(operation, "inference", "NCHW"))[0, 0]
        for operation in ("batch_norm", "layer_norm", "instance_norm")
    }
    first, text = normalizations.winner(rows)
    medians = sorted(row.median for row in rows.values())
    assert first == "batch_norm"
    assert text.endswith(f"{medians[1] / medians[0]:.2f}")


def test_what_was_not_measured_is_left_out_and_said(docs, tmp_path):
    def only_ours(content):
        content["accuracy"] = []
        content["benchmarks"] = [
            b
            for b in content["benchmarks"]
            if b["extra_info"]["implementation"] in ("cython", "copy")
            and b["extra_info"]["threads"] == 2
            and b["extra_info"]["pass"] != "backward"
        ]

    shutil.copytree(docs, tmp_path / "docs")
    output = make(tmp_path, only_ours)
    names = {path.stem for path in output.glob("*.png")}
    assert not any(n.startswith(("library", "accuracy", "threads", "backend")) for n in names)
    assert {"normalization-inference-nchw", "layout", "roofline"} <= names
    assert "accuracy-speed.csv" not in {path.name for path in output.iterdir()}
    text = (output / "index.md").read_text(encoding="utf-8")
    assert text.count("Left out") == 3
    assert "no other library was measured" in text


def test_a_bad_results_file_changes_nothing(tmp_path):
    advice, output = tmp_path / "a.json", tmp_path / "docs"
    advice.write_text("before")
    for text in ("{", "{}", json.dumps({**document(), "benchmarks": []})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ResultsError, match=r"bad\.json"):
            report.main(
                [str(tmp_path / "bad.json"), "--output", str(output), "--advice", str(advice)]
            )
    assert advice.read_text() == "before"
    assert not output.exists()


def test_a_full_disk_leaves_no_half_of_anything(tmp_path, monkeypatch):
    source = write_results(tmp_path / "results.json")
    output = tmp_path / "docs"
    write = Path.write_bytes

    def full(path, content):
        if path.name == "plotly-basic.min.js":
            write(path, content[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(page, "files", lambda measured: {"index.md": b"the page"})
    with pytest.raises(OSError, match="No space left"):
        report.main([str(source), "--output", str(output), "--advice", str(tmp_path / "a.json")])
    assert list(output.iterdir()) == []


def test_a_part_does_not_replace_what_is_shipped(tmp_path, capsys):
    source = write_results(tmp_path / "results.json")
    for others in ([], ["--output", str(tmp_path / "docs")], ["--advice", str(tmp_path / "a")]):
        with pytest.raises(SystemExit) as caught:
            report.main([str(source), *others])
        assert caught.value.code == 2
        assert "too few to replace docs/maps" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["results.json"]


def test_the_shipped_results_may_replace_what_is_shipped():
    results = read(report.latest(report.RESULTS))
    report._refuse_a_part(None, "results", results)


def test_areas_keep_their_colours():
    image = Image.effect_noise((80, 80), 200).convert("RGB")
    mauve, violet = (203, 199, 224), (204, 196, 222)
    image.paste(mauve, (0, 0, 40, 40))
    image.paste(violet, (40, 0, 80, 40))
    small = style._in_few_colours(image).convert("RGB")
    for place, colour in (((10, 10), mauve), ((60, 10), violet)):
        assert np.allclose(small.getpixel(place), colour, atol=2)


def test_a_tie_is_in_the_headline():
    content = document()
    for entry in content["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        if info["operation"] == "rms_norm" and info["shape"] == list(page.SHAPE):
            # Batch norm takes 1.1 sweeps over memory where RMS norm takes 1.2.
            stats["data"] = [s * 1.12 / 1.2 for s in stats["data"]]
    measured = Measured(check(content, "synthetic"))
    headline = list(page._page(measured, {}))[1]
    assert re.search(r"take batch norm or RMS norm\*\*, \d % apart", headline)
    assert "cannot take another without training it again" in headline


@pytest.mark.parametrize(
    ("seconds", "spread", "tie"),
    [(1.04, 0.01, True), (1.2, 0.01, False), (1.2, 0.2, True), (1.4, 0.5, False)],
)
def test_a_wide_spread_makes_a_tie_of_what_is_near(seconds, spread, tie):
    def estimate(name, seconds):
        low, high = seconds * (1 - spread), seconds * (1 + spread)
        return _advice.Estimate(name, "NCHW", "cython", seconds, low, high, 1.0, "measured", (1,))

    one, other = estimate("batch_norm", 1.0), estimate("rms_norm", seconds)
    assert page._equal(one, other) is page._equal(other, one) is tie


def test_one_thread_is_no_threads():
    content = document()
    entries = content["benchmarks"]
    content["benchmarks"] = [b for b in entries if b["extra_info"]["threads"] == 1]
    measured = Measured(check(content, "synthetic"))
    figure = next(normalizations.figures(measured))
    texts = [*page._page(measured, {}), style.footer(measured), figure.drawing.get_suptitle()]
    assert sum("1 thread" in text for text in texts) >= 3
    assert "1 threads" not in "\n".join(texts)


def test_the_latest_results_are_taken(tmp_path):
    for day, name in ((1, "b.json"), (2, "a.json")):
        (tmp_path / name).write_text(json.dumps({"datetime": f"2026-01-0{day}T00:00:00"}))
    assert report.latest(tmp_path).name == "a.json"
    with pytest.raises(ResultsError, match="no results file"):
        report.latest(tmp_path / "none")


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the interactive page in")
@pytest.mark.parametrize(
    ("choice", "shows"),
    [
        ("", "batch norm"),
        ("view=lead&operation=group_norm&pass=inference&layout=NCHW", "1 is equal"),
        ("view=library&operation=rms_norm&pass=backward&layout=NHWC", "cython"),
        ("view=none&operation=constructor&toString=x&layout=", "batch norm"),
        ("view=us&dtype=float16&implementation=torch", "shapes"),
    ],
)
def test_the_interactive_page_draws(docs, tmp_path, choice, shows):
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--v=0", f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000", "--dump-dom"),
            f"{(docs / 'explore.html').as_uri()}#{choice}",
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    cells = int(re.search(r'data-cells="(\d+)"', done.stdout)[1])
    assert cells > 8
    # Plotly's own elements: one mark per cell, with its text.
    assert len(re.findall(r'<path class="point"', done.stdout)) == cells
    assert shows in re.search(r'id="status"[^>]*>([^<]*)', done.stdout)[1]
    first = dict(re.findall(r'<select id="(\w+)"[^>]*><option value="([^"]*)"', done.stdout))
    opens = {key: first[key] for key in ("pass", "layout", "dtype")}
    assert opens == {"pass": "inference", "layout": "NCHW", "dtype": "float32"}
    assert first["plane"] != "s,1", "images come before rows"


def test_the_page_asks_no_network(docs):
    text = (docs / "explore.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    assert all((docs / name).exists() for name in explore.BUNDLED)
