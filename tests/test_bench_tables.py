"""The commands behind the tables of the pages: they run, and print tables."""

import re

import pytest


def is_table(lines, columns):
    """Whether lines are a Markdown table whose ratios are numbers."""
    head, rule, *rows = "\n".join(lines).splitlines()
    counts = {line.count("|") for line in (head, rule, *rows)}
    ratio = [i for i, name in enumerate(head.split("|")) if "ratio" in name]
    numbers = [row.split("|")[i].strip() for row in rows for i in ratio]
    return (
        counts == {columns + 1} and numbers and all(re.fullmatch(r"\d+\.\d\d", n) for n in numbers)
    )


def test_functions_are_timed_in_turn_after_one_round():
    from bench.turns import seconds

    calls = []
    before, after = seconds([lambda: calls.append("a"), lambda: calls.append("b")], 2, calls=3)
    assert "".join(calls) == 3 * "aaabbb"
    assert before > 0 and after > 0


def test_nodes_and_models_of_onnx():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from bench import onnx_models

    assert is_table(list(onnx_models.nodes(1)), 4)
    assert is_table(list(onnx_models.folded(1, ["Inception v2"])), 8)


def test_modules_of_torch():
    pytest.importorskip("torch")
    from bench import torch_models

    assert is_table(list(torch_models.modules(1)), 7)


def test_what_is_replaced(capsys, monkeypatch):
    from bench import instead

    monkeypatch.setattr(instead, "CALLS", 1)
    monkeypatch.setattr(instead, "N", 2)
    instead.main()
    formulas, tensors, conventions = capsys.readouterr().out.split("\n\n")
    assert is_table(formulas.splitlines()[1:], 4)
    assert is_table(tensors.splitlines(), 4) or not instead.arrays()
    _, _, *rows = conventions.splitlines()
    by_hand, ours = zip(*(line.split("|")[3:5] for line in rows), strict=True)
    assert by_hand == ours and len(set(ours)) == 3
